"""What the server does not take, with a sentence that names the field; keys, hosts, other sites, other endpoints."""

import json

import openai
import pytest
from api_server import serve, turns
from openai.types import Model
from openai.types.shared import ErrorObject
from serving import NAME, live, toy_engine

from moe_lm.server import Limits
from moe_lm.server.schemas import ChatRequest, CompletionRequest, Message, StreamOptions

pytestmark = pytest.mark.usefixtures("one_thread")
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
HELLO = {"messages": turns("hello")}
KEYS = ("first-key", "second-key")
SITE = "https://example.org"


@pytest.fixture(scope="module")
def api(tokenizer, tmp_path_factory, one_thread):
    with serve(tokenizer, tmp_path_factory.mktemp("model")) as api:
        yield api


@pytest.fixture(scope="module")
def keyed(tokenizer, tmp_path_factory, one_thread):
    """A server with keys, for pages of one site, that takes short bodies only."""
    with live(
        toy_engine(tokenizer), tmp_path_factory.mktemp("keyed"), Limits(max_body=4096), keys=KEYS, origins=[SITE]
    ) as server:  # fmt: skip
        yield server


def form(name, **schema):
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


BOTH = [
    ("temperature", 2.5, "temperature", "at most 2"),
    ("temperature", -0.1, "temperature", "at least 0"),
    ("temperature", "0.5", "temperature", "must be a number"),
    ("temperature", True, "temperature", "must be a number"),
    ("top_p", 0, "top_p", "above 0"),
    ("top_p", 1.1, "top_p", "at most 1"),
    ("n", 0, "n", "at least 1"),
    ("n", 129, "n", "at most 128"),
    ("n", 1.5, "n", "must be an integer"),
    ("seed", "7", "seed", "must be an integer"),
    ("seed", 2**63, "seed", "below"),
    ("presence_penalty", 2.1, "presence_penalty", "at most 2"),
    ("frequency_penalty", -3, "frequency_penalty", "at least -2"),
    ("max_tokens", -1, "max_tokens", "at least 0"),
    ("max_tokens", "5", "max_tokens", "must be an integer"),
    ("stop", 5, "stop", "a text or a list of at most 64 texts"),
    ("stop", ["a"] * 65, "stop", "at most 64"),
    ("stop", [""], "stop", "none of them empty"),
    ("logit_bias", {"x": 1}, "logit_bias.x", "must match"),
    ("logit_bias", {"1": 101}, "logit_bias[1]", "between -100 and 100"),
    ("logit_bias", {"260": 1}, "logit_bias", "token id 260, outside 0 to 259"),
    ("logit_bias", [1], "logit_bias", "must be an object"),
    ("stream", 1, "stream", "must be true or false"),
    ("stream_options", {"include_usage": True}, "stream_options", "set stream"),
    ("stream_options", {"include_usage": 1}, "stream_options.include_usage", "must be true or false"),
    ("stream_options", {"include_usages": True}, "stream_options.include_usages", "did you mean include_usage?"),
    ("user", 5, "user", "must be a text"),
    ("user", "u" * 257, "user", "at most 256 characters"),
    ("top_k", -1, "top_k", "at least 0"),
    ("min_p", 1.5, "min_p", "at most 1"),
    ("repetition_penalty", 0, "repetition_penalty", "above 0"),
    ("stop_token_ids", [-1], "stop_token_ids[0]", "at least 0"),
    ("stop_token_ids", [260], "stop_token_ids", "token id 260, outside 0 to 259"),
    ("ignore_eos", "yes", "ignore_eos", "must be true or false"),
    ("prompt_logprobs", 65, "prompt_logprobs", "at most 64"),
    ("speculation", "guess", "speculation", "must be one of 'none', 'ngram', 'draft' or 'staged'"),
    ("draft_tokens", 17, "draft_tokens", "at most 16"),
    ("token_details", 1, "token_details", "must be true or false"),
    ("response_format", "json", "response_format", "must be an object"),
    ("response_format", {"type": "xml"}, "response_format", "must have one of"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema", "is missing"),
    ("response_format", form("a b"), "response_format.json_schema.name", "must match"),
    ("response_format", form("a", type="nothing"), "response_format", "nothing"),
    ("response_format", form("a", type="array", uniqueItems=True), "response_format", "uniqueItems"),
    ("max_token", 5, "max_token", "did you mean max_tokens?"),
    ("temprature", 0, "temprature", "did you mean temperature?"),
    ("xyzzy", None, "xyzzy", "is not a parameter here"),
]
COMPLETION_ONLY = [
    ("prompt", [], "prompt", "a text, a list of token ids, or a list of at most 4096 of either, none of them empty"),
    ("prompt", [[]], "prompt", "none of them empty"),
    ("prompt", [1, "a"], "prompt", "a list of at most 4096 of either"),
    ("prompt", 5, "prompt", "a text"),
    ("prompt", [-1], "prompt", "token ids"),
    ("prompt", [260], "prompt", "token id 260, outside 0 to 259"),
    ("prompt", ["x"] * 257, "prompt", "257 prompts, more than the 256 of max_waiting"),
    ("logprobs", 21, "logprobs", "at most 20"),
    ("logprobs", True, "logprobs", "must be an integer"),
    ("echo", "true", "echo", "must be true or false"),
    ("messages", [], "messages", "is not a parameter here"),
]
CHAT_ONLY = [
    ("messages", [], "messages", "at least 1"),
    ("messages", "hello", "messages", "must be a list"),
    ("messages", [{"role": "user"}], "messages[0].content", "is missing"),
    ("messages", [{"role": "user", "content": None}], "messages[0].content", "a text or a list of at most 4096 parts"),
    ("messages", [{"content": "x"}], "messages[0].role", "is missing"),
    ("messages", [{"role": "tool", "content": "x"}], "messages[0].role", "must be one of"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
     "messages[0].content", "parts of type text"),
    ("messages", [{"role": "user", "content": "x", "tool_calls": []}], "messages[0].tool_calls", "not implemented"),
    ("messages", [{"role": "user", "contents": "x"}], "messages[0].contents", "did you mean content?"),
    ("logprobs", 1, "logprobs", "must be true or false"),
    ("top_logprobs", 2, "top_logprobs", "needs logprobs"),
    ("top_logprobs", 21, "top_logprobs", "at most 20"),
    ("max_completion_tokens", -1, "max_completion_tokens", "at least 0"),
    ("prompt", "x", "prompt", "is not a parameter here"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "name", "value", "param", "says"), [
    (path, *case) for path, cases in ((COMPLETIONS, BOTH + COMPLETION_ONLY), (CHATS, BOTH + CHAT_ONLY))
    for case in cases
])  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_name(api, path, name, value, param, says):
    base = {"prompt": "x", "max_tokens": 1} if path == COMPLETIONS else HELLO | {"max_tokens": 1}
    error = api.refusal(path, **base | {name: value})
    assert says in error["message"]
    assert error["param"] == param
    assert error["code"] in ("invalid_value", "unknown_parameter", "unsupported_parameter",
                             "missing_required_parameter", None)  # fmt: skip
    ErrorObject.model_validate(error, strict=True)
    assert error["message"].endswith((".", "?"))
    streamed = api.refusal(path, **{"stream": True} | base | {name: value}) if name != "stream_options" else error
    assert streamed == error


@pytest.mark.parametrize(("path", "kind"), [(COMPLETIONS, CompletionRequest), (CHATS, ChatRequest)])
def test_what_is_not_implemented_is_refused_when_given_and_taken_when_null(api, path, kind):
    base = {"prompt": "x", "max_tokens": 1} if path == COMPLETIONS else HELLO | {"max_tokens": 1}
    for name in kind.NOT_IMPLEMENTED:
        error = api.refusal(path, **base, **{name: 2})
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert error["message"] == f"'{name}' is not implemented by this server."
    status, found = api.live.json(path, {"model": NAME} | base | dict.fromkeys(kind.NOT_IMPLEMENTED))
    assert status == 200, found
    optional = set(kind.model_fields) - {"model", "messages", "max_tokens"}
    status, found = api.live.json(path, base | {"model": NAME} | dict.fromkeys(optional - base.keys()))
    assert status == 200, found
    for name in StreamOptions.NOT_IMPLEMENTED:
        error = api.refusal(path, **base, stream=True, stream_options={name: True})
        assert error["param"] == f"stream_options.{name}"
    if path == CHATS:
        message = {"role": "user", "content": "x"} | dict.fromkeys(Message.NOT_IMPLEMENTED)
        assert api.live.json(path, {"model": NAME, "messages": [message], "max_tokens": 1})[0] == 200


def test_the_client_raises_what_fits(api):
    create, chat = api.client.completions.create, api.client.chat.completions.create
    ids = api.tokenizer.encode("def main(").ids
    with pytest.raises(openai.BadRequestError) as error:
        create(model=NAME, prompt=ids, max_tokens=600)
    told = error.value
    assert (told.param, told.code, told.type) == ("prompt", "context_length_exceeded", "invalid_request_error")
    assert str(len(ids)) in told.body["message"]
    assert "600" in told.body["message"]
    assert "512" in told.body["message"]
    for text in ("x" * 600, "x" * 100_000):
        with pytest.raises(openai.BadRequestError) as error:
            chat(model=NAME, messages=turns(text))
        assert (error.value.param, error.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as error:
        create(model=NAME, prompt="y" * 100_000)
    assert (error.value.param, error.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as error:
        chat(model=NAME, messages=turns("x"), max_tokens=1, max_completion_tokens=1)
    assert (error.value.param, "max_completion_tokens" in str(error.value)) == ("max_tokens", True)
    with pytest.raises(openai.NotFoundError) as error:
        create(model="gpt", prompt="x")
    assert (error.value.param, error.value.code) == ("model", "model_not_found")
    assert "'gpt'" in str(error.value)
    assert f"'{NAME}'" in str(error.value)
    with pytest.raises(openai.BadRequestError, match="model is missing") as error:
        api.client.post("/completions", body={"prompt": "x"}, cast_to=object)
    assert error.value.param == "model"


def test_bodies_that_are_no_request(api):
    for raw in (b"", b"{", b"[]", b'"x"', b"null", b'{"model": NaN}', b"\xff", b'{"a": 1} 2'):
        status, found = api.live.json(COMPLETIONS, raw=raw)
        assert (status, found["error"]["type"]) == (400, "invalid_request_error")
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, found = api.live.json(COMPLETIONS, raw=b"{}", headers={"Content-Type": kind})
        assert (status, repr(kind) in found["error"]["message"]) == (415, True)
    body = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 1}).encode()
    kind = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert api.live.json(COMPLETIONS, raw=body, headers=kind)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("POST", "/v1/embeddings", 404), ("GET", "/static/nothing.js", 404),
     ("GET", "/static/../app.py", 404), ("GET", COMPLETIONS, 405), ("DELETE", "/v1/models", 405),
     ("POST", "/health", 405), ("PUT", CHATS, 405)],
)  # fmt: skip
def test_other_paths_and_methods_are_errors_of_the_same_shape(api, method, path, status):
    found, _, data = api.live.request(path, method=method)
    error = json.loads(data)["error"]
    assert (found, error["code"]) == (status, "no_such_endpoint")
    ErrorObject.model_validate(error, strict=True)
    assert f"{method} {path!r}" in error["message"]


