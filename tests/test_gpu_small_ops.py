"""The small Triton kernels against their plain twins: forward, each named gradient, ugly shapes, three dtypes, poisoned
margins, rows that must not be read or written, and launches that know nothing but shapes."""

import math

import pytest
import torch
import triton_device  # before any kernel: it decides how they run
from compare import DTYPES, TOLERANCE, assert_near, check
from torch import Tensor

import kernels
from kernels import use_backend
from kernels.gpu import cross_entropy, rms_norm, rope, rope_append
from kernels.gpu.launch import H100, Target, assume, recording

DEVICE = triton_device.DEVICE
BACKENDS = [("gpu", dtype) for dtype in DTYPES]
if DEVICE == "cpu":
    BACKENDS += [("cpu", torch.float32), ("cpu", torch.bfloat16)]


@pytest.fixture(autouse=True)
def _small_gpu():
    # Few multiprocessors, so that the programs of a backward take several rows.
    with assume(Target(90, 2)), use_backend("gpu"):
        yield


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 5), (5, 123), (2, 3, 64), (99, 60), (20, 2048), (3, 5000), (0, 16)])
def test_rms_norm(shape, residual, backend, dtype):
    inputs = {"x": randn(*shape), "weight": torch.rand(shape[-1], device=DEVICE) + 0.5}
    if residual:
        inputs["residual"] = randn(*shape)
    with use_backend(backend):
        check(lambda x, weight, *rest: kernels.rms_norm(x, weight, 1e-5, *rest), inputs, dtype, wide=("weight",))


def test_rms_norm_of_a_sum_that_nothing_else_reads():
    x, residual, weight = (randn(*shape).requires_grad_() for shape in [(4, 64), (4, 64), (64,)])
    normed, _ = kernels.rms_norm(x, weight, 1e-5, residual)
    normed.square().sum().backward()
    with use_backend("reference"):
        total = (x + residual).detach().requires_grad_()
        kernels.rms_norm(total, weight.detach(), 1e-5).square().sum().backward()
    torch.testing.assert_close(x.grad, total.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(x.grad, residual.grad)


def test_rms_norm_takes_rows_with_gaps():
    x, weight = randn(7, 100)[:, :64], randn(64)
    assert torch.equal(kernels.rms_norm(x, weight, 1e-5), kernels.rms_norm(x.contiguous(), weight, 1e-5))


def test_rms_norm_refuses_rows_wider_than_registers():
    assert "16384" in rms_norm.unsupported(randn(1, 16385), randn(16385), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "H", "C"), [(1, 1, 2), (63, 9, 32), (7, 3, 60), (40, 17, 128), (0, 2, 8)])
