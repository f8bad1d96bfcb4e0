"""Models on disk: a checkpoint is a Hugging Face model directory."""

from moe_lm.checkpoint.hf import ModelError, load, load_state, load_tokenizer, newest_run, resolve_model_dir, save_hf
from moe_lm.checkpoint.hf_config import from_hf_config, to_hf_config
from moe_lm.checkpoint.hf_family import check_exportable
from moe_lm.checkpoint.hf_state import from_hf_state, to_hf_state

__all__ = [
    "ModelError",
    "check_exportable",
    "from_hf_config",
    "from_hf_state",
    "load",
    "load_state",
    "load_tokenizer",
    "newest_run",
    "resolve_model_dir",
    "save_hf",
    "to_hf_config",
    "to_hf_state",
]