def test_models(api):
    [model] = api.client.models.list().data
    assert model == api.client.models.retrieve(NAME)
    assert (model.id, model.object, model.owned_by, model.max_model_len) == (NAME, "model", "moe-lm", 512)
    Model.model_validate(api.live.json(f"/v1/models/{NAME}")[1], strict=True)
    for name in ("gpt", f"{NAME}/x", "a b"):
        with pytest.raises(openai.NotFoundError) as error:
            api.client.models.retrieve(name)
        assert (error.value.param, error.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize("text", ["def main():\n    return 0\n", "naïve 😀<|endoftext|>x", "\x00\ufffd", ""])
def test_tokenize_and_detokenize_are_inverse(api, text):
    ids = api.tokenizer.encode(text).ids
    status, found = api.live.json("/tokenize", {"model": NAME, "prompt": text, "return_token_strs": True})
    assert status == 200
    names = [api.live.service.texts.named(token) for token in ids]
    assert found == {"tokens": ids, "count": len(ids), "max_model_len": 512, "token_strs": names}
    assert len(set(names)) == len(set(ids))
    assert api.live.json("/detokenize", {"model": NAME, "tokens": ids}) == (200, {"prompt": text})


def test_tokenize_tells_what_a_request_would_read(api):
    found = api.live.json("/tokenize", HELLO)[1]
    assert found["tokens"] == api.tokenizer.encode("User: hello\n\nAssistant:").ids
    assert found["count"] == api.chat("hello", max_tokens=0).usage.prompt_tokens
    for special in (True, False, None):
        found = api.live.json("/tokenize", {"prompt": "x", "add_special_tokens": special})[1]
        assert found["tokens"] == api.tokenizer.encode("x").ids
    for path, body, param in (
        ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "x"} | HELLO, "prompt"),
        ("/tokenize", HELLO | {"add_special_tokens": True}, "add_special_tokens"), ("/detokenize", {}, "tokens"),
        ("/tokenize", {"prompts": "x"}, "prompts"), ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": ["x"]}, "tokens[0]"),
    ):  # fmt: skip
        status, answer = api.live.json(path, body)
        assert (status, answer["error"]["param"]) == (400, param)
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert api.live.json(path, body | {"model": "gpt"})[0] == 404