def test_rope(N, H, C, dtype):
    angle = torch.rand(N, C // 2, device=DEVICE) * 100
    check(lambda x: kernels.rope(x, angle.cos(), angle.sin()), {"x": randn(N, H, C)}, dtype)


def test_rope_takes_heads_out_of_a_wider_projection():
    qkv, angle = randn(5, 6, 16), randn(5, 8)
    out = kernels.rope(qkv[:, 1:4], angle.cos(), angle.sin())
    with use_backend("reference"):
        torch.testing.assert_close(out, kernels.rope(qkv[:, 1:4], angle.cos(), angle.sin()), rtol=1e-5, atol=1e-5)


def unturned(n: int, C: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of no angle."""
    return torch.ones(n, C // 2, device=DEVICE), torch.zeros(n, C // 2, device=DEVICE)


@pytest.mark.parametrize("pages", ["same", "int8"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(("n", "H", "G", "C"), [(1, 1, 1, 2), (5, 8, 1, 64), (9, 6, 2, 60), (3, 40, 20, 16)])
def test_rope_append(n, H, G, C, dtype, pages, backend):
    P, count = 4, 7
    page_dtype = torch.int8 if pages == "int8" else dtype
    q, k, v = (x.to(dtype) for x in randn(n, H + 2 * G, C).split([H, G, G], dim=1))
    k[0], v[-1, -1] = 0, 0
    angle = torch.rand(n, C // 2, device=DEVICE) * 100
    rotation = angle.cos(), angle.sin()
    slots = torch.randperm(P * count, device=DEVICE)[:n]
    slots[1::3] = -1

    def run(name):
        caches = [torch.full((count, 2, P, G, C), 7, dtype=page_dtype, device=DEVICE)[:, 1] for _ in range(2)]
        scales = [torch.full((count, P, G), 7.0, device=DEVICE) if pages == "int8" else None for _ in range(2)]
        with use_backend(name), torch.inference_mode():
            return kernels.rope_append(q, k, v, *rotation, *caches, slots, *scales), *caches, *scales

    out, k_pages, v_pages, k_scales, v_scales = run(backend)
    true_out, true_k, true_v, true_k_scales, true_v_scales = run("reference")
    assert_near(out, true_out.float(), dtype, "q")
    if pages == "int8":
        torch.testing.assert_close(v_scales, true_v_scales, rtol=0, atol=0)
        torch.testing.assert_close(k_scales, true_k_scales, rtol=2 * TOLERANCE[dtype], atol=0)
        assert (k_pages.int() - true_k.int()).abs().max() <= 1 + 254 * TOLERANCE[dtype]
    else:
        assert_near(k_pages, true_k.float(), dtype, "k")
    assert torch.equal(v_pages, true_v)
    written = slots[slots >= 0]
    untouched = torch.ones(count * P, dtype=torch.bool, device=DEVICE).index_fill(0, written, False)
    for cache in (k_pages, v_pages):
        assert (cache.flatten(0, 1)[untouched] == 7).all()


def test_rope_append_is_rope_and_then_append():
    """Rotated in the same pass or before it: the same bits in the cache."""
    q, k, v, angle = randn(6, 4, 32).bfloat16(), randn(6, 2, 32).bfloat16(), randn(6, 2, 32).bfloat16(), randn(6, 16)
    slots = torch.arange(6, device=DEVICE)

    def cache():
        empty = torch.zeros(2, 4, 2, 32, dtype=torch.int8, device=DEVICE), torch.zeros(2, 4, 2, device=DEVICE)
        return [empty[0], empty[0].clone()], [empty[1], empty[1].clone()]

    (k_one, v_one), scales_one = cache()
    (k_two, v_two), scales_two = cache()
    rotation = angle.cos(), angle.sin()
    out = kernels.rope_append(q, k, v, *rotation, k_one, v_one, slots, *scales_one)
    turned_q, turned_k = kernels.rope(q, *rotation), kernels.rope(k, *rotation)
    assert torch.equal(out, turned_q)
    again = kernels.rope_append(turned_q, turned_k, v, *unturned(6, 32), k_two, v_two, slots, *scales_two)
    assert torch.equal(again, out)
    for one, two in zip([k_one, v_one, *scales_one], [k_two, v_two, *scales_two], strict=True):
        assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_rope_append_lets_nan_through():
    k, v = randn(2, 1, 8), randn(2, 1, 8)
    k[1, 0, 3] = float("nan")
    pages, scales = torch.zeros(2, 1, 2, 1, 8, dtype=torch.int8, device=DEVICE), torch.zeros(2, 1, 2, 1, device=DEVICE)
    slots = torch.arange(2, device=DEVICE)
    kernels.rope_append(randn(2, 1, 8), k, v, *unturned(2, 8), pages[0], pages[1], slots, scales[0], scales[1])
    assert scales[0, 0, :, 0].isnan().tolist() == [False, True]
    assert scales[1].isfinite().all()


def test_rope_append_wants_scales_for_int8_pages_alone():
    x, slots = randn(1, 1, 8), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for dtype, scales in ((torch.int8, None), (torch.float32, randn(1, 4, 1))):
        pages = torch.zeros(1, 4, 1, 8, dtype=dtype, device=DEVICE)
        with pytest.raises(ValueError, match=f"k_scales and v_scales: got {dtype}"):
            kernels.rope_append(x, x, x, *unturned(1, 8), pages, pages, slots, scales, scales)


def test_rope_append_traced():
    """A compiler sees which caches it writes."""
    q, k, v, angle = randn(3, 4, 8), randn(3, 1, 8), randn(3, 1, 8), randn(3, 4)
    slots = torch.tensor([5, -1, 2], device=DEVICE)

    def step(q, k, v, cos, sin, k_pages, v_pages, slots):
        return kernels.rope_append(q, k, v, cos, sin, k_pages, v_pages, slots) + k_pages.sum()

    caches = [[torch.zeros(2, 4, 1, 8, device=DEVICE) for _ in range(2)] for _ in range(2)]
    out = step(q, k, v, angle.cos(), angle.sin(), *caches[0], slots)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, angle.cos(), angle.sin(), *caches[1], slots), out)
    for one, two in zip(*caches, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D", "V"), [(1, 8, 2), (63, 60, 123), (9, 16, 5000), (70, 32, 40), (0, 8, 16)])
@pytest.mark.parametrize("ignored", [False, True])
def test_cross_entropy(N, D, V, ignored, dtype):
    targets = torch.randint(0, V, (N,), device=DEVICE)
    if ignored:
        targets[::3] = -100
    inputs = {"x": randn(N, D), "weight": randn(V, D) / math.sqrt(D)}
    check(lambda x, weight: kernels.cross_entropy(x, weight, targets), inputs, dtype, wide=("weight",))


def test_cross_entropy_ignores_what_it_does_not_score():
    x, weight = randn(4, 8), randn(10, 8)
    x[1] = float("nan")
    x.requires_grad_()
    targets = torch.tensor([1, -100, 2, 3], device=DEVICE)
    loss = kernels.cross_entropy(x, weight.requires_grad_(), targets)
    loss.backward()
    scored = [0, 2, 3]
    alone = kernels.cross_entropy(x.detach()[scored], weight.detach(), targets[scored])
    assert torch.equal(loss.detach(), alone)
    assert not x.grad[1].any()
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_chunks_of_rows_hold_no_more_than_x_or_the_weight():
    for N, D, V in [(2048, 1024, 32768), (1 << 20, 64, 300), (3, 8192, 100352), (8192, 2048, 100352)]:
        rows = cross_entropy.chunk_rows(N, D, V)
        assert rows * V < 2 * max(N, V) * D
        assert rows == N or rows & (rows - 1) == 0


def test_launches_know_shapes_alone():
    """On meta tensors there is nothing to read back: what these record a CUDA graph could capture."""

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    angle, slots = meta(8, 32, dtype=torch.float32), meta(8, dtype=torch.int64)
    pages = meta(4, 16, 1, 64, dtype=torch.int8)
    scales = meta(4, 16, 1, dtype=torch.float32)
    with assume(H100), recording() as launches:
        _, total, r = rms_norm.add_rms_norm_forward(meta(8, 256), meta(256), 1e-5, meta(8, 256))
        rms_norm.rms_norm_backward(meta(8, 256), total, meta(256), r, meta(8, 256))
        rope.rope(meta(8, 16, 64), angle, angle)
        q, k, v = meta(8, 18, 64).split([16, 1, 1], dim=1)
        rope_append.rope_append(q, k, v, angle, angle, pages, pages, slots, scales, scales)
        cross_entropy.cross_entropy_with_grads(meta(8, 256), meta(1000, 256, dtype=torch.float32), slots)
    assert [launch.kernel.__name__ for launch in launches] == [
        "forward_kernel", "backward_kernel", "rope_kernel", "rope_append_kernel", "row_kernel"
    ]  # fmt: skip


def test_twice_gives_the_same_bits():
    x, weight, targets = randn(100, 48).bfloat16(), randn(48), torch.randint(0, 90, (100,), device=DEVICE)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, weight, randn(90, 48).bfloat16() * 0 + 0.1)]
        normed, total = kernels.rms_norm(leaves[0], leaves[1], 1e-5, leaves[0] * 2)
        kernels.cross_entropy(normed + total, leaves[2], targets).backward()
        return [leaf.grad for leaf in leaves]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
