"""Checkpoint directories that are complete or not there, whatever moment the power goes.

A checkpoint is written beside its final place under a name that nothing looks for, every file and directory is flushed
to disk, and one rename makes it appear. Deletion goes the other way: first the name disappears, then the files.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

UNFINISHED = ".unfinished-"


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(checkpoint.name.removeprefix("step-"))


def publish(run_dir: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Make checkpoints/step-NNNNNN from what `write` puts into a directory; keep the `keep` newest and delete the rest.

    A checkpoint of that step which is already there is left as it is. Raises OSError when the disk refuses; what was
    complete before stays so.
    """
    parent = run_dir / "checkpoints"
    final = parent / f"step-{step:06d}"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover)
    if not final.exists():
        beside = parent / f"{UNFINISHED}{final.name}"
        beside.mkdir()
        write(beside)
        for folder, _, files in os.walk(beside):
            for name in files:
                flush(Path(folder) / name)
            flush(Path(folder))
        beside.rename(final)
        flush(parent)
    for old in checkpoints(run_dir)[:-keep]:
        beside = parent / f"{UNFINISHED}{old.name}"
        old.rename(beside)
        flush(parent)
        shutil.rmtree(beside)
    return final


def flush(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, text: str) -> None:
    """Write a text file so that it is the old one or the new one, never half of either."""
    beside = path.with_name(f"{UNFINISHED}{path.name}")
    beside.write_text(text, "utf-8")
    flush(beside)
    beside.replace(path)
    flush(path.parent)
