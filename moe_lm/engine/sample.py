"""What the engine keeps for one sample beside its Sequence: text, penalties' counts, grammar, prompt lookup."""

from collections.abc import Callable
from typing import TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moe_lm.engine.ngram import PromptLookup
from moe_lm.engine.request import Logprob, Output, TokenMask
from moe_lm.engine.sampler import Row, TokenCounts, cuts, logprobs
from moe_lm.engine.sequence import Sequence
from moe_lm.engine.text import TextStream

T = TypeVar("T")


class Sample:
    """One sample of a request while it runs. `kind` is its way of speculation; `coupled` as in Row.

    `error` is a sentence once the request's own mask or the decoding of its text has failed, and `cause` what was
    raised there, if anything was. The step then goes on for the others, and ends this request.
    """

    def __init__(
        self, sequence: Sequence, kind: str, vocab_size: int, tokenizer: Tokenizer | None, coupled: bool = False
    ):
        params = sequence.params
        self.sequence, self.kind, self.coupled, self.vocab_size = sequence, kind, coupled, vocab_size
        self.error: str | None = None
        self.cause: Exception | None = None
        self.cached: int | None = None
        """Of the first start, until it is reported."""
        self.verified = False
        """Whether the last step verified a draft."""
        self.text = TextStream(tokenizer, params.stop) if tokenizer else None
        self.lookup = PromptLookup() if kind in ("ngram", "staged") else None
        self.mask = self.attempt("making the mask", params.mask) if params.mask else None
        self.counts = TokenCounts(vocab_size, sequence.tokens) if params.penalised else None
        self.prompt_logprobs: list[Logprob | None] | None = None
        if params.prompt_logprobs is not None and sequence.index == 0:
            self.prompt_logprobs = [None]
        changed = params.penalised or params.logit_bias or self.mask
        self.is_plain = not changed and (params.temperature == 0 or not (coupled or cuts(params, vocab_size)))
        """Whether a token follows from its logits and the temperature alone: at 0 the likeliest, else one drawn."""

    def attempt(self, what: str, call: Callable[..., T], *args) -> T | None:
        """What a request's own code gives, named `what` in the error; None once anything of it has failed."""
        if self.error is None:
            try:
                return call(*args)
            except Exception as cause:
                self.cause, self.error = cause, f"{what} failed: {type(cause).__name__}: {cause}."
        return None

    def allowed(self) -> Tensor | None:
        """Tokens that may come next, bool (V,) or shorter; None where none may, or the mask has failed."""
        return self.attempt("the mask's allowed", read_mask, self.mask, self.vocab_size)

    def rows(self, drafted: list[int]) -> list[Row]:
        """How the tokens after the known ones and after each drafted one are drawn."""
        sequence, rows, passed = self.sequence, [], 0
        allowed = self.allowed() if self.mask else None
        if self.mask and allowed is None:
            self.error = self.error or "the mask allows no token to come next."
        for i in range(len(drafted) + 1):
            position = len(sequence.tokens) + i
            rows.append(Row(sequence.params, position, sequence.index, self.counts, drafted[:i], allowed, self.coupled))
            if allowed is None or i == len(drafted):
                continue
            if drafted[i] < len(allowed) and allowed[drafted[i]]:
                self.attempt("the mask's advance", self.mask.advance, drafted[i])
                passed += 1
                allowed = self.allowed()
            else:
                allowed = None
            # None: what follows a forbidden token, or the end of the text, is not looked at.
        if passed:
            self.attempt("the mask's rollback", self.mask.rollback, passed)
        return rows

    def wants_prompt_logprobs(self, end: int) -> bool:
        """Whether logits of the known tokens up to position `end` give some that are not there yet."""
        known = self.prompt_logprobs
        return known is not None and len(known) < min(end + 1, self.sequence.prompt_length)

    def read_prompt_logprobs(self, logits: Tensor, start: int) -> None:
        """Take those that the logits (n, V) after the tokens from position `start` on give."""
        sequence, known = self.sequence, self.prompt_logprobs
        end = min(start + len(logits) + 1, sequence.prompt_length)
        tokens = sequence.tokens[len(known) : end]
        top = [sequence.params.prompt_logprobs] * len(tokens)
        known += logprobs(logits[len(known) - 1 - start : end - 1 - start], tokens, top)

    def take_prompt_logprobs(self) -> list[Logprob | None] | None:
        """All of them, once."""
        taken, self.prompt_logprobs = self.prompt_logprobs, None
        return taken

    def push(self, new: list[int], stop_ids: frozenset[int], output: Output) -> list[int]:
        """Take new tokens up to the one that ends the sample, none once there is an error, which are returned; their
        text and the end go into `output`."""
        sequence = self.sequence
        params, length = sequence.params, len(sequence.tokens) - sequence.prompt_length
        kept: list[int] = []
        for token in new:
            if self.error:
                break
            kept.append(token)
            if token in params.stop_token_ids or (token in stop_ids and not params.ignore_eos):
                output.finish_reason, output.stop_reason = "stop", token
                break
            if self.text:
                output.text += self.attempt("decoding the text", self.text.push, [token]) or ""
                if self.text.stopped:
                    output.finish_reason, output.stop_reason = "stop", self.text.found
                    break
            if length + len(kept) == params.max_tokens:
                output.finish_reason = "length"
                break
            if self.mask:
                self.attempt("the mask's advance", self.mask.advance, token)
                if self.allowed() is None:
                    output.finish_reason = "stop"
                    break
        if self.counts:
            self.counts.add(kept)
        if output.finish_reason and self.text:
            output.text += self.text.finish()
        output.tokens = kept
        return kept


def read_mask(mask: TokenMask, vocab_size: int) -> Tensor | None:
    """What a mask allows, None for nothing. Raises TypeError where that is not what the sampler can apply."""
    allowed = mask.allowed()
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool or allowed.dim() != 1:
        raise TypeError(f"it gave {allowed!r}, not a bool tensor of one dimension")
    if len(allowed) > vocab_size:
        raise TypeError(f"it gave {len(allowed)} entries for a vocabulary of {vocab_size}")
    return allowed if allowed.any() else None
