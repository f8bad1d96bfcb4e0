"""The command line of every program: a TOML file, then `--section.key value` for any field of `RunConfig`.

`parse_run_config` serves the programs that take a run config, `Parser` the others. Either way `run_main` turns a
ConfigError into one sentence on stderr and exit status 2:

    def main(argv: list[str]) -> None:
        config, args = parse_run_config(argv, __doc__, default="configs/nano.toml")

    if __name__ == "__main__":
        run_main(main)
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import itertools
import os
import shutil
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from moe_lm.config import ConfigError, RunConfig, require
from moe_lm.toml import from_value, read_toml, to_plain, toml_value


def run_main(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Exit with the status of `main(arguments)`; a ConfigError becomes one line on stderr and status 2.

    So does Ctrl-C, with the status 130 that shells give it, wherever the program does not handle it itself. A reader of
    its output who leaves early ends it with 141, as SIGPIPE does.
    """
    # Read when OpenMP is loaded, so before any import of torch. By default GNU OpenMP's threads spin for milliseconds
    # after every parallel loop: where another process wants the core, a step of 0.4 s measured 10 s.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except ConfigError as error:
        print(*str(error).splitlines(), file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # `| head` has seen enough; what is buffered must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are ConfigErrors, with `-` and `_` alike in option names and no abbreviations."""

    def __init__(self, description: str | None = None, **options: Any):
        width = min(100, shutil.get_terminal_size().columns)
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=6, width=width)
        super().__init__(description=description, allow_abbrev=False, formatter_class=layout, **options)

    def parse_known_args(self, args=None, namespace=None):
        spelling = {option.replace("-", "_"): option for option in self._option_string_actions}
        tokens = list(sys.argv[1:] if args is None else args)
        end = tokens.index("--") if "--" in tokens else len(tokens)
        for i, token in enumerate(tokens[:end]):
            name, equals, value = token.partition("=")
            if name.startswith("--"):
                tokens[i] = spelling.get(name.replace("-", "_"), name) + equals + value
        return super().parse_known_args(tokens, namespace)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        self.refuse(unknown)
        return namespace

    def refuse(self, unknown: list[str]) -> None:
        """Raise ConfigError for the arguments that nobody asked for, an option before the value behind it."""
        options = [token for token in unknown if token.startswith("-")]
        if options:
            name = options[0].partition("=")[0]
            raise ConfigError(f"{name} is not a known setting{suggestion(name, self._option_string_actions)}")
        require(not unknown, f"{' '.join(unknown)!r} is more than this command takes.")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.")


def suggestion(option: str, known: Iterable[str]) -> str:
    """`; did you mean X?`: the same key in another section, else the closest key in this one, else in any.

    Of several sections with a key it is the one that is spelt most alike, else the first: the model's width before that
    of its vision encoder.
    """
    section, key = section_and_key(option)
    # The first of several comes last, so that it is the one that a dict keeps.
    places = [(*section_and_key(name), name) for name in known if name.startswith("--")][::-1]
    same = {there: name for there, other, name in places if other == key}
    if same:
        close = difflib.get_close_matches(section, same, n=1) or list(same)[-1:]
        return f"; did you mean {same[close[0]]}?"
    siblings = {other: name for there, other, name in places if section and f"{there}.".startswith(f"{section}.")}
    names = siblings or {other: name for _, other, name in places}
    close = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {names[close[0]]}?" if close else "."


def section_and_key(option: str) -> tuple[str, str]:
    """`--model.vision.hidden-size` as `model.vision` and `hidden_size`."""
    section, _, key = option.replace("-", "_").lstrip("_").rpartition(".")
    return section, key


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a class, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


@dataclass(frozen=True)
class Setting:
    """One field of RunConfig or of a table in it, as the command line names it."""

    name: str
    """`train.steps`"""
    kind: Any
    """The annotation."""
    default: Any
    """The value where a config file leaves it out; dataclasses.MISSING where it must not, having given its table."""
    doc: str
    """The string under the field."""


def settings(cls: type = RunConfig, prefix: str = "") -> Iterator[Setting]:
    """Every setting in the order of the classes; sections are not settings, optional tables and their fields are."""
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], prefix + field.name
        inner = without_none(kind)
        if inner is not kind or not dataclasses.is_dataclass(kind):
            yield Setting(name, kind, field.default, docs[field.name])
        if dataclasses.is_dataclass(inner):
            yield from settings(inner, f"{name}.")


def without_none(kind: Any) -> Any:
    """The annotation `kind` without its `| None`."""
    if typing.get_origin(kind) is types.UnionType:
        return next(arg for arg in typing.get_args(kind) if arg is not types.NoneType)
    return kind


def type_name(kind: Any) -> str:
    """What the help shows as the value of a setting of this annotation."""
    if without_none(kind) is not kind:
        return f"{type_name(without_none(kind))}|none"
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        item = type_name(typing.get_args(kind)[0])
        return '["TEXT", ...]' if item == "TEXT" else f"[{item}, ...]"
    if dataclasses.is_dataclass(kind):
        return "{KEY = VALUE, ...}"
    return {int: "INTEGER", float: "NUMBER", bool: "true|false", str: "TEXT"}[kind]


