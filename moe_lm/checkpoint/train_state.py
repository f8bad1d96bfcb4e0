"""What a run needs beside the weights to go on as if it had never stopped: optimizer, random numbers, loader, step."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lm.config import ConfigError, require

FORMAT = 1


def save_train_state(directory: Path, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> None:
    """Write train_state/ into a checkpoint directory; `progress` is anything JSON can hold."""
    folder = directory / "train_state"
    folder.mkdir()
    tensors = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = value.contiguous()
    save_file(tensors, folder / "state.safetensors")
    (folder / "progress.json").write_text(json.dumps({"format": FORMAT, **progress}), "utf-8")


def load_train_state(directory: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Put optimizer and random numbers back, and return what was saved as `progress`.

    Raises ConfigError, before anything is changed, when the directory holds no state, or that of another model.
    """
    folder = directory / "train_state"
    if not (folder / "progress.json").exists():
        raise ConfigError(f"{directory} holds weights but no train_state/: it can be loaded, not resumed.")
    progress = json.loads((folder / "progress.json").read_text("utf-8"))
    require(
        progress["format"] == FORMAT,
        f"{folder} has format {progress['format']}; this version reads format {FORMAT} only.",
    )
    tensors = load_file(folder / "state.safetensors")
    check_names(folder, tensors, model)
    torch.set_rng_state(tensors.pop("rng/cpu"))
    if "rng/cuda" in tensors:
        cuda_state = tensors.pop("rng/cuda")
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda_state)
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, key = parameter_and_key(path)
        # Fused AdamW counts its steps on the parameter's device.
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
    return progress


def parameter_and_key(path: str) -> tuple[str, str]:
    """The parameter and the entry of its optimizer state that the tensor `optimizer/NAME/KEY` is."""
    name, _, key = path.removeprefix("optimizer/").rpartition("/")
    return name, key


def check_names(folder: Path, tensors: dict[str, Tensor], model: nn.Module) -> None:
    """Raise ConfigError where the optimizer state is not that of `model`; before the first step there is none."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    held = set()
    for path, value in tensors.items():
        if not path.startswith("optimizer/"):
            continue
        name, _ = parameter_and_key(path)
        require(name in shapes, f"{folder} holds the optimizer state of {name}, which this model does not have.")
        require(
            value.dim() == 0 or value.shape == shapes[name],
            f"{folder} holds the optimizer state of {name} for shape {list(value.shape)}, and this model's is "
            f"{list(shapes[name])}.",
        )
        held.add(name)
    if held:
        missing = [name for name in shapes if name not in held]
        require(not missing, f"{folder} lacks the optimizer state of {', '.join(missing[:3])}, which this model has.")
