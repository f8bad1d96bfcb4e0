"""The loss in one C++ call: against the definition, also without AVX-512, on any number of threads."""

import math

import pytest
import torch
from compare import check
from torch import Tensor

import kernels
from kernels.cpu import cross_entropy, native_cross_entropy, pairs


def case(N: int, D: int, V: int, scored: str = "all") -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(0, V, (N,))
    if scored == "some":
        targets[::3] = -100
    elif scored == "none":
        targets[:] = -1
    return torch.randn(N, D), torch.randn(V, D) / math.sqrt(D), targets


@pytest.mark.parametrize("scored", ["all", "some", "none"])
@pytest.mark.parametrize("chunk", [2, 50, 1 << 20])
@pytest.mark.parametrize(("N", "D", "V"), [(0, 16, 32), (1, 16, 16), (63, 48, 80), (201, 80, 720)])
def test_it_is_the_definition(N, D, V, chunk, scored, products, monkeypatch):
    monkeypatch.setattr(native_cross_entropy, "CHUNK_ELEMENTS", chunk * V)
    x, weight, targets = case(N, D, V, scored)
    assert native_cross_entropy.suits(x.bfloat16(), weight) == (N > 0 and products != "batched")
    check(kernels.cross_entropy, {"x": x, "weight": weight}, torch.bfloat16, fixed=(targets,))
    check(kernels.cross_entropy, {"x": x, "weight": weight}, torch.bfloat16, fixed=(targets,), wide=("weight",))


def test_a_weight_of_float32_is_rounded_as_it_is_read(products):
    x, weight, targets = case(63, 48, 80)
    found = [
        cross_entropy.cross_entropy_with_grads(x.bfloat16(), each, targets) for each in (weight, weight.bfloat16())
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert [each.dtype for each in found[0]] == [torch.float32, torch.bfloat16, torch.float32]


def test_bits_do_not_depend_on_the_threads():
    x, weight, targets = case(500, 64, 400, "some")
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(native_cross_entropy.run(x.bfloat16(), weight, targets, want_grads=True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_token_of_no_number_spoils_its_own_row_only():
    x, weight, targets = case(120, 32, 64)
    _, clean, _ = native_cross_entropy.run(x.bfloat16(), weight, targets, want_grads=True)
    x[7] = math.nan
    loss, grad_x, _ = native_cross_entropy.run(x.bfloat16(), weight, targets, want_grads=True)
    others = torch.arange(120) != 7
    assert loss.isnan()
    assert grad_x[7].isnan().all()
    assert torch.equal(grad_x[others], clean[others])
    targets[7] = -100
    loss, grad_x, grad_weight = native_cross_entropy.run(x.bfloat16(), weight, targets, want_grads=True)
    assert loss.isfinite()
    assert torch.equal(grad_x[others], clean[others])
    assert not grad_x[7].any()
    assert grad_weight.isfinite().all()


def test_a_target_beyond_the_vocabulary_is_refused():
    x, weight, targets = case(20, 16, 32)
    targets[11] = 32
    with pytest.raises(IndexError, match="target 32 is not in a vocabulary of 32"):
        native_cross_entropy.run(x.bfloat16(), weight, targets, want_grads=True)


def test_what_it_does_not_suit_goes_the_other_way(monkeypatch):
    monkeypatch.setattr(pairs, "fastest", lambda: True)
    x, weight = torch.empty(4, 32), torch.empty(64, 32)
    for dtype, suited in ((torch.bfloat16, True), (torch.float32, True), (torch.float16, False)):
        assert native_cross_entropy.suits(x.bfloat16(), weight.to(dtype)) == suited
    assert not native_cross_entropy.suits(x, weight)
    assert not native_cross_entropy.suits(x[:0].bfloat16(), weight)
    assert not native_cross_entropy.suits(torch.empty(4, 24).bfloat16(), torch.empty(64, 24))
    assert not native_cross_entropy.suits(x.bfloat16(), torch.empty(100, 32))
