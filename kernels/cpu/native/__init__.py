"""The sources of the CPU libraries, and how one becomes a shared library: compiled once for each machine, compiler and
version of them, kept in a cache directory of the user. Nothing is compiled at import."""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
"""Looked for in this order where $CXX names none."""
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC",
    # Products are fused where the source says so and nowhere else, or an output's bits would depend on how a loop was
    # unrolled.
    "-ffp-contract=off",
    # Wide vectors never leave the library, so how they would be passed does not matter.
    "-Wno-psabi",
)  # fmt: skip
SOURCES = Path(__file__).parent


class BuildError(RuntimeError):
    """Why there is no library, in a sentence."""


def find_compiler() -> list[str]:
    """The command of the C++ compiler; raises BuildError if there is none."""
    named = os.environ.get("CXX")
    command = shlex.split(named) if named else None
    if command:
        if not shutil.which(command[0]):
            raise BuildError(f"Native code needs a C++ compiler, and there is no {command[0]}, which CXX names.")
        return command
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise BuildError(
        f"Native code needs a C++ compiler: none of {', '.join(COMPILERS)} is on the path; install one or set CXX."
    )


def cache_directory() -> Path:
    """Where libraries are kept, made with mode 0700; raises BuildError if others could have written there."""
    base = os.environ.get("XDG_CACHE_HOME")
    directory = (Path(base) if base else Path.home() / ".cache") / "moe_lm" / "native"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise BuildError(f"Native code cannot be kept in {directory}: {error.strerror}.") from None
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(
            f"Native code will not be loaded from {directory}, which other users can write; remove it or set "
            "XDG_CACHE_HOME."
        )
    return directory


@functools.cache
def cpu_flags() -> str:
    """What the CPU can do, as far as the system says: -march=native means another thing on another CPU."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def build(name: str = "decoder", extra_flags: tuple[str, ...] = ()) -> Path:
    """The library of NAME.cpp, compiled if it is not in the cache; raises BuildError."""
    if os.name != "posix":
        raise BuildError(f"Native code is compiled on Linux and the like only, not on {platform.system()}.")
    compiler = find_compiler()
    version = run([*compiler, "--version"])
    flags = (*FLAGS, *extra_flags)
    digest = hashlib.sha256("\0".join((name, *compiler, version, *flags, cpu_flags())).encode())
    for source in sorted(SOURCES.glob("*.[hc]*")):
        digest.update(source.read_bytes())
    directory = cache_directory()
    library = directory / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=directory) as building:
            object_file, result = Path(building) / f"{name}.o", Path(building) / f"{name}.so"
            run([*compiler, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(object_file)])
            # Without -fopenmp, so that no OpenMP library is named: the symbols are those of the one that torch loaded,
            # and so is the pool of threads.
            run([*compiler, "-shared", str(object_file), "-o", str(result)])
            result.replace(library)
    return library


def run(command: list[str]) -> str:
    """What a command prints; raises BuildError with its first error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout
    lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
    first = next((line for line in lines if "error" in line), lines[0])
    raise BuildError(f"Native code could not be compiled with {command[0]}: {first.strip()}")
