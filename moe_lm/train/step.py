"""What a training step tells of itself: on its way from the device once the step is begun, read when it is wanted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moe_lm.model import Losses
from moe_lm.train.distillation import DistillationLosses


class Reading:
    """The numbers of tensors of any shape on one device, on their way to the host by one copy. To begin it waits for
    nothing."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        # float64 holds every float32, and every count below 2^53.
        whole = torch.cat([tensor.detach().flatten().double() for tensor in tensors.values()])
        self.host = whole.to("cpu", non_blocking=True)
        self.copied = torch.cuda.current_stream(whole.device).record_event() if whole.is_cuda else None

    def wait(self) -> dict[str, Any]:
        """Each tensor as `tolist` has it, once the copy is done."""
        if self.copied is not None:
            self.copied.synchronize()
        parts = self.host.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape).tolist() for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


@dataclass
class Step:
    """One step, which may be under way yet."""

    number: int
    """From 1."""
    all_tokens: int
    """Of the run up to its end."""
    tokens: int
    """Of its batch; of these `num_targets` are predicted, `num_bytes` of text."""
    num_targets: int
    num_bytes: int
    learning_rate: float
    """What the schedule gave, before any group's ratio."""
    begun: float
    """time.perf_counter() at its beginning."""
    numbers: Reading

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Its losses and routing as plain numbers; waits for them."""
        found = self.numbers.wait()
        nll = sum(found["nll"])
        loads = [[count / max(1, sum(layer)) for count in layer] for layer in found["expert_counts"]]
        metrics = {
            "loss": nll / self.num_targets,
            "bits_per_byte": nll / math.log(2) / self.num_bytes,
            "aux_loss": found["aux"],
            "z_loss": found["z"],
            "expert_load": rounded(loads),
            "router_entropy": rounded(found["router_entropy"]),
            "router_confidence": rounded(found["router_confidence"]),
            "drop_rate": rounded(found["dropped"]),
            "grad_norm": found["grad_norm"],
            "dead_experts": sum(count == 0 for layer in found["expert_counts"] for count in layer),
        }
        if "expert_bias" in found:
            metrics["expert_bias"] = rounded(found["expert_bias"], 7)
        if "acceptance" in found:
            metrics["acceptance"] = sum(found["acceptance"]) / self.num_targets
        return metrics


def rounded(values: list, digits: int = 5) -> list:
    return [rounded(each, digits) if isinstance(each, list) else round(each, digits) for each in values]


def read_losses(parts: Sequence[tuple[float, Losses]], grad_norm: Tensor, biases: Sequence[Tensor]) -> Reading:
    """A step's numbers: of its micro-batches' losses, each with its share of the rows, and of its routers' biases."""
    every = [losses for _, losses in parts]
    tensors = {
        "grad_norm": grad_norm,
        "nll": torch.stack([losses.nll for losses in every]),
        "expert_counts": sum(losses.expert_counts for losses in every),
    }
    for name in ("aux", "z", "router_entropy", "router_confidence", "dropped"):
        tensors[name] = sum(share * getattr(losses, name) for share, losses in parts)
    if isinstance(every[0], DistillationLosses):
        tensors["acceptance"] = torch.stack([losses.acceptance for losses in every])
    if biases:
        tensors["expert_bias"] = torch.stack(list(biases))
    return Reading(tensors)
