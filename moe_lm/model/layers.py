"""The parts without structure: linear maps, RMSNorm, SwiGLU, rotary angles.

Weights may be wider than the activations (float32 masters under bfloat16 compute): each use rounds its weight to the
dtype of what it multiplies.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from moe_lm.config import ModelConfig


class Linear(nn.Module):
    """x @ weight^T without bias: (..., in) -> (..., out), weight (out, in)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum."""
        return kernels.rms_norm(x, self.weight, self.eps, residual)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix, gate rows first."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_up_proj(x)))


def rotary_angles(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, float32 (N, head_dim / 2) each, for positions (N,)."""
    inverse_frequencies = rotary_frequencies(config, positions.device)
    angles = positions.float()[:, None] * inverse_frequencies
    return angles.cos(), angles.sin()


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position of each channel pair, float32 (head_dim / 2,) (Su et al. 2021, section 3.2.2)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: slow turns are stretched, fast ones kept, those between mixed by where their wavelength lies.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
