"""How many tokens each sequence guesses ahead in the next step: what was asked for, or what measures faster."""

from moe_lm.engine.controller import Acceptance, Controller, Report
from moe_lm.engine.sample import Sample
from moe_lm.engine.scheduler import Work
from moe_lm.engine.sequence import Sequence
from moe_lm.engine.verdict import Verdict

LONGEST = 16
"""What SamplingParams.draft_tokens allows."""


class DraftLengths:
    """Choices for one engine. `most` is the longest guess of a request that does not say."""

    def __init__(self, most: int, adaptive: bool):
        self.most, self.adaptive = most, adaptive
        self.controllers: dict[str, Controller] = {}
        """By kind of speculation."""
        self.acceptance: dict[Sequence, Acceptance] = {}
        self.chosen: dict[Sequence, int] = {}

    def choose(self, running: list[Sequence], samples: dict[Sequence, Sample]) -> None:
        """Decide for the sequences that have only their last token to compute."""
        decoding = [sequence for sequence in running if len(sequence.tokens) - sequence.computed == 1]
        kinds: dict[str, list[Sequence]] = {}
        for sequence in decoding:
            kinds.setdefault(samples[sequence].kind, []).append(sequence)
        kinds.pop("none", None)
        self.chosen = {}
        for kind, own in kinds.items():
            limits = [min(sequence.params.draft_tokens or self.most, sequence.most_drafts) for sequence in own]
            if self.adaptive:
                known = [self.acceptance_of(sequence, kind) for sequence in own]
                limits = self.controllers[kind].choose(known, limits, len(decoding) - len(own))
            self.chosen.update(zip(own, limits, strict=True))

    def __call__(self, sequence: Sequence) -> int:
        """What was chosen for a sequence."""
        return self.chosen.get(sequence, 0)

    def acceptance_of(self, sequence: Sequence, kind: str) -> Acceptance:
        if sequence not in self.acceptance:
            controller = self.controllers.setdefault(kind, Controller(LONGEST))
            self.acceptance[sequence] = controller.sequence()
        return self.acceptance[sequence]

    def record(
        self, works: list[Work], samples: list[Sample], verdicts: list[Verdict], seconds: float, drafting: float
    ) -> None:
        """What a step took in all and for drafting. Steps with prompt tokens in them say nothing."""
        if not self.adaptive or any(work.count > 1 or not work.samples for work in works):
            return
        kinds: dict[str, list[tuple[Acceptance, int, int]]] = {}
        for work, sample, verdict in zip(works, samples, verdicts, strict=True):
            if work.sequence in self.acceptance:
                counts = (self.acceptance[work.sequence], len(verdict.draft.tokens), verdict.accepted)
                kinds.setdefault(sample.kind, []).append(counts)
        for kind, counts in kinds.items():
            known, proposed, accepted = map(list, zip(*counts, strict=True))
            self.controllers[kind].record(known, proposed, accepted, seconds, drafting, len(works) - len(known))

    def reports(self) -> dict[str, Report]:
        """What each kind of speculation did and cost, as far as it was adaptive."""
        return {kind: controller.report() for kind, controller in self.controllers.items()}

    def forget(self, sequence: Sequence) -> None:
        self.acceptance.pop(sequence, None)
