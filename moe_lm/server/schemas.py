"""The requests of the API: the fields of OpenAI's reference that are implemented, and extensions, each marked as one.

What a field of the reference means is said there (platform.openai.com/docs/api-reference); what differs is said here.
None of these classes takes a field that it does not have, nor a value of another type.
"""

import difflib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from moe_lm.engine.request import MOST_LOGPROBS, MOST_SAMPLES, MOST_STOPS, SPECULATIONS

MOST_NAME = 256
MOST_MESSAGES = 4096
MOST_BIASES = 4096
MOST_PROMPTS = 4096
MOST_TOKENS = 1 << 20
"""Of one call of /detokenize."""
MOST_IN_SCHEMA = {
    "values": 4096, "characters": 1 << 15, "properties": 400, "entries of allOf": 16
}  # fmt: skip
"""Of a JSON schema as a whole. Compiling 3000 properties takes llguidance 5 s, and from 500 in one object on its rows
exceed what it follows; an allOf of 60 patterns took more than a minute, one of 20 two seconds."""
MOST_TOP = 20
"""Alternatives of a token that OpenAI's reference allows in a chat; completions take as many here, 5 there."""
TOKEN_DETAILS_TOP = 5

Text = Annotated[str, Field(strict=True)]
Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Name = Annotated[str, Field(max_length=MOST_NAME)]
Number = Annotated[float, Field(allow_inf_nan=False)]
FILLED = Field(min_length=1, fail_fast=True)
"""Of a list. One error is told, and millions of them would take half a minute to collect."""
Speculation = Literal[SPECULATIONS]


class Part(BaseModel):
    """What every class of this file is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    NOT_IMPLEMENTED: ClassVar[tuple[str, ...]] = ()
    """Fields of OpenAI's reference that are refused, by name, unless they are null."""

    @model_validator(mode="before")
    @classmethod
    def refuse_what_is_not_there(cls, data: Any) -> Any:
        """The object without what it need not say; an error for a field that would have to be ignored."""
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if value is not None or name not in cls.NOT_IMPLEMENTED}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name in data:
            if name in cls.NOT_IMPLEMENTED:
                raise PydanticCustomError("unsupported_parameter", "is not implemented by this server", {"name": name})
            if name not in known:
                raise PydanticCustomError("unknown_parameter", closest(name, known), {"name": name})
        return data


def closest(name: str, known: set[str]) -> str:
    found = difflib.get_close_matches(name[:MOST_NAME], known, n=1)
    return "is not a parameter here" + (f": did you mean {found[0]}?" if found else "")


class StreamOptions(Part):
    NOT_IMPLEMENTED = ("include_obfuscation",)

    include_usage: bool | None = Field(None, description="A last chunk with the usage of the whole request.")


class TextFormat(Part):
    type: Literal["text"]


class JsonObjectFormat(Part):
    type: Literal["json_object"]


def few(biases: Any) -> Any:
    # Here, because the keys of millions are all looked at before they are counted.
    if isinstance(biases, dict) and len(biases) > MOST_BIASES:
        raise PydanticCustomError("too_long", "", {"max_length": MOST_BIASES})
    return biases


def modest(schema: Any) -> Any:
    """A JSON schema within MOST_IN_SCHEMA."""
    found, left = dict.fromkeys(MOST_IN_SCHEMA, 0), [schema]
    while left:
        value = left.pop()
        found["values"] += 1
        if isinstance(value, dict):
            found["characters"] += sum(map(len, value))
            for name, what in (("properties", "properties"), ("allOf", "entries of allOf")):
                if isinstance(value.get(name), dict | list):
                    found[what] += len(value[name])
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str):
            found["characters"] += len(value)
        for what, most in MOST_IN_SCHEMA.items():
            if found[what] > most:
                raise PydanticCustomError("schema_too_large", "", {"what": what, "most": most})
    return schema


class JsonSchema(Part):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    schema_: Annotated[dict[str, Any], BeforeValidator(modest)] = Field(
        alias="schema", description="Keywords that cannot be enforced are refused."
    )
    description: str | None = None
    strict: bool | None = Field(None, description="Enforced either way.")


class JsonSchemaFormat(Part):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Generation(Part):
    """What completions and chat completions have in common."""

    model: Name = Field(description="The model that this server has, as /v1/models names it.")
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="The same seed, the same text, whatever is guessed ahead."
    )
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Number] | None, BeforeValidator(few)
    ] = Field(None, json_schema_extra={"maxProperties": MOST_BIASES})
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: Name | None = Field(None, description="Named in the server's log.")
    top_k: int | None = Field(None, ge=0, lt=2**31, description="Extension: only the k likeliest tokens; 0 keeps all.")
    min_p: Number | None = Field(None, ge=0, le=1, description="Extension: least share of the likeliest one's.")
    repetition_penalty: Number | None = Field(
        None, gt=0, le=100, description="Extension: for tokens in prompt or output."
    )
    stop_token_ids: list[Token] | None = Field(
        None, max_length=1024, fail_fast=True, description="Extension: tokens that end it."
    )
    ignore_eos: bool | None = Field(None, description="Extension: end tokens are tokens like any other.")
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="Extension: of the prompt's tokens.")
    speculation: Speculation | None = Field(None, description="Extension: how tokens are guessed ahead.")
    draft_tokens: int | None = Field(None, ge=1, le=16, description="Extension: most tokens guessed at a time.")
    token_details: bool | None = Field(None, description="Extension: what is known of each token.")


class CompletionRequest(Generation):
    NOT_IMPLEMENTED = ("best_of", "suffix")

    prompt: (
        Text | Annotated[list[Token], FILLED] | Annotated[list[Text], FILLED, Field(max_length=MOST_PROMPTS)]
        | Annotated[list[Annotated[list[Token], FILLED]], FILLED, Field(max_length=MOST_PROMPTS)] | None
    ) = Field(None, description="Text, token ids, or a list of either; nothing starts a document.")  # fmt: skip
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="16 by default; 0 to look at the prompt alone.")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)


class ContentPart(Part):
    type: Literal["text"]
    text: Text


class Message(Part):
    NOT_IMPLEMENTED = ("audio", "function_call", "refusal", "tool_call_id", "tool_calls")

    role: Literal["developer", "system", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], FILLED, Field(max_length=MOST_MESSAGES)]
    name: Name | None = Field(None, description="Handed to the model's chat template.")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Generation):
    NOT_IMPLEMENTED = (
        "audio", "function_call", "functions", "metadata", "modalities", "moderation", "parallel_tool_calls",
        "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "reasoning_effort",
        "safety_identifier", "service_tier", "store", "tool_choice", "tools", "verbosity", "web_search_options",
    )  # fmt: skip

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="What the context leaves, by default.")
    max_completion_tokens: int | None = Field(None, ge=0, lt=2**31, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)


class TokenizeRequest(Part):
    """Exactly one of prompt and messages."""

    model: Name | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    add_special_tokens: bool | None = Field(None, description="Of a prompt; true by default, as in completions.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Part):
    model: Name | None = None
    tokens: list[Token] = Field(max_length=MOST_TOKENS, fail_fast=True)
