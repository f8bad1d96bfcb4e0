"""What to turn where a layout does not fit: settings are tried, not guessed, and the sentence names what does it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from moe_lm.config import ConfigError, ModelConfig, ServingPlan
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.layout import Layout, lay
from moe_lm.scaling.memory import ServingMemory, StageMemory, fullest_stage, largest_batch, serving_memory

Changes = dict[str, Any]

MORE_GPUS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""How many times as many are tried where nothing else helps."""


def training_advice(memory: tuple[StageMemory, ...], model: ModelConfig, layout: Layout, machine: Machine) -> str:
    """One sentence: that `memory`, training_memory of the rest, fits; or by how much not, and what mends it."""
    stage = max(range(len(memory)), key=lambda stage: memory[stage].total)
    needed = needs(f"Stage {stage} of the pipeline", memory[stage].total, memory[stage].limit, machine)
    if memory[stage].fits:
        return needed
    changes = training_remedy(model, layout, machine)
    if changes is None:
        return (
            f"{needed}, and no layout that was tried fits: shorten data.sequence_length, or take GPUs of more memory."
        )
    mended = fullest_stage(model, changed(model, layout, changes), machine).total
    return f"{needed}: {settings('plan', changes)} it {mended / 1e9:.1f} GB."


def serving_advice(memory: ServingMemory, model: ModelConfig, plan: ServingPlan, machine: Machine) -> str:
    """One sentence: that `memory`, serving_memory of the rest, fits; or by how much not, and what mends it."""
    load = f"{memory.batch} request{'s' * (memory.batch > 1)} of {memory.context} tokens"
    needed = needs(f"The fullest GPU with {load}", memory.per_gpu, memory.limit, machine)
    if memory.fits:
        return needed
    changes = serving_remedy(model, plan, machine, memory.batch, memory.context)
    if changes is None:
        return f"{needed}, and no layout that was tried fits: take GPUs of more memory."
    changed_plan = replace(plan, **changes)
    batch = changes.get("batch", memory.batch)
    mended = serving_memory(model, changed_plan, machine, batch=batch, context=memory.context).per_gpu
    return f"{needed}: {settings('serving', changes)} it {mended / 1e9:.1f} GB."


def needs(what: str, total: float, limit: float, machine: Machine) -> str:
    """The sentence so far; it ends with a full stop where all is well."""
    if total <= limit:
        return f"{what} needs {total / 1e9:.1f} GB and fits the {limit / 1e9:.1f} GB of {machine.sheet.name}."
    return (
        f"{what} needs {total / 1e9:.1f} GB, {(total - limit) / 1e9:.1f} GB more than the {limit / 1e9:.1f} GB of "
        f"{machine.sheet.name}"
    )


def settings(section: str, changes: Changes) -> str:
    """`plan.zero = 2 and plan.recompute = "full" make`, as a config file has them, with the verb they take."""
    values = [
        f'{section}.{name} = "{value}"' if isinstance(value, str) else f"{section}.{name} = {str(value).lower()}"
        for name, value in changes.items()
    ]
    return f"{values[0]} makes" if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]} make"


def training_remedy(model: ModelConfig, layout: Layout, machine: Machine) -> Changes | None:
    """The fewest changes of [plan] found that make it fit: one if one does, cheap ones before dear ones, or several.

    The batch of a step and the rows stay. GPUs stay, too, unless nothing else helps. None if nothing was found.
    """

    def fits(changes: Changes) -> bool:
        try:
            return fullest_stage(model, changed(model, layout, changes), machine).fits
        except ConfigError:  # sizes that do not divide: not a layout
            return False

    knobs = list(training_knobs(model, layout, machine))
    for change in knobs:
        if fits(change):
            return change
    together: Changes = {}
    for change in knobs:  # later values of one setting go further
        together |= change
        if fits(together):
            return fewest(together, knobs, fits)
    strongest = {name: value for change in knobs for name, value in change.items() if name not in ("tp", "pp")}
    for times in MORE_GPUS:
        for split in ({}, *(change for change in knobs if change.keys() & {"tp", "pp"})):
            more = strongest | split | {"gpus": layout.gpus * times}
            if fits(more):
                return fewest(more, knobs, fits)
    return None


def changed(model: ModelConfig, layout: Layout, changes: Changes) -> Layout:
    """`layout` with other settings of [plan], on as many GPUs unless these are among them. Raises ConfigError."""
    plan = replace(layout.plan, **{"gpus": layout.gpus} | changes)
    return lay(model, plan, layout.sequence_length, layout.batch_tokens, layout.optimizer)


def training_knobs(model: ModelConfig, layout: Layout, machine: Machine) -> Iterator[Changes]:
    """Single changes that save memory, from those that cost least time to those that cost most."""
    plan = layout.plan
    if not plan.flash_attention:
        yield {"flash_attention": True}
    if plan.tp > 1 and not plan.sequence_parallel:
        yield {"sequence_parallel": True}
    if plan.zero < 1:
        yield {"zero": 1}
    if plan.zero_group is not None and plan.zero_group < layout.dp:
        yield {"zero_group": layout.dp}
    if plan.recompute == "none" and not plan.flash_attention:
        yield {"recompute": "selective"}
    if plan.micro_batch > 1:
        yield {"micro_batch": 1}
    yield from ({"tp": tp} for tp in multiples(plan.tp, machine.sheet.gpus_per_node))
    if plan.zero < 2:
        yield {"zero": 2}
    if plan.recompute != "full":
        yield {"recompute": "full"}
    if plan.zero < 3:
        yield {"zero": 3}
    yield from ({"pp": pp} for pp in multiples(plan.pp, model.num_hidden_layers))
    if model.is_moe:
        yield from ({"ep": ep} for ep in multiples(plan.ep, model.num_local_experts))


def multiples(value: int, limit: int) -> Iterable[int]:
    """Multiples of `value` above it, up to `limit`."""
    return range(2 * value, limit + 1, value)


def fewest(changes: Changes, knobs: list[Changes], fits: Callable[[Changes], bool]) -> Changes:
    """`changes` without those that are not needed, and of the rest the first value among `knobs` that suffices."""
    for name in list(changes):
        others = {key: value for key, value in changes.items() if key != name}
        weaker = [others | knob for knob in knobs if name in knob]
        changes = next((tried for tried in (others, *weaker) if fits(tried)), changes)
    return changes


def serving_remedy(model: ModelConfig, plan: ServingPlan, machine: Machine, batch: int, context: int) -> Changes | None:
    """The fewest changes of [serving] found that make it fit: fewer requests if that suffices, then bits, then GPUs.

    None if nothing was found.
    """

    def fits(changes: Changes) -> bool:
        try:
            memory = serving_memory(
                model, replace(plan, **changes), machine, batch=changes.get("batch", batch), context=context
            )
        except ConfigError:  # sizes that do not divide: not a layout
            return False
        return memory.fits

    fewer = largest_batch(model, plan, machine, context)
    if 0 < fewer < batch:
        return {"batch": fewer}
    knobs: list[Changes] = [{"kv_bits": 8}] if plan.kv_bits > 8 else []
    knobs += [{"weight_bits": bits} for bits in (16, 8, 4) if bits < plan.weight_bits]
    knobs += [{"tp": tp} for tp in multiples(plan.tp, machine.sheet.gpus_per_node)]
    knobs += [{"pp": pp} for pp in multiples(plan.pp, model.num_hidden_layers)]
    for change in knobs:
        if fits(change):
            return change
    together: Changes = {"batch": plan.ep}
    for change in knobs:
        together |= change
        if fits(together):
            return fewest(together, knobs, fits)
    return None
