"""One typed file of settings describes a run: the model, its data, its training.

`RunConfig` is read from TOML and written beside every checkpoint (`moe_lm.toml`), and changed from the command line
(`moe_lm.cli`). Fields of `ModelConfig` carry the names of Hugging Face's config.json, so that a checkpoint
needs no translation table. Every class refuses what cannot work with one sentence that names the value and the knob.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting that cannot work; the message is one sentence with the value, the limit and the field to change."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_positive(config: Any, *names: str, section: str = "") -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}{name} = {value} must be greater than 0.")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was trained on."""

    rope_type: Literal["linear", "llama3"] = "linear"
    """`linear` divides every frequency by `factor` (Chen et al. 2023); `llama3` only the slow ones (Llama 3.1)."""
    factor: float = 1.0
    """How many times longer the context becomes."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor are left alone."""
    original_max_position_embeddings: int = 8192
    """llama3: the context length of the model before scaling, in tokens."""

    def __post_init__(self):
        require(self.factor >= 1, f"rope_scaling.factor = {self.factor} must be at least 1.")
        require(
            self.high_freq_factor > self.low_freq_factor > 0,
            f"rope_scaling.high_freq_factor = {self.high_freq_factor} must be above "
            f"low_freq_factor = {self.low_freq_factor}, which must be above 0.",
        )
        require_positive(self, "original_max_position_embeddings", section="rope_scaling.")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. With every router option at its default it is Mixtral with one key-value head."""

    vocab_size: int = 4096
    """Rows of the embedding: at least the tokenizer's vocabulary; a multiple of 128 keeps GPU tiles full."""
    hidden_size: int = 256
    """Width of the residual stream (d_model)."""
    intermediate_size: int = 512
    """Hidden width of the SwiGLU MLP; in a mixture, of each expert unless `moe_intermediate_size` says otherwise."""
    num_hidden_layers: int = 4
    """Number of blocks, each attention then MLP."""
    num_attention_heads: int = 8
    """Query heads."""
    num_key_value_heads: int = 1
    """Key-value heads: 1 is multi-query (MQA), `num_attention_heads` is multi-head, in between is grouped (GQA)."""
    head_dim: int | None = None
    """Width of one head; hidden_size / num_attention_heads if not given."""
    max_position_embeddings: int = 1024
    """Longest context in tokens that a cache is sized for and a request may fill."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies (Su et al. 2021)."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies; none by default."""
    tie_word_embeddings: bool = False
    """Whether the output projection is the embedding itself."""
    num_local_experts: int = 16
    """Routed experts per layer; 0 makes every MLP dense."""
    num_experts_per_tok: int = 2
    """Experts that each token is sent to (top-k)."""
    moe_intermediate_size: int | None = None
    """Hidden width of each expert where it differs from `intermediate_size`."""
    n_shared_experts: int = 0
    """Experts that see every token beside the routed ones (DeepSeekMoE, section 3.2), each of the experts' width."""
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss (Switch Transformer, section 2.2) in the training loss."""
    router_z_loss_coef: float = 0.001
    """Weight of the router z-loss (ST-MoE, section 3.2), which keeps router logits small."""
    router_jitter_noise: float = 0.0
    """Training only: router inputs are multiplied by uniform noise in [1 - j, 1 + j] (Switch Transformer)."""

    def __post_init__(self):
        require_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        require_positive(self, "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_theta")
        require_positive(self, "rms_norm_eps", "initializer_range")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads = {self.num_attention_heads} is not a multiple of num_key_value_heads = "
            f"{self.num_key_value_heads}; choose a divisor of {self.num_attention_heads}.",
        )
        require(
            self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = "
            f"{self.num_attention_heads}; change one of them or give head_dim.",
        )
        head_dim = self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads
        require(
            head_dim > 0 and head_dim % 2 == 0,
            f"head_dim = {head_dim} must be even and above 0: rotary embedding turns pairs of channels.",
        )
        object.__setattr__(self, "head_dim", head_dim)
        require(self.num_local_experts >= 0, f"num_local_experts = {self.num_local_experts} must be 0 (dense) or more.")
        require(self.n_shared_experts >= 0, f"n_shared_experts = {self.n_shared_experts} must be 0 or more.")
        if self.moe_intermediate_size is not None:
            require_positive(self, "moe_intermediate_size")
        if self.is_moe:
            require(
                1 <= self.num_experts_per_tok <= self.num_local_experts,
                f"num_experts_per_tok = {self.num_experts_per_tok} must be between 1 and num_local_experts = "
                f"{self.num_local_experts}.",
            )
        else:
            require(
                self.n_shared_experts == 0,
                f"n_shared_experts = {self.n_shared_experts} needs routed experts beside them: set num_local_experts.",
            )
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)} must be 0 or more.")
        require(
            0 <= self.router_jitter_noise < 1,
            f"router_jitter_noise = {self.router_jitter_noise} must be at least 0 and below 1.",
        )

    @property
    def is_moe(self) -> bool:
        return self.num_local_experts > 0

    @property
    def expert_size(self) -> int:
        """Hidden width of one expert."""
        return self.moe_intermediate_size or self.intermediate_size


@dataclass(frozen=True)
class SourceConfig:
    """One stream of documents in the mixture."""

    path: str
    """`python:code` or `python:prose` (the running interpreter's standard library), a local text, JSONL or parquet
    file or a directory of them, or a dataset name on the Hugging Face hub."""
    epochs: float = 1.0
    """Weight in the mixture, as passes over this source for each pass over a source of epochs = 1."""
    name: str | None = None
    """Hub only: the configuration of the dataset."""
    split: str = "train"
    """Hub only: the split that is read."""
    text_field: str = "text"
    """The column that holds the text, in JSONL, parquet and hub datasets."""
    streaming: bool = False
    """Read and tokenize while training instead of before it; needed where a source does not fit the disk."""

    def __post_init__(self):
        require(bool(self.path), "a source's path is empty: name a file, a directory, a hub dataset or python:code.")
        require(self.epochs > 0, f"epochs = {self.epochs} of source {self.path} must be greater than 0.")


@dataclass(frozen=True)
class DataConfig:
    """What the model reads."""

    sources: tuple[SourceConfig, ...] = (
        SourceConfig("python:prose", epochs=2.0),
        SourceConfig("python:code", epochs=4.0),
    )
    """The mixture. The default is the reported one: 2 epochs of text to 4 of code."""
    sequence_length: int = 256
    """Tokens in a training row; documents are packed into rows and attention does not cross from one to the next."""
    validation_fraction: float = 0.05
    """Share of the files (of the documents, where there are no files) that is held out and never trained on."""
    tokenizer: str | None = None
    """A tokenizer.json, or a directory with one; by default a byte-level BPE of model.vocab_size is trained on the
    training documents and saved with the model."""
    cache_dir: str = ".cache"
    """Where tokenized sources and trained tokenizers are kept between runs."""

    def __post_init__(self):
        require(bool(self.sources), "data.sources is empty: name at least one source.")
        require(self.sequence_length >= 2, f"data.sequence_length = {self.sequence_length} must be at least 2.")
        require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction = {self.validation_fraction} must be between 0 and 1, both excluded.",
        )


@dataclass(frozen=True)
class TrainConfig:
    """How the model learns."""

    steps: int = 600
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Seed of the initial weights, of the order of the data and of dropped-in noise."""
    batch_tokens: int = 8192
    """Tokens per optimizer step once the ramp is over."""
    batch_tokens_start: int | None = None
    """Tokens per step at the start of the batch-size ramp; `batch_tokens` if not given."""
    batch_ramp_steps: int = 0
    """Steps over which the batch grows linearly from `batch_tokens_start` to `batch_tokens`."""
    micro_batch_tokens: int = 8192
    """Most tokens in one forward and backward; a larger batch accumulates gradients over several."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` updates the matrices of the blocks with Muon (Jordan et al. 2024) and the rest with AdamW."""
    learning_rate: float = 2e-3
    """AdamW's peak of the schedule."""
    muon_learning_rate: float = 0.01
    """Muon's peak of the schedule."""
    muon_momentum: float = 0.95
    """Muon's decay of the momentum."""
    zero_init_residual: bool = True
    """Start what writes to the residual stream (attention output, MLP down projection) at zero, so that every block
    begins as the identity (Fixup, Zhang et al. 2019)."""
    embedding_learning_rate_ratio: float = 1.0
    """Learning rate of the token table as a multiple of the other weights': a row of it meets few tokens a step."""
    min_learning_rate_ratio: float = 0.05
    """Learning rate of the last step as a share of the peak."""
    warmup: float = 0.06
    """Linear warm-up, as a share of `steps`."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Shape of the decay from the peak to the end."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, per unit of learning rate; norms have none."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    distillation: float = 0.0
    """Draft only: weight in the loss of the divergence from the target's distribution, KL(target || draft), from 0, the
    text alone, to 1, the target alone (Hinton et al. 2015; DistillSpec, Zhou et al. 2024)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the forward and backward; weights and optimizer stay in float32. `auto` is bfloat16 where the device
    multiplies it faster than float32, measured at the start."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""
    eval_every: int = 200
    """Steps between evaluations on held-out documents; the last step always evaluates."""
    eval_tokens: int = 65536
    """Held-out tokens per source that an evaluation reads; the last one reads four times as many."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl; each line is about its own step."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard into the run directory (needs the `tensorboard` package)."""

    def __post_init__(self):
        require_positive(self, "steps", "batch_tokens", "micro_batch_tokens", section="train.")
        require_positive(
            self, "learning_rate", "muon_learning_rate", "embedding_learning_rate_ratio", "adam_eps", section="train."
        )
        require_positive(self, "eval_every", "eval_tokens", "log_every", section="train.")
        for name in ("beta1", "beta2", "muon_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name} = {value} must be at least 0 and below 1.")
        ratio = self.min_learning_rate_ratio
        require(0 <= ratio <= 1, f"train.min_learning_rate_ratio = {ratio} must be between 0 and 1.")
        require(0 <= self.distillation <= 1, f"train.distillation = {self.distillation} must be between 0 and 1.")
        require(0 <= self.warmup < 1, f"train.warmup = {self.warmup} must be a share of the steps, below 1.")
        for name in ("batch_ramp_steps", "weight_decay", "max_grad_norm", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name} = {value} must be 0 or more.")
        start = self.batch_tokens_start
        require(
            start is None or 0 < start <= self.batch_tokens,
            f"train.batch_tokens_start = {start} must be between 1 and batch_tokens = {self.batch_tokens}.",
        )
        require(
            (start is None) == (self.batch_ramp_steps == 0),
            f"train.batch_tokens_start = {start} and train.batch_ramp_steps = {self.batch_ramp_steps} need each other: "
            "set both or neither.",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = 200
    """Steps between checkpoints; the last step always saves."""
    keep: int = 2
    """Complete checkpoints that are kept, the newest ones."""

    def __post_init__(self):
        require_positive(self, "every", "keep", section="checkpoint.")


@dataclass(frozen=True)
class SampleConfig:
    """The text that a finished run writes, and how it speculates."""

    prompts: tuple[str, ...] = ("def main(", "class ", "import os\n")
    """Prompts that the trained model continues in the report."""
    max_tokens: int = 96
    """Longest continuation in tokens."""
    temperature: float = 0.7
    """Sampling temperature of the report's samples; 0 is greedy."""
    draft_tokens: int = 4
    """Tokens that the draft model proposes per step."""

    def __post_init__(self):
        require_positive(self, "max_tokens", "draft_tokens", section="sample.")
        require(self.temperature >= 0, f"sample.temperature = {self.temperature} must be 0 or more.")


@dataclass(frozen=True)
class RunConfig:
    """A whole run, as one TOML file describes it."""

    run_dir: str | None = None
    """Where the run is written; runs/ and the name of the config file by default."""
    draft: str | None = None
    """Config file of the draft model for speculative decoding, trained after this one with its tokenizer; `none`
    trains no draft. It never trains for more steps than its target."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The shape of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """What the model reads."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the model learns."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """The text that a finished run writes."""

    def __post_init__(self):
        length, limit = self.data.sequence_length, self.model.max_position_embeddings
        require(
            length <= limit,
            f"data.sequence_length = {length} is longer than model.max_position_embeddings = {limit}.",
        )
        smallest = min(self.train.micro_batch_tokens, self.train.batch_tokens_start or self.train.batch_tokens)
        require(
            smallest >= length,
            f"a batch of {smallest} tokens holds no row of data.sequence_length = {length}; raise "
            "train.batch_tokens_start, train.batch_tokens or train.micro_batch_tokens, or shorten the rows.",
        )
