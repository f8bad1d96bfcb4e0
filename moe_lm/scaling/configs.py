"""The configs that come with the project, by name."""

import functools
from pathlib import Path

from moe_lm.config import ModelConfig, RunConfig
from moe_lm.toml import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def config_path(name: str | Path) -> Path:
    """The file that `name` means: itself where it is a file, else configs/NAME.toml."""
    path = Path(name)
    shipped = CONFIGS / f"{path.name}.toml"
    return shipped if path.name == str(name) and not path.is_file() and shipped.is_file() else path


@functools.cache
def run_of(name: str) -> RunConfig:
    """The run config of that name. Raises ConfigError if there is none."""
    return load_config(config_path(name))


def model_of(name: str) -> ModelConfig:
    """Its model."""
    return run_of(name).model
