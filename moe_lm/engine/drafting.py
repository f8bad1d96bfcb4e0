"""Tokens guessed ahead, which one step of the target verifies: by prompt lookup, by a draft model, or by both in turn.

V vocabulary, k drafted tokens.
"""

import torch
from torch import Tensor

from moe_lm.engine.batch import Piece
from moe_lm.engine.runner import Runner
from moe_lm.engine.sample import Sample
from moe_lm.engine.sampler import distributions, usable
from moe_lm.engine.speculative import IN_DRAFT, Draft, verify


class Drafter:
    """Guesses for many samples at once. `runner` holds the draft model; None where there is none."""

    def __init__(self, runner: Runner | None):
        self.runner = runner

    def read(self, ends: list[tuple[Sample, int]]) -> None:
        """Have the draft model read every sample's tokens up to the given position, without guessing."""
        todo = [(sample.sequence, end) for sample, end in ends if sample.sequence.draft_computed < end]
        if todo:
            self.runner.forward([
                Piece(sequence.tokens[sequence.draft_computed : end], sequence.draft_computed, sequence.blocks, 0)
                for sequence, end in todo
            ])  # fmt: skip
        for sequence, end in todo:
            sequence.draft_computed = end

    def propose(self, wanted: list[tuple[Sample, int]]) -> list[Draft]:
        """At most the given number of tokens for every sample, in its own way of speculation."""
        guesses = [Guess(sample, k) for sample, k in wanted]
        staged, active = True, [guess for guess in guesses if guess.open]
        while active:
            self.extend(active, staged)
            staged, active = False, [guess for guess in active if guess.open]
        return [guess.draft for guess in guesses]

    def extend(self, guesses: list["Guess"], staged: bool) -> None:
        """One pass of the draft model, which gives each guess one more token, or several where lookup helps it."""
        helps = [guess.help() if staged else [] for guess in guesses]
        pairs = list(zip(guesses, helps, strict=True))
        logits = self.runner.forward([guess.piece(help) for guess, help in pairs]).logits.cpu()
        rows = [row for guess, help in pairs for row in guess.sample.rows(guess.draft.tokens + help)[-len(help) - 1 :]]
        laws = distributions(logits, rows) if not all(row.is_decided for row in rows) else None
        ready, verdicts = usable(logits), verify(logits, [Draft(help) for help in helps], rows, IN_DRAFT, laws)
        start = 0
        for (guess, help), (count, token) in zip(pairs, verdicts, strict=True):
            end = start + len(help) + 1
            law = None if rows[start].is_decided else laws[start:end]
            guess.take(help[:count], token, law, all(ready[start:end]))
            start = end


class Guess:
    """One sample's draft in the making: at most k tokens, of a kind that needs the draft model while it is open."""

    def __init__(self, sample: Sample, k: int):
        self.sample, self.k = sample, k
        self.known = sample.sequence.draft_computed
        """Tokens, drafted ones included, whose keys and values the draft model's cache holds."""
        found = sample.lookup.propose(sample.sequence.tokens, k) if sample.kind == "ngram" else []
        self.draft = Draft(found, None, ["ngram"] * len(found))
        self.open = sample.kind != "ngram"

    def help(self) -> list[int]:
        """What prompt lookup guesses that the draft model will say."""
        sample = self.sample
        return sample.lookup.propose(sample.sequence.tokens, self.k - 1) if sample.kind == "staged" else []

    def piece(self, help: list[int]) -> Piece:
        sequence, drafted = self.sample.sequence, self.draft.tokens
        unread = drafted[max(0, self.known - len(sequence.tokens)) :]
        return Piece(sequence.tokens[self.known :] + unread + help, self.known, sequence.blocks, len(help) + 1)

    def take(self, helped: list[int], token: int, laws: Tensor | None, usable: bool) -> None:
        """Tokens of lookup that stood, and the draft model's own after them; laws (.., V) is what they are drawn from,
        None for a token that is decided. Logits that are not `usable` end the guess: the target goes on alone."""
        sequence, draft = self.sample.sequence, self.draft
        if not usable:
            self.open = False
            return
        self.known = len(sequence.tokens) + len(draft.tokens) + len(helped)
        draft.tokens += [*helped, token]
        draft.sources += ["ngram"] * len(helped) + ["draft"]
        if laws is not None:
            new = laws[: len(helped) + 1]
            draft.q = new if draft.q is None else torch.cat([draft.q, new])
        sequence.draft_computed = self.known
        self.open = len(draft.tokens) < self.k
