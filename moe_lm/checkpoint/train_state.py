"""What a run needs beside the weights to go on as if it had never stopped: optimizer, random numbers, loader, step."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

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

    Raises ValueError when the directory holds no state, or that of another model.
    """
    folder = directory / "train_state"
    if not (folder / "progress.json").exists():
        raise ValueError(f"{directory} holds weights but no train_state/: it can be loaded, not resumed.")
    progress = json.loads((folder / "progress.json").read_text("utf-8"))
    if progress["format"] != FORMAT:
        raise ValueError(f"{folder} has format {progress['format']}; this version reads format {FORMAT} only.")
    tensors = load_file(folder / "state.safetensors")
    torch.set_rng_state(tensors.pop("rng/cpu"))
    if "rng/cuda" in tensors:
        cuda_state = tensors.pop("rng/cuda")
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda_state)
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, _, key = path.removeprefix("optimizer/").rpartition("/")
        if name not in parameters:
            raise ValueError(f"{folder} holds the optimizer state of {name}, which this model does not have.")
        parameter = parameters[name]
        # Fused AdamW counts its steps on the parameter's device.
        optimizer.state[parameter][key] = value.to(parameter.device)
    return progress
