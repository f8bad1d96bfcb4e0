"""Who may use a server: decided by where it listens and whether it has keys."""

import ipaddress
from pathlib import Path
from typing import NamedTuple

from moe_lm.config import ConfigError, require

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Access(NamedTuple):
    """`keys` and `hosts` as in Guard."""

    keys: tuple[str, ...]
    hosts: frozenset[str] | None


def access(host: str, key_file: Path | None, no_auth: bool) -> Access:
    """Keys for all who come from elsewhere, unless none are wanted. Raises ConfigError where that is not decided."""
    keys = read_keys(key_file) if key_file else ()
    require(not (keys and no_auth), "--api-key-file and --no-auth exclude each other: leave one out.")
    local = is_loopback(host)
    require(
        local or keys or no_auth,
        f"--host {host} lets other machines in: give --api-key-file, or --no-auth to serve whoever comes.",
    )
    return Access(keys, LOCAL_NAMES | {named(host)} if local and not keys and not no_auth else None)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def named(host: str) -> str:
    """A host as the Host header writes it."""
    return f"[{host}]" if ":" in host else host.lower()


def read_keys(file: Path) -> tuple[str, ...]:
    """The keys in a file, one on a line; empty lines and those that begin with # are none. Raises ConfigError."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error}.") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    require(keys, f"--api-key-file {file} holds no key: write one on a line.")
    odd = next((number for number, key in enumerate(keys, 1) if not key.isascii() or " " in key), None)
    require(odd is None, f"key {odd} of --api-key-file {file} must be ASCII without spaces, as a header carries it.")
    return keys
