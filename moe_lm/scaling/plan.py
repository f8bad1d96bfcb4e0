"""The whole answer for a config: what it holds, what training costs, what serving costs, on one or several GPUs."""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from moe_lm.config import ModelConfig, RunConfig
from moe_lm.scaling import serving
from moe_lm.scaling.advice import serving_advice, training_advice
from moe_lm.scaling.counts import Parameters, cache_numbers, forward_flops_per_token, parameters, train_flops_per_token
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.layout import Layout, settle
from moe_lm.scaling.memory import ServingMemory, StageMemory, largest_batch, serving_memory, training_memory
from moe_lm.scaling.training import Forecast, forecast


@dataclass(frozen=True)
class TrainingAnswer:
    """Training on one kind of GPU."""

    machine: Machine
    layout: Layout
    memory: tuple[StageMemory, ...]
    """Of a GPU of each stage."""
    advice: str
    """That it fits; or by how much not, and what mends it."""
    forecast: Forecast


@dataclass(frozen=True)
class ServingAnswer:
    """Serving on one kind of GPU."""

    machine: Machine
    memory: ServingMemory
    largest_batch: int
    """Requests of the planned length that fit."""
    advice: str
    forecast: serving.ServingForecast


@dataclass(frozen=True)
class Plan:
    """What a config comes to."""

    name: str
    run: RunConfig
    parameters: Parameters
    forward_flops_per_token: float
    """At half of the training context on average."""
    train_flops_per_token: float
    cache_bytes_per_token: float
    """With serving.kv_bits."""
    training: tuple[TrainingAnswer, ...]
    serving: tuple[ServingAnswer, ...]

    @property
    def model(self) -> ModelConfig:
        return self.run.model


def make_plan(name: str, run: RunConfig, training: list[Machine], serving_on: list[Machine]) -> Plan:
    """The plan of `run` for each of the machines. Raises ConfigError for a layout whose sizes do not divide."""
    length = run.data.sequence_length
    return Plan(
        name,
        run,
        parameters(run.model),
        forward_flops_per_token(run.model, (length + 1) / 2),
        train_flops_per_token(run.model, length),
        cache_numbers(run.model) * run.serving.kv_bits / 8,
        tuple(training_answer(run, machine) for machine in training),
        tuple(serving_answer(run, machine) for machine in serving_on),
    )


def training_answer(run: RunConfig, machine: Machine) -> TrainingAnswer:
    layout = settle(run)
    memory = training_memory(run.model, layout, machine)
    advice = training_advice(memory, run.model, layout, machine)
    return TrainingAnswer(machine, layout, memory, advice, forecast(run, layout, machine))


def serving_answer(run: RunConfig, machine: Machine) -> ServingAnswer:
    model, plan = run.model, run.serving
    context = plan.prompt_tokens + plan.output_tokens
    memory = serving_memory(model, plan, machine, batch=plan.batch, context=context)
    most = largest_batch(model, plan, machine, context)
    advice = serving_advice(memory, model, plan, machine)
    return ServingAnswer(machine, memory, most, advice, serving.forecast(model, plan, machine))


def as_json(value: Any) -> Any:
    """Dataclasses and named tuples as objects, tuples as lists, for json.dumps."""
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "_asdict"):
        return {key: as_json(item) for key, item in value._asdict().items()}
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value
