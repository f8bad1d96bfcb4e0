"""How many tokens to guess ahead, so that speculation is never slower than leaving it out. Plain Python, no clock.

Verifying k tokens costs more than decoding one: in a mixture of experts the more, the more experts they touch. Whether
the tokens gained pay for it depends on machine, model, batch size and text, so it is measured: how long steps of each
size take, and how often the guess at each place stands.
"""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from operator import mul, neg

from moe_lm.engine.step_costs import StepCosts, bucket

FORGET = 0.95
"""What one step leaves of the weight of the steps before it, in one sequence's acceptance: a memory of 20 steps."""
FORGET_SHARED = 0.98
"""The same for all sequences of a kind together: 50 guesses."""
PRIOR_WEIGHT = 4.0
"""How many of its own guesses count as much as what the sequences before it have shown."""
SHORTEST_PAUSE, LONGEST_PAUSE = 33, 264
"""Steps between two probes: at first 3% of all, then ever fewer while probing brings nothing."""
RICH_PAUSE = 8
"""The same where nothing is guessed now, but guessing has gained more than it lost: stopping may be a mistake, as step
times and acceptance are noise in part."""
LOSS = 0.008
"""The share of all time that speculation may have lost before probing stops, beside ALLOWANCE plain steps' worth."""
MEMORY = 0.999
"""What one step leaves of what was lost and taken before it: a probe that met a busy machine is not held against
speculation for ever."""
SPIKE = 1.5
"""How many times what such steps usually take counts as lost at most: the rest is other work's."""
ALLOWANCE = 12
BANK = 40
"""Plain steps' worth of what speculation gained that may be lost again while a change of text is found out."""
MARGIN = 1.02
"""How many times faster speculation must promise to be; below that it is noise."""
PROBE = 3
"""Steps of a probe. The first finds the draft model's weights and all that guessing runs out of the processor's caches,
which took a third more on the nano pair: its time is not kept."""
SURPRISE = 0.25
"""A probe in which so many more first guesses stood than expected is followed by another at once."""
HOLD = 4
"""Steps of the same sequences for which a choice holds: choosing for 16 sequences takes 0.3 ms."""
LONGEST_HOLD = 32
"""The same where the choice is to guess nothing."""
PATIENCE = 8
"""Steps of a batch that may go by what another one showed before its own plain steps are measured."""


class Acceptance:
    """How often guesses at each place stand, in one sequence: what it saw, and before that what others of its kind saw.

    Places count from 0; place i has a rate among the guesses whose earlier places stood.
    """

    def __init__(self, k_max: int, shared: "Acceptance | None" = None, forget: float = FORGET):
        self.shared, self.forget = shared, forget
        self.reached, self.stood = [0.0] * k_max, [0.0] * k_max

    def record(self, proposed: int, accepted: int) -> None:
        """Of `proposed` guesses in a row the first `accepted` stood."""
        for place in range(min(proposed, accepted + 1)):
            self.reached[place] = self.reached[place] * self.forget + 1
            self.stood[place] = self.stood[place] * self.forget + (place < accepted)

    def rates(self, prior: list[float] | None = None) -> list[float]:
        """The chance that the guess at each place stands if all before it did.

        prior: the shared rates, if known already.
        """
        if self.shared is None:
            # With nothing to go by, half of the first guesses stand, and at later places what the place before has.
            rates, rate = [], 0.5
            for reached, stood in zip(self.reached, self.stood, strict=True):
                rate = (stood + PRIOR_WEIGHT * rate) / (reached + PRIOR_WEIGHT)
                rates.append(rate)
            return rates
        return [
            (stood + PRIOR_WEIGHT * before) / (reached + PRIOR_WEIGHT)
            for reached, stood, before in zip(self.reached, self.stood, prior or self.shared.rates(), strict=True)
        ]


@dataclass
class Report:
    """What one kind of speculation did so far."""

    proposed_at: list[int]
    """Guessed tokens that were verified, by place."""
    accepted_at: list[int]
    """Those that stood."""
    acceptance_at: list[float]
    """Accepted share of those proposed at each place, 0 where there were none."""
    tokens_per_step: float
    """New tokens that one step gave one sequence, in the mean."""
    cost_ratio: float | None
    """Seconds of the steps that verified over what plain steps of the same batch take; None while not known."""
    probes: int
    """Steps that were taken with another length than the best known, to learn."""
    steps: int


