"""What all endpoints need: the model under its name, its tokenizer's texts, its chat template, the worker."""

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_lm.config import ConfigError, require
from moe_lm.data.tokenizer import END_OF_TEXT
from moe_lm.engine import ContextError, Engine, SamplingParams, TokenMask, grammar
from moe_lm.server.errors import ApiError, NotFound
from moe_lm.server.limits import Limits
from moe_lm.server.metrics import Metrics
from moe_lm.server.prompts import ChatTemplate, encode
from moe_lm.server.schemas import JsonObjectFormat, JsonSchemaFormat, Message, ResponseFormat
from moe_lm.server.tokens import TokenTexts
from moe_lm.server.worker import Worker

MOST_GRAMMARS = 32
"""Compiled schemas that are kept."""


class Service:
    """One model, served. `directory` is the model's, for its chat template; `name` what requests call it.

    Raises ConfigError for an engine without a tokenizer and for a template that cannot be.
    """

    def __init__(
        self, engine: Engine, name: str, directory: Path, limits: Limits, prepare: Callable[[], None] | None = None
    ):
        require(engine.tokenizer is not None, "a server needs the model's tokenizer: give the engine one.")
        self.engine, self.name, self.limits, self.created = engine, name, limits, int(time.time())
        self.tokenizer = engine.tokenizer
        self.texts = TokenTexts(self.tokenizer)
        self.template = ChatTemplate(directory)
        self.metrics = Metrics()
        self.worker = Worker(engine, limits, self.metrics, prepare)
        weights = [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in directory.glob("*.safetensors")
        ]
        described = repr((engine.target.model.config, sorted(weights), engine.describe()))
        self.fingerprint = f"fp_{hashlib.sha256(described.encode()).hexdigest()[:12]}"
        """OpenAI's system_fingerprint: while it stays, a seed gives the same text."""
        self.grammars: OrderedDict[str, Callable[[], TokenMask]] = OrderedDict()
        self.compiling = asyncio.Lock()

    def check_model(self, name: str | None) -> None:
        """Raises NotFound for a model that is not the one here."""
        if name not in (None, self.name):
            raise NotFound(
                f"there is no model {name[:100]!r} here: this server has {self.name!r}.", param="model",
                code="model_not_found",
            )  # fmt: skip

    def tokens(self, text: str, special: bool = True, param: str = "prompt") -> list[int]:
        """The tokens of a text, with those that the tokenizer puts around one if `special`. Raises ApiError, blaming
        `param`."""
        return encode(self.tokenizer, text, special, self.texts.longest, self.engine.context, param)

    def chat_tokens(self, messages: list[Message]) -> list[int]:
        # The template writes special tokens itself.
        return self.tokens(self.template.render(messages), special=False, param="messages")

    def start_token(self) -> int:
        """What stands before a document: the prompt where there is none. Raises ApiError if the tokenizer has none."""
        for name in (self.template.names.get("bos_token"), END_OF_TEXT):
            token = self.tokenizer.token_to_id(name) if name else None
            if token is not None:
                return token
        raise ApiError("the prompt is empty, and the tokenizer has no token that starts a text: give a prompt.",
                       param="prompt")  # fmt: skip

    def text(self, tokens: list[int], param: str = "tokens") -> str:
        """The text of tokens, special ones written out. Raises ApiError, blaming `param`, for ids that the model does
        not have."""
        bad = max(tokens, default=0)
        if bad >= self.engine.vocab_size:
            raise ApiError(f"{param} holds token id {bad}, outside 0 to {self.engine.vocab_size - 1}.", param=param)
        # Unlike decode, decode_batch lets other threads run.
        return self.tokenizer.decode_batch([tokens], skip_special_tokens=False)[0]

    def check(self, tokens: list[int], params: SamplingParams, param: str) -> None:
        """Raises ApiError, blaming `param` or the field that the engine names, for what it could never serve."""
        try:
            self.engine.check(tokens, params)
        except ContextError as error:
            raise ApiError(str(error), param=param, code="context_length_exceeded") from None
        except ConfigError as error:
            named = str(error).partition(" ")[0]
            raise ApiError(str(error), param=param if named == "the" else named, code="invalid_value") from None

    async def mask(self, form: ResponseFormat | None) -> Callable[[], TokenMask] | None:
        """What keeps an answer to a form. Raises ApiError for a schema that cannot be enforced."""
        if not isinstance(form, JsonObjectFormat | JsonSchemaFormat):
            return None
        schema: dict[str, Any] = form.json_schema.schema_ if isinstance(form, JsonSchemaFormat) else {"type": "object"}
        key = json.dumps(schema)
        # One at a time: compiling is the longest thing that a request can ask of the processor.
        async with self.compiling:
            if key not in self.grammars:
                end = tuple(self.engine.stop_ids) or None
                try:
                    self.grammars[key] = await asyncio.to_thread(grammar.json_schema, schema, self.tokenizer, end)
                except ConfigError as error:
                    raise ApiError(str(error), param="response_format", code="invalid_value") from None
                while len(self.grammars) > MOST_GRAMMARS:
                    self.grammars.popitem(last=False)
            self.grammars.move_to_end(key)
            return self.grammars[key]
