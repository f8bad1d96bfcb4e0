"""One typed file of settings describes a run: the model, its data, its training, and the cluster to plan it for.

`RunConfig` is read from TOML and written beside every checkpoint (`moe_lm.toml`), and changed from the command line
(`moe_lm.cli`). Fields of `ModelConfig` carry the names of Hugging Face's config.json, so that a checkpoint
needs no translation table. Every class refuses what cannot work with one sentence that names the value and the knob.
"""

from moe_lm.config.errors import ConfigError, require, require_positive
from moe_lm.config.model import LatentAttention, Mamba, ModelConfig, RopeScaling, VisionEncoder
from moe_lm.config.plan import ServingPlan, TrainingPlan
from moe_lm.config.quality import QUALITY_STEPS, QualityConfig, QualityRules
from moe_lm.config.run import CheckpointConfig, DataConfig, RunConfig, SampleConfig, SourceConfig, TrainConfig

__all__ = [
    "QUALITY_STEPS", "CheckpointConfig", "ConfigError", "DataConfig", "LatentAttention", "Mamba", "ModelConfig",
    "QualityConfig", "QualityRules", "RopeScaling", "RunConfig", "SampleConfig", "ServingPlan", "SourceConfig",
    "TrainConfig", "TrainingPlan", "VisionEncoder", "require", "require_positive",
]  # fmt: skip
