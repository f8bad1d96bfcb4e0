"""An engine from model directories."""

import json
from pathlib import Path

import torch

from moe_lm.config import ConfigError
from moe_lm.engine.engine import Engine


def open_engine(
    model: str | Path, draft: str | Path | None = None, *, dtype: torch.dtype | None = None,
    device: str | torch.device | None = None, **settings,
) -> Engine:  # fmt: skip
    """The engine of the model at a path, with its tokenizer, its end tokens and the draft model at another path.

    Paths, dtype and device are as in moe_lm.checkpoint.load; `settings` are the engine's, of which stop_ids replaces
    the end tokens. Raises ConfigError where one of the models cannot be opened, and where their tokenizers differ.
    """
    # On demand: reading and writing of models takes half as long to import as all of the engine.
    from moe_lm.checkpoint import load, load_tokenizer, resolve_model_dir

    tokenizer = load_tokenizer(model)
    if draft and load_tokenizer(draft).to_str() != tokenizer.to_str():
        raise ConfigError(f"the draft {draft} has another tokenizer than {model}: train it with this one.")
    settings = {"stop_ids": tuple(end_ids(resolve_model_dir(model)))} | settings
    target = load(model, dtype=dtype, device=device)
    return Engine(target, tokenizer, draft and load(draft, dtype=dtype, device=device), **settings)


def end_ids(directory: Path) -> set[int]:
    """The tokens that end a text: eos_token_id of generation_config.json or config.json, one or several."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).exists():
            value = json.loads((directory / name).read_text("utf-8")).get("eos_token_id")
            if value is not None:
                return set(value) if isinstance(value, list) else {value}
    return set()
