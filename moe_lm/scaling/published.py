"""What others measured and published: published.toml as typed runs, each with the plan that the planner is asked for.

P parameters, L layers, H query heads, C channels of a head, T tokens of a row.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from moe_lm.config import DataConfig, ModelConfig, RunConfig, ServingPlan, TrainConfig, TrainingPlan, require
from moe_lm.scaling.configs import model_of
from moe_lm.scaling.counts import forward_flops_per_token
from moe_lm.scaling.hardware import Machine, machine
from moe_lm.scaling.layout import Layout, settle
from moe_lm.toml import from_value, read_toml

PUBLISHED = Path(__file__).with_name("published.toml")

TRAINING_UNITS = {
    "step_seconds": "s",
    "tokens_per_s_per_gpu": "tokens/s/GPU",
    "model_tflops_per_gpu": "model TFLOP/s/GPU",
    "hardware_tflops_per_gpu": "hardware TFLOP/s/GPU",
    "gpu_hours": "GPU-hours",
}
"""The quantities that a training run may state, one each, with their units."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What every entry says of itself."""

    name: str
    family: str
    """Runs of one group with one code, which are left out together."""
    source: str
    verified: bool
    """Whether the figure was read where the source has it."""
    gpu: str
    """A sheet of configs/hardware."""
    config: str | None = None
    """A config of configs/ that has the model, in place of `model`."""
    model: ModelConfig | None = None
    network: float | None = None
    """Bytes/s per GPU between nodes, where they differ from the sheet's."""
    bandwidth: float | None = None
    """Bytes/s of the memory, where they differ from the sheet's."""
    assumed: tuple[str, ...] = ()
    """Settings that the source does not state."""
    lower_bound: bool = False
    """Whether the figure holds more than what is predicted, such as lost time."""
    note: str = ""

    def __post_init__(self):
        require(bool(self.source and self.family), f"{self.name} lacks a source or a family.")
        require((self.config is None) != (self.model is None), f"{self.name} needs either a config or a model.")

    @property
    def comparable(self) -> bool:
        """Whether the figure is one that a plan predicts; else nothing is fitted on it, and it is in no median."""
        return not self.lower_bound and "tp" not in self.assumed

    def shape(self, positions: int) -> ModelConfig:
        """The model, with a table of `positions` where it learns them."""
        model = self.model or model_of(self.config)
        return dataclasses.replace(model, max_position_embeddings=max(positions, model.max_position_embeddings))

    def machine(self) -> Machine:
        """The sheet, with what the source says of its own machine, and the constants of its kind."""
        base = machine(self.gpu)
        known = {"network": self.network, "bandwidth": self.bandwidth}
        sheet = dataclasses.replace(base.sheet, **{key: value for key, value in known.items() if value is not None})
        return Machine(sheet, base.reached)


@dataclass(frozen=True, kw_only=True)
class TrainingRun(Published):
    """A training run: its layout, and one measured quantity of TRAINING_UNITS."""

    sequence_length: int
    gpus: int
    tp: int
    pp: int
    interleave: int
    ep: int
    zero: int
    zero_group: int | None = None
    batch: int
    """Rows of an optimizer step."""
    micro_batch: int
    """Rows of one forward."""
    recompute: str
    flash_attention: bool
    sequence_parallel: bool
    dtype: str
    step_seconds: float | None = None
    tokens_per_s_per_gpu: float | None = None
    model_tflops_per_gpu: float | None = None
    hardware_tflops_per_gpu: float | None = None
    gpu_hours: float | None = None
    tokens: float | None = None
    """Tokens that gpu_hours were spent on."""

    def __post_init__(self):
        super().__post_init__()
        stated = [name for name in TRAINING_UNITS if getattr(self, name) is not None]
        require(len(stated) == 1, f"{self.name} states {len(stated)} quantities of {', '.join(TRAINING_UNITS)}, not 1.")
        require((self.gpu_hours is None) == (self.tokens is None), f"{self.name}: gpu_hours and tokens go together.")

    @property
    def quantity(self) -> str:
        return next(name for name in TRAINING_UNITS if getattr(self, name) is not None)

    @property
    def unit(self) -> str:
        return TRAINING_UNITS[self.quantity]

    @property
    def measured(self) -> float:
        return getattr(self, self.quantity)

    def layout(self) -> tuple[ModelConfig, Layout]:
        """The model and the layout. Raises ConfigError where the sizes do not divide each other."""
        names = ("gpu", "gpus", "tp", "pp", "ep", "interleave", "zero", "zero_group", "micro_batch", "recompute",
                 "sequence_parallel", "flash_attention", "dtype")  # fmt: skip
        plan = from_value(TrainingPlan, {name: getattr(self, name) for name in names}, self.name)
        model, tokens = self.shape(self.sequence_length), self.batch * self.sequence_length
        train = TrainConfig(batch_tokens=tokens, micro_batch_tokens=tokens)
        data = DataConfig(sequence_length=self.sequence_length)
        return model, settle(RunConfig(model=model, data=data, train=train, plan=plan))

    def from_step(self, seconds: float) -> float:
        """The stated quantity if an optimizer step takes `seconds`."""
        if self.step_seconds is not None:
            return seconds
        tokens_per_s = self.batch * self.sequence_length / seconds
        if self.gpu_hours is not None:
            return self.tokens / tokens_per_s * self.gpus / 3600
        per_gpu = tokens_per_s / self.gpus
        if self.tokens_per_s_per_gpu is not None:
            return per_gpu
        flops = customary_flops(self.shape(self.sequence_length), self.sequence_length, self.quantity)
        return per_gpu * flops / 1e12


