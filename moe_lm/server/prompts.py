"""From what a request asks to continue to the model's tokens."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from moe_lm.config import ConfigError
from moe_lm.server.errors import ApiError
from moe_lm.server.schemas import Message

PLAIN = """\
{%- for message in messages -%}
{{ message.role | capitalize }}: {{ message.content | trim }}

{% endfor -%}
Assistant:"""
PLAIN_STOPS = ("\nUser:", "\nSystem:", "\nDeveloper:")
"""Where an answer ends that the model, which knows of no turns, goes on from: before the next turn's name."""


TEMPLATE_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""What the code of a template can raise, such as LookupError in '{x}'.format()."""


class ChatTemplate:
    """How the turns of a chat become one text: the model's own way, or a plain one where it has none.

    `directory` is the model's; its chat_template.jinja or the chat_template in its tokenizer_config.json is a Jinja
    template as transformers has them, run in Jinja's sandbox. Raises ConfigError for one that is no template.
    """

    def __init__(self, directory: Path):
        settings = read_settings(directory)
        own = own_template(directory, settings)
        self.stops: tuple[str, ...] = () if own else PLAIN_STOPS
        self.is_plain = own is None
        self.names = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in settings.items()
            if name.endswith("_token") and isinstance(value, dict | str)
        }
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self.template = environment.from_string(own or PLAIN)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template of {directory} is no Jinja template: {error}.") from error

    def render(self, messages: list[Message]) -> str:
        """The text of a chat up to where the assistant's answer begins. Raises ApiError where the template refuses."""
        turns = [{"role": each.role, "content": each.text} | ({"name": each.name} if each.name else {})
                 for each in messages]  # fmt: skip
        values: dict[str, Any] = {"messages": turns, "add_generation_prompt": True, "tools": None, "documents": None}
        try:
            return self.template.render(**self.names, **values)
        except TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())[:300].rstrip(".") or "it gives no reason"
            raise ApiError(f"the model's chat template refuses these messages: {reason}.", param="messages") from error


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def read_settings(directory: Path) -> dict[str, Any]:
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}.") from error
    return settings if isinstance(settings, dict) else {}


def own_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The model's template; of several, the one named default."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = next((each["template"] for each in found if each.get("name") == "default"), None)
    return found


def split_prompts(prompt: str | list | None) -> list[str | list[int]]:
    """The prompts of a completion one by one; an empty text where there is none."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


def encode(tokenizer: Tokenizer, text: str, special: bool, longest: int, context: int, param: str) -> list[int]:
    """The tokens of a text. Raises ApiError at once, blaming `param`, for one that cannot fit: megabytes would take
    seconds."""
    least = -(-len(text.encode()) // longest)
    if least > context and tokenizer.normalizer is None:
        raise ApiError(
            f"the prompt has {len(text)} characters, at least {least} tokens, more than the context of {context}; "
            "shorten it.", param=param, code="context_length_exceeded",
        )  # fmt: skip
    # Unlike encode, encode_batch lets other threads run.
    return tokenizer.encode_batch([text], add_special_tokens=special)[0].ids
