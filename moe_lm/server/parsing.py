"""From the bytes of a body to a request, or to a sentence about what is wrong with it."""

import asyncio
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from moe_lm.server.errors import ApiError
from moe_lm.server.http import read_body
from moe_lm.server.limits import Limits
from moe_lm.server.schemas import MOST_MESSAGES, MOST_PROMPTS, MOST_STOPS, Part

R = TypeVar("R", bound=Part)

CHOICES = {
    "prompt": f"a text, a list of token ids, or a list of at most {MOST_PROMPTS} of either, none of them empty",
    "stop": f"a text or a list of at most {MOST_STOPS} texts",
    "content": f"a text or a list of at most {MOST_MESSAGES} parts of type text",
}
"""What a field of several types may be."""

SHOWN = 60
"""Characters of a wrong value in the error about it."""
MOST_BRACKETS = 1 << 17
"""Opening ones in a body. A million empty lists take over a second to build, in which no other thread runs."""
LONG = 1 << 16
"""Bytes of a body that is checked in a thread: 4 MiB of small messages take a second, in which the event loop would
answer nobody else."""

WORDS = {
    "bool_type": "must be true or false", "int_type": "must be an integer", "float_type": "must be a number",
    "string_type": "must be a text", "list_type": "must be a list", "dict_type": "must be an object",
    "model_type": "must be an object", "model_attributes_type": "must be an object", "finite_number": "must be finite",
    "greater_than_equal": "must be at least {ge}", "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}", "less_than": "must be below {lt}",
    "too_long": "must have at most {max_length} entries", "too_short": "must have at least {min_length} entries",
    "string_too_long": "must have at most {max_length} characters", "literal_error": "must be one of {expected}",
    "string_pattern_mismatch": "must match {pattern}",
    "union_tag_invalid": "must have one of {expected_tags} as its type",
    "schema_too_large": "has more than {most} {what}",
    "union_tag_not_found": "must be an object with a type",
}  # fmt: skip
"""Pydantic's kinds of error in our words."""


async def receive(kind: type[R], request: Request, limits: Limits) -> R:
    """The request in the body that comes. Raises ApiError as read_body and parse do."""
    body = await read_body(request, limits)
    return parse(kind, body) if len(body) < LONG else await asyncio.to_thread(parse, kind, body)


def parse(kind: type[R], body: bytes) -> R:
    """The request in a body. Raises ApiError: not JSON, a field that is not there, or a value that cannot be."""
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > MOST_BRACKETS:
        raise ApiError(f"the body opens {brackets} lists and objects, more than {MOST_BRACKETS}: send less at a time.")
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ApiError(f"the body is {show(data)}; it must be a JSON object.")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise in_a_sentence(error.errors(include_url=False)[0], data) from None


def in_a_sentence(error: dict[str, Any], data: Any) -> ApiError:
    """Where it is, what it is, and what it must be."""
    path, value, name = "", data, None
    # A location also names which type of several was tried, which the data does not have.
    for step in error["loc"]:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            continue
        path, name = joined(path, step), step
        if name in CHOICES:
            break
    kind, details = error["type"], error.get("ctx", {})
    if kind in ("unknown_parameter", "unsupported_parameter"):
        param = joined(path, details["name"])
        return ApiError(f"{param!r} {error['msg']}{'' if error['msg'][-1] == '?' else '.'}", param=param, code=kind)
    if name in CHOICES:
        must = f"must be {CHOICES[name]}"
    elif kind == "missing":
        param = joined(path, error["loc"][-1])
        return ApiError(f"{param} is missing: give it.", param=param, code="missing_required_parameter")
    else:
        must = WORDS[kind].format(**details) if kind in WORDS else f"is wrong: {error['msg']}"
    return ApiError(f"{path} = {show(value)} {must}.", param=path, code="invalid_value")


def joined(path: str, step: str | int) -> str:
    if isinstance(step, int):
        return f"{path}[{step}]"
    name = show(step)[1:-1]
    return f"{path}.{name}" if path else name


def show(value: Any) -> str:
    """A value as an error quotes it."""
    text = ""
    for piece in written(value):
        text += piece
        # The rest may be megabytes.
        if len(text) > SHOWN:
            return f"{text[: SHOWN - 3]}..."
    return text


def written(value: Any) -> Iterator[str]:
    """A value of JSON in Python's notation, piece by piece."""
    if isinstance(value, bool | None):
        yield {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, str):
        yield repr(value[: SHOWN + 1])
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield ", " if place else "["
            yield from written(item)
        yield "]" if value else "[]"
    elif isinstance(value, dict):
        for place, (name, item) in enumerate(value.items()):
            yield ", " if place else "{"
            yield from written(name)
            yield ": "
            yield from written(item)
        yield "}" if value else "{}"
    else:
        yield repr(value)
