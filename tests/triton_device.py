"""Where the tests of Triton kernels run: on a GPU if there is one, else in Triton's interpreter on the CPU.

Import this before anything under kernels.gpu: whether a kernel is interpreted is decided when it is defined.
"""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton, which exists for Linux only, is not installed.", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter_bf16
    import interpreter_speed

    interpreter_bf16.install()
    interpreter_speed.install()
