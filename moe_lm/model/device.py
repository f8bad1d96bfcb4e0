"""Which device a program computes on, and how much memory it has."""

import os

import torch

from moe_lm.config import ConfigError


def choose_device(name: str) -> torch.device:
    """The device that `name` means: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises ConfigError for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (index and not index.isdigit())):
        raise ConfigError(f"device = {name!r} is not a device; write auto, cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise ConfigError(f"device = {name!r} is not there: torch sees {count} CUDA devices; use auto or cpu.")
    return torch.device(name)


def memory_of(device: torch.device) -> int | None:
    """All memory of the device, free or not, in bytes; None on a CPU whose system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
