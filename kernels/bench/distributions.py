"""Tokens' choices of experts: even on average, by Zipf's law, or as a trained router makes them.

A choice of K different experts is drawn with Gumbel noise on the logarithm of each expert's popularity, so the router's
logits that the benchmark feeds and the loads that the prediction counts are the same draw.

N tokens, E experts, K experts per token.
"""

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

DISTRIBUTIONS = ("uniform", "zipf", "trained")


def router_logits(distribution: str, tokens: int, experts: int, seed: int = 0) -> Tensor:
    """Logits float32 (N, E) whose top-k are the drawn choices; the same for a seed on every machine and device.

    `uniform`: every expert is as likely, and the loads differ by chance alone. `zipf`: expert e is 1 / (e + 1) as
    likely as the first. `trained`: as popular as the trained router made it in one window of text after another.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(tokens, experts, generator=generator, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
    return (popularity(distribution, tokens, experts).log() - (-uniform.log()).log()).float()


def popularity(distribution: str, tokens: int, experts: int) -> Tensor:
    """How likely each token's first choice is, up to a factor, float64: (1, E), or (N, E) where tokens differ."""
    if distribution == "uniform":
        return torch.ones(1, experts, dtype=torch.float64)
    if distribution == "zipf":
        return 1 / torch.arange(1, experts + 1, dtype=torch.float64)[None]
    if distribution == "trained":
        router = trained_router()
        windows = torch.tensor(router["windows"], dtype=torch.float64).add_(0.5)  # no expert is impossible
        # Another number of experts takes the same ones again, or the first of them.
        window = torch.arange(tokens) // router["window_tokens"] % len(windows)
        return windows[window][:, torch.arange(experts) % router["experts"]]
    raise ValueError(f"distribution {distribution!r} is unknown; choose one of {', '.join(DISTRIBUTIONS)}.")


@functools.cache
def trained_router() -> dict:
    """Counts of a trained router's choices, window by window; its `note` says which."""
    return json.loads((Path(__file__).parent / "trained_router.json").read_text("utf-8"))


@functools.cache
def loads(distribution: str, tokens: int, experts: int, top_k: int, seed: int = 0) -> tuple[int, ...]:
    """Slots that each expert gets, E of them, N * K in all."""
    chosen = router_logits(distribution, tokens, experts, seed).topk(top_k, dim=1).indices
    return tuple(torch.bincount(chosen.flatten(), minlength=experts).tolist())
