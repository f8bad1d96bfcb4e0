"""Paged attention on the Triton backend: every shape against the definition, and the same bits in every company.

H query heads, G key-value heads, C channels, P tokens per page.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton_device
from compare import DTYPES, assert_near
from hypothesis import given
from hypothesis import strategies as st
from poison import assert_margins_untouched, poisoned
from torch import Tensor, library

import kernels
from kernels import attention_tiles, autograd, registry, use_backend
from kernels.attention_tiles import paged_tile, row_blocks
from kernels.gpu import paged_attention as gpu
from kernels.gpu.launch import A100, H100, assume, recording

DEVICE = triton_device.DEVICE


class Batch(NamedTuple):
    """Arguments of paged_attention."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    query_offsets: Tensor
    lengths: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    def select(self, s: int, first: int, last: int) -> "Batch":
        """Sequence s alone, with its queries first : last of those that it brings."""
        start, end = self.query_offsets[s : s + 2].tolist()
        return self._replace(
            q=self.q[start + first : start + last],
            page_table=self.page_table[s : s + 1],
            query_offsets=torch.tensor([0, last - first], device=DEVICE),
            lengths=self.lengths[s : s + 1] - (end - start - last),
        )


def make_batch(
    news: list[int], lengths: list[int], H: int, G: int, C: int, P: int, dtype: torch.dtype, *, quantized=False, width=0
) -> Batch:
    """Sequences of `lengths` tokens of which `news` are queries, in shuffled pages. Memory that holds no token is NaN,
    or 127 with a scale of NaN. The table has at least `width` columns, and -1 where a sequence has no page."""
    pages_each = [-(-length // P) for length in lengths]
    order = torch.randperm(sum(pages_each) + 2)
    table = torch.full((len(news), max(*pages_each, width)), -1)
    k, v = (torch.full((len(order), P, G, C), float("nan")) for _ in range(2))
    used = 0
    for s, (length, count) in enumerate(zip(lengths, pages_each, strict=True)):
        table[s, :count] = order[used : used + count]
        used += count
        slots = table[s, torch.arange(length) // P] * P + torch.arange(length) % P
        k.view(-1, G, C)[slots], v.view(-1, G, C)[slots] = torch.randn(2, length, G, C)
    q = poisoned(torch.randn(sum(news), H, C).to(DEVICE, dtype))
    rest = [table, torch.tensor([0, *news]).cumsum(0), torch.tensor(lengths)]
    if quantized:
        scales = [x.abs().amax(-1) / 127 for x in (k, v)]
        pages = [
            (x / scale[..., None]).round().nan_to_num(127).to(torch.int8)
            for x, scale in zip((k, v), scales, strict=True)
        ]
        rest += scales
    else:
        pages = [x.to(dtype) for x in (k, v)]
    return Batch(q, *(x.to(DEVICE) for x in [*pages, *rest]))


def run(batch: Batch) -> Tensor:
    with use_backend("gpu"):
        return kernels.paged_attention(*batch)


def check(batch: Batch) -> Tensor:
    dtype = batch.q.dtype
    out = run(batch)
    exact = [x.float() if x is not None and x.dtype == dtype else x for x in batch]
    with use_backend("reference"):
        true = kernels.paged_attention(*exact)
    assert out.dtype == dtype
    assert_near(out, true, dtype, "out")
    assert_margins_untouched(batch.q)
    return out


@pytest.fixture(params=[A100, H100], ids=["sm_80", "sm_90"])
def gpu_target(request):
    """Tiles of either GPU, which differ for 16-bit queries."""
    with assume(request.param):
        yield request.param


@pytest.fixture
def short_splits(monkeypatch):
    """A split of 64 keys and then splits of 128, so that short sequences have several."""
    monkeypatch.setattr(gpu, "paged_tile", lambda *shape: paged_tile(*shape)._replace(split=64, fine=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("P", [16, 64])
def test_lengths_around_page_boundaries(P, dtype):
    lengths = [P * pages + more for pages in (1, 2, 3) for more in (-1, 0, 1)] + [1]
    check(make_batch([1, 2, 3, 16, 1, 7, 4, 1, 9, 1], lengths, 2, 1, 64, P, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("H", "G", "C"), [(1, 1, 128), (8, 1, 256), (8, 8, 64), (6, 2, 128), (40, 8, 64), (128, 1, 64), (128, 2, 128)]
)
def test_heads(H, G, C, dtype):
    check(make_batch([1, 2], [20, 37], H, G, C, 16, dtype))


@pytest.mark.parametrize(("C", "P"), [(8, 4), (60, 24), (16, 1)])
def test_odd_head_and_page_sizes(C, P, gpu_target):
    check(make_batch([2, 1], [37, 5], 3, 1, C, P, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splits_with_empty_ranges(dtype, short_splits):
    """Sequences of 1 to 3 splits in a table of 4; queries on both sides of a split's boundary."""
    batch = make_batch([1, 2, 1, 3, 5], [1, 63, 64, 65, 130], 2, 2, 16, 16, dtype, width=16)
    out = check(batch)
    # Without the empty columns: fewer splits are launched, or none is merged.
    narrow = batch.select(0, 0, 1)
    assert torch.equal(run(narrow._replace(page_table=narrow.page_table[:, :1])), out[:1])


def test_sequences_without_queries(short_splits):
    batch = make_batch([0, 3, 0, 0, 1, 0], [70, 70, 5, 130, 1, 64], 2, 1, 16, 16, torch.float32)
    check(batch)
    assert run(batch._replace(q=batch.q[:0], query_offsets=torch.zeros_like(batch.query_offsets))).shape == (0, 2, 16)


def test_a_nan_among_keys_spoils_its_own_sequence(short_splits):
    """Whichever of three splits it is in."""
    batch = make_batch([2, 1], [200, 70], 2, 1, 16, 16, torch.float32)
    good = run(batch)
    for position in (3, 100, 195):
        k = batch.k_pages.clone()
        k[batch.page_table[0, position // 16], position % 16] = float("nan")
        out = run(batch._replace(k_pages=k))
        assert out[:2].isnan().all(), position
        assert torch.equal(out[2:], good[2:]), position


def test_long_prefill_chunk():
    check(make_batch([200, 1], [230, 9], 2, 1, 16, 16, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_pages(dtype, gpu_target, short_splits):
    check(make_batch([1, 3, 2], [1, 33, 70], 2, 2, 64, 16, dtype, quantized=True))


@pytest.mark.parametrize("backend", dict.fromkeys(registry.BACKENDS[DEVICE]))
def test_int8_pages_elsewhere(backend):
    batch = make_batch([1, 5, 2], [1, 33, 70], 4, 2, 16, 16, torch.float32, quantized=True)
    wide = [pages * scales[..., None] for pages, scales in zip(batch[1:3], batch[6:], strict=True)]
    with use_backend(backend):
        got, true = kernels.paged_attention(*batch), kernels.paged_attention(batch.q, *wide, *batch[3:6])
    torch.testing.assert_close(got, true)


@pytest.fixture
def rows_by_themselves(monkeypatch):
    """In the interpreter a row of a product gets the same bits whatever rows stand beside it, as on tensor cores.

    It asks numpy, whose BLAS does not keep that on every CPU: not with the Haswell kernels of OpenBLAS on an AMD Zen 5.
    """
    if DEVICE == "cuda":
        return
    matmul = np.matmul

    def row_by_row(a, b, **kwargs):
        return np.concatenate([matmul(a[i : i + 1], b, **kwargs) for i in range(len(a))])

    monkeypatch.setattr(np, "matmul", row_by_row)


@pytest.mark.parametrize(
    ("target", "dtype", "R", "quantized"),
    [
        (A100, torch.bfloat16, 1, False), (A100, torch.bfloat16, 1, True), (H100, torch.bfloat16, 3, False),
        (H100, torch.bfloat16, 1, True), (H100, torch.float32, 3, False), (H100, torch.float32, 1, True),
    ],
)  # fmt: skip
def test_same_bits_in_any_company(target, dtype, R, quantized, short_splits, rows_by_themselves):
    """Queries on both sides of a split's boundary: 16, 4 and 1 of them, in a batch, among single queries."""
    batch = make_batch([2, 16, 1], [20, 72, 33], R, 1, 64, 16, dtype, quantized=quantized)
    with assume(target):
        together = run(batch)
        for first, last in [(0, 16), (12, 16), (15, 16), (3, 4)]:
            alone = run(batch.select(1, first, last))
            assert torch.equal(alone, together[2 + first : 2 + last]), f"queries {first} to {last}"
        ends = batch.query_offsets[1:] - 1
        single = batch._replace(q=batch.q[ends], query_offsets=torch.arange(4, device=DEVICE))
        assert torch.equal(run(single), together[ends])


def test_same_bits_in_several_launches(monkeypatch, short_splits, rows_by_themselves):
    batch = make_batch([3, 0, 5, 1], [70, 5, 80, 66], 1, 1, 16, 16, torch.float32)
    whole = check(batch)
    for queries in (1, 4, 5):
        monkeypatch.setattr(gpu, "WORKSPACE_BYTES", queries * 4 * 2 * 16)
        assert torch.equal(run(batch), whole), f"{queries} queries a launch"


def test_addresses_beyond_32_bits():
    """Keys and values behind 2^31 elements of memory that nothing touches."""
    pages, P, C = 2**31 // (64 * 64) + 2, 64, 64
    small = make_batch([1, 2], [70, 64], 2, 1, C, P, torch.bfloat16, quantized=True)
    high = torch.tensor([pages - 1, 3, pages - 2], device=DEVICE)
    table = torch.where(small.page_table < 0, small.page_table, 0)
    k, v = (torch.empty(pages, P, 1, C, dtype=torch.int8, device=DEVICE) for _ in range(2))
    k_scales, v_scales = (torch.empty(pages, P, 1, device=DEVICE) for _ in range(2))
    for page, (s, column) in zip(high, [(0, 0), (0, 1), (1, 0)], strict=True):
        old = small.page_table[s, column]
        for big, source in zip((k, v, k_scales, v_scales), (*small[1:3], *small[6:]), strict=True):
            big[page] = source[old]
        table[s, column] = page
    big = Batch(small.q, k, v, table, *small[4:6], k_scales, v_scales)
    assert torch.equal(run(big), run(small))


def test_strided_pools(short_splits):
    """One layer of a pool that holds keys and values of several, and a table cut from a wider one."""
    batch = make_batch([2, 1], [70, 9], 4, 2, 16, 16, torch.float32, width=8)
    pool = torch.full((*batch.k_pages.shape[:2], 2, 3, 2, 16), float("nan"), device=DEVICE)
    pool[:, :, 0, 1], pool[:, :, 1, 1] = batch.k_pages, batch.v_pages
    strided = batch._replace(k_pages=pool[:, :, 0, 1], v_pages=pool[:, :, 1, 1], page_table=batch.page_table[:, :5])
    assert torch.equal(run(strided), run(batch))


def test_refusals():
    batch = make_batch([1], [1], 1, 1, 16, 16, torch.float32)
    assert "bfloat16" in gpu.unsupported(*batch._replace(k_pages=batch.k_pages.bfloat16()))
    assert "side by side" in gpu.unsupported(*batch._replace(v_pages=torch.empty(2, 16, 16, 2).transpose(2, 3)))
    far_apart = torch.empty(64, 2**25, 1, 16, dtype=torch.float32, device="meta").transpose(0, 1)
    assert "2^31" in gpu.unsupported(*batch._replace(k_pages=far_apart))
    assert "256" in gpu.unsupported(*batch._replace(q=torch.empty(1, 1, 300)))


@given(st.data())
def test_row_blocks_suffice(data):
    news = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8))
    R, block_m = data.draw(st.integers(1, 130)), data.draw(st.sampled_from([16, 32, 64]))
    bound = row_blocks(sum(news), len(news), R, block_m)
    assert sum(math.ceil(n * R / block_m) for n in news) <= bound
    assert row_blocks(len(news), len(news), R, block_m) == len(news) * math.ceil(R / block_m)


def record(S: int, news: int, context: int, H: int, G: int, C: int, dtype=torch.bfloat16) -> list:
    """What a call on tensors of these shapes launches."""
    pages = -(-context // 64)

    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    k = empty(8, 64, G, C, dtype=dtype)
    with recording() as launches:
        gpu.paged_attention(
            empty(S * news, H, C, dtype=dtype), k, k, empty(S, pages), empty(S + 1), empty(S)
        )  # fmt: skip
    return launches


@pytest.mark.parametrize("H", [16, 128])
def test_launches_of_decode(H):
    """A long context fills the GPU; single queries get no more programs than they need, and short contexts no merge."""
    with assume(H100):
        attend, _merge = record(1, 1, 131072, H, 1, 128)
        assert math.prod(attend.grid) >= H100.sms
        assert len(record(16, 1, 512, H, 1, 128)) == 1
    for target in (A100, H100):
        with assume(target):
            blocks = math.ceil(H / paged_tile(target.arch, H, 128, 2, 2).block_m)
            assert record(16, 1, 32768, H, 1, 128)[0].grid[0] == 16 * blocks


def test_workspace_is_bounded():
    launches = record(1, 4096, 131072, 16, 1, 128)
    partials = [launch.args[8] for launch in launches if launch.kernel is gpu.attend_splits]
    assert len(partials) > 1
    assert all(partial.nbytes <= attention_tiles.WORKSPACE_BYTES for partial in partials)


def test_custom_op():
    batch = make_batch([1, 3], [9, 20], 2, 1, 16, 16, torch.float32, quantized=True)
    library.opcheck(autograd.paged_attention, tuple(batch), test_utils=("test_schema", "test_faketensor"))