def test_a_server_with_keys_lets_in_who_has_one(keyed):
    asked = {"model": NAME, "prompt": "x", "max_tokens": 1}
    for key in KEYS:
        client = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0)
        assert client.completions.create(**asked).choices
        assert client.models.list().data
    for key in ("first-ke", "first-key2", "x", "first-key second-key"):
        client = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0)
        for call in (lambda client=client: client.completions.create(**asked), client.models.list):
            with pytest.raises(openai.AuthenticationError) as error:
                call()
            assert error.value.code == "invalid_api_key"
    paths = [COMPLETIONS, CHATS, "/v1/models", f"/v1/models/{NAME}", "/tokenize", "/detokenize", "/status", "/metrics",
             "/nothing"]  # fmt: skip
    for sent in (None, "Basic first-key", "first-key", "Bearer"):
        for path in paths:
            status, told, data = keyed.request(path, headers={"Authorization": sent} if sent else {})
            assert (status, told["www-authenticate"]) == (401, "Bearer")
            assert "first-key" not in json.loads(data)["error"]["message"]
    assert keyed.request("/status", headers={"Authorization": f"bearer  {KEYS[1]} "})[0] == 200
    for path in ("/", "/health", "/openapi.json", "/static/page.js", "/static/page.css"):
        assert keyed.request(path)[0] == 200


