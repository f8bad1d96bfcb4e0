"""Held-out bits per byte: what the model pays for text it has never seen, whatever its tokenizer."""

import math
from dataclasses import dataclass

import torch

from moe_lm.config import RunConfig
from moe_lm.data import PreparedData
from moe_lm.model import Transformer


@dataclass(frozen=True)
class Evaluation:
    """Sums over the held-out rows that were read."""

    bits_per_byte: float
    """Over all sources: bits of all scored targets by the bytes of their text."""
    by_source: dict[str, float]
    """The same for each source alone."""
    expert_counts: list[list[int]]
    """Slots that each expert of each routing layer got."""

    @property
    def dead_experts(self) -> int:
        """Experts that no held-out token went to."""
        return sum(count == 0 for layer in self.expert_counts for count in layer)


@torch.no_grad()
def evaluate(model: Transformer, data: PreparedData, config: RunConfig, max_tokens: int) -> Evaluation:
    """Score up to `max_tokens` held-out tokens of every source. Draws no random numbers."""
    length = config.data.sequence_length
    rows = max(1, config.train.micro_batch_tokens // length)
    device = model.embed_tokens.device
    model.eval()
    nats, sizes, experts = [], [], []
    for index in range(len(data.sources)):
        total, num_bytes = torch.zeros((), dtype=torch.float64, device=device), 0
        for cpu_batch in data.validation_batches(index, length, max_tokens, rows):
            batch = cpu_batch.to(device)
            losses = model.losses(batch.tokens, batch.targets, batch.positions, batch.documents)
            total += losses.nll
            num_bytes += batch.num_bytes
            experts.append(losses.expert_counts)
        nats.append(total.item())
        sizes.append(num_bytes)
    model.train()
    names = [source.name for source in data.sources]
    return Evaluation(
        bits_per_byte=sum(nats) / math.log(2) / sum(sizes),
        by_source={name: nat / math.log(2) / size for name, nat, size in zip(names, nats, sizes, strict=True)},
        expert_counts=torch.stack(experts).sum(0).tolist(),
    )
