"""Requests that no client should send, made from the description that a server gives of itself.

Plain `random` and not hypothesis: 20,000 requests at one live server must be quick and the same on every run, and
shrinking would repeat them at a server that has changed meanwhile. A failure names the request as a whole.
"""

import copy
import json
import random
from typing import Any, NamedTuple

MODEL = "toy"
GOOD, BAD, EITHER = "good", "bad", "either"


class Asked(NamedTuple):
    """A request. `verdict` is what the answer must be: GOOD 200, BAD 4xx, EITHER one of the two."""

    what: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes | None
    verdict: str


class Raw(str):
    """Stands in a body as it is."""


ODD = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, -1e308, "", "a", "\0",
    "null", "1", "\u2028", "🙂" * 9, "a" * 3000, "\r\nX-Forged: 1", [], [[]], [[[]]], [None], [0], [-1], [2**31],
    [10**30], [260], ["a", 1], [True], [1.5], [""], [[1], "a"], {}, {"": 0}, {"a": {}}, {"type": "text"},
    {"type": []}, {"$ref": "#"}, Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("-1e999"),
    Raw("0x1"), Raw("01"), Raw("1."), Raw(".5"), Raw("'a'"), Raw('"\\ud800"'), Raw('"\\udc00\\ud800"'), Raw('"\\x"'),
    Raw('"\x01"'), Raw('"\\u0000"'), Raw("nul"), Raw("[1,]"), Raw('{"a":1,}'), Raw("//"), Raw(""), Raw("[" * 100_000),
    Raw('{"a":' * 50_000), Raw("9" * 5000), Raw("1e400"), Raw("-0"), Raw("1E-400"), Raw("[" * 150 + "]" * 150),
)  # fmt: skip
"""Values for every place of a body."""

FITTING = {
    "model": [MODEL], "prompt": ["def", "a b"], "n": [1, 2, None],
    "messages": [[{"role": "user", "content": "hi"}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}]],
    "max_tokens": [1, 2, 3], "stop": ["x", ["ab", "\n"], None], "logit_bias": [{"5": 1.5, "0": -100}, {}, None],
    "stop_token_ids": [[1, 2], [], None], "tokens": [[], [1, 2, 3]], "user": ["me", None],
    "stream": [True, False, None],
}  # fmt: skip
"""Values that are right where the schema alone does not say so, or that end soon."""
PROMPTS = ("", [5, 6], ["a", "b"], [[7], [8, 9]], None, "def")
RELATED = frozenset({
    "stream_options", "response_format", "max_completion_tokens", "top_logprobs", "add_special_tokens", "logprobs",
    "messages", "prompt", "prompt_logprobs", "model",
})  # fmt: skip
"""Fields that are right or wrong together with others: a body that must be good has none beside what it needs."""
NEEDED = {
    "/v1/completions": ("model", "prompt", "max_tokens"), "/v1/chat/completions": ("model", "messages", "max_tokens"),
    "/tokenize": ("prompt",), "/detokenize": ("tokens",),
}  # fmt: skip
JSON = {"Content-Type": "application/json"}


