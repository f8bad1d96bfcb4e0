"""Training: the loop, its schedule and optimizer, its metrics and its report."""

from moe_lm.train.loop import NotFinite, Trainer

__all__ = ["NotFinite", "Trainer"]
