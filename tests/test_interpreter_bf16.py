"""Every operation that interpreter_bf16 wraps gives what torch gives, bit for bit where both round once."""

import pytest
import torch
from triton_device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU: nothing is interpreted")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

SIZE = 256


@triton.jit
def unary_kernel(x, out, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    if OP == "copy":
        r = a
    elif OP == "negate":
        r = -a
    elif OP == "abs":
        r = tl.abs(a)
    elif OP == "add constant":
        r = a + 1.375
    elif OP == "full":
        r = tl.full((SIZE,), 1.7, tl.bfloat16)
    elif OP == "cumsum":
        r = tl.associative_scan(a, 0, tl.standard._sum_combine)
    elif OP == "scan by a function":
        r = tl.associative_scan(a, 0, larger)
    elif OP == "reversed cumsum":
        r = tl.cumsum(a, 0, reverse=True)
    elif OP == "clamp":
        r = tl.clamp(a, -0.5, 0.75)
    elif OP == "transpose":
        r = tl.reshape(tl.trans(tl.reshape(a, (16, 16))), (SIZE,))
    tl.store(out + i, r)


@triton.jit
def larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def binary_kernel(x, y, out, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    b = tl.load(y + i)
    if OP == "add":
        r = a + b
    elif OP == "sub":
        r = a - b
    elif OP == "mul":
        r = a * b
    elif OP == "div":
        r = a / b
    elif OP == "min":
        r = tl.minimum(a, b)
    elif OP == "max":
        r = tl.maximum(a, b)
    elif OP == "fma":
        r = tl.fma(a, b, a)
    elif OP == "where":
        r = tl.where(a < b, a, b)
    elif OP == "ge":
        r = (a >= b).to(tl.bfloat16)
    elif OP == "eq":
        r = tl.where(a == a, a != b, False).to(tl.float32)
    elif OP == "mixed":
        r = a * b.to(tl.float32)
    tl.store(out + i, r)


@triton.jit
def reduce_kernel(x, out, OP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    i = tl.arange(0, ROWS)
    a = tl.load(x + i[:, None] * COLS + tl.arange(0, COLS)[None, :])
    if OP == "sum":
        r = tl.sum(a, 1)
    elif OP == "sum in bf16":
        r = tl.reduce(a, 1, tl.standard._sum_combine)
    elif OP == "max":
        r = tl.max(a, 1)
    elif OP == "max in bf16":
        r = tl.reduce(a, 1, tl.standard._elementwise_max)
    elif OP == "min":
        r = tl.min(a, 1)
    elif OP == "by a function":
        r = tl.reduce(a, 1, larger)
    elif OP == "argmax":
        r = tl.argmax(a, 1)
    elif OP == "argmin":
        r = tl.argmin(a, 1)
    elif OP == "max and index":
        value, index = tl.max(a, 1, return_indices=True)
        r = value.to(tl.float32) + index
    tl.store(out + i, r)


@triton.jit
def cast_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def dot_kernel(x, y, out, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    b = tl.arange(0, B)[:, None, None]
    m = tl.arange(0, M)[None, :, None]
    n = tl.arange(0, N)[None, None, :]
    x = tl.load(x + (b * M + m) * K + tl.arange(0, K)[None, None, :])
    y = tl.load(y + (b * K + tl.arange(0, K)[None, :, None]) * N + n)
    if B == 1:
        tile = tl.dot(tl.reshape(x, (M, K)), tl.reshape(y, (K, N)), input_precision="ieee")[None]
    else:
        tile = tl.dot(x, y, input_precision="ieee")
    tl.store(out + (b * M + m) * N + n, tile)


@triton.jit
def loop_kernel(out, N):
    total = 0
    for i in range(0, N):
        total += i
    tl.store(out, total)


@triton.jit
def descriptor_kernel(x, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    a = x.load([0, 0])
    tl.store(out + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :], a + a)


def bf16(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * torch.rand(shape) * 3).bfloat16()


def scanned(x, op):
    return torch.stack([op(x[: i + 1]) for i in range(len(x))])


UNARY = {
    "copy": lambda x: x,
    "negate": lambda x: -x,
    "abs": lambda x: x.abs(),
    "add constant": lambda x: x + torch.tensor(1.375, dtype=torch.bfloat16),
    "full": lambda x: torch.full_like(x, 1.7),
    "cumsum": lambda x: x.float().cumsum(0),
    "scan by a function": lambda x: scanned(x, torch.max),
    "reversed cumsum": lambda x: x.float().flip(0).cumsum(0).flip(0),
    "clamp": lambda x: x.clamp(-0.5, 0.75),
    "transpose": lambda x: x.view(16, 16).t().reshape(-1),
}
BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "min": torch.minimum,
    "max": torch.maximum,
    "fma": lambda x, y: x.float() * y.float() + x.float(),
    "where": lambda x, y: torch.where(x < y, x, y),
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x != y,
    "mixed": lambda x, y: x.float() * y.float(),
}
REDUCE = {
    "sum": lambda x: x.float().sum(1),
    "sum in bf16": lambda x: x.float().sum(1),
    "max": lambda x: x.amax(1),
    "max in bf16": lambda x: x.amax(1),
    "min": lambda x: x.amin(1),
    "by a function": lambda x: x.amax(1),
    "argmax": lambda x: x.float().argmax(1),
    "argmin": lambda x: x.float().argmin(1),
    "max and index": lambda x: x.amax(1).float() + x.float().argmax(1),
}


def same_to_one_rounding(got, true):
    torch.testing.assert_close(got.float(), true.to(got.dtype).float(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("op", UNARY)
def test_unary(op):
    x, out = bf16(SIZE), torch.empty(SIZE, dtype=torch.bfloat16)
    unary_kernel[(1,)](x, out, OP=op, SIZE=SIZE)
    if "cumsum" in op:
        same_to_one_rounding(out, UNARY[op](x))
    else:
        assert torch.equal(out, UNARY[op](x))


@pytest.mark.parametrize("op", BINARY)
def test_binary(op):
    x, y, out = bf16(SIZE), bf16(SIZE), torch.empty(SIZE, dtype=torch.bfloat16)
    y[::7] = x[::7]
    binary_kernel[(1,)](x, y, out, OP=op, SIZE=SIZE)
    assert torch.equal(out, BINARY[op](x, y).to(torch.bfloat16))


@pytest.mark.parametrize("op", REDUCE)
def test_reduce(op):
    x, out = bf16(8, 32), torch.empty(8, dtype=torch.float32)
    reduce_kernel[(1,)](x, out, OP=op, ROWS=8, COLS=32)
    same_to_one_rounding(out, REDUCE[op](x))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool]
)
def test_casts(dtype):
    x = (torch.randn(SIZE) * 30).bfloat16()
    x[::5] = 0
    there = torch.empty(SIZE, dtype=dtype)
    cast_kernel[(1,)](x, there, SIZE=SIZE)
    assert torch.equal(there, x.to(dtype))
    back = torch.empty_like(x)
    cast_kernel[(1,)](there, back, SIZE=SIZE)
    assert torch.equal(back, there.to(torch.bfloat16))


def test_float32_rounds_to_nearest_even():
    words = torch.randint(-(2**31), 2**31, (1 << 16,)).to(torch.int32)
    words[:256] = torch.arange(256).to(torch.int32) * 0x8000 + 0x3F800000  # half of these are ties
    x = words.view(torch.float32)
    x[256:262] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3.4e38])
    out = torch.empty(len(x), dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, SIZE=len(x))
    true = x.to(torch.bfloat16)
    real = ~x.isnan()
    assert torch.equal(out[real].view(torch.int16), true[real].view(torch.int16))
    assert torch.equal(out.isnan(), x.isnan())


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_dot(batch, out_dtype):
    x, y = bf16(batch, 16, 32), bf16(batch, 32, 16)
    out = torch.empty(batch, 16, 16, dtype=out_dtype)
    dot_kernel[(1,)](x, y, out, B=batch, M=16, N=16, K=32)
    torch.testing.assert_close(out, (x.float() @ y.float()).to(out_dtype))


def test_tensor_descriptor():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, out = bf16(6, 24), torch.empty(8, 32, dtype=torch.bfloat16)
    descriptor_kernel[(1,)](TensorDescriptor.from_tensor(x, [8, 32]), out, ROWS=8, COLS=32)
    assert torch.equal(out[:6, :24], x + x)
    assert not out[6:].any()
    assert not out[:, 24:].any()


def test_a_loop_takes_its_bound_from_an_argument():
    out = torch.empty(1, dtype=torch.int32)
    loop_kernel[(1,)](out, 5)
    assert out == 10
