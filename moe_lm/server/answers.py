"""What the engine gave, in the form that the API has for it: a choice at a time, in one piece or in many.

A choice is fed outputs and says each time what is new in them. Fed with all of them joined, that is the whole answer;
so a stream and an answer in one piece cannot differ.
"""

import math
from typing import Any

from moe_lm.engine import Logprob, Output
from moe_lm.server.schemas import TOKEN_DETAILS_TOP, ChatRequest, CompletionRequest, Generation
from moe_lm.server.tokens import Offsets, TokenTexts

LEAST = -9999.0
"""What JSON, which has no infinity, says for the log-probability of what cannot be; as OpenAI does."""


class Prompt:
    """One prompt of a request: what its choices have in common."""

    def __init__(self, request: Generation, tokens: list[int], text: str, texts: TokenTexts):
        self.request, self.tokens, self.text, self.texts = request, tokens, text, texts
        self.logprobs: list[Logprob | None] | None = None
        """Of its tokens, once the first output of its first sample has them."""
        self.cached = 0

    def read(self, output: Output) -> None:
        """Take what an output says of the prompt."""
        self.logprobs = self.logprobs or output.prompt_logprobs
        self.cached = self.cached or output.cached or 0

    def shown_logprobs(self) -> list[dict[str, Any] | None]:
        """The extension prompt_logprobs: by token id, the prompt's own token and the likeliest ones."""
        return [each and {
            str(token): {"logprob": finite(value), "decoded_token": self.texts.shown(token)}
            for token, value in ((each.token, each.logprob), *each.top)
        } for each in self.logprobs or []]  # fmt: skip


class Choice:
    """One sample. `index` is its place in the answer."""

    def __init__(self, prompt: Prompt, index: int):
        self.prompt, self.index, self.texts, self.begun = prompt, index, prompt.texts, False
        self.tokens = 0

    def piece(self, output: Output) -> dict[str, Any]:
        """What is new, in the fields that both kinds of answer have."""
        self.tokens += len(output.tokens)
        piece: dict[str, Any] = {"index": self.index}
        request = self.prompt.request
        if request.prompt_logprobs is not None and not self.begun:
            piece["prompt_logprobs"] = self.prompt.shown_logprobs()
        if request.token_details:
            piece["token_details"] = [self.details(output, i) for i in range(len(output.tokens))]
        self.begun = True
        return piece | {"finish_reason": output.finish_reason}

    def details(self, output: Output, i: int) -> dict[str, Any]:
        token, texts, logprob = output.tokens[i], self.texts, output.logprobs[i]
        return {
            "id": token, "text": texts.shown(token), "bytes": list(texts.of(token)), "source": output.sources[i],
            "logprob": finite(logprob.logprob),
            "top": [
                {"id": other, "text": texts.shown(other), "logprob": finite(value)}
                for other, value in logprob.top[:TOKEN_DETAILS_TOP]
            ],
            "experts": output.experts[i],
        }  # fmt: skip


class CompletionChoice(Choice):
    """A choice of /v1/completions."""

    def __init__(self, prompt: Prompt, index: int):
        super().__init__(prompt, index)
        self.offsets = Offsets(prompt.texts)

    def read(self, output: Output) -> dict[str, Any]:
        request: CompletionRequest = self.prompt.request
        first = not self.begun
        text = self.prompt.text + output.text if first and request.echo else output.text
        logprobs = None if request.logprobs is None else self.logprobs(output, first)
        return {"text": text, "logprobs": logprobs} | self.piece(output)

    def logprobs(self, output: Output, first: bool) -> dict[str, list]:
        known: list[Logprob | None] = list(output.logprobs)
        tokens, offsets = list(output.tokens), []
        if first and self.prompt.request.echo:
            known, tokens = (self.prompt.logprobs or []) + known, self.prompt.tokens + tokens
            offsets = self.offsets.of_prompt(self.prompt.tokens)
        most, named = self.prompt.request.logprobs, self.texts.named
        return {
            "tokens": [named(token) for token in tokens],
            "token_logprobs": [each and finite(each.logprob) for each in known],
            # The token itself is always among them, so that they may be one more than asked for.
            "top_logprobs": [each and {
                named(token): finite(value) for token, value in (*each.top[:most], (each.token, each.logprob))
            } for each in known],
            "text_offset": offsets + self.offsets.of_output(output.tokens),
        }  # fmt: skip


class ChatChoice(Choice):
    """A choice of /v1/chat/completions."""

    def read(self, output: Output) -> dict[str, Any]:
        request: ChatRequest = self.prompt.request
        logprobs = None
        if request.logprobs:
            logprobs = {"content": [self.logprob(each) for each in output.logprobs], "refusal": None}
        return {"content": output.text, "logprobs": logprobs} | self.piece(output)

    def logprob(self, each: Logprob) -> dict[str, Any]:
        top = each.top[: self.prompt.request.top_logprobs or 0]
        return self.entry(each.token, each.logprob) | {"top_logprobs": [self.entry(*other) for other in top]}

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.texts.named(token), "logprob": finite(logprob), "bytes": list(self.texts.of(token))}


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST


def usage(prompts: list[Prompt], choices: list[Choice]) -> dict[str, Any]:
    """What a request took, in tokens: those of end-of-text and of stop strings are counted too."""
    read, written = sum(len(prompt.tokens) for prompt in prompts), sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(prompt.cached for prompt in prompts)},
    }
