"""The experts in one C++ call: against the definition, also without AVX-512, on any number of threads."""

import math

import pytest
import torch
from compare import check

import kernels
from kernels.cpu import expert_mlp, native_experts, pairs
from kernels.cpu.native import BuildError


def case(N: int, D: int, F: int, E: int, K: int, kind: str = "random") -> tuple[dict, kernels.Routing]:
    logits = torch.randn(N, E)
    if kind == "one expert":
        logits[:, 0] += 100
    elif kind == "empty experts":
        logits[:, : E // 2] -= 100
    routing = kernels.route(logits, K)
    return {
        "x": torch.randn(N, D), "weights": routing.weights, "gate_up": torch.randn(E, 2 * F, D) / math.sqrt(D),
        "down": torch.randn(E, D, F) / math.sqrt(F),
    }, routing  # fmt: skip


@pytest.mark.parametrize("kind", ["random", "one expert", "empty experts"])
@pytest.mark.parametrize(
    ("N", "D", "F", "E", "K"),
    [(1, 16, 16, 4, 2), (63, 48, 80, 16, 2), (200, 32, 64, 8, 3), (700, 80, 16, 3, 1), (450, 128, 64, 4, 2)],
)
def test_it_is_the_definition(N, D, F, E, K, kind, products):
    inputs, routing = case(N, D, F, E, K, kind)

    def op(x, weights, gate_up, down):
        return kernels.expert_mlp(x, routing._replace(weights=weights), gate_up, down)

    check(op, inputs, torch.bfloat16, wide=("weights",))


@pytest.mark.parametrize(("N", "D", "F", "E", "K"), [(63, 48, 80, 16, 2), (450, 128, 64, 4, 2)])
def test_weights_of_float32_are_rounded_as_they_are_read(N, D, F, E, K, products):
    inputs, routing = case(N, D, F, E, K)
    x, grad = inputs["x"].bfloat16(), torch.randn(N, D).bfloat16()

    def run(dtype):
        gate_up, down = (inputs[name].detach().to(dtype).requires_grad_() for name in ("gate_up", "down"))
        out = kernels.expert_mlp(x, routing, gate_up, down)
        out.backward(grad)
        return out, gate_up.grad, down.grad

    (out, *exact), (rounded_out, *rounded) = run(torch.float32), run(torch.bfloat16)
    assert torch.equal(out, rounded_out)
    for wide, narrow in zip(exact, rounded, strict=True):
        assert wide.dtype == torch.float32
        assert torch.equal(wide.bfloat16(), narrow)
        if products != "batched":
            assert not torch.equal(wide, narrow.float())

    def op(x, weights, gate_up, down):
        return kernels.expert_mlp(x, routing._replace(weights=weights), gate_up, down)

    check(op, inputs, torch.bfloat16, wide=("weights", "gate_up", "down"))


def both_ways(inputs: dict, routing: kernels.Routing, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x, gate_up, down = (inputs[name].bfloat16() for name in ("x", "gate_up", "down"))
    out, hidden = native_experts.forward(x, *routing, gate_up, down)
    return out, hidden, *native_experts.backward(grad.bfloat16(), x, *routing, gate_up, down, hidden)


def test_bits_do_not_depend_on_the_threads():
    inputs, routing = case(1000, 64, 48, 5, 2)
    grad, found, before = torch.randn(1000, 64), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(both_ways(inputs, routing, grad))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_token_of_no_number_spoils_its_own_row_only():
    inputs, routing = case(120, 32, 16, 4, 2)
    grad = torch.randn(120, 32)
    clean = both_ways(inputs, routing, grad)
    inputs["x"][7] = math.nan
    out, _, grad_x, grad_weights, *_ = both_ways(inputs, routing, grad)
    for got, want in ((out, clean[0]), (grad_x, clean[2]), (grad_weights, clean[3])):
        assert got[7].isnan().all()
        assert torch.equal(got[torch.arange(120) != 7], want[torch.arange(120) != 7])


@pytest.mark.parametrize("spoil", ["order", "offsets"])
def test_slots_that_are_not_there_are_refused(spoil):
    inputs, routing = case(20, 16, 16, 4, 2)
    wrong = routing._replace(**{spoil: getattr(routing, spoil) + 1})
    with pytest.raises(IndexError, match="not the 40 slots of a routing"):
        both_ways(inputs, wrong, torch.randn(20, 16))


def test_what_it_does_not_suit_goes_the_other_way(monkeypatch):
    monkeypatch.setattr(pairs, "fastest", lambda: True)
    x, gate_up = torch.empty(4, 32), torch.empty(2, 64, 32)
    for dtype, suited in ((torch.bfloat16, True), (torch.float32, True), (torch.float16, False)):
        assert native_experts.suits(x.bfloat16(), gate_up.to(dtype)) == suited
    assert not native_experts.suits(x, gate_up)
    assert not expert_mlp.rounds(x.bfloat16(), gate_up, gate_up.bfloat16())
    assert not native_experts.suits(torch.empty(4, 24).bfloat16(), gate_up)
    assert not native_experts.suits(x.bfloat16(), torch.empty(2, 48, 32))


def test_without_a_compiler_products_are_batched(monkeypatch):
    def fail(*_):
        raise BuildError("no compiler")

    monkeypatch.setattr(pairs, "build", fail)
    for cached in (pairs.load, pairs.fastest):
        cached.cache_clear()
    try:
        inputs, routing = case(40, 16, 16, 4, 2)
        x, gate_up, down = (inputs[name].bfloat16() for name in ("x", "gate_up", "down"))
        assert not pairs.fastest()
        out, hidden = expert_mlp.expert_mlp_forward(x, *routing, gate_up, down)
        assert out.shape == x.shape
        assert len(hidden) >= 80
    finally:
        for cached in (pairs.load, pairs.fastest):
            cached.cache_clear()
