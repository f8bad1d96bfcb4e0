"""The kernels in the interpreter of every Triton that the code is kept working on; each is installed for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_gpu_*.py"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.9.0"])
def test_kernels_on_triton(version, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    installed = subprocess.run([*pip, f"triton=={version}"], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert said.stdout.strip() == version
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_interpreter_bf16.py", *FILES, "-m", "not slow and not gpu"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
