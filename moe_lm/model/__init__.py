"""The mathematics of the model, on one device, read top to bottom: layers, attention, moe, transformer."""

from moe_lm.model.transformer import Losses, Transformer

__all__ = ["Losses", "Transformer"]
