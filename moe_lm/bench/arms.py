"""The trainings that a comparison is made of: each for so many steps, or for so many seconds of its own.

Those of one round are all in memory and take turns of a few seconds, so that a slow phase of the machine meets every
one of them. Charged is the time inside the steps alone: not preparation, not evaluation, not the others' turns. A round
whose results are on file is not trained again.
"""

import dataclasses
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_lm.bench import machine
from moe_lm.checkpoint.directory import replace_file
from moe_lm.config import ConfigError, RunConfig
from moe_lm.data import PreparedData
from moe_lm.scaling.counts import parameters
from moe_lm.toml import to_dict
from moe_lm.train import NotFinite, Trainer
from moe_lm.train.evaluate import evaluate
from moe_lm.train.metrics import read_metrics

Record = dict[str, Any]
"""What came of an arm, as a line of the file of results."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Arm:
    """One training: a config with its seed, for `config.train.steps` steps or for `seconds`."""

    name: str
    config: RunConfig
    seconds: float | None = None

    @property
    def budget(self) -> str:
        return f"{self.config.train.steps} steps" if self.seconds is None else f"{self.seconds:g} s"

    @property
    def key(self) -> str:
        """The same for arms that train alike, whatever their names."""
        config = self.config
        train = to_dict(config.train)
        # Said by the budget, or for the eyes only.
        for name in ("steps", "eval_every", "log_every", "tensorboard"):
            train.pop(name)
        facts = [to_dict(config.model), to_dict(config.data), train, self.budget]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """Records by the key of their arm, in memory and as lines of `path`, where there is one.

    Raises ConfigError where the file cannot be read or written.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.found: dict[str, Record] = {}
        if path is None:
            return
        try:
            lines = read_metrics(path)  # without a last line that a kill cut short
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, "".join(json.dumps(line) + "\n" for line in lines))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--json {path} cannot be read and written: {error}.") from None
        if not all(isinstance(line, dict) and "key" in line for line in lines):
            raise ConfigError(f"--json {path} holds something else than results: name another file.")
        self.found = {line["key"]: line for line in lines}

    def add(self, record: Record) -> None:
        self.found[record["key"]] = record
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")


