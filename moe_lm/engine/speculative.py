"""Speculative sampling: which drafted tokens stand, so that the target's distribution is untouched.

Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2. k drafted tokens, V vocabulary.
"""

from torch import Tensor

from moe_lm.engine.sampler import draw


def accept(draft: Tensor | None, target: Tensor, tokens: list[int], uniforms: list[float]) -> tuple[int, int]:
    """How many of the drafted tokens stand, and the token that follows them.

    draft (k, V): what each drafted token was drawn from; target (k + 1, V): what the target would draw there and after
    the last; tokens: the k drafted ones; uniforms: k + 1 numbers in [0, 1).

    Token i stands with probability min(1, target_i / draft_i). The first that does not is replaced by a draw from
    max(0, target - draft), else one token is drawn after the last. Each token so drawn has the target's distribution,
    whatever the draft was.
    """
    for i, token in enumerate(tokens):
        p, q = target[i, token].item(), draft[i, token].item()
        if uniforms[i] * q >= p:
            residual = (target[i] - draft[i]).clamp_(min=0)
            # Where target and draft agree to the last bit but for rounding, there is no residual to draw from.
            return i, draw(residual if residual.any() else target[i], uniforms[-1])
    return len(tokens), draw(target[len(tokens)], uniforms[-1])
