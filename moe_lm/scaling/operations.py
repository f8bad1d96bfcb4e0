"""The operations of a layer on one GPU, as serving predicts them: the points of a roofline."""

from dataclasses import dataclass

from moe_lm.config import ModelConfig, ServingPlan
from moe_lm.scaling.forward import Forward, pipeline
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.serving import modern_engine


@dataclass(frozen=True)
class Operation:
    """One part of a forward pass."""

    phase: str
    """What it is part of, such as `decode`."""
    name: str
    seconds: float
    flops: float
    """What is asked for: padding does not count."""
    bytes: float
    """Weights and cache that are read, and the rows of the residual that go in."""

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.flops / self.seconds


def operations(
    phase: str, model: ModelConfig, plan: ServingPlan, machine: Machine, *, sequences: float, tokens: float,
    context: float,
) -> list[Operation]:  # fmt: skip
    """Those of a pass of `tokens` new tokens of each of `sequences`, on one rank of the plan, that multiply anything.

    One layer of each kind, and the logits. A new token attends to `context` cached ones and to the new ones before it:
    decode is one token, prefill and the forward of a training micro-batch have no context. Raises ConfigError where tp,
    pp or ep do not fit the model.
    """
    engine = modern_engine(machine)
    forward = Forward(model, plan, machine, engine, sequences, sequences * plan.ep, tokens, context)
    rows = sequences * tokens
    logits = sequences if tokens > 1 else rows
    parts = [(*item, rows) for kind in pipeline(model, plan.tp, plan.pp, plan.ep).layers
             for item in forward.layer(kind).items()]  # fmt: skip
    parts += [(*item, logits) for item in forward.output(logits).items()]
    found: dict[str, Operation] = {}
    for name, part, taken in parts:
        if part.flops and name not in found:
            moved = part.weights + part.cache + taken * model.hidden_size * forward.residual
            found[name] = Operation(phase, name, part.seconds, part.flops, moved)
    return list(found.values())
