"""What the logits of a step say of each sequence in it.

V vocabulary.
"""

from dataclasses import dataclass, field

from torch import Tensor

from moe_lm.engine.request import Output
from moe_lm.engine.sample import Sample
from moe_lm.engine.sampler import cleared, logprobs, usable
from moe_lm.engine.scheduler import Work
from moe_lm.engine.speculative import Draft, verify


@dataclass
class Verdict:
    """New tokens of one sample; none where the work does not sample."""

    draft: Draft = field(default_factory=Draft)
    tokens: list[int] = field(default_factory=list)
    """Guessed tokens that stand and the one after them, as far as their logits can be drawn from."""
    logits: Tensor | None = None
    """What each of them was judged by, float32 (len(tokens), V)."""
    failed: bool = False
    """Whether the next token's logits are not finite."""
    experts: list[list[list[int]]] = field(default_factory=list)
    """Of the passes that gave the tokens, (len(tokens), L, K), where the request asks for them."""

    @property
    def accepted(self) -> int:
        """Guessed tokens that stand."""
        return len(self.tokens) - (not self.failed)

    def report(self, output: Output, top: int | None) -> None:
        """Add what is asked for about the output's tokens, which may be fewer."""
        count = len(output.tokens)
        output.sources = [*self.draft.sources[: self.accepted], "target"][:count]
        output.experts = self.experts[:count]
        if top is not None and count:
            output.logprobs = logprobs(self.logits[:count], output.tokens, [top] * count)


def judge(
    works: list[Work], samples: list[Sample], drafts: list[Draft], wanted: list[int], logits: Tensor
) -> list[Verdict]:
    """One verdict for each work, given the logits of its `wanted` last rows, (sum of wanted, V)."""
    rows, chosen, sampling, end = [], [], [], 0
    for work, sample, draft, count in zip(works, samples, drafts, wanted, strict=True):
        if sample.wants_prompt_logprobs(work.start + work.count):
            sample.read_prompt_logprobs(logits[end : end + work.count], work.start)
        end += count
        if work.samples:
            rows += sample.rows(draft.tokens)
            chosen += range(end - len(draft.tokens) - 1, end)
            sampling.append(draft)
    if len(chosen) < logits.shape[0]:
        logits = logits[chosen]
    ready = usable(logits) if rows else []
    found, first, verdicts = iter(verify(cleared(logits, ready), sampling, rows)), 0, []
    for work, draft in zip(works, drafts, strict=True):
        if not work.samples:
            verdicts.append(Verdict())
            continue
        count, token = next(found)
        good = ready[first : first + count + 1]
        new = [*draft.tokens[:count], token]
        # A guess that stands on logits of zeros, put in for bad ones, does not.
        new = new if all(good) else new[: good.index(False)]
        verdicts.append(Verdict(draft, new, logits[first : first + len(new)], not all(good)))
        first += len(draft.tokens) + 1
    return verdicts


def note_experts(works: list[Work], verdicts: list[Verdict], experts: Tensor) -> None:
    """Give each verdict the experts that its tokens came from, if asked for, of those (M, N, K) that the step chose."""
    end = 0
    for work, verdict in zip(works, verdicts, strict=True):
        first = end + work.count - 1
        end += work.count + len(verdict.draft.tokens)
        if work.sequence.params.experts:
            verdict.experts = experts[:, first : first + len(verdict.tokens)].transpose(0, 1).tolist()
