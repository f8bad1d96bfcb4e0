"""Compiles recorded launches for a GPU that is not there, and reads the resources and machine code of the result.

Triton asks a driver for its target alone until a kernel is loaded, and `warmup` stops short of that. The signature and
the specialisations (divisible by 16, equal to 1) are those that Triton derives from the recorded arguments: an address
on the meta device is the offset in bytes, which is as aligned as the real one would be.
"""

import importlib.metadata
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from kernels.check import CannotCheckError
from kernels.gpu.launch import Launch

VERSIONS = ((3, 6), (3, 10))
"""Triton versions from the first to below the second are known to give machine code that this package can read."""

INSTRUCTION_BYTES = 16
"""Of every instruction since compute capability 7.0."""


class Build(NamedTuple):
    """A compiled kernel."""

    cubin: bytes
    registers: int
    shared: int
    """Bytes of shared memory per program."""
    stack: int
    local: int
    specialised: bool
    """Whether the kernel asks for a loop to be split among producer and consumer warps."""


class Driver:
    """What Triton asks a driver before it loads a kernel."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def require_compiler() -> None:
    """Raise CannotCheckError where Triton or its tools do not give machine code that this package can read."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CannotCheckError(
            "TRITON_INTERPRET=1 makes Triton interpret kernels, which leaves nothing to check; unset it."
        )
    version = importlib.metadata.version("triton")
    if not VERSIONS[0] <= tuple(int(part) for part in version.split(".")[:2]) < VERSIONS[1]:
        low, high = (".".join(str(part) for part in bound) for bound in VERSIONS)
        raise CannotCheckError(f"triton {version} is not known to this check, which reads {low} up to below {high}.")
    for tool in ("nvdisasm", "cuobjdump"):
        try:
            getattr(triton.knobs.nvidia, tool).path  # noqa: B018  (raises where the tool is missing)
        except RuntimeError as error:
            raise CannotCheckError(
                f"{tool} is missing, which triton's wheel for Linux brings; set TRITON_{tool.upper()}_PATH to it."
            ) from error


def assume_target(arch: int) -> None:
    """Make Triton compile for `arch` in this process. It keeps kernels by device, so this is for once per process."""
    triton.runtime.driver.set_active(Driver(arch))


_builds: dict[int, tuple[Any, Build]] = {}


def build(launch: Launch) -> Build:
    """What `launch` would run. Raises what the compiler raises."""
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
    # Triton returns the same object for launches that differ in nothing it specialises on.
    if id(compiled) not in _builds:
        usage = _run(triton.knobs.nvidia.cuobjdump.path, compiled.asm["cubin"], "-res-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        registers, stack, local = (int(number) for number in found.groups())
        # The attribute is on a loop that asks, before any pass decides whether to do it.
        specialised = "tt.warp_specialize" in compiled.asm["ttir"]
        shared = compiled.metadata.shared
        _builds[id(compiled)] = compiled, Build(compiled.asm["cubin"], registers, shared, stack, local, specialised)
    return _builds[id(compiled)][1]


def machine_code(cubins: Iterable[bytes], arch: int) -> dict[bytes, str]:
    """The instructions of each cubin, one a line, as nvdisasm prints them.

    It takes half a second to start and 0.05 s for a kernel, so it is given the code of all as one. Addresses count from
    the first kernel's start. Its data flow analysis takes 0.2 s a kernel and changes nothing here.
    """
    codes = {cubin: text_section(cubin) for cubin in cubins}
    if not codes:
        return {}
    listing = _run(triton.knobs.nvidia.nvdisasm.path, b"".join(codes.values()), "-ndf", "--binary", f"SM{arch}")
    lines = [line for line in listing.splitlines() if ";" in line]
    assert len(lines) == sum(map(len, codes.values())) // INSTRUCTION_BYTES
    rest = iter(lines)
    return {cubin: "\n".join(islice(rest, len(code) // INSTRUCTION_BYTES)) for cubin, code in codes.items()}


def text_section(cubin: bytes) -> bytes:
    """The machine code of the one function in a cubin, a 64-bit little-endian ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # A section's name (an offset into the section of names), offset in the file, and bytes.
    sections = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(count)]
    found = [
        cubin[start : start + length]
        for name, start, length in sections
        if cubin.startswith(b".text.", sections[names][1] + name)
    ]
    assert len(found) == 1, f"{len(found)} functions in a cubin"
    return found[0]


def _run(tool: str, code: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([tool, *options, file.name], check=True, capture_output=True, text=True).stdout