class Requests:
    """Draws requests from an OpenAPI description, the same ones for the same seed."""

    def __init__(self, described: dict[str, Any], seed: int):
        self.draw, self.schemas = random.Random(seed), described["components"]["schemas"]
        self.kinds = {
            path: self.resolved(entry["post"]["requestBody"]["content"]["application/json"]["schema"])
            for path, entry in described["paths"].items()
            if "post" in entry
        }
        self.gets = [path.replace("{name}", MODEL) for path, entry in described["paths"].items() if "get" in entry]

    def resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        return self.schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema

    def value(self, name: str, schema: dict[str, Any]) -> Any:
        """One that the schema of a field allows."""
        draw, schema = self.draw, self.resolved(schema)
        if name in FITTING:
            return copy.deepcopy(draw.choice(FITTING[name]))
        if options := schema.get("anyOf") or schema.get("oneOf"):
            return self.value(name, draw.choice(options))
        if "const" in schema or "enum" in schema:
            return draw.choice(schema.get("enum") or [schema["const"]])
        kind = schema.get("type")
        if kind in ("integer", "number"):
            low, high = schema.get("minimum", schema.get("exclusiveMinimum", 0)), schema.get("maximum", 20)
            if kind == "integer":
                return draw.randint(max(low, -9), min(high, 20))
            return draw.choice([high, low + (high - low) * (1 - draw.random())])
        if kind == "object":
            fields = schema.get("properties", {})
            return {name: self.value(name, field) for name, field in fields.items()}
        return {"boolean": draw.random() < 0.5, "string": "abc", "array": [], "null": None}[kind]

    def body(self, path: str, related: bool) -> dict[str, Any]:
        """What must be good, unless fields that are related to others are among its fields."""
        fields = self.kinds[path]["properties"]
        free = [name for name in fields if name not in NEEDED[path] and (related or name not in RELATED)]
        chosen = self.draw.sample(free, self.draw.randint(0, min(4, len(free))))
        return {name: self.value(name, fields[name]) for name in (*NEEDED[path], *chosen)}

    def next(self) -> Asked:
        make = self.draw.choices(
            (self.good, self.mutated, self.without, self.unknown, self.no_json, self.schema, self.around),
            (6, 40, 6, 8, 12, 8, 20),
        )[0]
        return make(self.draw.choice(list(self.kinds)))

    def posted(self, what: str, path: str, body: Any, verdict: str, **headers: str) -> Asked:
        data = body if isinstance(body, bytes) else written(body).encode("utf-8", "surrogatepass")
        return Asked(what, "POST", path, JSON | headers, data, verdict)

    def good(self, path: str) -> Asked:
        return self.posted("good", path, self.body(path, related=False), GOOD)

    def mutated(self, path: str) -> Asked:
        body = self.body(path, related=True)
        if path == "/v1/completions":
            body["prompt"] = copy.deepcopy(self.draw.choice(PROMPTS))
        for _ in range(self.draw.choice((1, 1, 1, 2, 3))):
            places = list(places_of(body))
            holder, key = self.draw.choice(places)
            holder[key] = copy.deepcopy(self.draw.choice(ODD))
        # What it asks for must end soon.
        if isinstance(body.get("max_tokens"), int | float) and body["max_tokens"] == 2**31:
            body["max_tokens"] = 3
        return self.posted("mutated", path, body, EITHER)

    def without(self, path: str) -> Asked:
        body = self.body(path, related=False)
        needed = self.kinds[path].get("required", [])
        for name in needed and [self.draw.choice(needed)]:
            body.pop(name)
        return self.posted("without", path, body, BAD if needed else GOOD)

    def unknown(self, path: str) -> Asked:
        draw, body = self.draw, self.body(path, related=False)
        name = draw.choice(["promt", "foo", "", "\n", "a" * 5000, "__class__", "0", "best_of", "tools", "schema_"])
        body[name] = draw.choice([0, "a", [], {"a": 1}])
        return self.posted("unknown", path, body, BAD)

    def no_json(self, path: str) -> Asked:
        draw, body = self.draw, written(self.body(path, related=False)).encode()
        broken = draw.choice((
            lambda: b"", lambda: body[: draw.randrange(1, len(body))], lambda: body + draw.choice([b"]", b"a", b"{}"]),
            lambda: body.replace(b'"', b'"\xff', 1), lambda: b"\xef\xbb\xbf" + body,
            lambda: body.decode().encode("utf-16"),
            lambda: b"[" * 100_000, lambda: draw.randbytes(draw.randint(1, 200)) + b"\xff", lambda: b"[" + body + b"]",
            lambda: b"null", lambda: b'"' + body + b'"', lambda: b'{"a":' * 60_000, lambda: b"\0" * 50,
        ))  # fmt: skip
        return self.posted("no JSON", path, broken(), BAD)

    def schema(self, path: str) -> Asked:
        """A response_format that is odd, of completions or chats."""
        path = self.draw.choice(list(self.kinds)[:2])
        schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "a+"}}, "required": ["a"]}
        for _ in range(self.draw.randint(1, 2)):
            holder, key = self.draw.choice(list(places_of(schema)))
            holder[key] = copy.deepcopy(self.draw.choice([*ODD, *SCHEMAS]))
        body = {name: FITTING[name][0] for name in NEEDED[path]} | {
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        }
        return self.posted("schema", path, body, EITHER)

    def around(self, path: str) -> Asked:
        """What is odd lies around the body."""
        draw, body = self.draw, self.body(path, related=False)
        kind = draw.randrange(6)
        if kind == 0:
            odd = draw.choice(["text/plain", "", "application/x-www-form-urlencoded", "application/jsonp", "a" * 5000])
            return self.posted("type", path, body, BAD, **{"Content-Type": odd})
        if kind == 1:
            method = draw.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW", "A" * 300])
            return Asked("method", method, path, {}, None, BAD)
        if kind == 2:
            return Asked("path", draw.choice(["GET", "POST"]), draw.choice(PATHS), {}, None, BAD)
        if kind == 3:
            odd = {"X-Long": "a" * 30_000, "Accept": "\xff\xfe", "Cookie": "a=" * 9000, "Authorization": "Basic \xe9"}
            name = draw.choice(list(odd))
            return self.posted("header", path, body, GOOD, **{name: odd[name]})
        if kind == 4:
            host = draw.choice(["evil.example", "", "127.0.0.1.evil", "a" * 3000, "\xff", "127.0.0.1@evil", ":"])
            return self.posted("host", path, body, BAD, Host=host)
        return Asked("get", "GET", draw.choice(self.gets), {}, None, GOOD)


