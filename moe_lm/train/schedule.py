"""How the learning rate and the batch size move over a run: pure functions of the step or the share that is done."""

import math

from moe_lm.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step 1 to `steps`: linear warm-up to the peak, then what `config.decay` says, to the floor at the end."""
    warmup = round(config.warmup * config.steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.decay == "wsd":
        steps = max(1, round(config.decay_share * config.steps))
    else:
        steps = max(1, config.steps - warmup - 1)  # the first step after the warm-up is at the peak as well
    return decayed(config, (config.steps - step) / steps)


def learning_rate_at(config: TrainConfig, done: float) -> float:
    """The same for a run that is not counted in steps: `done` in [0, 1] is the share that is over after the step."""
    if done < config.warmup:
        return config.learning_rate * done / config.warmup
    return decayed(config, (1 - done) / (config.decay_share if config.decay == "wsd" else 1 - config.warmup))


def decayed(config: TrainConfig, left: float) -> float:
    """Rate when the share `left` of the decay is still to come; the peak where that is 1 or more.

    A cosine (Loshchilov & Hutter 2017) or a line; wsd (Hu et al. 2024, MiniCPM, section 4) falls as 1 - sqrt, which
    ended lowest of the shapes that Haegele et al. 2024 tried (section 3.1).
    """
    left = min(1.0, left)
    share = {"cosine": (1 - math.cos(math.pi * left)) / 2, "linear": left, "wsd": 1 - math.sqrt(1 - left)}[config.decay]
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * share)


def batch_rows(config: TrainConfig, sequence_length: int, step: int) -> int:
    """Rows of the batch of step 1 to `steps`: a line from the start of the ramp to its end, in whole rows."""
    end = config.batch_tokens
    start = config.batch_tokens_start or end
    done = min(1.0, (step - 1) / config.batch_ramp_steps) if config.batch_ramp_steps else 1.0
    return max(1, round((start + (end - start) * done) / sequence_length))
