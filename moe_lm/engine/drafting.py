"""Tokens guessed ahead, which one step of the target verifies: by prompt lookup, by a draft model, or by both in turn.

V vocabulary, k drafted tokens.
"""

import torch
from torch import Tensor

from moe_lm.engine.batch import Piece
from moe_lm.engine.runner import Ahead, Runner
from moe_lm.engine.sample import Sample
from moe_lm.engine.sampler import cleared, distributions, usable
from moe_lm.engine.speculative import IN_DRAFT, Draft, verify
from moe_lm.engine.uniforms import uniform


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
        if helped := [guess for guess in guesses if guess.help]:
            self.extend(helped)
        if plain := [guess for guess in guesses if guess.open and guess.sample.is_plain]:
            self.follow(plain)
        while drawn := [guess for guess in guesses if guess.open]:
            self.extend(drawn)
        return [guess.draft for guess in guesses]

    def follow(self, guesses: list["Guess"]) -> None:
        """All that is left of guesses whose tokens follow from logits and temperature alone."""
        found = self.runner.guess([guess.piece() for guess in guesses], [guess.ahead() for guess in guesses])
        for guess, (tokens, laws) in zip(guesses, found, strict=True):
            guess.take(tokens, laws)
            guess.open = False

    def extend(self, guesses: list["Guess"]) -> None:
        """One pass of the draft model, which gives each guess one more token, or several where lookup helps it."""
        helps = [guess.help for guess in guesses]
        pairs = list(zip(guesses, helps, strict=True))
        logits = self.runner.forward([guess.piece() for guess in guesses]).logits.cpu()
        ready = usable(logits)
        logits = cleared(logits, ready)
        rows = [row for guess, help in pairs for row in guess.sample.rows(guess.draft.tokens + help)[-len(help) - 1 :]]
        laws = distributions(logits, rows) if not all(row.is_decided for row in rows) else None
        verdicts = verify(logits, [Draft(help) for help in helps], rows, IN_DRAFT, laws)
        start = 0
        for (guess, help), (count, token) in zip(pairs, verdicts, strict=True):
            end = start + len(help) + 1
            if all(ready[start:end]):
                guess.take([*help[:count], token], None if rows[start].is_decided else laws[start:end])
            else:
                guess.open = False
            start = end


class Guess:
    """One sample's draft in the making: at most k tokens, of a kind that needs the draft model while it is open."""

    def __init__(self, sample: Sample, k: int):
        self.sample, self.k, self.open = sample, k, sample.kind != "ngram"
        self.known = sample.sequence.draft_computed
        """Tokens, drafted ones included, whose keys and values the draft model's cache holds."""
        self.draft = Draft()
        self.help: list[int] = []
        """What prompt lookup guesses that the draft model will say, for its next pass."""
        if sample.kind == "ngram":
            tokens = sample.lookup.propose(sample.sequence.tokens, k)
            self.draft = Draft(tokens, None, ["ngram"] * len(tokens))
        elif sample.kind == "staged" and k > 1:
            self.help = sample.lookup.propose(sample.sequence.tokens, k - 1)

    def piece(self) -> Piece:
        """What the draft model has not read."""
        sequence, drafted = self.sample.sequence, self.draft.tokens
        unread = drafted[max(0, self.known - len(sequence.tokens)) :]
        tokens = sequence.tokens[self.known :] + unread + self.help
        return Piece(tokens, self.known, sequence.blocks, len(self.help) + 1)

    def ahead(self) -> Ahead:
        """What is left to guess, drawn by the numbers that `extend` would use."""
        sequence, first = self.sample.sequence, len(self.sample.sequence.tokens) + len(self.draft.tokens)
        params, count = sequence.params, self.k - len(self.draft.tokens)
        if params.temperature == 0:
            return Ahead(count)
        places = range(first, first + count)
        uniforms = tuple(uniform(params.seed, sequence.index, place, IN_DRAFT.sample) for place in places)
        return Ahead(count, params.temperature, uniforms)

    def take(self, tokens: list[int], laws: Tensor | None) -> None:
        """What the draft model says, all but the last of it read; laws (.., V) is what its first tokens are drawn from,
        None where they are decided."""
        sequence, draft = self.sample.sequence, self.draft
        if not tokens:
            return
        draft.tokens += tokens
        draft.sources += ["ngram"] * min(len(self.help), len(tokens) - 1)
        draft.sources += ["draft"] * (len(draft.tokens) - len(draft.sources))
        if laws is not None:
            new = laws[: len(tokens)]
            draft.q = new if draft.q is None else torch.cat([draft.q, new])
        self.known = sequence.draft_computed = len(sequence.tokens) + len(draft.tokens) - 1
        self.help, self.open = [], len(draft.tokens) < self.k
