"""Attention of the GPU backend against its plain twin. FlexAttention has its gradient on the CPU too, unfused, but says
that it has none: its check is taken out here. What a GPU compiles is built on the CPU once, in a slow test."""

import pytest
import torch
import triton_device  # before any kernel: it decides how they run
from compare import DTYPES, check
from torch.nn.attention import flex_attention

import kernels
from kernels import registry, use_backend
from kernels.gpu import attention

DEVICE = triton_device.DEVICE

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def _backend(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with use_backend("gpu"):
        yield


def numbers(kind: str, B: int, T: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    if kind == "scattered":
        return torch.randint(0, 3, (B, T), device=DEVICE)
    every = {"one": T, "short": 9, "long": T // 2 + 1}[kind]
    starts = torch.rand(B, T, device=DEVICE) < 1 / every
    return starts.cumsum(1) if kind != "one" else torch.zeros(B, T, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", ["none", "one", "short", "long", "scattered"])
@pytest.mark.parametrize(("B", "T", "H", "G", "C"), [(1, 1, 1, 1, 2), (2, 63, 4, 1, 60), (2, 300, 6, 2, 16)])
def test_attention(B, T, H, G, C, documents, dtype):
    documents = numbers(documents, B, T)
    inputs = {name: torch.randn(B, T, heads, C, device=DEVICE) for name, heads in {"q": H, "k": G, "v": G}.items()}
    # A gradient of 0, as q's is with one key, is the difference of two terms of about 1.
    check(kernels.attention, inputs, dtype, fixed=(documents,), floor=1.0)


def test_attention_does_not_cross_documents():
    q, k, v = (torch.randn(1, 200, heads, 8, device=DEVICE) for heads in (4, 1, 1))
    documents = (torch.arange(200, device=DEVICE) >= 140).long()[None]
    out = kernels.attention(q, k, v, documents)
    k[:, :140] = 1e30
    assert torch.equal(kernels.attention(q, k, v, documents)[:, 140:], out[:, 140:])
    torch.testing.assert_close(out[:, 140:], kernels.attention(q[:, 140:], k[:, 140:], v[:, 140:]))


@pytest.mark.parametrize("kind", ["one", "short", "long", "scattered"])
@pytest.mark.parametrize("T", [1, 128, 129, 700])
def test_blocks_of_the_mask(T, kind):
    """Packed rows list what torch's builder lists from all T x T pairs; other rows list no less, and no block twice."""
    mask = attention.block_mask(numbers(kind, 3, T))
    true = flex_attention.create_block_mask(mask.mask_mod, 3, None, T, T, device=DEVICE)
    part, full = dense(mask.kv_num_blocks, mask.kv_indices), dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    true_part = dense(true.kv_num_blocks, true.kv_indices)
    true_full = dense(true.full_kv_num_blocks, true.full_kv_indices)
    if kind == "scattered":
        assert not (part & full).any()
        assert not (full & ~true_full).any()
        assert not ((true_part | true_full) & ~(part | full)).any()
    else:
        assert torch.equal(part, true_part)
        assert torch.equal(full, true_full)


def dense(number: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The lists as bool (B, 1, i, j)."""
    listed = torch.arange(order.shape[3], device=order.device) < number[..., None]
    return torch.zeros_like(listed).scatter(3, order.long(), listed)


def test_autograd_sees_through_it():
    q, k = torch.randn(1, 5, 2, 8, device=DEVICE, requires_grad=True), torch.randn(1, 5, 1, 8, device=DEVICE)
    assert kernels.attention(q, k, k).grad_fn.name() == "TransposeBackward0"
    assert registry.select("attention", (q, k, k, None)) == "gpu"


def test_wide_heads_are_refused():
    q = torch.empty(1, 1, 1, 257, device=DEVICE)
    assert "256 channels, not 257" in attention.unsupported(q, q, q, None)


def test_nothing_is_read_back():
    """On meta tensors a value that the host wants is an error."""
    q, k = (torch.empty(2, 300, heads, 32, dtype=torch.bfloat16, device="meta") for heads in (4, 1))
    assert attention.attention(q, k, k, None).shape == q.shape
    mask = attention.block_mask(torch.empty(2, 300, dtype=torch.int64, device="meta"))
    assert mask.q_indices.shape == (2, 1, 3, 3)


def test_traced_whole():
    """The graph that is compiled on a GPU, forward and backward."""
    mask = attention.block_mask(numbers("short", 2, 150))
    leaves = [torch.randn(2, heads, 150, 16, device=DEVICE, requires_grad=True) for heads in (4, 1, 1)]
    eager = attention.masked(*leaves, mask, 0.25)
    traced = torch.compile(attention.masked, fullgraph=True, backend="aot_eager")(*leaves, mask, 0.25)
    torch.testing.assert_close(traced, eager)
    gradient = torch.randn_like(eager)
    for one, two in zip(
        torch.autograd.grad(traced, leaves, gradient), torch.autograd.grad(eager, leaves, gradient), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_mask_is_made_once_for_all_layers():
    documents = numbers("short", 2, 150)
    mask = attention.documents_mask(documents)
    assert attention.documents_mask(documents) is mask
    documents[:, 70:] = 1000
    changed = attention.documents_mask(documents)
    assert changed is not mask
    with torch.inference_mode():
        assert attention.documents_mask(documents) is changed
        assert not attention.documents_mask(documents + 1).kv_indices.requires_grad
    newer = numbers("one", 2, 150)
    with torch.inference_mode():
        assert not attention.documents_mask(newer).kv_indices.is_inference()


@pytest.mark.slow
@pytest.mark.parametrize("documents", ["short", "scattered"])
def test_compiled(documents):
    """Fused, it walks the lists of blocks: the unfused one looks at the mask alone."""
    q, k, v = (torch.randn(2, heads, 600, 32, device=DEVICE) for heads in (4, 1, 1))
    documents = numbers(documents, 2, 600)
    with torch.inference_mode():
        fused = attention.fused(q, k, v, attention.block_mask(documents), 32**-0.5)
    with use_backend("reference"):
        true = kernels.attention(*(x.transpose(1, 2) for x in (q, k, v)), documents).transpose(1, 2)
    torch.testing.assert_close(fused, true, rtol=1e-4, atol=1e-5)
