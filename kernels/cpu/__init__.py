"""Fast CPU operations, in terms of what torch already does well there: oneDNN GEMMs and vectorised elementwise passes.

Each module holds the operation, `unsupported` (why it cannot take some arguments), and its gradient where it has one.
"""

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16)


def unavailable(device: torch.device) -> str | None:
    """Why no operation of this backend runs on `device`; None if they do."""
    return None if device.type == "cpu" else f"does not run on {device.type}"


def unsupported_dtype(x: torch.Tensor) -> str | None:
    return None if x.dtype in FLOAT_DTYPES else f"has float32 and bfloat16 only, not {x.dtype}"
