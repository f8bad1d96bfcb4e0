"""Whether a run can fit its device at all, asked before anything is read or built."""

from moe_lm.config import RunConfig, require
from moe_lm.model.device import choose_device, memory_of
from moe_lm.scaling.counts import parameters


def state_bytes(config: RunConfig) -> int:
    """Bytes of float32 weights, their gradients and the optimizer's state: two moments of AdamW, or one of Muon's for
    the matrices of the blocks but the routers. Activations come on top."""
    counts = parameters(config.model)
    numbers = 4 * counts.total
    if config.train.optimizer == "muon":
        numbers -= counts.attention + counts.mlp
    return 4 * numbers


def check_memory(config: RunConfig) -> None:
    """Raise ConfigError where the state of training is more than all memory of `train.device`."""
    device, needed = choose_device(config.train.device), state_bytes(config)
    memory, total = memory_of(device), parameters(config.model).total
    require(
        memory is None or needed <= memory,
        f"{total / 1e9:,.2f}B parameters take {needed / 1e9:,.1f} GB to train, {needed / total:.0f} bytes each for "
        f"float32 weights, gradients and the state of train.optimizer = {config.train.optimizer}, and {device} has "
        f"{(memory or 0) / 1e9:,.1f} GB: lower model.hidden_size, num_hidden_layers or num_local_experts, or plan it "
        "for a cluster with python -m moe_lm.scaling.",
    )
