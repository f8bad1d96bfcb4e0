"""Hugging Face model directories, both ways: config.json, model.safetensors, tokenizer.json, generation_config.json."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

import moe_lm.data.tokenizer as tokenizer_files
from moe_lm.checkpoint.directory import checkpoints
from moe_lm.checkpoint.hf_config import from_hf_config, to_hf_config
from moe_lm.checkpoint.hf_state import CORRECTION, from_hf_state, hf_layout, hf_zeros, to_hf_state
from moe_lm.config import ConfigError, ModelConfig, require
from moe_lm.model import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
LEFT_OUT = re.compile(r"rotary_emb\.inv_freq$|^model\.mtp_")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ModelError(ConfigError):
    """A model directory that cannot be opened; the message is one sentence."""


def save_hf(
    directory: str | Path, model: Transformer, tokenizer: Tokenizer, *, dtype: torch.dtype | None = None
) -> None:
    """Write `model` into an existing directory so that transformers, vLLM, llama.cpp and `load` open it.

    Weights are written in `dtype`, the model's own if not given; the bias on the choice of experts stays float32. Needs
    host memory for one copy of them. Files are neither renamed into place nor fsynced. Raises ConfigError for a config
    that no family holds, and for a tokenizer with more entries than the model's vocabulary or without an end of text.
    """
    directory, config = Path(directory), model.config
    dtype = dtype or model.embed_tokens.dtype
    end = tokenizer_files.end_of_text_id(tokenizer)
    entries = max(tokenizer.get_vocab().values()) + 1
    require(
        entries <= config.vocab_size,
        f"the tokenizer has {entries} entries and model.vocab_size = {config.vocab_size} rows for them: raise it.",
    )
    settings = to_hf_config(config, dtype=dtype, bos_token_id=end, eos_token_id=end)
    # safetensors refuses views that share memory, so every tensor is copied even where nothing is to be cast.
    tensors = {
        name: tensor.detach().to("cpu", torch.float32 if name.endswith(CORRECTION) else dtype, copy=True).contiguous()
        for name, tensor in to_hf_state(model.state_dict(), config).items()
    }
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    write_json(directory / "config.json", settings)
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": end, "eos_token_id": end, "do_sample": True},
    )
    tokenizer_files.save_tokenizer(tokenizer, directory, config.max_position_embeddings)


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> Transformer:
    """The model at `path` (see `resolve_model_dir`) in eval mode, its parameters trainable.

    Opens every family of `moe_lm.checkpoint.hf_family` in safetensors, in one file or several. `dtype` None is that of
    the file (where its weights differ, the widest that holds them all), `device` None the CPU. Weights go into place
    one tensor at a time, so the peak of memory is about one copy. Raises ModelError for a directory that is
    incomplete or damaged, or a model that `Transformer` does not compute.
    """
    directory = resolve_model_dir(path)
    with torch.device("meta"):
        model = Transformer(read_config(directory))
    with ExitStack() as stack:
        weights = Weights(directory, stack)
        stored = weights.dtype()
        check_names(weights, model)
        model = model.to(dtype or stored).to_empty(device=device or "cpu")
        copy_weights(weights, model)
    return model.eval()


def load_state(path: str | Path, model: Transformer) -> None:
    """Copy the weights of the model at `path` (see `resolve_model_dir`) into `model`, in place, cast to its dtype.

    Raises ModelError, before anything is copied, where they are not those of a model of its shape.
    """
    with ExitStack() as stack:
        weights = Weights(resolve_model_dir(path), stack)
        weights.dtype()
        check_names(weights, model)
        copy_weights(weights, model)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of the model at `path` (see `resolve_model_dir`), or a tokenizer.json or a directory with one.

    Raises ConfigError if there is none.
    """
    path = Path(path).expanduser()
    if path.is_file() or (path / "tokenizer.json").is_file():
        return tokenizer_files.load_tokenizer(path)
    return tokenizer_files.load_tokenizer(resolve_model_dir(path))


def resolve_model_dir(path: str | Path) -> Path:
    """The directory with config.json that `path` means: itself, or the newest complete checkpoint of a run directory.

    Raises ModelError, saying what to name instead. Nothing is downloaded.
    """
    directory = Path(path).expanduser()
    if (directory / "config.json").is_file():
        return directory
    if (directory / "checkpoints").is_dir():
        found = checkpoints(directory)
        if not found:
            raise ModelError(f"{path} has no complete checkpoint under checkpoints/ yet: let the run reach its first.")
        return found[-1]
    if directory.is_file():
        raise ModelError(f"{path} is a file: name the directory that holds it.")
    if directory.is_dir():
        raise ModelError(f"{path} has neither a config.json nor checkpoints/: name a model, a checkpoint or a run.")
    # What looks like a name on the hub may as well be a mistyped run, so both are answered.
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
    hint = f", and a model of the hub is downloaded first: hf download {path} --local-dir DIRECTORY." if hub else "."
    raise ModelError(f"there is no directory {path}: name a model, a checkpoint or a run{hint}")


