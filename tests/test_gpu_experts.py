"""The Triton kernels of routing and experts against their plain twins: forward, each named gradient, ugly shapes and
routings, three dtypes, both GPUs' code paths, poisoned margins."""

import itertools
import math

import pytest
import torch
import triton_device  # before any kernel: it decides how they run
from compare import DTYPES, assert_near, check, check_route
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import Routing, tiles, use_backend
from kernels.gpu import grouped
from kernels.gpu.launch import A100, H100, Target, assume, recording

DEVICE = triton_device.DEVICE
GPUS = [Target(80, 3), Target(90, 3)]
"""Few multiprocessors, so that persistent programs take several tiles."""


SMALL = tiles.GemmTile(32, 64, 32, 4, 3, 1, halves=True)
"""A tile that small shapes have several of."""


@pytest.fixture(params=GPUS, ids=["sm_80", "sm_90"])
def gpu(request):
    with assume(request.param), use_backend("gpu"):
        yield request.param


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "expert_gemm", lambda *_: SMALL)
    monkeypatch.setattr(tiles, "weight_gradient", lambda *_: SMALL)
    monkeypatch.setattr(tiles, "decode_gemm", lambda arch, *_: SMALL._replace(block_m=64, swap=arch >= 90))


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE) * scale


def make_routing(kind: str, N: int, E: int, K: int) -> Routing:
    logits = randn(N, E)
    if kind == "one expert":
        logits[:, 0] += 100
    elif kind == "empty experts":
        logits[:, : E // 2] -= 100
    with use_backend("reference"):
        return kernels.route(logits, K)


@pytest.mark.parametrize(
    ("N", "E", "K"), [(0, 4, 2), (1, 1, 1), (1, 16, 2), (63, 16, 2), (200, 8, 4), (130, 64, 1), (65, 24, 3)]
)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "not"])
@pytest.mark.parametrize("biased", [False, True], ids=["logits", "biased"])
def test_route(N, E, K, biased, normalize, gpu):
    bias = randn(E) / 4 if biased else None
    check_route((randn(N, E) * 2).round(), K, bias, normalize)  # few values: many ties
    if N == 63:
        logits = randn(N, E)
        logits[:, 3] += 100
        check_route(logits, K, bias, normalize)


def test_many_experts_in_many_blocks(gpu):
    check_route(randn(150, 256), 8, randn(256) / 100, False)


