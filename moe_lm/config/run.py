"""What a run does with a model: its data, its training, its checkpoints."""

from dataclasses import dataclass, field
from typing import Literal

from moe_lm.config.errors import require, require_positive
from moe_lm.config.model import ModelConfig
from moe_lm.config.plan import ServingPlan, TrainingPlan
from moe_lm.config.quality import QualityConfig, QualityRules


@dataclass(frozen=True)
class SourceConfig:
    """One stream of documents in the mixture."""

    path: str
    """`python:code` or `python:prose` (the running interpreter's standard library), `python:packages` (what is
    installed beside it), a local text, JSONL or parquet file or a directory of them, or a dataset on the Hugging Face
    hub."""
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
    kind: Literal["auto", "prose", "code"] = "auto"
    """Which heuristics of data.quality fit it; `auto` is code for all of python: but its prose, and for
    files with a name of code."""
    rules: QualityRules | None = None
    """Thresholds of the heuristics for this source, in place of all those of data.quality.rules."""
    skip_quality: tuple[Literal["exact", "lines", "heuristics", "near", "outliers", "classifier"], ...] = ()
    """Steps of data.quality that leave this source alone."""

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
    quality: QualityConfig | None = None
    """What is removed from the training documents; by default nothing."""

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
    expert_ns_steps: int = 5
    """Muon's steps of Newton and Schulz (`ns_steps` of torch.optim.Muon) for the routed experts; other matrices take 5.
    Fewer cost less and leave updates less orthogonal. Nano learns as well with 3."""
    expert_muon_every: int = 1
    """Optimizer steps from one of Muon's to the next for the routed experts, each as long as so many; their momentum is
    kept at every step. It changes slowly, and most of Muon's time is the experts'."""
    zero_init_residual: bool = True
    """Start what writes to the residual stream (attention output, MLP down projection) at zero, so that every block
    begins as the identity (Fixup, Zhang et al. 2019)."""
    embedding_learning_rate_ratio: float = 1.0
    """Learning rate of the token table as a multiple of the other weights': a row of it meets few tokens a step."""
    expert_learning_rate_ratio: float = 1.0
    """Learning rate of the routed experts as a multiple of the other weights': each meets a share of the
    tokens, so its gradient is noisier, and both optimizers step as far on noise."""
    min_learning_rate_ratio: float = 0.05
    """Learning rate of the last step as a share of the peak."""
    warmup: float = 0.06
    """Linear warm-up, as a share of `steps`."""
    decay: Literal["cosine", "linear", "wsd"] = "cosine"
    """Shape of the decay from the peak to the end; `wsd` stays at the peak until the last `decay_share` of the run, and
    then falls as 1 - sqrt (Hu et al. 2024; Haegele et al. 2024)."""
    decay_share: float = 0.2
    """wsd only: share of `steps` in the decay."""
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
    upcycle: str | None = None
    """A dense model, checkpoint or run that a mixture starts from, with its tokenizer (Komatsuzaki et al. 2023)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the forward and backward; weights and optimizer stay in float32. `auto` is bfloat16 where the device
    multiplies it faster than float32, measured at the start."""
    activation_checkpointing: bool = False
    """Keep of each block only its input, and compute the rest again in the backward (Chen et al. 2016): less memory for
    about a third more time, with the same losses and gradients bit for bit."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""
    eval_every: int = 200
    """Steps between evaluations on held-out documents; the last step always evaluates."""
    eval_tokens: int = 65536
    """Held-out tokens per source that an evaluation reads; the last one reads four times as many."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl; each line is about its own step."""
    starving_steps: int = 25
    """Warn of an expert that gets less than 5% of its even share of the tokens in so many steps on end; 0 does not. In
    nano, which keeps all of its experts, none went without for longer than 7 steps."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard into the run directory (needs the `tensorboard` package)."""

    def __post_init__(self):
        require_positive(
            self,
            "steps",
            "batch_tokens",
            "micro_batch_tokens",
            "expert_ns_steps",
            "expert_muon_every",
            section="train.",
        )
        require_positive(self, "learning_rate", "muon_learning_rate", "adam_eps", section="train.")
        require_positive(self, "embedding_learning_rate_ratio", "expert_learning_rate_ratio", section="train.")
        require_positive(self, "eval_every", "eval_tokens", "log_every", section="train.")
        for name in ("beta1", "beta2", "muon_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name} = {value} must be at least 0 and below 1.")
        ratio = self.min_learning_rate_ratio
        require(0 <= ratio <= 1, f"train.min_learning_rate_ratio = {ratio} must be between 0 and 1.")
        require(0 <= self.distillation <= 1, f"train.distillation = {self.distillation} must be between 0 and 1.")
        require(0 <= self.warmup < 1, f"train.warmup = {self.warmup} must be a share of the steps, below 1.")
        share = self.decay_share
        require(0 < share <= 1, f"train.decay_share = {share} must be a share of the steps, above 0 and at most 1.")
        require(
            self.decay != "wsd" or self.warmup + share <= 1,
            f"train.warmup = {self.warmup} and train.decay_share = {share} are shares of the steps and come to more "
            "than 1: lower one of them.",
        )
        for name in ("batch_ramp_steps", "weight_decay", "max_grad_norm", "seed", "starving_steps"):
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
    plan: TrainingPlan = field(default_factory=TrainingPlan)
    """The cluster that moe_lm.scaling plans the training for; the run itself is on one device."""
    serving: ServingPlan = field(default_factory=ServingPlan)
    """The cluster and the load that moe_lm.scaling plans serving for; a server takes its own options."""

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
        require(
            self.train.upcycle is None or self.data.tokenizer is None,
            f"train.upcycle = {self.train.upcycle} brings its own tokenizer beside data.tokenizer = "
            f"{self.data.tokenizer}: leave data.tokenizer out.",
        )