def newest_run(root: Path) -> Path:
    """The run directory in `root` with the newest complete checkpoint. Raises ModelError, saying how to make one."""
    found = {run: checkpoints(run) for run in root.glob("*/")}
    newest = max(found, key=lambda run: found[run][-1].stat().st_mtime if found[run] else 0, default=None)
    if newest is None or not found[newest]:
        raise ModelError(f"there is no trained run under {root}/: make one with python train.py, or name a model.")
    return newest


def read_config(directory: Path) -> ModelConfig:
    """The shape of the model in `directory`. Raises ModelError, naming the file, for one that is refused."""
    file = directory / "config.json"
    try:
        return from_hf_config(read_json(file))
    except ModelError:
        raise
    except ConfigError as error:
        raise ModelError(f"{file}: {error}") from None


class Weights(Mapping):
    """The tensors of a directory's safetensors files by name, read when asked for. Files close with `stack`.

    Tensors that are none of the parameters are left out: the rotary frequencies that old Llama files carry, and the
    heads for tokens further ahead (multi-token prediction) of Ernie4_5_Moe's, which transformers leaves out as well.
    """

    def __init__(self, directory: Path, stack: ExitStack):
        self.directory = directory
        self.files: dict[str, Any] = {}
        for file in weight_files(directory):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is damaged or incomplete ({error}): write or download it again.") from None
            names = (name for name in opened.keys() if not LEFT_OUT.search(name))  # noqa: SIM118
            self.files.update(dict.fromkeys(names, opened))

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __contains__(self, name: object) -> bool:
        return name in self.files  # Mapping's own would read the tensor

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every weight. Raises ModelError where one is no plain floating point."""
        dtype = None
        for name, file in self.files.items():
            if name.endswith(CORRECTION):
                continue
            kind = file.get_slice(name).get_dtype()
            if kind not in DTYPES:
                raise ModelError(
                    f"{self.directory}: tensor {name} has dtype {kind}, which must be one of {', '.join(DTYPES)}."
                )
            dtype = DTYPES[kind] if dtype is None else torch.promote_types(dtype, DTYPES[kind])
        return dtype


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises ModelError where it has none, or not all of them."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ModelError(f"{index} has no table weight_map of file names: download it again.")
        files = [directory / name for name in sorted(set(names.values()))]
        for file in files:
            if file.parent != directory or not file.is_file():
                raise ModelError(f"{index} names {file.name}, which is not in {directory}: download it again.")
        return files
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ModelError(
            f"{directory} has its weights as pickles only ({pickles[0]}), which run code when they are opened: name a "
            "model saved as safetensors, as save_pretrained of transformers does."
        )
    raise ModelError(f"{directory} has a config.json but no weights: {WEIGHTS} or {INDEX} is needed.")


def copy_weights(weights: Weights, model: Transformer) -> None:
    with torch.no_grad():
        from_hf_state(weights, model.config, model.state_dict())


def check_names(weights: Weights, model: Transformer) -> None:
    """Raise ModelError where the tensors are not those of `model`, which may be on the meta device."""
    directory, state, tied = weights.directory, model.state_dict(), model.config.tie_word_embeddings
    zeros = hf_zeros(model.config, weights)
    shapes = {name: tuple(place.read(state).shape) for name, place in hf_layout(model.config, weights).items()} | zeros
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise ModelError(
            f"{directory} lacks {enumeration(missing)} that the model has: complete the files or correct the config."
        )
    unexpected = [name for name in weights if name not in shapes and not (tied and name == HEAD)]
    if unexpected:
        raise ModelError(
            f"{directory} holds {enumeration(unexpected)} that the model does not have: correct the config."
        )
    wrong = [
        f"{name} {list(weights.shape(name))} in place of {list(shape)}"
        for name, shape in shapes.items()
        if weights.shape(name) != shape
    ]
    if wrong:
        raise ModelError(f"{directory} has {enumeration(wrong)}: correct the config.")
    other = [name for name in zeros if weights[name].count_nonzero()]
    if other:
        raise ModelError(f"{directory} holds {enumeration(other)} other than zero: moe-lm's model has no such weight.")
    if tied and HEAD in weights and not torch.equal(weights[HEAD], weights["model.embed_tokens.weight"]):
        raise ModelError(f"{directory} holds an {HEAD} other than its embedding: set tie_word_embeddings to false.")


def enumeration(names: list[str], shown: int = 3) -> str:
    """How many tensors, and the first few of them."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:shown])}{more})"


def read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(settings, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(settings).__name__}.")
    return settings


def write_json(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8", newline="\n")
