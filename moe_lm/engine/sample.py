"""What the engine keeps for one sample beside its Sequence: text, penalties' counts, grammar, prompt lookup."""

from tokenizers import Tokenizer
from torch import Tensor

from moe_lm.engine.ngram import PromptLookup
from moe_lm.engine.request import Logprob, Output
from moe_lm.engine.sampler import Row, TokenCounts, cuts, logprobs
from moe_lm.engine.sequence import Sequence
from moe_lm.engine.text import TextStream


class Sample:
    """One sample of a request while it runs. `kind` is its way of speculation; `coupled` as in Row."""

    def __init__(
        self, sequence: Sequence, kind: str, vocab_size: int, tokenizer: Tokenizer | None, coupled: bool = False
    ):
        params = sequence.params
        self.sequence, self.kind, self.coupled = sequence, kind, coupled
        self.text = TextStream(tokenizer, params.stop) if tokenizer else None
        self.lookup = PromptLookup() if kind in ("ngram", "staged") else None
        self.mask = params.mask() if params.mask else None
        self.counts = TokenCounts(vocab_size, sequence.tokens) if params.penalised else None
        self.prompt_logprobs: list[Logprob | None] | None = None
        if params.prompt_logprobs is not None and sequence.index == 0:
            self.prompt_logprobs = [None]
        changed = params.penalised or params.logit_bias or self.mask
        self.is_plain = not changed and (params.temperature == 0 or not (coupled or cuts(params, vocab_size)))
        """Whether a token follows from its logits and the temperature alone: at 0 the likeliest, else one drawn."""

    def rows(self, drafted: list[int]) -> list[Row]:
        """How the tokens after the known ones and after each drafted one are drawn."""
        sequence, rows, passed = self.sequence, [], 0
        allowed = self.mask.allowed() if self.mask else None
        for i in range(len(drafted) + 1):
            position = len(sequence.tokens) + i
            rows.append(Row(sequence.params, position, sequence.index, self.counts, drafted[:i], allowed, self.coupled))
            if allowed is None or i == len(drafted):
                continue
            if drafted[i] < len(allowed) and allowed[drafted[i]]:
                self.mask.advance(drafted[i])
                passed += 1
                allowed = self.mask.allowed()
            else:
                allowed = None  # what follows a forbidden token is not looked at
        if passed:
            self.mask.rollback(passed)
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
        """Take new tokens up to the one that ends the sample, which are returned; their text and the end go into
        `output`."""
        sequence = self.sequence
        params, length = sequence.params, len(sequence.tokens) - sequence.prompt_length
        kept: list[int] = []
        for token in new:
            kept.append(token)
            if token in params.stop_token_ids or (token in stop_ids and not params.ignore_eos):
                output.finish_reason, output.stop_reason = "stop", token
                break
            if self.text:
                output.text += self.text.push([token])
                if self.text.stopped:
                    output.finish_reason, output.stop_reason = "stop", self.text.found
                    break
            if length + len(kept) == params.max_tokens:
                output.finish_reason = "length"
                break
            if self.mask:
                self.mask.advance(token)
                if not self.mask.allowed().any():
                    output.finish_reason = "stop"
                    break
        if self.counts:
            self.counts.add(kept)
        if output.finish_reason and self.text:
            output.text += self.text.finish()
        output.tokens = kept
        return kept
