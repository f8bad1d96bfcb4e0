"""Every row of the published facts: reported, computed, difference, verdict, one line of derivation.

The reports of GPT-4's shape and cost are unconfirmed by OpenAI. A row whose report contradicts itself says so.
"""

from moe_lm.scaling.facts import inference, model, neighbours, training
from moe_lm.scaling.facts.row import FACTS, Figure, Row

__all__ = ["SECTIONS", "Figure", "Row", "facts"]

SECTIONS = (model, training, inference, neighbours)
"""Importing them has entered their rows."""


def facts() -> list[Row]:
    """All rows, in the order of the table."""
    return [FACTS[id]() for id in sorted(FACTS)]
