"""Serving without a server: continuous batching, a paged cache, sampling, speculation."""

from moe_lm.engine.engine import Engine
from moe_lm.engine.request import Logprob, Output, Result, SamplingParams, TokenMask
from moe_lm.engine.stats import Stats
from moe_lm.engine.text import TextStream

__all__ = ["Engine", "Logprob", "Output", "Result", "SamplingParams", "Stats", "TextStream", "TokenMask"]
