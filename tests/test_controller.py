"""The choice of draft lengths on simulated machines, whose time is computed and not measured."""

import random
from collections.abc import Callable

import pytest

from moe_lm.engine.controller import PATIENCE, SHORTEST_PAUSE, Controller
from moe_lm.engine.step_costs import WINDOW, StepCosts

COSTS = {
    "free": lambda batch, tokens: 1.0,
    "proportional": lambda batch, tokens: tokens / batch,
    "experts": lambda batch, tokens: 1 + 0.25 * (tokens - batch) ** 0.7,
    "padded": lambda batch, tokens: 1.0 if tokens == batch else 1.8,
    "dearer than proportional": lambda batch, tokens: (tokens / batch) ** 1.3,
}


class Machine:
    """Steps of `batch` sequences, that take `pace` times their cost. `relative` is the time taken over what plain steps
    take for the same tokens."""

    def __init__(self, cost: Callable, batch: int = 1, drafting: float = 0.02, seed: int = 0, k_max: int = 8):
        self.controller = Controller(k_max)
        self.sequences = [self.controller.sequence() for _ in range(batch)]
        self.cost, self.batch, self.drafting, self.random = cost, batch, drafting, random.Random(seed)
        self.pace, self.seconds, self.plain_seconds = 1.0, 0.0, 0.0
        self.chosen: list[list[int]] = []

    def run(self, steps: int, *rates: float) -> "Machine":
        """Sequence i's guesses stand with probability rates[i], or the only one given."""
        for _ in range(steps):
            lengths = self.controller.choose(self.sequences)
            accepted = []
            for i, length in enumerate(lengths):
                count = 0
                while count < length and self.random.random() < rates[i % len(rates)]:
                    count += 1
                accepted.append(count)
            drafting = self.drafting * max(lengths) * self.pace
            step = self.cost(self.batch, self.batch + sum(lengths)) * self.pace
            self.seconds += step + drafting
            self.plain_seconds += self.cost(self.batch, self.batch) * self.pace * (1 + sum(accepted) / self.batch)
            # What is measured is disturbed: always a little, and now and then something else has the machine.
            step *= self.random.uniform(0.95, 1.05) * (5 if self.random.random() < 0.01 else 1)
            self.controller.record(self.sequences, lengths, accepted, step + drafting, drafting)
            self.chosen.append(lengths)
        return self

    @property
    def relative(self) -> float:
        return self.seconds / self.plain_seconds

    def usual(self, last: int = 200) -> float:
        """The draft length of most steps of late: the median over steps and sequences."""
        lengths = sorted(length for step in self.chosen[-last:] for length in step)
        return lengths[len(lengths) // 2]


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("rate", [0.0, 0.4, 0.7, 0.95])
def test_speculation_is_never_slower_than_none(name, batch, rate):
    machine = Machine(COSTS[name], batch).run(1500, rate)
    assert machine.relative < 1.03
    if rate == 0 or "proportional" in name:
        assert machine.usual() == 0


@pytest.mark.parametrize("batch", [1, 16])
def test_free_verification_gets_long_drafts(batch):
    machine = Machine(COSTS["free"], batch).run(1000, 0.95)
    assert machine.usual() == 8
    assert machine.relative < 0.25


@pytest.mark.parametrize("rate", [0.5, 0.7, 0.85])
def test_the_chosen_length_is_near_the_best(rate):
    def gain(k):
        return sum(rate**i for i in range(k + 1)) / (COSTS["experts"](1, 1 + k) + 0.02 * k)

    machine = Machine(COSTS["experts"]).run(3000, rate)
    assert gain(machine.usual()) > 0.95 * max(map(gain, range(9)))
    assert machine.relative < 1.06 / max(map(gain, range(9)))


def test_it_adapts_when_the_text_changes():
    machine = Machine(COSTS["experts"])
    assert machine.run(1500, 0.0).usual() == 0
    assert machine.run(700, 0.95).usual() >= 6
    assert machine.run(300, 0.0).usual(100) == 0
    assert machine.run(700, 0.95).usual() >= 6


def test_it_adapts_when_the_machine_changes():
    machine = Machine(COSTS["free"]).run(500, 0.9)
    machine.cost = COSTS["dearer than proportional"]
    assert machine.run(500, 0.9).usual() == 0


def test_what_a_busy_machine_cost_once_is_forgotten():
    """Other work that met the probes alone has made guessing look dear, and taken all that it may lose."""
    machine = Machine(lambda batch, tokens: 1.0 if tokens == batch else 4.0).run(100, 0.9)
    machine.controller.lost = 40.0
    machine.cost = COSTS["free"]
    assert machine.run(2500, 0.9).usual() >= 6


def test_each_sequence_has_its_own_length():
    machine = Machine(lambda batch, tokens: 1 + 0.03 * (tokens - batch), 8).run(1500, 0.95, 0.0)
    last = [step for step in machine.chosen[-100:] if any(step)]
    usual = [sorted(step[i] for step in last)[len(last) // 2] for i in range(8)]
    assert min(usual[0::2]) >= 5
    assert max(usual[1::2]) <= 1


def test_probes_are_few():
    for rate, most in ((0.0, 0.02), (0.95, 0.04)):
        machine = Machine(COSTS["experts"], 1).run(1000, rate)
        known = machine.controller.report().probes
        machine.run(2000, rate)
        assert known < machine.controller.report().probes < known + most * 2000


def test_costs_are_learnt_in_plain_steps_first():
    machine = Machine(COSTS["free"], 4).run(2, 0.9)
    assert machine.chosen == [[0] * 4] * 2
    assert any(any(step) for step in machine.run(SHORTEST_PAUSE, 0.9).chosen)


def test_a_first_step_that_compiles_does_not_count():
    costs = StepCosts()
    costs.record(2, 4, 1.5)  # nothing to measure it by
    costs.record(2, 2, 1000.0)
    assert costs.plain(2) is None
    costs.record(2, 2, 1.0)
    assert costs.plain(2) == 1.0
    costs.record(2, 4, 1000.0)
    assert costs.step_times(2, 4) is None
    costs.record(2, 4, 1.5)
    assert costs.step_times(2, 4) == 1.5
    assert costs.step_times(2, 3) == 1.25
    assert costs.step_times(2, 5) is None
    assert costs.step_times(3, 4) == 1.25, "as of two, with as many tokens for each"
    assert costs.step_times(5, 10) is None
    for _ in range(WINDOW):
        costs.record(2, 2, 1.0)
        costs.record(2, 4, 3.0)
    assert costs.step_times(2, 4) == 3.0


def test_the_nearest_batch_stands_in_for_one_not_measured():
    costs = StepCosts()

    def measure(batch: int, plain: float, ratio: float) -> None:
        for _ in range(2):
            costs.record(batch, batch, plain)
        for _ in range(2):
            costs.record(batch, 4 * batch, plain * ratio, 3, plain * ratio / 10)

    measure(4, 1.0, 1.5)
    measure(16, 4.0, 3.0)
    assert [costs.plain(batch) for batch in (1, 2, 5, 6, 7, 9, 33)] == [None, 1.0, 1.0, 1.0, 1.0, 4.0, None]
    assert [costs.step_times(batch, 4 * batch) for batch in (1, 2, 6, 9)] == [None, 1.5, 1.5, 3.0]
    assert [costs.draft_times(batch, 3) for batch in (1, 2, 9)] == pytest.approx([None, 0.15, 0.3])
    assert not costs.measured(6)
    for _ in range(2):
        costs.record(6, 6, 1.25)
    assert costs.plain(6) == 1.25
    assert costs.step_times(6, 24) == 1.5, "the ratio is still another's"
    measure(6, 1.25, 2.0)
    assert costs.step_times(6, 24) == 2.0
    assert costs.step_times(5, 20) == 2.0, "5 is nearer to 6 than to 4, as 5/4 is more than 6/5"


def test_guessing_goes_on_when_a_request_ends():
    """A new batch size costs no plain steps at first; stayed at, it is measured."""
    machine = Machine(COSTS["free"], 8).run(100, 0.9)
    assert any(machine.chosen[-1])
    del machine.sequences[5:]
    machine.batch, machine.chosen = 5, []
    machine.run(PATIENCE, 0.9)
    assert all(any(step) for step in machine.chosen)
    assert not machine.controller.costs.measured(5)
    machine.run(10, 0.9)
    assert machine.controller.costs.measured(5)
    assert any(machine.chosen[-1])


def test_what_steps_take_is_compared_with_steps_just_before():
    """A machine that turns twice as slow while it guesses has not made guessing dearer."""
    costs = StepCosts()
    for _ in range(2):
        costs.record(1, 1, 1.0)
    for seconds in (1.0, 2.0):
        for _ in range(4 * WINDOW):
            costs.record(1, 4, 1.5 * seconds, 3, 0.5 * seconds)
        assert costs.slower() == (seconds == 2), "so that plain steps are due"
        assert (costs.step_times(1, 4), costs.draft_times(1, 3), costs.times(1, 4, 3)) == (1.5, 0.5, 2.0)
    for _ in range(WINDOW):
        costs.record(1, 1, 2.0)
    assert (costs.plain(1), costs.step_times(1, 4), costs.draft_times(1, 3)) == (2.0, 1.5, 0.5)
    for _ in range(2 * WINDOW):
        costs.record(1, 1, 2.0)
        costs.record(1, 4, 8.0, 3, 1.0)
    assert costs.times(1, 4, 3) == 4.5, "but what has become dearer beside plain steps is found out"
    assert not costs.slower()


@pytest.mark.parametrize("batch", [1, 16])
def test_a_machine_that_is_now_faster_now_slower_is_used_as_well_as_a_steady_one(batch):
    def cost(batch, tokens):
        return 1 + 0.1 * (tokens - batch) / batch**0.5

    source = random.Random(0)
    steady, unsteady = (Machine(cost, batch, drafting=0.1) for _ in range(2))
    for _ in range(25):
        steps = source.randint(30, 200)
        unsteady.pace = source.choice([1.0, 1.7])
        steady.run(steps, 0.8)
        unsteady.run(steps, 0.8)
    assert steady.relative < 0.85
    assert unsteady.relative < steady.relative + 0.04


def test_the_first_drafted_token_may_cost_more_than_the_next():
    costs = StepCosts()
    for _ in range(2):
        costs.record(1, 1, 1.0)
    assert costs.draft_times(1, 1) is None
    for length, seconds in ((2, 0.5), (4, 0.75)):
        for _ in range(2):
            costs.record(1, 1 + length, 1.5, length, seconds)
    assert [costs.draft_times(1, length) for length in (1, 2, 3, 4, 8)] == [0.5, 0.5, 0.625, 0.75, 1.5]


def test_the_first_step_of_a_probe_is_not_measured():
    """It finds caches cold: a guess that pays once they are warm is found to pay."""
    controller = Controller(2)
    sequence, before = [controller.sequence()], 0
    for _ in range(200):
        lengths = controller.choose(sequence)
        controller.record(sequence, lengths, lengths, 5.0 if lengths[0] and not before else 1.0)
        before = lengths[0]
    assert lengths == [2]


def test_limits_hold_in_every_step():
    controller = Controller(6)
    sequences, source = [controller.sequence() for _ in range(3)], random.Random(1)
    for _ in range(400):
        limits = [source.choice([0, 1, 9]) for _ in sequences]
        lengths = controller.choose(sequences, limits, others=2)
        assert all(0 <= length <= min(limit, 6) for length, limit in zip(lengths, limits, strict=True))
        controller.record(sequences, lengths, lengths, 1.0, 0.0, others=2)
    assert controller.choose(sequences, [0, 0, 0], others=2) == [0, 0, 0]


def test_a_new_sequence_starts_with_what_others_showed():
    machine = Machine(COSTS["experts"], 2).run(300, 0.9)
    assert machine.controller.sequence().rates()[0] == pytest.approx(0.9, abs=0.12)
    assert Controller(3).sequence().rates() == [0.5] * 3


def test_the_report_adds_up():
    controller = Controller(4)
    sequences = [controller.sequence(), controller.sequence()]
    for proposed, accepted, seconds in (
        ([0, 0], [0, 0], 1.0), ([0, 0], [0, 0], 1.0), ([4, 2], [1, 2], 3.5), ([4, 0], [4, 0], 2.5),
    ):  # fmt: skip
        controller.record(sequences, proposed, accepted, seconds, 0.5 if any(proposed) else 0.0)
    report = controller.report()
    assert report.proposed_at == [3, 3, 2, 2]
    assert report.accepted_at == [3, 2, 1, 1]
    assert report.acceptance_at == pytest.approx([1, 2 / 3, 0.5, 0.5])
    assert report.tokens_per_step == (8 + 7) / 8
    assert report.cost_ratio == pytest.approx(2.5)
    assert (report.steps, report.probes) == (4, 0)
    assert Controller(2).report().cost_ratio is None
