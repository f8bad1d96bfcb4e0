"""The routes of the server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from moe_lm.engine import Engine
from moe_lm.engine.checks import MODEL_KINDS
from moe_lm.engine.request import SPECULATIONS
from moe_lm.server.errors import ApiError, Failed
from moe_lm.server.generation import Chat, Completions
from moe_lm.server.http import Guard, refusal
from moe_lm.server.metrics import engine_metrics
from moe_lm.server.openapi import openapi
from moe_lm.server.parsing import receive
from moe_lm.server.schemas import DetokenizeRequest, TokenizeRequest
from moe_lm.server.service import Service

STATIC = Path(__file__).parent / "static"


def make_app(
    service: Service, *, keys: Sequence[str] = (), hosts: frozenset[str] | None = None, origins: Sequence[str] = ()
) -> Starlette:
    """The ASGI app of a service, whose worker it starts and stops.

    `keys` are the API keys of which a request needs one, none for no keys; `hosts` as in Guard; `origins` are the sites
    whose pages may use the server from a browser.
    """
    endpoints = Endpoints(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()

    async def api_error(request: Request, error: ApiError) -> Response:
        service.metrics.refused(error.status, error.code)
        return refusal(error)

    async def http_error(request: Request, error: HTTPException) -> Response:
        told = ApiError(
            f"{request.method[:20]} {request.url.path[:200]!r}: {error.detail.lower()}.", code="no_such_endpoint"
        )
        told.status = error.status_code
        return await api_error(request, told)

    async def our_error(request: Request, error: Exception) -> Response:
        return await api_error(request, Failed(f"the server failed at this request: {type(error).__name__}."))

    middleware = [Middleware(Guard, keys=keys, hosts=hosts)]
    if origins:
        # Outermost: a preflight carries no key.
        cors = Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"],
                          allow_headers=["Authorization", "Content-Type"])  # fmt: skip
        middleware.insert(0, cors)
    routes = [
        Route("/v1/completions", Completions(service), methods=["POST"]),
        Route("/v1/chat/completions", Chat(service), methods=["POST"]),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.model),
        Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        Route("/detokenize", endpoints.detokenize, methods=["POST"]),
        Route("/health", endpoints.health),
        Route("/status", endpoints.status),
        Route("/metrics", endpoints.metrics),
        Route("/openapi.json", endpoints.openapi),
        Route("/", endpoints.page),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    handlers = {ApiError: api_error, HTTPException: http_error, Exception: our_error}
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)
    # A path with a slash too many is another path; a redirect would repeat the Host header that the client made up.
    app.router.redirect_slashes = False
    return app


class Endpoints:
    """All that does not generate."""

    def __init__(self, service: Service):
        self.service = service

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.model_card()]})

    async def model(self, request: Request) -> Response:
        self.service.check_model(request.path_params["name"])
        return JSONResponse(self.model_card())

    def model_card(self) -> dict[str, Any]:
        service = self.service
        return {
            "id": service.name, "object": "model", "created": service.created, "owned_by": "moe-lm",
            "max_model_len": service.engine.context,
        }  # fmt: skip

    async def tokenize(self, request: Request) -> Response:
        service = self.service
        asked = await receive(TokenizeRequest, request, service.limits)
        service.check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError("give either prompt or messages, one of them.", param="prompt")
        if asked.messages is not None:
            if asked.add_special_tokens is not None:
                raise ApiError(
                    "add_special_tokens is for a prompt: a chat template writes its own.", param="add_special_tokens"
                )
            tokens = await asyncio.to_thread(service.chat_tokens, asked.messages)
        else:
            tokens = await asyncio.to_thread(service.tokens, asked.prompt, asked.add_special_tokens is not False)
        found = {"tokens": tokens, "count": len(tokens), "max_model_len": service.engine.context}
        if asked.return_token_strs:
            found["token_strs"] = [service.texts.named(token) for token in tokens]
        return JSONResponse(found)

    async def detokenize(self, request: Request) -> Response:
        asked = await receive(DetokenizeRequest, request, self.service.limits)
        self.service.check_model(asked.model)
        return JSONResponse({"prompt": await asyncio.to_thread(self.service.text, asked.tokens)})

    def state(self) -> str:
        worker = self.service.worker
        return "dead" if worker.dead else "draining" if worker.draining else "ok"

    async def health(self, request: Request) -> Response:
        state = self.state()
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def status(self, request: Request) -> Response:
        """What the page shows of the batch."""
        service = self.service
        return JSONResponse(await service.worker.ask(self.of_engine) | {
            "model": service.name, "state": self.state(), "waiting": len(service.worker.waiting),
            "waiting_tokens": sum(job.cost for job in service.worker.waiting.values()),
            "max_waiting": service.limits.max_waiting, "tokens_per_s": service.worker.tokens_per_second(),
        })  # fmt: skip

    def of_engine(self, engine: Engine) -> dict[str, Any]:
        """The part of the status that is the engine's; run between two steps."""
        snapshot, stats, config = engine.snapshot(), engine.stats, engine.target.model.config
        kinds = [kind for kind in SPECULATIONS if engine.draft is not None or kind not in MODEL_KINDS]
        return {
            "draft": engine.draft is not None, "speculations": kinds, "speculation": engine.speculation,
            "num_hidden_layers": config.num_hidden_layers, "num_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok, "max_sequences": engine.scheduler.max_sequences,
            "running": snapshot.running,
            "slots": [
                {"id": slot.request_id, "index": slot.index, "phase": slot.phase, "tokens": slot.tokens,
                 "of": slot.limit, "prompt": slot.prompt}
                for slot in snapshot.slots
            ],
            "kv": {"block_size": snapshot.block_size, "blocks": snapshot.blocks, "used": snapshot.used,
                   "cached": snapshot.cached},
            "acceptance": stats.acceptance if stats.proposed else None,
            "tokens_per_step": stats.tokens_per_step or None,
            "prefix_hits": stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else None,
        }  # fmt: skip

    async def metrics(self, request: Request) -> Response:
        found = await self.service.worker.ask(lambda engine: list(engine_metrics(engine.snapshot(), engine.stats)))
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self.service.metrics.render(found), media_type=kind)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi())

    async def page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html")
