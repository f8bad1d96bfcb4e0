"""The hardware sheets of configs/hardware: what one device and its links do on paper, each figure with its source."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_lm.config import ConfigError, require
from moe_lm.scaling.constants import EFFICIENCY, Efficiency
from moe_lm.toml import from_value, nearest, read_toml, to_dict, toml_value

KEPT = 3 / 8
"""Share of the last cache that keeps what a step reads for the next. Fitted on four mixtures, of 7 to 18M
parameters and other sizes than nano's, at batches of 1, 4 and 16, on an AMD EPYC with 32 MiB that others share: 13% is
the mean error of their passes, and 21, 14 and 19% at 1/4, 1/2 and 5/8. A core read experts of 9 MB at 80 GB/s, of 18 MB
at 34."""
SHEETS = Path(__file__).resolve().parents[2] / "configs" / "hardware"


@dataclass(frozen=True)
class PeakFlops:
    """Dense FLOP/s by the dtype of the operands; 0 where the device cannot multiply it."""

    float32: float
    tensorfloat32: float = 0.0
    bfloat16: float = 0.0
    float16: float = 0.0
    float8: float = 0.0
    int8: float = 0.0


@dataclass(frozen=True)
class Measured:
    """Fields of constants.Efficiency that were measured on the device itself."""

    gemm: float
    attention: float
    passes: float
    launch: float
    grouped: float
    loss: float
    cached: float


@dataclass(frozen=True)
class Hardware:
    """One device, and how several are joined."""

    name: str
    """In words."""
    family: Literal["a100", "h100", "cpu"]
    """Which constants hold for it (moe_lm.scaling.constants)."""
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes/s between memory and the device."""
    units: int
    """Streaming multiprocessors, or cores: how many tiles are computed at once."""
    l2_bytes: int
    """Bytes of the last cache."""
    peak_flops: PeakFlops
    gpus_per_node: int
    """Devices joined by the fast links."""
    nvlink: float
    """Bytes/s that a device sends over the fast links while it receives as many."""
    network: float
    """Bytes/s that a device sends to other nodes of its island while it receives as many."""
    nvlink_latency: float
    """Seconds of a message over the fast links."""
    network_latency: float
    """Seconds of a message between nodes."""
    price: float
    """Dollars per device and hour."""
    power: float
    """Watts at full load."""
    island_gpus: int = 0
    """Devices of an island, between which the network is weaker; 0 is one island for all."""
    weak_network: float = 0.0
    """Bytes/s that a device sends to another island."""
    measured: Measured | None = None
    """What it was measured to reach, in place of the constants of its family."""

    def peak(self, dtype: str) -> float:
        """FLOP/s in `dtype`. Raises ConfigError where the device has none."""
        flops = getattr(self.peak_flops, dtype)
        if not flops:
            have = [name for name, value in vars(self.peak_flops).items() if value]
            raise ConfigError(f"dtype = {dtype} is not multiplied by {self.name}; it has {', '.join(have)}.")
        return flops


@dataclass(frozen=True)
class Machine:
    """A device as the cost model sees it: its sheet, and what it reaches of it."""

    sheet: Hardware
    reached: Efficiency

    def reading(self, nbytes: float) -> "Machine":
        """This machine while it reads the same `nbytes` again and again, of which the last cache keeps a part."""
        if self.reached.cached <= 1:
            return self
        kept = min(1.0, KEPT * self.sheet.l2_bytes / nbytes)
        faster = 1 / (kept / self.reached.cached + 1 - kept)
        return Machine(self.sheet, self.reached._replace(bandwidth=self.reached.bandwidth * faster))


def machine(name: str | Path) -> Machine:
    """The device of a sheet with the constants of its kind. Raises ConfigError if there is no such sheet."""
    return machine_of(load_hardware(name))


def machine_of(sheet: Hardware) -> Machine:
    """The device of a sheet that is there already."""
    measured = vars(sheet.measured) if sheet.measured else {}
    return Machine(sheet, EFFICIENCY[sheet.family]._replace(**measured))


def hardware_names() -> list[str]:
    """The sheets that come with the project."""
    return sorted(path.stem for path in SHEETS.glob("*.toml"))


def load_hardware(name: str | Path) -> Hardware:
    """The sheet `name` of configs/hardware, or the file of that path. Raises ConfigError if there is none."""
    return from_value(Hardware, read_sheet(name)[0], "")


def read_sheet(name: str | Path) -> tuple[dict, dict[str, str]]:
    """The figures of a sheet and, by the same keys, their sources."""
    path = Path(name)
    if path.suffix != ".toml":
        path = SHEETS / f"{name}.toml"
        if not path.is_file():
            names = hardware_names()
            raise ConfigError(
                f"gpu = {name!r} is no sheet of configs/hardware ({', '.join(names)}){nearest(name, names)}"
            )
    table = read_toml(path)
    sources = table.pop("sources", {})
    missing = [key for key in table if key not in ("name", "family") and key not in sources]
    require(not missing, f"{path} gives no source for {', '.join(missing)}: add each to [sources].")
    return table, sources


def sheet_toml(sheet: Hardware, source: str) -> str:
    """A sheet as a file for `load_hardware`, fractions to four digits, every figure with the same `source`."""
    tables = rounded(to_dict(sheet))
    sources = {key: source for key in tables if key not in ("name", "family")}
    inner = {key: tables.pop(key) for key in list(tables) if isinstance(tables[key], dict)}
    lines = [f"{key} = {toml_value(value)}" for key, value in tables.items()]
    for name, table in (*inner.items(), ("sources", sources)):
        lines += ["", f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def rounded(table: dict[str, Any]) -> dict[str, Any]:
    """The table with four digits of every fraction, which is more than a measurement has."""
    return {
        key: rounded(value) if isinstance(value, dict) else float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in table.items()
    }