def customary_flops(model: ModelConfig, rows_of: int, quantity: str) -> float:
    """FLOPs of a token by the formula of the sources (Narayanan et al. 2021, eq. 3), forward and backward.

    6 P + 12 L H C T: attention as if it saw the whole row, where `counts` halves it for the causal mask. Hardware FLOPs
    count the layers' forward twice, but not that of the projection to the vocabulary.
    """
    forward = forward_flops_per_token(model, rows_of)
    if quantity == "model_tflops_per_gpu":
        return 3 * forward
    return 4 * forward - 2 * model.vocab_size * model.hidden_size


@dataclass(frozen=True, kw_only=True)
class DecodeRun(Published):
    """Tokens/s that an engine made of all its sequences together."""

    tp: int
    ep: int
    batch: int
    """Sequences that decode together, over all ranks."""
    context: int
    """Tokens of context, on average over the measurement."""
    weight_bits: int
    kv_bits: int
    weight_only: bool
    """Whether weights are widened before they are multiplied; else both operands have weight_bits."""
    tokens_per_s: float
    engine: str
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    includes_prefill: bool = False
    """Whether tokens_per_s are those of the answers over the whole time, prompts included."""

    def __post_init__(self):
        super().__post_init__()
        require(
            not self.includes_prefill or bool(self.prompt_tokens and self.output_tokens),
            f"{self.name} includes the prefill: it needs prompt_tokens and output_tokens.",
        )

    quantity = "tokens_per_s"
    unit = "tokens/s"

    @property
    def measured(self) -> float:
        return self.tokens_per_s

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return max(self.context, (self.prompt_tokens or 0) + (self.output_tokens or 0))

    def plan(self) -> tuple[ModelConfig, ServingPlan]:
        """The model and the plan; products of 8-bit weights that are not widened are in float8."""
        widened = self.weight_only or self.weight_bits > 8
        settings = {
            "gpu": self.gpu, "tp": self.tp, "ep": self.ep, "batch": self.batch, "weight_bits": self.weight_bits,
            "kv_bits": self.kv_bits, "dtype": "bfloat16" if widened else "float8",
            "prompt_tokens": self.prompt_tokens or self.context, "output_tokens": self.output_tokens or 1,
        }  # fmt: skip
        return self.shape(self.longest), from_value(ServingPlan, settings, self.name)


@functools.cache
def published(path: Path = PUBLISHED) -> tuple[tuple[TrainingRun, ...], tuple[DecodeRun, ...]]:
    """The training and the decode runs of the file. Raises ConfigError for an entry that is not complete."""
    tables = read_toml(path)
    runs = [
        tuple(from_value(kind, entry, entry.get("name", key)) for entry in tables[key])
        for key, kind in (("training", TrainingRun), ("decode", DecodeRun))
    ]
    return runs[0], runs[1]
