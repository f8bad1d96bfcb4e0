"""The passes between products: the C++ ones and torch's, each against its formula in float64, on ugly shapes.

N tokens, K experts per token, D width, F expert width, V vocabulary, M rows, B rows of T tokens, R heads of a key head.
"""

import inspect
import math

import pytest
import torch
from compare import assert_near

from kernels.cpu import FLOAT_DTYPES, native_passes, torch_passes
from kernels.cpu import passes as chosen
from kernels.cpu.native_passes import library
from kernels.reference import route as reference

MODULES = pytest.mark.parametrize("passes", [native_passes, torch_passes], ids=["native", "torch"])
BOTH = pytest.mark.parametrize("dtype", FLOAT_DTYPES)


def test_both_have_the_same_functions():
    for name in [*native_passes.FUNCTIONS, "place"]:
        native, plain = (inspect.signature(getattr(module, name)) for module in (native_passes, torch_passes))
        assert native == plain, name
    assert native_passes.unavailable() is None


@MODULES
@BOTH
@pytest.mark.parametrize(("N", "V"), [(1, 1), (5, 33), (70, 1000)])
def test_cross_entropy(passes, dtype, N, V):
    logits = torch.randn(N, V).mul_(3).to(dtype)
    targets = torch.randint(V, (N,))
    targets[::3] = -1
    exact = logits.double().requires_grad_()
    true = torch.nn.functional.cross_entropy(exact, targets, ignore_index=-1, reduction="sum")
    true.backward()
    logits[targets < 0] = float("nan")
    before = logits.clone()
    assert passes.cross_entropy(logits, targets, False) == pytest.approx(true.item(), rel=1e-5, abs=1e-6)
    assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7))
    assert passes.cross_entropy(logits, targets, True) == pytest.approx(true.item(), rel=1e-5, abs=1e-6)
    assert_near(logits, exact.grad.float(), dtype, "gradient")


@MODULES
@BOTH
def test_a_logit_of_no_number_is_not_lost(passes, dtype):
    logits = torch.zeros(2, 20, dtype=dtype)
    logits[1, 7] = float("nan")
    assert math.isnan(passes.cross_entropy(logits, torch.tensor([1, 2]), True))


@MODULES
@BOTH
@pytest.mark.parametrize(("M", "F"), [(1, 1), (7, 19), (130, 64)])
def test_swiglu(passes, dtype, M, F):
    hidden = torch.randn(M, 2 * F).mul_(2).to(dtype)
    exact = hidden.double().requires_grad_()
    true = torch.nn.functional.silu(exact[:, :F]) * exact[:, F:]
    assert_near(passes.swiglu(hidden), true.float().detach(), dtype, "act")
    grad = torch.randn(M, F).to(dtype)
    true.backward(grad.double())
    got, weights = passes.swiglu_backward(given := grad.clone(), hidden)
    assert weights is None
    assert_near(got, exact.grad.float(), dtype, "dhidden")
    assert_near(given, true.float().detach(), dtype, "act")


@MODULES
@BOTH
def test_swiglu_of_weighted_rows(passes, dtype):
    N, K, F = 6, 2, 21
    slots = torch.tensor([3, -1, 0, 11, 5, 1, 2, 4, -1, 6, 7, 8, 9, 10])
    hidden, grad = torch.randn(len(slots), 2 * F).to(dtype), torch.randn(len(slots), F).to(dtype)
    spare = slots < 0
    hidden[spare], grad[spare] = float("nan"), float("inf")
    weights = torch.rand(N, K)
    exact, exact_weights = hidden[~spare].double().requires_grad_(), weights.double().requires_grad_()
    act = torch.nn.functional.silu(exact[:, :F]) * exact[:, F:]
    weighted = act * exact_weights.view(-1)[slots[~spare]][:, None]
    weighted.backward(grad[~spare].double())
    got, got_weights = passes.swiglu_backward(grad, hidden, weights, slots)
    assert_near(got[~spare], exact.grad.float(), dtype, "dhidden")
    assert_near(got_weights, exact_weights.grad.float(), dtype, "dweights")
    assert_near(grad[~spare], weighted.float().detach(), dtype, "weight * act")
    assert not got[spare].any()
    assert not grad[spare].any()


@MODULES
@BOTH
@pytest.mark.parametrize("D", [1, 40])
def test_rows_go_out_and_come_back(passes, dtype, D):
    x = torch.randn(9, D).to(dtype)
    sources = torch.tensor([4, -1, 0, 8, 8])
    rows = passes.gather(x, sources)
    assert torch.equal(rows[[0, 2, 3, 4]], x[[4, 0, 8, 8]])
    assert not rows[1].any()
    slots, weights = torch.tensor([[0, 3], [4, 2], [8, 8]]), torch.rand(3, 2)
    assert_near(passes.combine(x, weights, slots), (x.float()[slots] * weights[..., None]).sum(1), dtype, "sum")
    assert_near(passes.combine(x, None, slots), x.float()[slots].sum(1), dtype, "plain sum")


