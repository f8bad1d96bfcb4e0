"""The OpenAPI description of the server, made from the classes that requests are checked by."""

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from moe_lm.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

POSTS = {
    "/v1/completions": (CompletionRequest, "Continue a prompt, or several."),
    "/v1/chat/completions": (ChatRequest, "Answer in a chat."),
    "/tokenize": (TokenizeRequest, "The token ids of a prompt or a chat."),
    "/detokenize": (DetokenizeRequest, "The text of token ids."),
}
GETS = {
    "/v1/models": "The model that is served.",
    "/v1/models/{name}": "The same, if that is its name.",
    "/health": "200 while requests are served, 503 while the server ends or when its engine is dead.",
    "/status": "The batch, the queue and the cache at this moment.",
    "/metrics": "All that is counted, for Prometheus.",
}
ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    }}},
}  # fmt: skip


@cache
def openapi() -> dict[str, Any]:
    """OpenAPI 3.1, as a JSON object."""
    kinds = [(kind, "validation") for kind, _ in POSTS.values()]
    named, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    error = {"description": "What is wrong, in a sentence.", "content": {"application/json": {"schema": ERROR}}}
    paths: dict[str, Any] = {}
    for path, (kind, summary) in POSTS.items():
        body = {"required": True, "content": {"application/json": {"schema": named[kind, "validation"]}}}
        answers = {"200": {"description": "The answer."}, "4XX": error, "5XX": error}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": answers}}
    for path, summary in GETS.items():
        get: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": summary}, "4XX": error}}
        if "{name}" in path:
            get["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {"get": get}
    return {
        "openapi": "3.1.0",
        "info": {"title": "moe-lm", "version": "1", "description": "OpenAI's API around one engine, and extensions."},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