def test_bodies_longer_than_the_limit(keyed):
    own = {"Authorization": f"Bearer {KEYS[0]}"}
    whole = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 1}).encode()
    fits = whole.ljust(4096)
    assert keyed.json(COMPLETIONS, raw=fits, headers=own)[0] == 200
    status, found = keyed.json(COMPLETIONS, raw=fits + b" ", headers=own)
    assert (status, "4096 bytes of max_body" in found["error"]["message"]) == (413, True)


def test_pages_of_other_sites_are_let_in_only_where_they_are_named(api, keyed):
    preflight = {"Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    for site, allowed in ((SITE, True), ("https://example.com", False)):
        asked = {"Origin": site, "Authorization": f"Bearer {KEYS[0]}"}
        for _, told, _ in (
            keyed.request("/v1/models", headers=asked),
            keyed.request(COMPLETIONS, headers={"Origin": site} | preflight, method="OPTIONS"),
        ):
            assert told.get("access-control-allow-origin") == (SITE if allowed else None)
    status, told, _ = keyed.request(COMPLETIONS, headers={"Origin": SITE} | preflight, method="OPTIONS")
    assert status == 200
    assert told["access-control-allow-methods"] == "GET, POST"
    assert "Authorization" in told["access-control-allow-headers"]
    for headers, method in (({"Origin": SITE}, "GET"), ({"Origin": SITE} | preflight, "OPTIONS")):
        _, told, _ = api.live.request("/v1/models", headers=headers, method=method)
        assert not [name for name in told if name.startswith("access-control")]


def test_a_server_that_is_called_by_another_name_refuses(tokenizer, tmp_path):
    with live(toy_engine(tokenizer), tmp_path, hosts=frozenset({"localhost", "127.0.0.1", "[::1]"})) as server:
        port = server.url.rpartition(":")[2]
        for host in ("localhost", f"127.0.0.1:{port}", f"LOCALHOST:{port}", "[::1]", f"[::1]:{port}"):
            assert server.request("/v1/models", headers={"Host": host})[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.2", "[::2]", ""):
            for path in ("/", "/health", "/v1/models"):
                status, found = server.json(path, headers={"Host": host})
                assert (status, "is not known as" in found["error"]["message"]) == (403, True)
