"""Triton kernels for NVIDIA GPUs from compute capability 8.0 (A100) on; the same kernels run on a CPU in Triton's
interpreter, for tests.

Each module holds the operation, `unsupported` (why it cannot take some arguments), and its gradient where it has one.
Nothing here reads a value back from the device: every grid and buffer has a size that the host can compute, so that a
call can be captured in a CUDA graph.
"""

import importlib.util
import os

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels instead of compiling them, which it decides when a kernel is defined."""

INSTALLED = importlib.util.find_spec("triton") is not None


def unavailable(device: torch.device) -> str | None:
    """Why no kernel of this backend runs on `device`; None if they do."""
    if not INSTALLED:
        return "needs triton, which is not installed"
    if device.type == "cpu" and not INTERPRETING:
        return "runs on CUDA, and on the CPU only under TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return f"does not run on {device.type}"
    # Without a CUDA build there are fake CUDA tensors only, which have no capability.
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"needs compute capability 8.0 or higher, and this GPU has {major}.{minor}"
    return None


def unsupported_dtype(x: torch.Tensor) -> str | None:
    return None if x.dtype in FLOAT_DTYPES else f"has bfloat16, float16 and float32 only, not {x.dtype}"
