"""What training does between matrix products: in one C++ pass each where there is a compiler, else in torch's.

Both modules have the same functions: `native_passes`, a pass over memory each, and `torch_passes`, several.
"""

import functools
import warnings
from types import ModuleType

from kernels.cpu import native_passes, torch_passes


@functools.cache
def passes() -> ModuleType:
    """The module in use: the same one for the whole process. Why it is torch's is said once."""
    reason = native_passes.unavailable()
    if reason is None:
        return native_passes
    warnings.warn(f"Passes between products are torch's own, which take longer: {reason}", RuntimeWarning, stacklevel=2)
    return torch_passes