@MODULES
@BOTH
@pytest.mark.parametrize(("shape", "R"), [((1, 3, 4), 1), ((2, 40, 6), 3), ((3, 150, 8), 2)])
@pytest.mark.parametrize("several", [False, True])
def test_softmax_sees_the_past_of_its_document(passes, dtype, shape, R, several):
    """The later half of the queries of every row, against the whole softmax in float64."""
    (B, T, C), first = shape, shape[1] // 2
    scale, queries = 1 / math.sqrt(C), T - first
    documents = torch.randint(3, (B, T)) if several else None
    scores = torch.randn(B, queries, R, T).mul_(2).to(dtype)
    seen = torch.arange(T) <= torch.arange(first, T)[:, None]
    seen = seen.expand(B, -1, -1)
    if several:
        seen = seen & (documents[:, first:, None] == documents[:, None])
    exact = scores.double().requires_grad_()
    weighted = (exact * scale).masked_fill(~seen[:, :, None], float("-inf"))
    true = weighted.softmax(-1)
    lse = torch.full((B, T, R), 7.0)
    got = scores.clone().view(B, queries * R, T)
    passes.softmax(got, lse, scale, first, documents)
    assert_near(got.view(true.shape), true.float().detach(), dtype, "p")
    assert not got.view(true.shape)[~seen[:, :, None].expand(true.shape)].any()
    torch.testing.assert_close(lse[:, first:], weighted.logsumexp(-1).float().detach(), rtol=1e-4, atol=1e-4)
    assert (lse[:, :first] == 7).all()
    grad = torch.randn(true.shape).to(dtype)
    true.backward(grad.double())
    delta = torch.zeros(B, T, R)
    delta[:, first:] = (true.detach() * grad.double()).sum(-1).float()
    again, given = scores.clone().view(B, queries * R, T), grad.clone().view(B, queries * R, T)
    passes.softmax_backward(again, given, lse, delta, scale, first, documents)
    assert_near(again.view(true.shape), true.float().detach(), dtype, "p again")
    assert_near(given.view(true.shape), exact.grad.float(), dtype, "dscores")