PATHS = (
    "/nope", "/v1", "/v1/", "//", "/v1/models/", "/v1/models/%0d%0aX-Forged:1", "/v1/models/a%00b", "/v1/models/../toy",
    "/v1/models/" + "a" * 9000, "/v1/models/%ff%fe", "/v1/models/toy/", "/static/", "/static/../app.py",
    "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static/%00", "/static//etc/passwd", "/static/" + "a" * 5000,
    "/static/%ff", "/static/..%5capp.py", "/health/", "/nope%0a", "/metrics/..", "/v1/completions/%F0%9F%99%82",
)  # fmt: skip
SCHEMAS = (
    {"$ref": "#"}, {"$ref": "#/$defs/a"}, {"$ref": "file:///etc/passwd"}, {"allOf": [{"$ref": "#"}]}, {"not": {}},
    {"enum": list(range(3000))}, {"enum": []}, {"type": "string", "pattern": "(a*)*(a*)*b"},
    {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"}, {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "(" * 5000}, {"type": "string", "pattern": "(?=a)(\n)"},
    {"properties": {f"a{i}": {} for i in range(10_000)}}, {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}"}
    for i in range(60)]}, {"type": "string", "format": "error: "}, {"type": "string", "format": "a" * 9000},
    {"type": "string", "minLength": 10**18}, {"maximum": 10**400}, {"type": "array", "minItems": 10**9},
    {"anyOf": [{}] * 5000}, {"const": "a" * 40_000}, {"type": "integer", "multipleOf": 1e-300}, {"a" * 40_000: 1},
    {"x-guidance": {"item_separator": "("}}, {"type": ["string"] * 300}, {"properties": {"": {"const": "\0"}}},
)  # fmt: skip


def places_of(value: Any):
    """Every place in a tree, as what holds it and its key there."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(entries):
        yield value, key
        yield from places_of(item)


def written(value: Any) -> str:
    """JSON in which a Raw stands as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(name)}: {written(item)}' for name, item in value.items())}}}"
    return json.dumps(value)
