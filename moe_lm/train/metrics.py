"""Where a run's numbers go: metrics.jsonl always, TensorBoard when asked, and one live line on the terminal."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from moe_lm.checkpoint.directory import replace_file
from moe_lm.config import ConfigError


class MetricsLog:
    """Appends one JSON object per line to metrics.jsonl; on resume, drops what lies beyond the checkpoint.

    `after` is the step that the run stands at: later lines belong to steps that will be taken again.
    """

    def __init__(self, run_dir: Path, after: int, tensorboard: bool):
        self.path = run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= after]
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a", encoding="utf-8")
        self.board = open_tensorboard(run_dir, after) if tensorboard else None

    def write(self, metrics: dict[str, Any]) -> None:
        self.file.write(json.dumps(metrics, allow_nan=False) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def open_tensorboard(run_dir: Path, after: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "train.tensorboard = true needs the tensorboard package: pip install 'moe-lm[tensorboard]'."
        ) from None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=after + 1)


class ProgressLine:
    """One line that renews itself on a terminal; elsewhere a new line every `quiet_seconds`."""

    def __init__(self, steps: int, done: int, stream: TextIO | None = None, quiet_seconds: float = 15.0):
        self.steps, self.first, self.stream = steps, done, stream or sys.stderr
        self.live = self.stream.isatty()
        self.interval = 0.2 if self.live else quiet_seconds
        self.start = time.monotonic()
        self.shown = -math.inf
        self.unended = False

    def show(self, metrics: dict[str, Any], last: bool = False) -> None:
        now = time.monotonic()
        if now - self.shown < self.interval and not last:
            return
        self.shown = now
        done = metrics["step"] - self.first
        eta = (now - self.start) / done * (self.steps - metrics["step"])
        text = progress_text(metrics, self.steps, eta)
        self.stream.write(f"\r\x1b[2K{text}" if self.live else f"{text}\n")
        self.unended = self.live
        self.stream.flush()

    def note(self, text: str) -> None:
        """A line that stays, above the live one."""
        self.stream.write(f"\r\x1b[2K{text}\n" if self.live else f"{text}\n")
        self.unended = False
        self.stream.flush()

    def close(self) -> None:
        """Leave the live line as it is; what is printed next begins below it."""
        if self.unended:
            self.stream.write("\n")
            self.stream.flush()


def progress_text(metrics: dict[str, Any], steps: int, eta: float) -> str:
    """`step 40/600  loss 3.21  1.98 bits/byte  9,812 tok/s  MFU 31%  experts 0.7-1.4x  ETA 4:10`."""
    load = metrics["expert_load"]
    balance = ""
    if load:
        relative = [share * len(layer) for layer in load for share in layer]
        balance = f"  experts {min(relative):.1f}-{max(relative):.1f}x"
    minutes, seconds = divmod(round(eta), 60)
    return (
        f"step {metrics['step']}/{steps}  loss {metrics['loss']:.3f}  {metrics['bits_per_byte']:.3f} bits/byte  "
        f"{metrics['tokens_per_s']:,.0f} tok/s  MFU {metrics['mfu']:.0%}{balance}  ETA {minutes}:{seconds:02d}"
    )