def read_value(kind: Any, text: str, where: str) -> Any:
    """A command-line argument as the plain value that a TOML file would hold, None for `none`.

    Raises ConfigError, naming `where`, for text that is no value of the annotation `kind`.
    """
    inner = without_none(kind)
    if inner is not kind and text == "none":
        return None
    value: Any = text
    if typing.get_origin(inner) is Literal:
        value = next((choice for choice in typing.get_args(inner) if str(choice) == text), text)
    elif inner is bool:
        value = {"true": True, "false": False}.get(text, text)
    elif inner in (int, float):
        with contextlib.suppress(ValueError):  # from_value refuses the text in the words of any wrong type
            value = inner(text)
    elif inner is not str:
        try:
            (value,) = tomllib.loads(f"value = {text}").values()
        except ValueError:  # bad TOML, or a line break and a second key
            raise ConfigError(f"{where} = {text!r} must be written as in TOML: {type_name(inner)}.") from None
    from_value(kind, value, where)
    return value


def override(table: dict[str, Any], name: str, value: Any) -> None:
    """Set `section.key` in the tables of a TOML file, making those that are not there."""
    *sections, key = name.split(".")
    for depth, section in enumerate(sections, 1):
        if table.get(section) is None:
            table[section] = {}
        table = table[section]
        require(isinstance(table, dict), f"{'.'.join(sections[:depth])} = {table!r} must be a table.")
    table[key] = value


def parse_run_config(
    argv: list[str],
    description: str | None,
    default: str | Path = "configs/nano.toml",
    extra: Callable[[Parser], None] | None = None,
    find: Callable[[Path], Path] = Path,
) -> tuple[RunConfig, argparse.Namespace]:
    """The config of the run, and the command's own arguments, with the path of the config file as `config_path` and the
    settings on top of it as `overrides`.

    `[CONFIG] [--section.key value ...]`: the file, `default` if none is named, then each setting on top of it; the
    checks see only the result, so that settings that need each other change together. `extra(parser)` adds the
    command's own options, none of them required; `find` turns what CONFIG says into the path of a file. `--help` prints
    and exits. Raises ConfigError for what cannot work.
    """
    parser = Parser(description, add_help=False, usage="%(prog)s [CONFIG] [--section.key VALUE ...]")
    path_help = "the TOML file of the run (default %(default)s)"
    parser.add_argument("config_path", metavar="CONFIG", nargs="?", type=Path, default=Path(default), help=path_help)
    parser.add_argument("-h", "--help", action="store_true", help="show every setting and exit")
    if extra:
        extra(parser)
    known = {setting.name: setting for setting in settings()}
    actions = add_settings(parser, known.values())
    args, unknown = parser.parse_known_args(argv)
    args.config_path = find(args.config_path)
    if vars(args).pop("help"):
        describe(parser, actions, known, args.config_path)
        parser.print_help()
        parser.exit()
    parser.refuse(unknown)
    # Each is absent unless given, and the order is that of the command line.
    given = {name: vars(args).pop(name) for name in list(vars(args)) if name in known}
    args.overrides = {name: read_value(known[name].kind, text, f"--{name}") for name, text in given.items()}
    return overridden(args.config_path, args.overrides), args


def overridden(path: Path, values: Mapping[str, Any]) -> RunConfig:
    """The config of a file with some `section.key` set to plain values. Raises ConfigError for what cannot work."""
    table = read_toml(path)
    for name, value in values.items():
        override(table, name, value)
    return from_value(RunConfig, table, "")


def add_settings(parser: Parser, known: Iterable[Setting]) -> dict[str, argparse.Action]:
    """Add an option for every setting, grouped by section."""
    about_all = (
        "Every setting of the config file, and its value there as the default. In names - is as good as _;\n"
        "`none` unsets what may be none; lists and tables are written as in TOML."
    )
    docs, groups, actions = {"run": about_all, **field_docs(RunConfig)}, {}, {}
    for setting in known:
        section = setting.name.partition(".")[0] if "." in setting.name else "run"
        if section not in groups:
            groups[section] = parser.add_argument_group(section, docs[section])
        actions[setting.name] = groups[section].add_argument(
            f"--{setting.name}", dest=setting.name, metavar=type_name(setting.kind), default=argparse.SUPPRESS
        )
    return actions


def describe(parser: Parser, actions: dict[str, argparse.Action], known: dict[str, Setting], path: Path) -> None:
    """Write the help of every setting: its doc, and its value in the config file as the default."""
    try:
        table = read_toml(path)
        from_value(RunConfig, table, "")
    except ConfigError as error:  # the help is wanted most where something does not work
        table, parser.epilog = {}, textwrap.fill(f"The defaults above are those without a config file: {error}")
    for name, action in actions.items():
        value: Any = table
        for key in name.split("."):
            value = (value or {}).get(key)
        value = known[name].default if value is None else value
        if value is dataclasses.MISSING:
            shown = "no default"
        else:
            shown = f"default {'none' if value is None else toml_value(to_plain(value))}"
        action.help = f"{known[name].doc}{table_keys(known[name].kind)} ({shown})".replace("%", "%%")


def table_keys(kind: Any) -> str:
    """A sentence with the keys of the tables in a list, which have no options of their own."""
    item, *_ = typing.get_args(kind) or (None,)
    if typing.get_origin(kind) is not tuple or not dataclasses.is_dataclass(item):
        return ""
    hints = typing.get_type_hints(item)
    return f" Keys of each: {', '.join(f'{name} ({type_name(hint)})' for name, hint in hints.items())}."
