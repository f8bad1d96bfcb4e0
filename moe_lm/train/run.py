"""A run directory from its config: where it lies, what it is written with, and the model and draft trained into it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from moe_lm.checkpoint import check_exportable
from moe_lm.checkpoint.directory import checkpoints, replace_file
from moe_lm.config import ConfigError, RunConfig, require
from moe_lm.data import PreparedData, prepare_data
from moe_lm.model import Transformer
from moe_lm.model.transformer import check_buildable
from moe_lm.scaling.counts import parameters
from moe_lm.toml import load_config, to_toml
from moe_lm.train.distillation import check_distillation
from moe_lm.train.loop import Trainer
from moe_lm.train.memory import check_memory
from moe_lm.train.upcycle import check_upcycling

CONFIG_FILE = "config.toml"


@dataclass(frozen=True)
class TrainedModel:
    """A model at the end of its run, ready for use."""

    run_dir: Path
    config: RunConfig
    trainer: Trainer

    @property
    def model(self) -> Transformer:
        return self.trainer.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.trainer.data.tokenizer

    @property
    def seconds(self) -> float:
        """Wall-clock of the training, that before a resume included."""
        return self.trainer.seconds


def choose_run_dir(config: RunConfig, config_path: Path) -> Path:
    """Where a new run is written: what the config says, else runs/ and the file's name, numbered if that is taken.

    Raises ConfigError when the directory that was asked for holds a run already.
    """
    if config.run_dir is not None:
        run_dir = Path(config.run_dir)
        require(
            not (run_dir / CONFIG_FILE).exists(),
            f"run_dir = {run_dir} holds a run already: continue it with --resume {run_dir}, or name another --run-dir.",
        )
        return run_dir
    name, number = config_path.stem, 1
    while (Path("runs") / name / CONFIG_FILE).exists():
        number += 1
        name = f"{config_path.stem}-{number}"
    return Path("runs") / name


def draft_config(config: RunConfig, config_path: Path, run_dir: Path) -> RunConfig | None:
    """The draft's run: its own file's model and schedule, on the target's data, seed, device and vocabulary.

    The file is named beside the target's, or from the working directory; a resumed run has its own copy. Raises
    ConfigError when there is no such file, and when a run is resumed with another one.
    """
    if config.draft is None:
        return None
    own, copy = run_dir / CONFIG_FILE, run_dir / "draft" / CONFIG_FILE
    if own.exists() and copy.exists():
        began = load_config(own).draft
        require(
            began in (None, config.draft),
            f"draft = {config.draft} is not the {began} that {run_dir} began with: resume without --draft, or with "
            "--draft none to leave it out.",
        )
        return load_config(copy)
    beside = config_path.parent / config.draft
    draft = load_config(beside if beside.exists() else config.draft)
    shared = {name: getattr(config.train, name) for name in ("seed", "device", "dtype", "tensorboard")}
    train = dataclasses.replace(draft.train, steps=min(draft.train.steps, config.train.steps), **shared)
    model = dataclasses.replace(
        draft.model,
        vocab_size=config.model.vocab_size,
        max_position_embeddings=config.model.max_position_embeddings,
    )
    return dataclasses.replace(draft, run_dir=None, draft=None, model=model, data=config.data, train=train)


def open_run(run_dir: Path, config: RunConfig, draft: RunConfig | None) -> None:
    """Make the directories. They are a run only once `train` has written its config there.

    Raises ConfigError for a model that cannot be built, saved, held in memory, distilled or upcycled, and for a
    directory that cannot be written.
    """
    require(
        draft is None or draft.train.upcycle is None,
        f"draft = {config.draft} has a train.upcycle, and a draft has its target's tokenizer: leave it out there.",
    )
    for folder, settings, target in ((run_dir, config, None), (run_dir / "draft", draft, config.model)):
        if settings is not None:
            check_buildable(settings.model)
            check_exportable(settings.model)
            check_memory(settings)
            check_distillation(settings, target)
            check_start(settings, folder)
            with writable(folder):
                folder.mkdir(parents=True, exist_ok=True)


def check_start(config: RunConfig, run_dir: Path) -> None:
    """Raise ConfigError where `train.upcycle` cannot start a run, or is not what a run with a checkpoint began with."""
    if not checkpoints(run_dir):
        check_upcycling(config)
    elif (run_dir / CONFIG_FILE).exists():
        began, here = load_config(run_dir / CONFIG_FILE).train.upcycle, config.train.upcycle
        require(
            began == here,
            f"train.upcycle = {here or 'none'} is not the {began or 'none'} that {run_dir} began with: resume without "
            "--train.upcycle.",
        )


def write_config(folder: Path, config: RunConfig) -> None:
    with writable(folder):
        replace_file(folder / CONFIG_FILE, to_toml(dataclasses.replace(config, run_dir=None)))


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"run_dir = {folder} cannot be written: {error.strerror}.") from None


def train(
    config: RunConfig, run_dir: Path, data: PreparedData, say: Callable[[str], None], *,
    draft: RunConfig | None = None, target: Transformer | None = None,
) -> TrainedModel | None:  # fmt: skip
    """Train the model of `config` to its end, from its newest checkpoint if it has one; None if asked to stop before.

    `draft` is the run to be trained after it, whose config is kept with it; `target` is the model that this one is to
    draft for. Raises what Trainer and Trainer.run raise.
    """
    counts = parameters(config.model)
    trainer = Trainer(config, run_dir, data, target)
    # Only now are the settings known to fit the data, the device and the checkpoint: a run refused before leaves its
    # name free, or its config as it was. The draft's comes first, since a directory with a config is resumed.
    if draft is not None:
        write_config(run_dir / "draft", draft)
    write_config(run_dir, config)
    kind = f"{config.model.num_local_experts} experts, top-{config.model.num_experts_per_tok}"
    say(
        f"{run_dir}: {counts.total / 1e6:.1f}M parameters, {counts.active / 1e6:.1f}M active per token "
        f"({kind if config.model.is_moe else 'dense'}), {config.train.steps} steps in {trainer.dtype} on "
        f"{trainer.device}" + beginning(trainer)
    )
    if not trainer.run():
        say(f"stopped after step {trainer.step}; everything is saved in {checkpoints(run_dir)[-1]}")
        return None
    return TrainedModel(run_dir, config, trainer)


def beginning(trainer: Trainer) -> str:
    """What the run goes on from, if not from random weights."""
    if trainer.step:
        return f", resumed at step {trainer.step}"
    upcycled = trainer.config.train.upcycle
    return f", upcycled from {upcycled}" if upcycled is not None else ""


def prepare(config: RunConfig, run_dir: Path, say: Callable[[str], None]) -> PreparedData:
    """The run's data, with the tokenizer of its newest checkpoint if it has one, else of the model it starts from."""
    from moe_lm.checkpoint import load_tokenizer

    begun = run_dir if checkpoints(run_dir) else config.train.upcycle
    tokenizer = load_tokenizer(begun) if begun is not None else None
    data = prepare_data(config.data, config.model.vocab_size, tokenizer=tokenizer, progress=say)
    for source in data.sources:
        if source.train is not None:
            say(
                f"{source.name}: {source.train.num_bytes / 1e6:.1f} MB, {source.train.num_tokens / 1e6:.2f}M tokens to "
                f"train on, {source.validation.num_tokens / 1e3:.0f}k held out"
            )
    return data
