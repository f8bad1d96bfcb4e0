"""Serving without a server: continuous batching, a paged cache, sampling, speculation."""

from moe_lm.engine.engine import Engine
from moe_lm.engine.opening import open_engine
from moe_lm.engine.request import Logprob, Output, Result, SamplingParams, TokenMask
from moe_lm.engine.scheduler import ContextError
from moe_lm.engine.snapshot import Slot, Snapshot
from moe_lm.engine.stats import Stats
from moe_lm.engine.text import TextStream

__all__ = [
    "ContextError",
    "Engine",
    "Logprob",
    "Output",
    "Result",
    "SamplingParams",
    "Slot",
    "Snapshot",
    "Stats",
    "TextStream",
    "TokenMask",
    "open_engine",
]
