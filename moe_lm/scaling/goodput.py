"""What failures and checkpoints leave of a run's time.

d seconds to write a checkpoint, t seconds of work between two, M mean seconds between failures, R seconds to restart.
"""

import math
from dataclasses import dataclass

from moe_lm.scaling.constants import CHECKPOINT_BYTES, RELIABILITY, Reliability


@dataclass(frozen=True)
class Goodput:
    """Checkpoints at the interval that loses least."""

    share: float
    """Of the time on the clock that a run without failures and checkpoints would have taken."""
    checkpoint_bytes: float
    write_seconds: float
    interval_seconds: float
    """Seconds of work between two checkpoints."""
    seconds_between_failures: float
    """Of the whole cluster."""


def goodput(weights: float, gpus: int, reliability: Reliability = RELIABILITY) -> Goodput:
    """Goodput of a model of `weights` on `gpus`, of which any one that fails stops all.

    The interval is Daly's (2006, higher-order optimum), which starts from Young's sqrt(2 d M) (1974); the share is
    Daly's complete model for failures at random, t / (M e^(R / M) (e^((t + d) / M) - 1)). All GPUs write at once, and
    the run waits.
    """
    nbytes = CHECKPOINT_BYTES * weights
    write = nbytes / (reliability.storage * gpus)
    between = 3600 / (reliability.failures * gpus)
    interval = best_interval(write, between)
    lost = between * math.exp(reliability.restart / between) * math.expm1((interval + write) / between)
    return Goodput(interval / lost, nbytes, write, interval, between)


def best_interval(write: float, between: float) -> float:
    """Seconds of work between checkpoints that take `write` seconds, with `between` seconds between failures."""
    if write >= 2 * between:
        return between
    ratio = math.sqrt(write / (2 * between))
    return math.sqrt(2 * write * between) * (1 + ratio / 3 + ratio**2 / 9) - write
