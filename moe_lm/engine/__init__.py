"""Serving without a server: KV cache, sampling, speculative decoding. The first form, for one sequence at a time."""

from moe_lm.engine.generator import Generation, Generator, Stats
from moe_lm.engine.sampler import SamplingParams
from moe_lm.engine.text import TextStream

__all__ = ["Generation", "Generator", "SamplingParams", "Stats", "TextStream"]
