"""How every class of settings refuses what cannot work."""

from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work; the message is one sentence with the value, the limit and the field to change."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_positive(config: Any, *names: str, section: str = "") -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}{name} = {value} must be greater than 0.")