class Contender:
    """An arm in training. It keeps random numbers of its own, so that what it draws does not depend on the turns."""

    def __init__(self, arm: Arm, data: PreparedData, run_dir: Path):
        self.arm = arm
        self.trainer = Trainer(arm.config, run_dir, data)
        self.seconds = 0.0
        """Spent in its steps."""
        self.loss = float("nan")
        self.failure: str | None = None
        """Why it had to be given up."""
        self.devices = [self.trainer.device] if self.trainer.device.type == "cuda" else []
        self.random = self.random_state()

    def random_state(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    @property
    def step_seconds(self) -> float:
        """Of a step so far; 0 before the first."""
        return self.seconds / max(1, self.trainer.step)

    @property
    def finished(self) -> bool:
        if self.arm.seconds is None or self.failure is not None:
            return self.trainer.finished or self.failure is not None
        return self.seconds + self.step_seconds / 2 > self.arm.seconds  # else it would end further off

    @property
    def done(self) -> float | None:
        """The share of its seconds that is over after the next step, None where steps are counted."""
        if self.arm.seconds is None:
            return None
        return min(1.0, (self.seconds + self.step_seconds) / self.arm.seconds)

    def take_turn(self, seconds: float) -> None:
        """Train for about so long, at least one step."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.random[0])
            for device, state in zip(self.devices, self.random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            end, first = self.seconds + seconds, self.trainer.step
            try:
                while not self.finished and (self.seconds < end or self.trainer.step == first):
                    start = time.perf_counter()
                    self.loss = self.trainer.train_step(self.done)["loss"]
                    machine.synchronize(self.trainer.device)
                    self.seconds += time.perf_counter() - start
            except NotFinite as error:
                self.failure = str(error)
            self.random = self.random_state()

    def record(self) -> Record:
        """What came of it, with an evaluation as long as that of a run's last step."""
        trainer, config = self.trainer, self.arm.config
        counts = parameters(config.model)
        held_out = None
        if self.failure is None:
            held_out = evaluate(trainer.model, trainer.data, config, 4 * config.train.eval_tokens)
        return {
            "key": self.arm.key,
            "name": self.arm.name,
            "budget": self.arm.budget,
            "seed": config.train.seed,
            "learning_rate": config.train.learning_rate,
            "muon_learning_rate": config.train.muon_learning_rate,
            "parameters": counts.total,
            "active": counts.active,
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "seconds": self.seconds,
            "tokens_per_s": trainer.tokens / self.seconds if self.seconds else 0.0,
            "bits_per_byte": held_out and held_out.bits_per_byte,
            "by_source": held_out and held_out.by_source,
            "dead_experts": held_out and held_out.dead_experts,
            "failure": self.failure,
        }


def train_round(arms: Sequence[Arm], data: PreparedData, results: Results, turn: float, say: Say) -> list[Record]:
    """The records of `arms`, trained turn by turn unless all of them are on file. `turn` in seconds.

    All of a round is trained again where one is missing: only what trained side by side is compared.
    """
    if all(arm.key in results.found for arm in arms):
        return [results.found[arm.key] for arm in arms]
    with tempfile.TemporaryDirectory() as nothing_saved:
        for arm in arms:
            warm_up(arm, data, Path(nothing_saved))
        contenders = [Contender(arm, data, Path(nothing_saved)) for arm in arms]
        order = list(contenders)
        while not all(each.finished for each in contenders):
            for contender in order:
                if not contender.finished:
                    contender.take_turn(turn)
                    say(progress_text(contender))
            order.reverse()  # nobody always goes first
    records = [contender.record() for contender in contenders]
    for record in records:
        results.add(record)
    return records


def warm_up(arm: Arm, data: PreparedData, run_dir: Path) -> None:
    """A step that counts for nothing: what a process does once, as compiling kernels, is nobody's time."""
    Contender(dataclasses.replace(arm, seconds=None), data, run_dir).take_turn(0.0)


def progress_text(contender: Contender) -> str:
    """`nano, seed 0: step 12, 8.1 of 600 s, loss 3.210, 6,017 tokens/s`."""
    arm, trainer = contender.arm, contender.trainer
    if contender.failure is not None:
        return f"{arm.name}, seed {arm.config.train.seed}: given up: {contender.failure}"
    step = f"step {trainer.step}"
    where = f"{step} of {arm.budget}" if arm.seconds is None else f"{step}, {contender.seconds:.1f} of {arm.budget}"
    return (
        f"{arm.name}, seed {arm.config.train.seed}: {where}, loss {contender.loss:.3f}, "
        f"{trainer.tokens / contender.seconds:,.0f} tokens/s"
    )


def short_names(records: Sequence[Record]) -> dict[str, str]:
    """The sources that were scored, with what a column has room for: the end of the name."""
    names = sorted({name for record in records for name in record["by_source"] or ()})
    return {name: name.rpartition(":")[2].rpartition("/")[2][-9:] for name in names}


def with_seed(config: RunConfig, seed: int, **train: Any) -> RunConfig:
    """The config with another seed and other settings of its training."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed, **train))


def edge_of(best: float, tried: Iterable[float]) -> tuple[str, str] | None:
    """How to say that the best of several numbers is at their end, and where others should be tried; None if not."""
    numbers = set(tried)
    if len(numbers) < 2:
        return None
    return {min(numbers): ("least", "lower"), max(numbers): ("greatest", "higher")}.get(best)


def mean_bits(records: Sequence[Record]) -> float | None:
    """Held-out bits per byte, the mean over seeds; None where one of them was given up."""
    values = [record["bits_per_byte"] for record in records]
    return None if None in values else statistics.fmean(values)


def spread_of(records: Sequence[Record]) -> float:
    """How far the seeds lie apart, from the lowest to the highest; 0 for one seed, and where one was given up."""
    values = [record["bits_per_byte"] for record in records]
    return 0.0 if None in values else max(values) - min(values)
