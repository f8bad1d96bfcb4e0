"""Cleaning the training documents: heuristic rules, copies, repeated lines, near-copies, outliers, a classifier.

Read `rules` and `duplicates` for what is measured, `cleaning` for the order of the steps, `source` for how training
gets what is left.
"""

from moe_lm.data.quality.cleaning import Cleaning
from moe_lm.data.quality.source import clean_sources

__all__ = ["Cleaning", "clean_sources"]
