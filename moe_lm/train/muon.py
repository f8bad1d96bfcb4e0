"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum whose matrices are made orthogonal.

A gradient of low rank moves few directions of a matrix far and the others hardly at all; the orthogonal matrix nearest
to the momentum moves all of them alike. Experts, which meet an eighth of the tokens, gain most.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import AdamW

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the odd quintic that drives singular values into about [0.7, 1.2] (Jordan et al. 2024)."""
NEWTON_SCHULZ_STEPS = 5
CHUNK_ELEMENTS = 1 << 19
"""Matrices go through a whole step in chunks of 1 MiB of bfloat16, which stay in a core's second-level cache."""
Stack = tuple[Tensor, Tensor, Tensor]
"""Weights, gradients and momenta of matrices of one shape, views (n, M, N) of one parameter each."""


def orthogonalize(matrices: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """U V^T of the singular value decomposition of each matrix, roughly: five steps take singular values into about
    [0.7, 1.2], fewer leave the small ones smaller.

    (n, M, N) of any floating dtype, which the result keeps; a zero matrix stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    # The Frobenius norm bounds the largest singular value, which must start at or below 1.
    precise = torch.promote_types(matrices.dtype, torch.float32)
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=precise).clamp_min(1e-7)
    x = matrices / norm.to(matrices.dtype)
    tall = matrices.shape[1] > matrices.shape[2]
    for _ in range(steps):
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x


class MuonAdamW(AdamW):
    """Muon for the groups marked `muon`, fused AdamW for the others.

    Every matrix is made orthogonal by itself: a tensor of more than two axes is a stack of them (experts), and one
    that several share row by row (queries, keys and values; gate and up) is cut as the group's `rows` says, a list of
    row counts for each parameter. Uncut, nano ended 0.056 bits per byte worse (300 steps, one seed). An update is
    scaled by sqrt(max(1, rows / columns)), so that one learning rate suits every shape. `dtype` is that of the
    orthogonalisation; bfloat16 suffices.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype = torch.float32, **adamw):
        super().__init__(groups, fused=True, **adamw)
        self.dtype = dtype
        self.steps = 0
        """Taken so far; a run that is taken up sets it."""

    @torch.no_grad()
    def step(self, divisor: Tensor | None = None) -> None:
        """Take one. Gradients count divided by `divisor`, a float32 scalar on their device, as each is read: dividing
        them beforehand is another pass over memory, 2% of a step of 214M parameters on two CPU cores.
        """
        self.steps += 1
        for group in self.param_groups:
            if group["muon"]:
                self.muon_step(group, divisor)
        self.grad_scale = divisor  # by which fused AdamW divides; torch.amp.GradScaler sets it likewise
        super().step()

    def muon_step(self, group: dict, divisor: Tensor | None = None) -> None:
        rate, momentum, decay = group["every"] * group["lr"], group["momentum"], group["weight_decay"]
        due = self.steps % group["every"] == 0
        for shape, stacks in self.stacks(group).items():
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for chunk in chunks(stacks):
                for _, gradients, buffers in chunk:
                    if divisor is not None:
                        gradients.div_(divisor)
                    buffers.lerp_(gradients, 1 - momentum)
                if not due:
                    continue
                # Nesterov: the step looks one decay ahead.
                updates = [torch.lerp(gradients, buffers, momentum).to(self.dtype) for _, gradients, buffers in chunk]
                orthogonal = orthogonalize(updates[0] if len(updates) == 1 else torch.cat(updates), group["ns_steps"])
                for (weights, *_), part in zip(chunk, orthogonal.split([len(each) for each in updates]), strict=True):
                    weights.mul_(1 - rate * decay).add_(part, alpha=-rate * scale)

    def stacks(self, group: dict) -> dict[torch.Size, list[Stack]]:
        """The group's matrices by their shape, in stacks of at most CHUNK_ELEMENTS, or of one that has more.

        It takes the gradients away, so that AdamW passes over these parameters.
        """
        alike: dict[torch.Size, list[Stack]] = defaultdict(list)
        for parameter, rows in zip(group["params"], group["rows"], strict=True):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            tensors = parameter, gradient, state["momentum_buffer"]
            for stack in zip(*[matrices(tensor, rows) for tensor in tensors], strict=True):
                size = max(1, CHUNK_ELEMENTS // stack[0][0].numel())
                alike[stack[0].shape[1:]] += zip(*[each.split(size) for each in stack], strict=True)
        return alike


def matrices(tensor: Tensor, rows: list[int]) -> list[Tensor]:
    """The matrices that `tensor`, (sum of rows, N) or (n, sum of rows, N), is made of, as views (n, M, N)."""
    if len(set(rows)) == 1:
        return [tensor.view(-1, rows[0], tensor.shape[-1])]
    return [part.view(-1, *part.shape[-2:]) for part in tensor.split(rows, -2)]


def chunks(stacks: list[Stack]) -> Iterator[list[Stack]]:
    """Neighbours of CHUNK_ELEMENTS together, or one that has more."""
    chunk, size = [], 0
    for stack in stacks:
        elements = stack[0].numel()
        if chunk and size + elements > CHUNK_ELEMENTS:
            yield chunk
            chunk, size = [], 0
        chunk.append(stack)
        size += elements
    if chunk:
        yield chunk
