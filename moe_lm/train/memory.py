"""Whether a run can fit its device at all, asked before anything is read or built."""

from moe_lm.config import RunConfig, TrainingPlan, require
from moe_lm.model.device import choose_device, memory_of
from moe_lm.scaling.activations import layer_activations
from moe_lm.scaling.counts import parameters


def state_bytes(config: RunConfig) -> int:
    """Bytes of float32 weights, their gradients and the optimizer's state: two moments of AdamW, or one of Muon's for
    the matrices of the blocks but the routers. Activations come on top."""
    counts = parameters(config.model)
    numbers = 4 * counts.total
    if config.train.optimizer == "muon":
        numbers -= counts.attention + counts.mlp
    return 4 * numbers


def activation_bytes(config: RunConfig) -> float:
    """Bytes that the blocks keep of the largest micro-batch from forward to backward, as the planner counts them.

    `train.dtype` = auto counts as bfloat16. With `train.activation_checkpointing` the inputs of all blocks, and at the
    end of the forward the whole of one.
    """
    train, model, length = config.train, config.model, config.data.sequence_length
    rows = max(1, min(train.micro_batch_tokens, train.batch_tokens) // length)
    plan = TrainingPlan(
        recompute="full" if train.activation_checkpointing else "none", sequence_parallel=False,
        dtype="float32" if train.dtype == "float32" else "bfloat16",
    )  # fmt: skip
    layers = [
        layer_activations(model, layer, plan, rows * length, length, 1.0) for layer in range(model.num_hidden_layers)
    ]
    again = max(layer.working for layer in layers) if train.activation_checkpointing else 0.0
    return sum(layer.kept for layer in layers) + again


def check_memory(config: RunConfig) -> None:
    """Raise ConfigError where the state of training, alone or with the blocks' activations, is more than all memory of
    `train.device`."""
    device, needed = choose_device(config.train.device), state_bytes(config)
    memory, total = memory_of(device), parameters(config.model).total
    require(
        memory is None or needed <= memory,
        f"{total / 1e9:,.2f}B parameters take {needed / 1e9:,.1f} GB to train, {needed / total:.0f} bytes each for "
        f"float32 weights, gradients and the state of train.optimizer = {config.train.optimizer}, and {device} has "
        f"{(memory or 0) / 1e9:,.1f} GB: lower model.hidden_size, num_hidden_layers or num_local_experts, or plan it "
        "for a cluster with python -m moe_lm.scaling.",
    )
    activations, train = activation_bytes(config), config.train
    spare = ", or set train.activation_checkpointing = true"
    require(
        memory is None or needed + activations <= memory,
        f"training takes {needed / 1e9:,.1f} GB for float32 weights, gradients and the state of train.optimizer = "
        f"{train.optimizer}, and {activations / 1e9:,.1f} GB for the activations of train.micro_batch_tokens = "
        f"{train.micro_batch_tokens}, and {device} has {(memory or 0) / 1e9:,.1f} GB: lower train.micro_batch_tokens "
        f"or data.sequence_length{'' if train.activation_checkpointing else spare}.",
    )
