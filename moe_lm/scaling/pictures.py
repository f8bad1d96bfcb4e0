"""`--plot DIR` and `--html FILE`: the pictures and the page of a plan."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lm.config import ConfigError
from moe_lm.scaling import page, plots
from moe_lm.scaling.facts import facts
from moe_lm.scaling.html import Tile
from moe_lm.scaling.layout import settle
from moe_lm.scaling.memory import StageMemory, fullest_stage
from moe_lm.scaling.operations import operations
from moe_lm.scaling.plan import Plan, ServingAnswer, TrainingAnswer
from moe_lm.scaling.published import published
from moe_lm.scaling.sweeps import points_of, rows_of
from moe_lm.scaling.tables import interval, layout_text
from moe_lm.scaling.text import dollars, duration, short
from moe_lm.scaling.validate import validate


def layouts_of(plan: Plan, answer: TrainingAnswer) -> dict[str, StageMemory]:
    """The fullest GPU as planned, and with every other ZeRO stage and way of recomputing."""
    asked = plan.run.plan
    changes: list[dict[str, Any]] = [{"zero": zero} for zero in range(4) if zero != asked.zero]
    changes += [{"recompute": kind} for kind in ("none", "selective", "full") if kind != asked.recompute]
    found = {"as planned": max(answer.memory, key=lambda stage: stage.total)}
    for change in changes:
        layout = settle(replace(plan.run, plan=replace(asked, **change)))
        name = ", ".join(f"{key} {value}" for key, value in change.items())
        found[name] = fullest_stage(plan.model, layout, answer.machine)
    return found


def pictures(plan: Plan) -> dict[str, bytes]:
    """PNGs by file name: a set for each kind of GPU. Raises ConfigError where matplotlib is missing."""
    found = {}
    for answer in plan.training:
        name = answer.machine.sheet.name
        found[file_name("memory", name)] = plots.memory_plot(
            layouts_of(plan, answer), f"Training memory of {plan.name}, {answer.layout.gpus:,} x {name}"
        )
    for answer in plan.serving:
        found |= serving_pictures(plan, answer)
    return found


def serving_pictures(plan: Plan, answer: ServingAnswer) -> dict[str, bytes]:
    name, asked, model = answer.machine.sheet.name, plan.run.serving, plan.model
    length = asked.prompt_tokens + asked.output_tokens
    on = f"{plan.name} on {answer.forecast.gpus:,} x {name}"
    found = {
        file_name("batch", name): plots.batch_plot(
            rows_of(plan.model, plan.run.serving, answer.machine), f"Decode rate of {on}"
        )
    }
    if points := points_of(plan.model, plan.run.serving, answer.machine):
        found[file_name("frontier", name)] = plots.frontier_plot(points, f"Latency against price, {on} at most")
    each = max(1, asked.batch // asked.ep // asked.pp)
    decode = operations(f"decode, {each} at {length:,} tokens", model, asked, answer.machine, sequences=each, tokens=1,
                        context=length)  # fmt: skip
    prefill = operations(f"prefill of {asked.prompt_tokens:,} tokens", model, asked, answer.machine, sequences=1,
                         tokens=asked.prompt_tokens, context=0)  # fmt: skip
    found[file_name("roofline", name)] = plots.roofline_plot(
        decode + prefill, answer.machine, f"Operations of a layer of {plan.name}, {name}, tp {asked.tp}", asked.dtype
    )
    return found


def titled(text: str) -> str:
    return text[:1].upper() + text[1:]


def file_name(kind: str, device: str) -> str:
    return f"{kind}-{device.lower().replace(' ', '-').replace('/', '-')}"


def write_plots(plan: Plan, directory: Path) -> list[Path]:
    """Write every picture of the plan as a PNG; gives the paths. Raises ConfigError where that cannot be."""
    return write_pictures(pictures(plan), directory)


def write_pictures(drawn: Mapping[str, bytes], directory: Path) -> list[Path]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"{name}.png" for name in drawn]
        for path, data in zip(paths, drawn.values(), strict=True):
            path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"--plot {directory} cannot be written: {error.strerror}.") from None
    return paths


def write_page(plan: Plan, path: Path) -> None:
    """Write the plan as one page, with its pictures. Raises ConfigError as `write_plots`."""
    drawn = {name: page.picture_html(data, name.replace("-", " ")) for name, data in pictures(plan).items()}
    counts = plan.parameters
    tiles = [Tile("parameters", short(counts.total), f"{short(counts.active)} active per token")]
    sections = {"Parameters": page.parameters_html(counts)}
    for answer in plan.training:
        told, name = answer.forecast, answer.machine.sheet.name
        on = f"training on {answer.layout.gpus:,} x {name}"
        span = f"{duration(told.seconds.low)} to {duration(told.seconds.high)}"
        tiles.append(Tile(on, duration(told.seconds.mid), span))
        tiles.append(Tile("its cost", dollars(told.cost.mid), f"MFU {interval(told.mfu, '{:.0%}'.format)}"))
        sections[titled(on)] = (
            page.note(f"{layout_text(answer)}. {answer.advice}")
            + page.memory_html(answer.memory)
            + drawn[file_name("memory", name)]
            + page.time_html(told.step)
        )  # fmt: skip
    for answer in plan.serving:
        told, name = answer.forecast, answer.machine.sheet.name
        on = f"serving on {told.gpus:,} x {name}"
        rate, price = told.figures["tokens_per_s"], told.figures["price_output"]
        tiles.append(Tile(on, f"{short(rate.mid)} tokens/s", f"{short(rate.low)} to {short(rate.high)}"))
        span = f"${price.low:.4f} to ${price.high:.4f}"
        tiles.append(Tile("1,000 tokens of answers", f"${price.mid:.4f}", span))
        asked_of = plan.model, plan.run.serving, answer.machine
        points = points_of(*asked_of)
        content = page.note(answer.advice) + (page.serving_html(points) if points else "")
        content += drawn.get(file_name("frontier", name), "") + page.sweep_html(
            rows_of(plan.model, plan.run.serving, answer.machine)
        )
        sections[titled(on)] = content + drawn[file_name("batch", name)] + drawn[file_name("roofline", name)]
    told = page.facts_html([row.as_json() for row in facts()])
    sections["Reported facts of GPT-4"] = f"<details><summary>Every row</summary>{told}</details>"
    sections["Validation"] = page.validation_html(validate(*published()))
    subtitle = f"{plan.model.num_hidden_layers} layers, rows of {plan.run.data.sequence_length:,} tokens"
    try:
        path.write_text(page.plan_page(plan.name, subtitle, tiles, sections), "utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path} cannot be written: {error.strerror}.") from None