@pytest.mark.parametrize("options", [(), (torch.zeros(8, device=DEVICE), False)], ids=["plain", "biased"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_logit_leaves_every_slot_in_its_place(bad, options, gpu):
    logits = randn(70, 8)
    logits[3] = bad
    logits[5, 2:] = bad
    routing = kernels.route(logits, 2, *options)
    assert sorted(routing.order.tolist()) == list(range(140))
    assert routing.offsets[-1] == 140
    assert all(len(set(row)) == 2 for row in routing.experts.tolist())
    with use_backend("reference"):
        clean = torch.ones(70, dtype=torch.bool, device=DEVICE).index_fill_(
            0, torch.tensor([3, 5], device=DEVICE), False
        )
        assert torch.equal(routing.experts[clean], kernels.route(logits, 2, *options).experts[clean])


def expert_inputs(routing: Routing, N: int, D: int, F: int, E: int) -> dict[str, Tensor]:
    return {
        "x": randn(N, D),
        "weights": routing.weights,
        "gate_up": randn(E, 2 * F, D, scale=1 / math.sqrt(D)),
        "down": randn(E, D, F, scale=1 / math.sqrt(F)),
    }


KINDS = ["random", "one expert", "empty experts"]
SHAPES = [(1, 16, 8, 4, 2), (63, 60, 36, 16, 2), (150, 136, 72, 4, 3)]
EVERY = [
    # The interpreter takes seconds for each: every shape, kind and dtype once, the product behind `slow`.
    pytest.param(*case, marks=() if case in ((0, 0, 1), (1, 1, 0), (1, 2, 2)) else pytest.mark.slow)
    for case in itertools.product(range(3), range(3), range(3))
]


@pytest.mark.parametrize(("shape", "kind", "dtype"), EVERY)
def test_expert_mlp(shape, kind, dtype, small_tiles, gpu):
    (N, D, F, E, K), kind, dtype = SHAPES[shape], KINDS[kind], DTYPES[dtype]
    routing = make_routing(kind, N, E, K)

    def op(x, weights, gate_up, down):
        return kernels.expert_mlp(x, routing._replace(weights=weights), gate_up, down)

    check(op, expert_inputs(routing, N, D, F, E), dtype, wide=("weights",))


def test_no_tokens(gpu):
    routing = make_routing("random", 0, 4, 2)
    leaves = [t.requires_grad_() for t in (randn(0, 16), randn(4, 24, 16), randn(4, 16, 12))]
    out = kernels.expert_mlp(leaves[0], routing, *leaves[1:])
    out.sum().backward()
    assert out.shape == (0, 16)
    assert all((leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize(("N", "dtype"), [(3, torch.bfloat16), (40, torch.float16), (100, torch.bfloat16)])
def test_expert_mlp_in_shipped_tiles(N, dtype, gpu):
    routing = make_routing("random", N, 3, 2)

    def op(x, weights, gate_up, down):
        return kernels.expert_mlp(x, routing._replace(weights=weights), gate_up, down)

    check(op, expert_inputs(routing, N, 72, 40, 3), dtype, wide=("weights",))


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_expert_mlp_on_any_routing(small_tiles, gpu, data):
    E = data.draw(st.integers(1, 64))
    N, K = data.draw(st.integers(1, 40)), data.draw(st.integers(1, min(E, 4)))
    seed = data.draw(st.integers(0, 2**16))
    favour = data.draw(st.sampled_from([0, 3, 50]))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, E, generator=generator)
    logits[:, seed % E] += favour
    with use_backend("reference"):
        routing = kernels.route(logits.to(DEVICE), K)

    def op(x, weights, gate_up, down):
        return kernels.expert_mlp(x, routing._replace(weights=weights), gate_up, down)

    D, F = data.draw(st.sampled_from([(8, 8), (24, 40), (12, 10)]))
    dtype = data.draw(st.sampled_from(DTYPES))
    check(op, expert_inputs(routing, N, D, F, E), dtype, wide=("weights",))


@pytest.mark.parametrize("N", [20, 70])
def test_expert_mlp_sends_nothing_between_tokens(N, small_tiles, gpu):
    """A NaN token spoils its own row only: neither the rest of a tile nor a neighbour reads it."""
    routing = make_routing("random", N, 4, 2)
    x, gate_up, down = randn(N, 16), randn(4, 24, 16), randn(4, 16, 12)
    clean = kernels.expert_mlp(x, routing, gate_up, down)
    x[0] = float("nan")
    spoiled = kernels.expert_mlp(x, routing, gate_up, down)
    assert spoiled[0].isnan().all()
    assert torch.equal(spoiled[1:], clean[1:])


def test_a_bad_expert_spoils_only_its_own_tokens(small_tiles, gpu):
    """Tiles that reach past an expert's rows or columns read the next expert's weights, which may hold anything."""
    N, D, F = 90, 20, 12
    routing = make_routing("random", N, 4, 1)
    x, gate_up, down = randn(N, D), randn(4, 2 * F, D), randn(4, D, F)
    gate_up[1], down[1] = float("nan"), float("inf")
    leaves = [x.requires_grad_(), gate_up.requires_grad_(), down.requires_grad_()]
    out = kernels.expert_mlp(x, routing, gate_up, down)
    out.sum().backward()
    spared = (routing.experts != 1).all(1)
    assert out[spared].isfinite().all()
    assert out[~spared].isnan().all()
    assert x.grad[spared].isfinite().all()
    for leaf in leaves[1:]:
        assert leaf.grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[5, 0, 123], [0, 0, 1], [64, 65, 63]])
def test_grouped_gemm(sizes, dtype, small_tiles, gpu):
    offsets = torch.tensor([0, *sizes], device=DEVICE).cumsum(0)

    def op(x, weight):
        return kernels.grouped_gemm(x, weight, offsets)

    check(op, {"x": randn(sum(sizes), 60), "weight": randn(len(sizes), 36, 60, scale=1 / 8)}, dtype)


def test_addresses_beyond_32_bits(small_tiles, gpu):
    """Weights of 2^31 + 2^21 elements, of which the last group alone is touched."""
    E, x = 2**10 + 1, randn(3, 2048).bfloat16()
    weight = torch.empty(E, 1024, 2048, dtype=torch.bfloat16, device=DEVICE)
    weight[-1] = randn(1024, 2048, scale=1 / 8)
    offsets = torch.zeros(E + 1, dtype=torch.int64, device=DEVICE)
    offsets[-1] = 3
    out = kernels.grouped_gemm(x, weight, offsets)
    assert_near(out, x.float() @ weight[-1].float().T, torch.bfloat16, "out")


def test_a_heavy_expert_is_cut_into_chunks_that_add_up(small_tiles, gpu, monkeypatch):
    """Four chunks of one expert and one of another; the gradient of an idle expert is zero."""
    monkeypatch.setattr(tiles, "gradient_chunk", lambda *_: 64)
    offsets = torch.tensor([0, 200, 200, 230], device=DEVICE)
    check(lambda x, w: kernels.grouped_gemm(x, w, offsets), {"x": randn(230, 12), "w": randn(3, 20, 12)}, DTYPES[0])


def test_splitting_the_inner_dimension(gpu, monkeypatch):
    monkeypatch.setattr(tiles, "decode_splits", lambda *_: 4)
    routing = make_routing("random", 5, 4, 2)
    inputs = expert_inputs(routing, 5, 48, 200, 4)
    out = kernels.expert_mlp(inputs["x"], routing, inputs["gate_up"], inputs["down"])
    with use_backend("reference"):
        assert_near(out, kernels.expert_mlp(inputs["x"], routing, inputs["gate_up"], inputs["down"]), DTYPES[0], "out")


@pytest.mark.parametrize("row_tiles", range(1, 8))
def test_a_last_round_of_tiles_is_cut_in_halves(row_tiles, small_tiles, monkeypatch):
    """Exactly the tiles that `whole_tiles` leaves over come from the matrix of the half tiles, which here is zero."""
    weight, run = randn(1, 64, 32), grouped.launch
    x, offsets = randn(32 * row_tiles, 32), torch.tensor([0, 32 * row_tiles], device=DEVICE)

    def launch(kernel, grid, *args, **meta):
        args = (*args[:2], torch.zeros_like(weight), *args[3:]) if kernel is grouped.rows_kernel else args
        run(kernel, grid, *args, **meta)

    monkeypatch.setattr(grouped, "launch", launch)
    with assume(GPUS[0]), use_backend("gpu"):
        out = kernels.grouped_gemm(x, weight, offsets)
    halved = row_tiles - tiles.whole_tiles(row_tiles, 3)
    assert (out == 0).all(1).sum() == 32 * halved


@pytest.mark.parametrize("N", [40, 50, 80])
def test_halves_leave_the_same_bits(N, small_tiles, gpu, monkeypatch):
    routing = make_routing("random", N, 2, 1)
    inputs = [t.bfloat16() for t in (randn(N, 40), randn(2, 144, 40), randn(2, 40, 72))]

    def run():
        leaves = [t.clone().requires_grad_() for t in (*inputs, routing.weights)]
        out = kernels.expert_mlp(leaves[0], routing._replace(weights=leaves[3]), *leaves[1:3])
        out.square().sum().backward()
        return [out, *(leaf.grad for leaf in leaves)]

    halved = run()
    monkeypatch.setattr(tiles, "expert_gemm", lambda *_: SMALL._replace(halves=False))
    assert all(torch.equal(one, other) for one, other in zip(halved, run(), strict=True))


def test_twice_gives_the_same_bits(small_tiles, gpu):
    routing = make_routing("random", 60, 4, 2)
    inputs = [t.bfloat16() for t in (randn(60, 32), randn(4, 64, 32), randn(4, 32, 32))]

    def run():
        leaves = [t.clone().requires_grad_() for t in inputs]
        kernels.expert_mlp(leaves[0], routing, *leaves[1:]).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("target", [A100, H100], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("N", [1, 64, 1000])
def test_launching_reads_nothing_back(N, target):
    """On meta tensors, which hold no values: every grid and buffer follows from shapes, as a CUDA graph needs it."""
    from kernels.gpu import expert_mlp, route

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    with assume(target), recording() as launches:
        routing = route.route(empty(N, 16, dtype=torch.float32), 2)
        x, gate_up, down = empty(N, 256), empty(16, 512, 256), empty(16, 256, 256)
        out, hidden = expert_mlp.expert_mlp_forward(x, *routing, gate_up, down)
        grads = expert_mlp.expert_mlp_backward(out, x, *routing, gate_up, down, hidden)
        assert expert_mlp.expert_mlp(x, *routing, gate_up, down).shape == x.shape
    assert [grad.shape for grad in grads] == [x.shape, (N, 2), gate_up.shape, down.shape]
    assert hidden.shape == (2 * N, 512)
    names = {launch.kernel.__name__ for launch in launches}
    assert names >= {"choose_kernel", "up_kernel", "rows_kernel", "gradient_kernel", "swiglu_backward_kernel"}
