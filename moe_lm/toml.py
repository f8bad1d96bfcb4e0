"""Settings as TOML and back: what a file holds is checked against the annotations of `RunConfig`, field by field."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from moe_lm.config import ConfigError, RunConfig, require


def nearest(name: str, known: typing.Iterable[str], section: str = "") -> str:
    """`; did you mean X?` for the closest known name, shown behind `section`, or a full stop when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {section}{close[0]}?" if close else "."


TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def from_value(kind: Any, value: Any, where: str) -> Any:
    """`value` (as TOML or JSON gives it) as an instance of the annotation `kind`.

    Raises ConfigError, naming `where`, for a wrong type, an unknown key or a refused combination.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is None:
            return None
        inner = next(arg for arg in args if arg is not types.NoneType)
        return from_value(inner, value, where)
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), f"{where} = {value!r} must be a table.")
        hints = typing.get_type_hints(kind)
        section = f"{where}." if where else ""
        for key in value:
            if key not in hints:
                raise ConfigError(f"{section}{key} is not a known setting{nearest(key, hints, section)}")
        parts = {key: from_value(hints[key], part, section + key) for key, part in value.items()}
        missing = [
            f.name for f in dataclasses.fields(kind)
            if f.name not in parts and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]  # fmt: skip
        require(not missing, f"{where} lacks {', '.join(missing)}.")
        return kind(**parts)
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} = {value!r} must be a list.")
        return tuple(from_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        require(value in args, f"{where} = {value!r} must be one of {', '.join(map(repr, args))}.")
        return value
    if kind is float and type(value) is int:
        value = float(value)
    require(type(value) is kind, f"{where} = {value!r} must be {TYPE_NAMES[kind]}.")
    if kind is float:
        require(math.isfinite(value), f"{where} = {value} must be a finite number.")
    if kind is str:
        # Bytes of the command line that are no UTF-8 arrive as lone surrogates, which TOML cannot write.
        lone = any("\ud800" <= character <= "\udfff" for character in value)
        require(not lone, f"{where} = {value!r} must be valid UTF-8.")
    return value


def load_config(path: str | Path) -> RunConfig:
    """Read a TOML file. Raises ConfigError for a missing file, bad TOML, or settings that cannot work."""
    return from_value(RunConfig, read_toml(path), "")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file, not yet checked. Raises ConfigError where the file cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text("utf-8-sig"))  # -sig: some editors on Windows begin with a mark
    except FileNotFoundError:
        folder = Path(path).parent
        raise ConfigError(f"no config file {path}{nearest(str(path), map(str, folder.glob('*.toml')))}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; name a .toml file.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # besides TOMLDecodeError: not UTF-8, or a number of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain tables, without those that are None."""
    return {
        key: to_plain(value)
        for key, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
        if value is not None
    }


def to_plain(value: Any) -> Any:
    """`value` as TOML and JSON know it: dataclasses as tables, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def to_toml(config: RunConfig) -> str:
    """The config as TOML that `load_config` reads back to an equal object."""
    tables = to_dict(config)
    top = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    lines = [f"{key} = {toml_value(value)}" for key, value in top.items()]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines).lstrip("\n") + "\n"


def toml_value(value: Any) -> str:
    """A table, list, string, number or boolean as an inline TOML value."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # A JSON string, number or boolean is also a TOML one, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