@MODULES
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("N", "E", "K"), [(1, 2, 1), (70, 16, 2), (33, 19, 5), (0, 4, 2)])
def test_route(passes, N, E, K, biased, normalize):
    """Against the definition, with equal logits, infinite ones and some that are no number."""
    logits = torch.randn(N, E)
    logits[: N // 3] = logits[: N // 3].round()
    if N > 9:
        logits[5, 1], logits[6, 1:], logits[7, [0, 1]] = math.nan, -math.inf, math.inf
        logits[8] = math.nan
    bias = torch.linspace(-0.5, 0.5, E) if biased else None
    found, expected = (module.route(logits, K, bias, normalize) for module in (passes, reference))
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(got, want)


@MODULES
@BOTH
@pytest.mark.parametrize(("N", "D", "E"), [(1, 1, 1), (33, 19, 5), (70, 160, 20)])
def test_gate(passes, dtype, N, D, E):
    x, weight, grad = torch.randn(N, D).to(dtype), torch.randn(E, D), torch.randn(N, E)
    exact, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    true = exact @ exact_weight.t()
    true.backward(grad.double())
    assert_near(passes.gate(x, weight), true.float().detach(), torch.float32, "logits")
    grad_x, grad_weight = passes.gate_backward(grad, x, weight)
    assert grad_x.dtype == dtype
    assert_near(grad_x, exact.grad.float(), dtype, "dx")
    assert_near(grad_weight, exact_weight.grad.float(), torch.float32, "dweight")


@MODULES
@pytest.mark.parametrize(("N", "E", "rows"), [(1, 1, 1), (60, 5, 3), (64, 40, 4)])
def test_router_statistics(passes, N, E, rows):
    logits, grad_probability, grad_z = torch.randn(N, E) * 3, torch.randn(rows, E), torch.tensor(0.7)
    exact = logits.double().requires_grad_()
    p = exact.softmax(1)
    true = [p.view(rows, -1, E).mean(1), exact.logsumexp(1).square().mean(), -(p * p.log()).sum(1).mean(),
            p.amax(1).mean()]  # fmt: skip
    for got, want in zip(passes.router_statistics(logits, rows), true, strict=True):
        torch.testing.assert_close(got, want.float().detach())
    ((true[0] * grad_probability).sum() + true[1] * grad_z).backward()
    found = passes.router_statistics_backward(logits, grad_probability, grad_z)
    torch.testing.assert_close(found, exact.grad.float(), rtol=1e-4, atol=1e-6)


@MODULES
@pytest.mark.parametrize("size", [0, 2, 50])
def test_place(passes, size):
    """Expert 1 has no slot, expert 2 has more than two."""
    _, experts, order, offsets = reference.route(torch.tensor([[1.0, 0, 9], [0, -1, 5], [7, 0, 6]]), 2)
    starts, total = ([0, 8, 8], 16) if size == 0 else ([0, 0, 3 * size - size], 3 * size + 8)
    tokens, slots, row_of_slot = passes.place(order, offsets, starts, experts.shape, size, total)
    rows = row_of_slot.flatten()
    assert torch.equal(slots[rows], torch.arange(6))
    assert torch.equal(tokens[rows], torch.arange(6) // 2)
    assert (slots < 0).sum() == (tokens < 0).sum() == total - 6
    for e in (0, 2):
        of_expert = order[offsets[e] : offsets[e + 1]]
        own = [e * size + i if i < size else starts[e] + i for i in range(len(of_expert))]
        assert rows[of_expert].tolist() == own


@pytest.mark.parametrize(
    ("order", "offsets"),
    [
        ([0, 1, 2, 9], [0, 2, 4]),
        ([0, 1, 2, -1], [0, 2, 4]),
        ([0, 1, 2, 3], [0, 2, 5]),
        ([0, 1, 2, 3], [0, 9, 4]),
        ([0, 1, 2, 3], [0, -9, 4]),
    ],
)
def test_slots_that_are_not_there_are_refused(order, offsets):
    with pytest.raises(IndexError, match="are not the 4 slots of a routing"):
        native_passes.place(torch.tensor(order), torch.tensor(offsets), [0, 2], torch.Size([2, 2]), 2, 4)


@MODULES
def test_row_products(passes):
    a, b = torch.randn(3, 5, 37), torch.randn(3, 5, 37)
    torch.testing.assert_close(passes.row_products(a, b), (a * b).sum(-1))


def test_the_portable_library_computes_the_same(monkeypatch):
    """Without vector instructions by name: a machine without AVX-512, as far as this one can show it."""
    generic = library(generic=True)
    N, V, F, D = 33, 70, 19, 40
    inputs = {
        "logits": torch.randn(N, V), "hidden": torch.randn(N, 2 * F), "grad": torch.randn(N, F),
        "x": torch.randn(N, D), "weight": torch.rand(D), "angle": torch.rand(N, D // 4), "router": torch.randn(V, D),
    }  # fmt: skip

    def all_of(dtype):
        logits, hidden, grad, x = (inputs[name].to(dtype) for name in ("logits", "hidden", "grad", "x"))
        logits, grad = logits.clone(), grad.clone()
        loss = native_passes.cross_entropy(logits, torch.arange(N), True)
        out, _, inverse = native_passes.rms_norm(x, inputs["weight"], 1e-5, x)
        angle = inputs["angle"]
        return [
            torch.tensor(loss), logits, native_passes.swiglu(hidden), *native_passes.swiglu_backward(grad, hidden)[:1],
            native_passes.route(inputs["logits"], 2, None, False)[0], out, inverse,
            native_passes.route(inputs["logits"][:, :13], 3, None, True)[1], native_passes.gate(x, inputs["router"]),
            *native_passes.gate_backward(inputs["logits"], x, inputs["router"]),
            *native_passes.router_statistics(inputs["logits"], 3),
            native_passes.router_statistics_backward(inputs["logits"], inputs["logits"][:3], torch.tensor(0.5)),
            native_passes.rope(x.view(N, 2, D // 2), angle.cos(), angle.sin()),
        ]  # fmt: skip

    for dtype in FLOAT_DTYPES:
        fast = all_of(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(native_passes, "library", lambda: generic)
            for got, want in zip(all_of(dtype), fast, strict=True):
                assert_near(got.float(), want.float(), dtype, "generic")


def test_a_row_does_not_depend_on_the_number_of_threads():
    x, threads = torch.randn(4000, 64), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            logits = x.clone()
            native_passes.cross_entropy(logits, torch.arange(len(x)) % 64, True)
            found.append(torch.cat([native_passes.swiglu(x), logits], dim=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_without_a_compiler_torch_computes_and_says_so(monkeypatch):
    monkeypatch.setattr(native_passes, "unavailable", lambda: "there is no compiler.")
    chosen.passes.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"torch's own, which take longer: there is no compiler\."):
            assert chosen.passes() is torch_passes
        assert chosen.passes() is torch_passes
    finally:
        chosen.passes.cache_clear()
