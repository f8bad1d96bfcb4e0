"""How the learning rate and the batch size move over a run: pure functions of the step."""

import math

from moe_lm.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step 1 to `steps`: linear warm-up, then a cosine (Loshchilov & Hutter 2017) or line to the floor."""
    warmup = round(config.warmup * config.steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    left = (config.steps - step) / max(1, config.steps - warmup - 1)
    left = min(1.0, left)
    share = (1 - math.cos(math.pi * left)) / 2 if config.decay == "cosine" else left
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * share)


def batch_rows(config: TrainConfig, sequence_length: int, step: int) -> int:
    """Rows of the batch of step 1 to `steps`: a line from the start of the ramp to its end, in whole rows."""
    end = config.batch_tokens
    start = config.batch_tokens_start or end
    done = min(1.0, (step - 1) / config.batch_ramp_steps) if config.batch_ramp_steps else 1.0
    return max(1, round((start + (end - start) * done) / sequence_length))
