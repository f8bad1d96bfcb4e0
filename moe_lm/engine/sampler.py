"""From logits to a distribution, and from a distribution to a token.

n rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lm.config import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How one continuation is drawn. With every filter at its default the model's own distribution is sampled."""

    max_tokens: int = 128
    """Most new tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (the lowest id among equals)."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Only tokens of at least this share of the likeliest one's probability (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that are in the context (Keskar et al. 2019)."""
    seed: int = 0
    """Seed of the uniforms that choose tokens."""

    def __post_init__(self):
        for name, low, high in (
            ("max_tokens", 1, None), ("temperature", 0, None), ("top_k", 0, None), ("top_p", 0, 1), ("min_p", 0, 1),
            ("repetition_penalty", 0, None), ("seed", 0, 2**63 - 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not (value >= low and (high is None or value <= high) and value < float("inf")):
                limit = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ConfigError(f"{name} = {value} must be {limit}.")
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name} = 0 would leave nothing to choose from; it must be above 0.")


def probabilities(logits: Tensor, params: SamplingParams, contexts: list[list[int]]) -> Tensor:
    """The distribution that row i's token is drawn from, float32 (n, V), given logits (n, V) float32.

    contexts[i] are the tokens before row i's, which the repetition penalty looks at. Greedy rows are one-hot.
    """
    if params.repetition_penalty != 1:
        logits = logits.clone()
        for row, context in zip(logits, contexts, strict=True):
            seen = torch.tensor(sorted(set(context)), device=logits.device)
            scores = row[seen]
            row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if params.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    p = torch.softmax(logits / params.temperature, dim=1)
    if params.top_k and params.top_k < p.shape[1]:
        # Ties at the border are cut by sort order, so that exactly k remain.
        p = keep_first(p, torch.arange(p.shape[1], device=p.device) < params.top_k)
    if params.top_p < 1:
        ordered = p.sort(dim=1, descending=True, stable=True).values
        p = keep_first(p, ordered.cumsum(1) - ordered < params.top_p * p.sum(1, keepdim=True))
    if params.min_p > 0:
        p = p * (p >= params.min_p * p.amax(1, keepdim=True))
    return p / p.sum(1, keepdim=True)


def keep_first(p: Tensor, keep: Tensor) -> Tensor:
    """p (n, V) with zeros where `keep`, a mask over each row's descending order, is false."""
    order = p.sort(dim=1, descending=True, stable=True).indices
    return p * torch.zeros_like(p, dtype=torch.bool).scatter_(1, order, keep.expand_as(p))


def draw(p: Tensor, uniform: float) -> int:
    """The token whose interval of the cumulative distribution p (V,) holds `uniform` in [0, 1).

    p need not be normalised. A token of probability 0 is never drawn.
    """
    cumulative = p.double().cumsum(0)
    target = cumulative[-1] * uniform
    token = int(torch.searchsorted(cumulative, target, right=True))
    # Rounding can put the target on the total itself: then the last token with any probability is meant.
    return token if token < len(p) and p[token] > 0 else int(p.nonzero()[-1])