@dataclass
class Plan:
    """A draft length for each sequence of a step, and what is expected of it."""

    k: int
    lengths: list[int]
    tokens: float
    """Expected new tokens of these sequences."""
    times: float | None
    """Expected time, in plain steps of the batch; None where a step of that size is not known."""

    def rate(self) -> float:
        """New tokens in the time of a plain step."""
        return self.tokens / self.times


class Controller:
    """Chooses draft lengths for one kind of speculation (`ngram`, `draft` or `staged`).

    Before each step ask `choose`, then guess and verify, and tell `record` what it took. Steps with prompt tokens in
    them are left out of both. Each sequence has an `Acceptance`, made by `sequence`.
    """

    def __init__(self, k_max: int):
        assert k_max >= 1
        self.k_max = k_max
        self.shared = Acceptance(k_max, forget=FORGET_SHARED)
        self.costs = StepCosts()
        self.lost = self.total = 0.0
        """Plain steps' worth of time that speculation took beyond what plain steps take for the same tokens (below 0:
        what it gained, up to BANK), and that all steps took."""
        self.pause, self.waited, self.turn = SHORTEST_PAUSE, 0, 0
        self.held: tuple[list[Acceptance], int, list[int]] | None = None
        """Sequences, others and lengths of a choice that still holds, for `holds` more steps."""
        self.holds = 0
        self.guessing = self.cold = False
        """Whether the last step was to guess, and was the first one to do so."""
        self.expected: float | None = None
        """In a probe: the first guesses that should stand, as a share."""
        self.stood: list[bool] = []
        """In a probe: whether the first guesses so far stood."""
        self.proposed_at, self.accepted_at = [0] * k_max, [0] * k_max
        self.steps = self.probes = self.sequence_steps = self.new_tokens = 0
        self.verify_seconds = self.plain_seconds = 0.0

    def sequence(self) -> Acceptance:
        """What a new sequence starts with."""
        return Acceptance(self.k_max, self.shared)

    def choose(self, sequences: list[Acceptance], limits: list[int] | None = None, others: int = 0) -> list[int]:
        """How many tokens to guess for each sequence of the coming step.

        limits: most for each, as by the tokens that it may still have; None for k_max. others: sequences in the step
        that bring one token each and are not asked about.
        """
        limits = [self.k_max if limits is None else min(limit, self.k_max) for limit in limits or sequences]
        lengths = self.decide(sequences, limits, others)
        self.cold, self.guessing = any(lengths) and not self.guessing, any(lengths)
        return lengths

    def decide(self, sequences: list[Acceptance], limits: list[int], others: int) -> list[int]:
        """`choose` with all limits at hand."""
        count, batch = len(sequences), len(sequences) + others
        if self.holds and self.held[:2] == (sequences, others):
            self.holds -= 1
            self.waited += 1
            return [min(length, limit) for length, limit in zip(self.held[2], limits, strict=True)]
        self.holds, self.expected, self.stood = 0, None, []
        if not self.costs.near(batch) or not any(limits):
            return [0] * count
        prior = self.shared.rates()
        rates = [each.rates(prior) for each in sequences]
        plans = self.plans(rates, limits, batch)
        known = [plan for plan in plans if plan.times is not None]
        best = max(known, key=Plan.rate)
        if best.rate() < MARGIN * count:
            best = plans[0]
        if best.k:
            self.pause = SHORTEST_PAUSE
        self.waited += 1
        probe = self.probe(plans, best, batch)
        if probe is None:
            # Where nothing is guessed nothing is learned, so there is nothing new to decide before a probe is due.
            learned = len(known) == len(plans) and not best.k
            holds = min(max(HOLD, self.due() - self.waited), LONGEST_HOLD) if learned else HOLD
            self.held, self.holds = (list(sequences), others, best.lengths), holds - 1
            return best.lengths
        self.waited, self.turn, self.probes = 0, self.turn + 1, self.probes + 1
        self.expected = sum(rate[0] for rate in rates) / count
        # All take part, those too that would stop short: else what they accept would never be seen again.
        lengths = [min(probe.k, limit) for limit in limits]
        self.held, self.holds = (list(sequences), others, lengths), PROBE - 1
        return lengths

    def plans(self, rates: list[list[float]], limits: list[int], batch: int) -> list[Plan]:
        """One plan for each draft length from 0 to the longest limit.

        A sequence stops short of the others where its next guess would bring less than plain steps do in that time.
        """
        count = len(rates)
        survival = [list(accumulate(each, mul)) for each in rates]
        longest = self.costs.step_times(batch, batch + count * self.k_max)
        worth = (longest - 1) / self.k_max if longest is not None else 0.0
        # The chances fall from place to place, so those above `worth` come first.
        wanted = [
            min(most, bisect_left(chances, -worth, key=neg)) for most, chances in zip(limits, survival, strict=True)
        ]
        # Where that leaves nobody, there must still be plans to probe.
        wanted = wanted if any(wanted) else limits
        plans, tokens = [Plan(0, [0] * count, count, 1.0)], float(count)
        for k in range(1, max(wanted) + 1):
            tokens += sum([row[k - 1] for row, most in zip(survival, wanted, strict=True) if most >= k])
            lengths = [k if k < most else most for most in wanted]
            plans.append(Plan(k, lengths, tokens, self.costs.times(batch, batch + sum(lengths), max(lengths))))
        return plans

    def due(self) -> int:
        """Steps without a guess until a probe: few while what speculation gained would pay for it."""
        return self.pause if self.lost >= 0 else RICH_PAUSE

    def probe(self, plans: list[Plan], best: Plan, batch: int) -> Plan | None:
        """Another plan than the best known one, if it is time to learn and there is time to lose."""
        if self.costs.unmeasured[bucket(batch)] >= PATIENCE and not self.costs.measured(batch):
            return plans[0]
        if best.k and self.waited >= PATIENCE and self.costs.slower():
            return plans[0]
        left = (LOSS * self.total + ALLOWANCE - self.lost) / PROBE
        # At worst nothing stands, and a token costs as much as another sequence would.
        others = [plan for plan in plans if plan.k != best.k and (plan.times or 1 + plan.k) - 1 <= left]
        unknown = [plan for plan in others if plan.times is None]
        if not others or self.waited < (2 if unknown else self.pause if best.k else self.due()):
            return None
        if unknown:
            # The longest one: the costs of those between it and none can then be estimated.
            return unknown[-1]
        if best.k:
            near = [plan for plan in others if plan.k in (0, best.k - 1, best.k + 1)]
            return near[self.turn % len(near)] if near else None
        if self.turn % 2:
            return others[self.turn // 2 % len(others)]
        return max(others, key=Plan.rate)

    def record(
        self, sequences: list[Acceptance], proposed: list[int], accepted: list[int], seconds: float,
        drafting: float = 0.0, others: int = 0,
    ) -> None:  # fmt: skip
        """What a step took: tokens guessed and accepted for each sequence, its seconds and those of them for drafting.

        It need not be what `choose` said: prompt lookup may find less.
        """
        batch, guesses = len(sequences) + others, sum(proposed)
        tokens = batch + guesses
        if not (guesses and self.cold):
            self.costs.record(batch, tokens, seconds - drafting, max(proposed), drafting)
        new = len(sequences) + sum(accepted)
        plain = self.costs.unit(bucket(batch)) or self.costs.plain(batch)
        self.total, self.lost = MEMORY * self.total + (seconds / plain if plain else 1), MEMORY * self.lost
        if guesses and plain is not None:
            usual = self.costs.times(batch, tokens, max(proposed))
            # A step that compiles takes once what it never takes again: no token counts for more than two alone do.
            most = SPIKE * usual if usual else drafting / plain + 2 * tokens / batch
            self.lost = max(-BANK, self.lost + min(seconds / plain, most) - new / len(sequences))
            self.verify_seconds += seconds - drafting
            self.plain_seconds += plain
        if self.expected is not None and guesses:
            self.stood += [count > 0 for count, offered in zip(accepted, proposed, strict=True) if offered]
            if not self.holds:
                self.learn(sum(self.stood) / len(self.stood) - self.expected)
        for each, offered, stood in zip(sequences, proposed, accepted, strict=True) if guesses else ():
            each.record(offered, stood)
            self.shared.record(offered, stood)
            for place in range(offered):
                self.proposed_at[place] += 1
                self.accepted_at[place] += place < stood
        self.steps += 1
        self.sequence_steps += len(sequences)
        self.new_tokens += new

    def learn(self, surprise: float) -> None:
        """Set the time of the next probe by what the last one showed."""
        if surprise > SURPRISE:
            self.waited = self.pause
        else:
            self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def report(self) -> Report:
        """What happened so far."""
        return Report(
            proposed_at=list(self.proposed_at),
            accepted_at=list(self.accepted_at),
            acceptance_at=[a / p if p else 0.0 for a, p in zip(self.accepted_at, self.proposed_at, strict=True)],
            tokens_per_step=self.new_tokens / self.sequence_steps if self.sequence_steps else 0.0,
            cost_ratio=self.verify_seconds / self.plain_seconds if self.plain_seconds else None,
            probes=self.probes,
            steps=self.steps,
        )
