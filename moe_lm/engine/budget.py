"""How many cache blocks a memory budget holds."""

import re

from moe_lm.config import ConfigError

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(size: int | str) -> int:
    """A number of bytes, or a text such as 2GiB or 500MB. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if found is None or (unit := found[2].lower() or "b") not in units:
        raise ConfigError(f"kv_memory = {size!r} is no size; write it as 2GiB, 500MB or a number of bytes.")
    return int(float(found[1]) * units[unit])


def count_blocks(memory: int | str, block_bytes: int, most: int) -> int:
    """Blocks of `block_bytes` in the budget, at most as many as could ever be used. Raises ConfigError if none fits."""
    blocks = min(parse_bytes(memory) // block_bytes, most)
    if blocks < 1:
        raise ConfigError(f"kv_memory = {memory} holds no cache block, of {block_bytes} bytes each; raise kv_memory.")
    return blocks
