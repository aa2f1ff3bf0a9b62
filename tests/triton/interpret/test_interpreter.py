"""What the tests of this directory add to the interpreter: bf16 that equals torch's, conversions bit for bit and products to fp32 rounding, and refused accesses out of bounds."""

import pytest
import torch

tl = pytest.importorskip("triton.language")
import triton  # noqa: E402


@triton.jit
def convert_kernel(X, Y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Y + at, tl.load(X + at).to(Y.dtype.element_ty))


@triton.jit
def product_kernel(A, B, C, N: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(A + i * N + j), tl.load(B + i * N + j), tl.full((N, N), 1.0, tl.float32), input_precision=PRECISION)
    tl.store(C + i * N + j, product)


@triton.jit
def add_kernel(A, N: tl.constexpr):
    at = A + tl.arange(0, N)
    tl.store(at, tl.load(at) + tl.load(at))


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    convert_kernel[(1,)](x, y, N=x.numel())
    return y


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    nan = a.isnan() & b.isnan()
    assert torch.equal(torch.where(nan, 0, a.view(integers)), torch.where(nan, 0, b.view(integers)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_conversion_from_every_bf16(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert_same_bits(converted(every, dtype), every.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_conversion_to_bf16(dtype: torch.dtype) -> None:
    """Random bit patterns, ties between two bf16 numbers, and the largest finite numbers, which round to infinity."""
    g = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (2**14,), generator=g, dtype=torch.int64).to(torch.int32).view(torch.float32)
    ties = (torch.randint(0, 2**15, (2**14,), generator=g, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    edges = torch.tensor([3.4e38, -3.4e38, 1e-40, -1e-45, 0.0, -0.0, float("inf"), float("nan")] * 2048)
    normal = torch.randn(2**14, generator=g)
    x = torch.cat([patterns, ties, edges, normal]).to(dtype)
    assert_same_bits(converted(x, torch.bfloat16), x.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_product(dtype: torch.dtype) -> None:
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (1, 2))
    c = torch.empty(64, 64)
    product_kernel[(1,)](a, b, c, N=64, PRECISION="ieee")
    exact = a.double() @ b.double() + 1.0
    assert (c - exact).norm() <= 1e-6 * exact.norm()


def test_tf32_product_is_rounded() -> None:
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    c = torch.empty(64, 64)
    product_kernel[(1,)](a, b, c, N=64, PRECISION="tf32")
    exact = a.double() @ b.double() + 1.0
    assert 1e-4 <= (c - exact).norm() / exact.norm() <= 1e-3


def test_bf16_arithmetic_is_refused() -> None:
    with pytest.raises(Exception, match="compute in fp32"):
        add_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), N=16)


@triton.jit
def copy_kernel(X, Y, stride_x, stride_y, T, D, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (i < T) & (j < D)
    tl.store(Y + i * stride_y + j, tl.load(X + i * stride_x + j, mask=mask, other=0.0), mask=mask)


@pytest.mark.parametrize(("read", "rows", "columns"), [("padded", 5, 12), ("padded", 6, 11), ("plain", 6, 11), ("y", 6, 11)])
def test_out_of_bounds_is_refused(read: str, rows: int, columns: int) -> None:
    """One row or one column too many, of the source or of the target, within the memory that torch holds."""
    padded, plain, y = torch.zeros(8, 16)[:5, :11], torch.zeros(8, 11)[:5], torch.zeros(8, 11)[:5]
    x = plain if read == "plain" else padded
    copy_kernel[(1,)](x, y, x.stride(0), 11, 5, 11, BLOCK=16)
    x, y = (torch.zeros(8, 16), y) if read == "y" else (x, torch.zeros(8, 16))
    with pytest.raises(Exception, match="out of bounds"):
        copy_kernel[(1,)](x, y, x.stride(0), y.stride(0), rows, columns, BLOCK=16)
