"""An operation and its gradients on some backend against the reference.

The reference runs in float32 from the same (rounded) inputs, so a tolerance measures the kernel and not its inputs.
"""

from collections.abc import Callable

import torch
from poison import assert_margins_untouched, poisoned
from torch import Tensor

import kernels
from kernels import use_backend

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest error as a share of the largest true value, or of `floor` where all true values are smaller."""


def assert_near(got: Tensor, true: Tensor, dtype: torch.dtype, name: str, floor: float = 0.1) -> None:
    assert got.shape == true.shape, name
    if true.numel():
        scale = max(true.abs().max().item(), floor)
        error = (got.float() - true).abs().max().item() / scale
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.2e}"


def check(
    op: Callable, inputs: dict[str, Tensor], dtype: torch.dtype, *, fixed: tuple = (), wide: tuple[str, ...] = (),
    floor: float = 0.1,
) -> None:  # fmt: skip
    """Compare op(*inputs, *fixed) and its gradients in `dtype`, between poisoned margins, with the reference's.

    Inputs named in `wide` stay float32 on both sides, as master weights do. Without gradients the result is the same.
    """
    given, exact = {}, {}
    for name, value in inputs.items():
        rounded = value.detach() if name in wide else value.detach().to(dtype)
        given[name] = poisoned(rounded).requires_grad_()
        exact[name] = rounded.to(dtype).float().requires_grad_()
    outs = several(op(*given.values(), *fixed))
    with use_backend("reference"):
        trues = several(op(*exact.values(), *fixed))
    for i, (out, true) in enumerate(zip(outs, trues, strict=True)):
        assert_near(out, true, dtype, f"out {i}", floor)
    gradients = [torch.randn_like(true).to(out.dtype) for out, true in zip(outs, trues, strict=True)]
    torch.autograd.backward(outs, gradients)
    torch.autograd.backward(trues, [gradient.float() for gradient in gradients])
    for name in inputs:
        assert given[name].grad.dtype == given[name].dtype
        assert_near(given[name].grad, exact[name].grad, dtype, f"d{name}", floor)
        assert_margins_untouched(given[name])
    with torch.inference_mode():
        for i, (again, true) in enumerate(zip(several(op(*given.values(), *fixed)), trues, strict=True)):
            assert_near(again, true, dtype, f"out {i} without gradients", floor)


def check_route(logits: Tensor, K: int, bias: Tensor | None = None, normalize: bool = True) -> None:
    """The chosen backend's routing of logits (N, E), and the gradient of its weights, against the reference's."""
    logits = poisoned(logits).requires_grad_()
    twin = logits.detach().clone().requires_grad_()
    bias = None if bias is None else poisoned(bias)
    routing = kernels.route(logits, K, bias, normalize)
    with use_backend("reference"):
        true = kernels.route(twin, K, bias, normalize)
    for got, want in zip(routing[1:], true[1:], strict=True):
        assert torch.equal(got, want)
    torch.testing.assert_close(routing.weights, true.weights)
    gradient = torch.randn_like(true.weights)
    routing.weights.backward(gradient)
    true.weights.backward(gradient)
    torch.testing.assert_close(logits.grad, twin.grad)
    assert_margins_untouched(logits)
    with torch.inference_mode():
        for again, got in zip(kernels.route(logits, K, bias, normalize), routing, strict=True):
            assert torch.equal(again, got)


def several(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)
