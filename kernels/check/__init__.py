"""The static gate: compiles what the kernels' launchers would launch, without a GPU, and judges the machine code.

`python -m kernels.check` builds every shipped configuration for sm_80 and sm_90 and exits with 1 where one breaks a
rule; `--self-test` then breaks shipped kernels on purpose and exits with 1 where no rule notices, too. What no machine
code shows stays unseen: bank conflicts, L2 hits, stalls at barriers, imbalance between experts.
"""


class CannotCheckError(Exception):
    """Why nothing can be said of the kernels, as a sentence."""
