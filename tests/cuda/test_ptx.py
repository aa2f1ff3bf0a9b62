"""The PTX interpreter against numpy, and the shipped kernels, as nvcc compiled them, in the interpreter against the reference."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.cuda import nvcc, ptx

needs_nvcc = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))

HEADER = ".version 9.0\n.target sm_80\n.address_size 64\n.extern .shared .align 128 .b8 shared[];\n"
REGISTERS = ".reg .pred %p<9>; .reg .b16 %rs<20>; .reg .b32 %r<60>; .reg .f32 %f<20>; .reg .b64 %rd<40>;"


def assemble(body: str, pointers: int = 1) -> ptx.Kernel:
    """A kernel of some statements. Its parameters are pointers, which %rd0, %rd1, ... hold when it starts, as %r0 holds the thread and %rd9 16 times the thread."""
    params = ", ".join(f".param .u64 p{k}" for k in range(pointers))
    loads = "".join(f"ld.param.u64 %rd{k}, [p{k}]; cvta.to.global.u64 %rd{k}, %rd{k};\n" for k in range(pointers))
    start = "mov.u32 %r0, %tid.x; mul.wide.u32 %rd9, %r0, 16;\n"
    return ptx.load(f"{HEADER}.visible .entry test({params})\n.maxntid 256, 1, 1\n{{\n{REGISTERS}\n{loads}{start}{body}\nret;\n}}")["test"]


def launch(kernel: ptx.Kernel, *buffers: np.ndarray, grid: tuple[int, ...] = (1,), threads: int = 32, shared: int = 0, readonly: int = 0, **options: Any) -> int:
    """Runs a kernel over buffers, the first ``readonly`` of which it may not write."""
    memory = ptx.Memory()
    params = b"".join(memory.add(b, f"buffer {k}", writable=k >= readonly).to_bytes(8, "little") for k, b in enumerate(buffers))
    return kernel.launch(grid, (threads,), shared, params, memory, **options)


# ---- single instructions

LETTER = {"pred": "%p", 16: "%rs", 32: "%r", 64: "%rd"}
RANDOM = np.random.default_rng(0)
FLOATS = np.array([0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.5, 1e-40, -1e-45, 1e38, -3e38, np.inf, -np.inf, np.nan, 65504.0, 65520.0], np.float32)


def operands(kind: str, n: int = 128) -> np.ndarray:
    """Random numbers of a type, corner cases among them."""
    if kind in ("f16", "bf16"):
        return RANDOM.integers(0, 1 << 16, n, dtype=np.uint16)
    if kind in ("f32", "f64"):
        values = (RANDOM.standard_normal(n) * 2.0 ** RANDOM.integers(-20, 20, n)).astype(kind.replace("f", "float"))
        values[: len(FLOATS)] = RANDOM.permutation(FLOATS)
        return values
    dtype = np.dtype(f"{'int' if kind[0] == 's' else 'uint'}{kind.lstrip('bus')}")
    info = np.iinfo(dtype)
    values = RANDOM.integers(info.min, info.max, n, dtype=dtype, endpoint=True) >> dtype.type(RANDOM.integers(0, dtype.itemsize * 8 - 1))
    values[:4] = RANDOM.permutation(np.array([0, 1, info.min, info.max], dtype))
    return values


def evaluate(opcode: str, result: str, *sources: tuple[str, np.ndarray], extra: str = "", **options: Any) -> np.ndarray:
    """``opcode d, a, b, ...`` for arrays of operands and their types, 128 threads."""
    registers = [f"{LETTER[ptx.bits_of(kind)]}{10 + k}" for k, (kind, _) in enumerate(sources)]
    target, size = f"{LETTER[ptx.bits_of(result)]}9" if result != "pred" else "%p1", ptx.bits_of(result) // 8
    body = ""
    for k, ((_, values), register) in enumerate(zip(sources, registers)):
        body += f"mul.wide.u32 %rd30, %r0, {values.itemsize}; add.s64 %rd30, %rd30, %rd{k}; ld.global.b{8 * values.itemsize} {register}, [%rd30];\n"
    if result == "pred":
        body += f"{opcode} %p1, {', '.join(registers)}{extra}; selp.b32 %r9, 1, 0, %p1;\n"
        target, size = "%r9", 4
    else:
        body += f"{opcode} {target}, {', '.join(registers)}{extra};\n"
    out = len(sources)
    body += f"mul.wide.u32 %rd30, %r0, {size}; add.s64 %rd30, %rd30, %rd{out}; st.global.b{8 * size} [%rd30], {target};"
    dtype = np.uint32 if result == "pred" else ptx.dtype_of(result)
    got = np.zeros(128, dtype)
    launch(assemble(body, out + 1), *(v for _, v in sources), got, threads=128, readonly=out, **options)
    return got


def bits(v: np.ndarray) -> np.ndarray:
    return v.view(f"u{v.itemsize}")


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits; any NaN for a NaN."""
    expected = expected.astype(got.dtype)
    both_nan = np.isnan(got) & np.isnan(expected) if got.dtype.kind == "f" else np.zeros(got.shape, bool)
    wrong = np.flatnonzero((bits(got) != bits(expected)) & ~both_nan)
    assert not wrong.size, f"{wrong.size} differ, such as {got[wrong[0]]!r} instead of {expected[wrong[0]]!r} (operand {wrong[0]})"


def python(function: Callable[..., int]) -> Callable[..., np.ndarray]:
    """A function of Python integers, element by element."""

    def run(*arrays: np.ndarray) -> np.ndarray:
        width = arrays[0].itemsize * 8
        return np.array([function(*map(int, values)) & ((1 << width) - 1) for values in zip(*arrays)], f"u{width // 8}").view(arrays[0].dtype)

    return run


def sign_extend(v: int, width: int) -> int:
    v &= (1 << width) - 1
    return v - (1 << width) if width and v >> (width - 1) else v


def bit_field(signed: bool) -> Callable[[int, int, int], int]:
    def extract(a: int, position: int, length: int) -> int:
        position, length, a = position & 255, length & 255, a & 0xFFFFFFFF
        value = (sign_extend(a, 32) if signed else a) >> position & (1 << length) - 1
        if signed and length:
            value = sign_extend((sign_extend(a, 32) >> position), min(length, 32 - position) if position < 32 else 1) if position < 32 else -(a >> 31)
        return value

    return extract


def permuted(a: int, b: int, selector: int) -> int:
    bytes_ = (a | b << 32).to_bytes(8, "little")
    chosen = [bytes_[selector >> 4 * k & 7] for k in range(4)]
    return int.from_bytes(bytes(255 * (c >> 7) if selector >> 4 * k & 8 else c for k, c in enumerate(chosen)), "little")


INTEGER: list[tuple[str, str, Callable[..., np.ndarray]]] = [
    *(
        (f"{op}.{kind}", f"{kind} {kind}", f)
        for kind in ("s32", "u32", "s64")
        for op, f in {"add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum}.items()
    ),
    *((f"mul.hi.{kind}", f"{kind} {kind}", python(lambda a, b, w=int(kind[1:]): a * b >> w)) for kind in ("s32", "u32", "s64", "u64")),
    ("mad.lo.s32", "s32 s32 s32", lambda a, b, c: a * b + c),
    ("mad.hi.u32", "u32 u32 u32", python(lambda a, b, c: (a * b >> 32) + c)),
    ("and.b32", "b32 b32", np.bitwise_and),
    ("or.b64", "b64 b64", np.bitwise_or),
    ("xor.b16", "b16 b16", np.bitwise_xor),
    ("not.b32", "b32", np.invert),
    ("neg.s32", "s32", np.negative),
    ("abs.s32", "s32", np.abs),
    ("shl.b32", "b32 u32", python(lambda a, n: a << n if n < 32 else 0)),
    ("shr.u32", "u32 u32", python(lambda a, n: a >> min(n, 32))),
    ("shr.s32", "s32 u32", python(lambda a, n: a >> min(n, 32))),
    ("shl.b64", "b64 u32", python(lambda a, n: a << n if n < 64 else 0)),
    ("shr.s64", "s64 u32", python(lambda a, n: a >> min(n, 64))),
    ("shf.l.wrap.b32", "b32 b32 u32", python(lambda a, b, n: (b << 32 | a) << (n & 31) >> 32)),
    ("shf.r.clamp.b32", "b32 b32 u32", python(lambda a, b, n: (b << 32 | a) >> min(n, 32))),
    ("bfe.u32", "u32 u32 u32", python(bit_field(False))),
    ("bfe.s32", "s32 u32 u32", python(bit_field(True))),
    ("bfi.b32", "b32 b32 u32 u32", python(lambda a, b, p, n: b & ~((1 << n) - 1 << p) | (a & (1 << n) - 1) << p)),
    ("prmt.b32", "b32 b32 u32", python(permuted)),
    ("popc.b32", "b32", python(lambda a: a.bit_count())),
    ("clz.b32", "b32", python(lambda a: 32 - a.bit_length())),
    ("bfind.u32", "u32", python(lambda a: a.bit_length() - 1)),
    ("brev.b32", "b32", python(lambda a: int(f"{a:032b}"[::-1], 2))),
    ("div.s32", "s32 s32", python(lambda a, b: int(math.copysign(1, a) * math.copysign(1, b)) * (abs(a) // abs(b)))),
    ("rem.s64", "s64 s64", python(lambda a, b: a - b * (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1))),
]


@pytest.mark.parametrize(("opcode", "kinds", "expected"), INTEGER, ids=[row[0] for row in INTEGER])
def test_integers(opcode: str, kinds: str, expected: Callable[..., np.ndarray]) -> None:
    values = [operands(kind) for kind in kinds.split()]
    name = opcode.split(".")[0]
    if name in ("shl", "shr", "shf", "bfe", "bfi"):
        lengths = 1 if name in ("shl", "shr", "shf") else 2
        for k in range(1, lengths + 1):
            values[-k] = RANDOM.integers(0, 70 if lengths == 1 else 33, 128, dtype=np.uint32)
    if name in ("div", "rem"):
        values[1][values[1] == 0] = 7
        values[1][values[1] == -1] = 5
    result = kinds.split()[0]
    with np.errstate(all="ignore"):
        same(evaluate(opcode, result, *zip(kinds.split(), values)), expected(*values))


def test_products_of_twice_the_width() -> None:
    a, b, c = operands("s32"), operands("s32"), operands("s64")
    same(evaluate("mul.wide.s32", "s64", ("s32", a), ("s32", b)), a.astype(np.int64) * b)
    with np.errstate(all="ignore"):
        same(evaluate("mad.wide.s32", "s64", ("s32", a), ("s32", b), ("s64", c)), a.astype(np.int64) * b + c)
    same(evaluate("mul.wide.u16", "u32", ("u16", operands("u16")), ("u16", np.full(128, 9, np.uint16)))[:0], np.zeros(0, np.uint32))


def test_every_table_of_lop3() -> None:
    a, b, c = (operands("b32") for _ in range(3))
    for table in (0x00, 0xFF, 0x96, 0xE8, 0x6A, 0xCA, 0x11, 0x7F):
        expected = sum(np.uint32(1 << n) * (np.uint32(table) >> ((a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1) & 1) for n in range(32))
        same(evaluate("lop3.b32", "b32", ("b32", a), ("b32", b), ("b32", c), extra=f", {table}"), expected.astype(np.uint32))


def in_double(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *v: function(*(x.astype(np.float64) for x in v)).astype(np.float32)


FLOAT: list[tuple[str, int, Callable[..., np.ndarray]]] = [
    ("add.f32", 2, np.add),
    ("sub.rn.f32", 2, np.subtract),
    ("mul.f32", 2, np.multiply),
    ("fma.rn.f32", 3, in_double(lambda a, b, c: a * b + c)),
    ("div.rn.f32", 2, np.divide),
    ("div.full.f32", 2, np.divide),
    ("rcp.rn.f32", 1, lambda a: np.float32(1) / a),
    ("sqrt.rn.f32", 1, np.sqrt),
    ("rsqrt.approx.f32", 1, in_double(lambda a: 1 / np.sqrt(a))),
    ("ex2.approx.f32", 1, in_double(np.exp2)),
    ("lg2.approx.f32", 1, in_double(np.log2)),
    ("tanh.approx.f32", 1, in_double(np.tanh)),
    ("min.f32", 2, np.fmin),
    ("max.f32", 2, np.fmax),
    ("max.NaN.f32", 2, np.maximum),
    ("neg.f32", 1, np.negative),
    ("abs.f32", 1, np.abs),
    ("copysign.f32", 2, lambda a, b: np.copysign(b, a)),
    ("add.sat.f32", 2, lambda a, b: np.nan_to_num(np.clip(a + b, 0, 1), nan=0.0)),
]


@pytest.mark.parametrize(("opcode", "count", "expected"), FLOAT, ids=[row[0] for row in FLOAT])
def test_floats(opcode: str, count: int, expected: Callable[..., np.ndarray]) -> None:
    values = [operands("f32") for _ in range(count)]
    with np.errstate(all="ignore"):
        same(evaluate(opcode, "f32", *(("f32", v) for v in values)), expected(*values))


@pytest.mark.parametrize("opcode", ["add.ftz.f32", "mul.ftz.f32", "ex2.approx.ftz.f32", "rcp.approx.ftz.f32"])
def test_subnormal_numbers_are_flushed_where_the_opcode_says_so(opcode: str) -> None:
    tiny = np.float32(2.0**-127)
    a = np.resize(np.array([tiny, -tiny, 1.0, 2.0**127], np.float32), 128)
    b = np.full(128, 0.5, np.float32)
    expected = {
        "add": [0.5, 0.5, 1.5, 2.0**127],
        "mul": [0.0, -0.0, 0.5, 2.0**126],
        "ex2": [1.0, 1.0, 2.0, np.inf],
        "rcp": [np.inf, -np.inf, 1.0, 0.0],  # 2^-127 is subnormal
    }[opcode[:3]]
    sources = [("f32", a), ("f32", b)][: 2 if opcode[:3] in ("add", "mul") else 1]
    same(evaluate(opcode, "f32", *sources), np.resize(np.array(expected, np.float32), 128))


def test_rounding_down_up_and_to_zero() -> None:
    a, b = operands("f32"), operands("f32")
    a, b = np.where(np.isfinite(a), a, 1), np.where(np.isfinite(b), b, 1)
    a[:] = np.clip(a, -1e6, 1e6)
    b[:] = np.clip(b, -1e6, 1e6)
    one, product = np.ones(128, np.float32), a.astype(np.float64) * b
    down, up, zero = (evaluate(f"fma.{mode}.f32", "f32", ("f32", a), ("f32", b), ("f32", 0 * one)) for mode in ("rm", "rp", "rz"))
    assert (down <= product).all() and (up >= product).all() and (np.abs(zero) <= np.abs(product)).all()
    exact = down == product
    assert exact.any() and not exact.all()
    same(up[~exact], np.nextafter(down, np.float32(np.inf))[~exact])
    same(up[exact], down[exact])


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_packed_halves(kind: str) -> None:
    scale = lambda v: torch.from_numpy(v.astype(np.int16) if v.dtype != np.int16 else v).view(torch.bfloat16 if kind == "bf16" else torch.float16)
    a, b, c = (scale(operands(kind, 256).view(np.int16)) for _ in range(3))
    packed = lambda t: t.view(torch.int16).numpy().view(np.uint32)
    for opcode, expected in {"add": a.float() + b.float(), "mul": a.float() * b.float(), "fma.rn": a.float() * b.float() + c.float()}.items():
        sources = [("b32", packed(t)) for t in ([a, b, c] if opcode == "fma.rn" else [a, b])]
        got = torch.from_numpy(evaluate(f"{opcode}.{kind}x2", "b32", *sources).view(np.int16)).view(a.dtype)
        assert torch.equal(got.nan_to_num(7.0), expected.to(a.dtype).nan_to_num(7.0))


# ---- comparisons and conversions


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "f32"])
def test_comparisons(kind: str) -> None:
    a, b = operands(kind), operands(kind)
    b[::3] = a[::3]
    compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    nan = np.isnan(a) | np.isnan(b)
    for name, function in compare.items():
        got = evaluate(f"setp.{name}.{kind}", "pred", (kind, a), (kind, b))
        same(got, function(a, b) & ~nan)
        if kind == "f32":
            same(evaluate(f"setp.{name}u.f32", "pred", (kind, a), (kind, b)), function(a, b) | nan)
    if kind == "f32":
        same(evaluate("setp.num.f32", "pred", (kind, a), (kind, b)), ~nan)
        same(evaluate("setp.nan.f32", "pred", (kind, a), (kind, b)), nan)


def test_comparisons_that_combine_with_a_predicate_and_set_two() -> None:
    body = """setp.lt.u32 %p1, %r0, 20; setp.gt.and.u32 %p2|%p3, %r0, 9, !%p1; setp.gt.or.u32 %p4, %r0, 30, %p1;
              selp.b32 %r1, 1, 0, %p2; selp.b32 %r2, 2, 0, %p3; selp.b32 %r3, 4, 0, %p4; or.b32 %r1, %r1, %r2; or.b32 %r1, %r1, %r3;
              mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd0; st.global.u32 [%rd1], %r1;"""
    out, t = np.zeros(32, np.uint32), np.arange(32)
    launch(assemble(body), out)
    same(out, (t > 9) & ~(t < 20) | (~(t > 9) & ~(t < 20)) << 1 | ((t > 30) | (t < 20)) << 2)


def test_conversions_of_integers() -> None:
    a, wide = operands("s32"), operands("s64")
    same(evaluate("cvt.s64.s32", "s64", ("s32", a)), a.astype(np.int64))
    same(evaluate("cvt.u64.u32", "u64", ("s32", a)), a.view(np.uint32).astype(np.uint64))
    same(evaluate("cvt.u32.u64", "u32", ("s64", wide)), wide.astype(np.uint32))
    same(evaluate("cvt.s32.s8", "s32", ("s32", a)), a.astype(np.int8).astype(np.int32))
    same(evaluate("cvt.sat.s16.s32", "s32", ("s32", a)), np.clip(a, -(1 << 15), (1 << 15) - 1))
    same(evaluate("cvt.sat.u8.s32", "u32", ("s32", a)), np.clip(a, 0, 255))
    same(evaluate("cvt.rn.f32.s32", "f32", ("s32", a)), a.astype(np.float32))
    same(evaluate("cvt.rn.f32.u64", "f32", ("s64", wide)), wide.view(np.uint64).astype(np.float32))


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_conversions_of_floats_to_integers(mode: str) -> None:
    a = operands("f32")
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](a)
    same(evaluate(f"cvt.{mode}.f32.f32", "f32", ("f32", a)), rounded)
    clamp = lambda v, low, high: 0 if math.isnan(v) else int(min(max(v, low), high)) if math.isfinite(v) else (low if v < 0 else high)
    for kind, low, high in (("s32", -(2**31), 2**31 - 1), ("u32", 0, 2**32 - 1), ("s64", -(2**63), 2**63 - 1)):
        expected = np.array([clamp(float(v), low, high) for v in rounded], np.int64 if low else np.uint64)
        same(evaluate(f"cvt.{mode}.{kind}.f32", kind, ("f32", a)), expected)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_conversions_of_halves(kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    a, b = operands("f32"), operands("f32")
    as_torch = lambda v: torch.from_numpy(v.view(np.int16).copy()).view(dtype)
    equal = lambda got, expected: torch.testing.assert_close(as_torch(got), expected.to(dtype), rtol=0, atol=0, equal_nan=True)
    equal(evaluate(f"cvt.rn.{kind}.f32", kind, ("f32", a)), torch.from_numpy(a))
    equal(evaluate(f"cvt.rn.relu.{kind}.f32", kind, ("f32", a)), torch.from_numpy(a).relu())
    largest = torch.finfo(dtype).max
    equal(evaluate(f"cvt.rn.satfinite.{kind}.f32", kind, ("f32", a)), torch.from_numpy(a).clamp(-largest, largest))
    packed = evaluate(f"cvt.rn.{kind}x2.f32", "b32", ("f32", a), ("f32", b)).view(np.uint16)
    equal(packed[1::2], torch.from_numpy(a))  # the first operand goes to the upper half
    equal(packed[::2], torch.from_numpy(b))
    bits_ = np.arange(0, 1 << 16, 1 << 9, dtype=np.uint16)
    same(evaluate(f"cvt.f32.{kind}", "f32", (kind, bits_)), as_torch(bits_).float().numpy())
    same(evaluate("cvt.sat.f32.f32", "f32", ("f32", a)), np.nan_to_num(np.clip(a, 0, 1), nan=0.0))


def test_moves_that_pack_and_unpack() -> None:
    body = """{ .reg .b16 low, high; mov.b32 {low, high}, %r0; add.s16 low, low, 1; mov.b32 %r1, {high, low}; }
              mov.b64 %rd1, {%r0, %r1}; mov.b64 {%r2, _}, %rd1; mov.b32 %r3, {0, %rs1}; mov.b16 %rs1, 0x3f80; mov.b32 %f1, {0, %rs1}; mov.f32 %f2, 0f40000000;
              mul.f32 %f1, %f1, %f2; add.s64 %rd2, %rd0, %rd9; st.global.v4.b32 [%rd2], {%r1, %r2, %f1, %r0};"""
    out, t = np.zeros((32, 4), np.uint32), np.arange(32)
    launch(assemble(body), out)
    assert (out[:, 0] == t + 1 << 16).all() and (out[:, 1] == t).all() and (out[:, 2].copy().view(np.float32) == 2.0).all() and (out[:, 3] == t).all()


def test_approximations_can_be_wrong_by_their_bound() -> None:
    a = np.abs(operands("f32"))
    a = np.where(np.isfinite(a) & (a > 1e-3) & (a < 1e3), a, 1.5).astype(np.float32)
    for opcode, bound in {"ex2.approx.ftz.f32": 2.0**-22, "rcp.approx.ftz.f32": 2.0**-23, "rsqrt.approx.f32": 2.0**-22.9}.items():
        values = np.clip(a, -100, 100) if opcode.startswith("ex2") else a
        low, exact, high = (evaluate(opcode, "f32", ("f32", values), perturb=p).astype(np.float64) for p in (-1, 0, 1))
        assert (low < exact).all() and (exact < high).all()
        assert (high / exact - 1 <= bound + 2.0**-24 * 3).all() and (high / low - 1 >= bound).all()
    same(evaluate("sqrt.rn.f32", "f32", ("f32", a), perturb=1), np.sqrt(a))
    same(evaluate("rcp.approx.f32", "f32", ("f32", a), perturb={"ex2": 1}), 1 / a)
    assert (evaluate("rcp.approx.f32", "f32", ("f32", a), perturb={"rcp": -1}) < 1 / a).all()


# ---- control flow


def test_lanes_that_part_come_together_again() -> None:
    """A loop of as many turns as the lane's number, with an early exit of the others' loop, then a sum over the warp."""
    body = """mov.u32 %r1, 0; mov.u32 %r2, 0;
        LOOP: setp.ge.u32 %p1, %r1, %r0; @%p1 bra DONE; add.s32 %r2, %r2, %r1; and.b32 %r3, %r1, 1; setp.eq.s32 %p2, %r3, 0; @!%p2 bra ODD;
        add.s32 %r2, %r2, 100;
        ODD: add.s32 %r1, %r1, 1; bra.uni LOOP;
        DONE: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; add.s64 %rd2, %rd0, %rd9; st.global.v2.b32 [%rd2], {%r2, %r4};"""
    out = np.zeros((64, 4), np.uint32)
    launch(assemble(body), out, threads=64)
    expected = np.array([sum(k + (100 if k % 2 == 0 else 0) for k in range(n)) for n in range(64)], np.uint32)
    same(out[:, 0].copy(), expected)
    same(out[:, 1].copy(), expected[np.arange(64) ^ 1])


def test_a_loop_that_ends_in_its_condition() -> None:
    """Lanes below 8 go round twice; the rest waits for them at the shuffle. The predicate that parted them changes meanwhile."""
    body = """mov.u32 %r1, %r0; mov.u32 %r2, 0;
        LOOP: add.u32 %r2, %r2, 1; add.u32 %r1, %r1, 32; setp.lt.u32 %p1, %r1, 40; @%p1 bra LOOP;
        mov.u32 %r3, -1; shfl.sync.bfly.b32 %r4, %r2, 8, 31, %r3; add.s64 %rd2, %rd0, %rd9; st.global.v2.b32 [%rd2], {%r2, %r4};"""
    out, lane = np.zeros((32, 4), np.uint32), np.arange(32)
    launch(assemble(body), out)
    assert (out[:, 0] == np.where(lane < 8, 2, 1)).all() and (out[:, 1] == np.where((lane ^ 8) < 8, 2, 1)).all()


def test_blocks_that_run_together_do_what_blocks_do_alone() -> None:
    """Blocks of different length that exchange data through shared memory; block indices in three dimensions."""
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y;
        mad.lo.u32 %r6, %r3, %r5, %r2; mad.lo.u32 %r6, %r6, %r4, %r1; mov.u32 %r7, 0; mov.u32 %r10, shared;
        LOOP: shl.b32 %r8, %r0, 2; add.u32 %r8, %r8, %r10; mad.lo.u32 %r9, %r7, 1000, %r0; st.shared.u32 [%r8], %r9; bar.sync 0;
        xor.b32 %r8, %r8, 252; ld.shared.u32 %r11, [%r8]; bar.sync 0; add.u32 %r7, %r7, 1; setp.le.u32 %p1, %r7, %r6; @%p1 bra LOOP;
        mad.lo.u32 %r12, %r6, 64, %r0; mul.wide.u32 %rd1, %r12, 4; add.s64 %rd1, %rd1, %rd0; st.global.u32 [%rd1], %r11;"""
    kernel, results = assemble(body), []
    for lanes in (64, 128, 1024):
        out = np.zeros((12, 64), np.uint32)
        launch(kernel, out, grid=(2, 3, 2), threads=64, shared=256, lanes=lanes)
        results.append(out)
        assert (out == np.arange(12)[:, None] * 1000 + (63 - np.arange(64))).all()


def test_thread_indices_of_three_dimensions() -> None:
    body = """mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z; mov.u32 %r4, %ntid.x; mov.u32 %r5, %ntid.y; mov.u32 %r7, %laneid;
        mad.lo.u32 %r6, %r3, %r5, %r2; mad.lo.u32 %r6, %r6, %r4, %r1; mul.wide.u32 %rd1, %r6, 16; add.s64 %rd1, %rd1, %rd0; st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r7};"""
    out = np.zeros((64, 4), np.uint32)
    memory = ptx.Memory()
    assemble(body).launch((1,), (4, 8, 2), 0, memory.add(out).to_bytes(8, "little"), memory)
    t = np.arange(64)
    assert (out == np.stack([t % 4, t // 4 % 8, t // 32, t % 32], 1)).all()


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(mode: str, width: int) -> None:
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    body = f"""shfl.sync.{mode}.b32 %r1|%p1, %r0, 3, {clamp}, 0xffffffff; selp.u32 %r2, 1, 0, %p1;
               add.s64 %rd2, %rd0, %rd9; st.global.v2.b32 [%rd2], {{%r1, %r2}};"""
    out = np.zeros((32, 4), np.uint32)
    launch(assemble(body), out)
    for lane in range(32):
        source = {"up": lane - 3, "down": lane + 3, "bfly": lane ^ 3, "idx": lane // width * width + 3}[mode]
        inside = source // width == lane // width
        assert tuple(out[lane, :2]) == (source if inside else lane, inside), (mode, width, lane)


def test_votes() -> None:
    body = """setp.gt.u32 %p1, %r0, 40; vote.sync.ballot.b32 %r1, %p1, -1; vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, !%p1, -1;
              selp.u32 %r2, 1, 0, %p2; selp.u32 %r3, 1, 0, %p3; activemask.b32 %r4; add.s64 %rd2, %rd0, %rd9; st.global.v4.b32 [%rd2], {%r1, %r2, %r3, %r4};"""
    out = np.zeros((64, 4), np.uint32)
    launch(assemble(body), out, threads=64)
    assert (out[:32] == [0, 0, 1, 0xFFFFFFFF]).all() and (out[32:] == [0xFFFFFFFF & ~((1 << 9) - 1), 1, 0, 0xFFFFFFFF]).all()


def test_a_barrier_that_some_threads_miss_is_a_deadlock() -> None:
    with pytest.raises(ptx.Fault, match=r"deadlock: .*32 threads, thread 0 of block 0 the first, wait at bar\.sync 0 .*; 0 threads have left"):
        launch(assemble("setp.lt.u32 %p1, %r0, 32; @%p1 bra FIRST; bar.sync 1; ret; FIRST: bar.sync 0;"), np.zeros(1), threads=64)


def test_threads_that_left_are_not_waited_for_by_a_barrier_but_by_a_warp() -> None:
    body = "setp.lt.u32 %p1, %r0, {n}; @%p1 ret; {wide} mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd0; st.global.u32 [%rd1], %r0;"
    out = np.zeros(64, np.uint32)
    launch(assemble(body.format(n=10, wide="bar.sync 0;")), out, threads=64)
    assert (out == np.where(np.arange(64) < 10, 0, np.arange(64))).all()
    with pytest.raises(ptx.Fault, match=r"deadlock: 22 threads, thread 10 of block 0 the first.*; 42 threads have left"):
        launch(assemble(body.format(n=10, wide="shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;")), out, threads=64)


# ---- memory


def test_accesses_out_of_bounds_misaligned_or_forbidden() -> None:
    out, source = np.zeros(32, np.float32), np.arange(32, dtype=np.float32)
    at = lambda offset, code: f"mul.wide.u32 %rd3, %r0, 4; add.s64 %rd3, %rd3, {offset}; add.s64 %rd4, %rd3, %rd0; add.s64 %rd5, %rd3, %rd1; {code}"
    copy = "ld.global.f32 %f1, [%rd4]; st.global.f32 [%rd5], %f1;"
    launch(assemble(at(0, copy), 2), source, out, readonly=1)
    same(out, source)
    for offset, code, message in [
        (4, copy, r"global read of 4 bytes at 0x\w+ \(buffer 0 \+ 128 of 128, read-only\) by thread 31 of block 0\n  in ld.global.f32"),
        (-4, copy, "global read of 4 bytes .*before all buffers.* by thread"),
        (0, "ld.global.f32 %f1, [%rd4]; st.global.f32 [%rd4], %f1;", "global write .*read-only"),
        (2, copy, "misaligned global read of 4 bytes"),
        (0, "ld.global.v2.f32 {%f1, %f2}, [%rd4];", "misaligned global read of 8 bytes .*thread 1 "),
        (0, "cvt.u32.u64 %r4, %rd4; cvt.u64.u32 %rd4, %r4; " + copy, "before all buffers"),
        (0, "st.shared.u32 [%r0+128], %r0;", "misaligned shared"),
        (0, "shl.b32 %r1, %r0, 2; st.shared.u32 [%r1+4], %r0;", "shared write of 4 bytes at 128 of 128 by thread 31"),
        (0, "shl.b32 %r1, %r0, 2; ld.shared.u32 %r2, [%r1+-8];", "shared read of 4 bytes at -8 of 128 by thread 0"),
        (0, "ld.param.u64 %rd6, [p1+8];", "parameter read"),
    ]:
        with pytest.raises(ptx.Fault, match=message):
            launch(assemble(at(offset, code), 2), source, out, readonly=1, shared=128)


def test_tensors_are_registered_with_their_alignment_and_extent() -> None:
    base = torch.arange(64, dtype=torch.bfloat16)
    memory = ptx.Memory()
    address = memory.add(base[1:].view(9, 7)[:, :5])
    assert address % 64 == base.data_ptr() % 64 + 2 and memory.buffers[0].size == 2 * (8 * 7 + 5)
    assert memory.at(address).words(2)[memory.buffers[0].row(np.array([address]), 2)][0, 0] == 0x3F80  # 1.0
    assert memory.add(torch.zeros(0)) and memory.add(torch.zeros(1)) > 1 << 32
    below, above = memory.add(big := torch.zeros(1 << 12)), memory.buffers[-1].end
    assert below >> 32 != above >> 32 and big is memory._kept[-1]


def test_parameter_structs_and_generic_addresses() -> None:
    class Params(ctypes.Structure):
        _fields_ = [("x", ctypes.c_void_p), ("none", ctypes.c_void_p), ("y", ctypes.c_void_p), ("rows", ctypes.c_int64), ("scale", ctypes.c_float)]

    text = f"""{HEADER}.visible .entry test(.param .align 8 .b8 p[40]) {{ {REGISTERS}
        mov.b64 %rd1, p; cvta.param.u64 %rd2, %rd1; ld.u64 %rd3, [%rd2]; ld.param.u64 %rd4, [%rd1+16]; ld.f32 %f1, [%rd2+32]; ld.param.u64 %rd7, [p+8];
        setp.ne.s64 %p1, %rd7, 0; @%p1 trap;
        mov.u32 %r0, %tid.x; mul.wide.u32 %rd5, %r0, 4; add.s64 %rd3, %rd3, %rd5; add.s64 %rd4, %rd4, %rd5; ld.f32 %f2, [%rd3]; mul.f32 %f2, %f2, %f1;
        mov.u32 %r1, shared; cvt.u64.u32 %rd6, %r1; cvta.shared.u64 %rd6, %rd6; add.s64 %rd6, %rd6, %rd5; st.f32 [%rd6], %f2; cvta.to.shared.u64 %rd6, %rd6; cvt.u32.u64 %r2, %rd6;
        ld.shared.f32 %f3, [%r2]; st.f32 [%rd4], %f3; ret; }}"""
    x, y = torch.arange(32.0), torch.full((32,), math.nan)
    memory = ptx.Memory()
    params = memory.pack(Params, writable={"y"}, x=x, none=None, y=y, rows=32, scale=0.5)
    ptx.load(text)["test"].launch((1,), (32,), 128, params, memory)
    assert torch.equal(y, x / 2)
    with pytest.raises(AssertionError, match="no"):
        memory.pack(Params, z=1)
    with pytest.raises(ptx.Fault, match="32 bytes of parameters, the kernel has 40"):
        ptx.load(text)["test"].launch((1,), (32,), 128, params[:32], memory)


def test_atomics_add_one_lane_after_the_other() -> None:
    counter, old = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    launch(
        assemble("atom.global.add.u32 %r1, [%rd0], 2; mul.wide.u32 %rd2, %r0, 4; add.s64 %rd2, %rd2, %rd1; st.global.u32 [%rd2], %r1; red.global.max.u32 [%rd0], 3;", 2),
        counter,
        old,
    )
    assert counter[0] == 64 and sorted(old) == list(range(0, 64, 2))


COPY = "shl.b32 %r1, %r0, 4; mov.u32 %r2, shared; add.u32 %r2, %r2, %r1; add.s64 %rd2, %rd0, %rd9; add.s64 %rd3, %rd1, %rd9;\n"
READ = "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r2]; st.global.v4.b32 [%rd3], {%r5, %r6, %r7, %r8};"


def copied(code: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    source, out = RANDOM.integers(1, 1 << 32, (32, 4), dtype=np.uint32), np.zeros((32, 4), np.uint32)
    launch(assemble(COPY + code, 2), source, out, shared=1024, readonly=1, **options)
    return source, out


def test_asynchronous_copies_arrive_when_a_wait_retires_their_group() -> None:
    start = "cp.async.cg.shared.global [%r2], [%rd2], 16; cp.async.commit_group;"
    source, out = copied(start + "cp.async.wait_group 0;" + READ)
    same(out, source)
    source, out = copied(start + "cp.async.wait_group 1;" + READ + "cp.async.wait_all;")
    assert (out == 0xFFFFFFFF).all(), "read too early"
    source, out = copied("cp.async.cg.shared.global [%r2], [%rd2], 16; cp.async.wait_group 0;" + READ + "cp.async.wait_all;")
    assert (out == 0xFFFFFFFF).all(), "no group holds it"
    second = "cp.async.ca.shared.global [%r2+512], [%rd2], 8; cp.async.commit_group; cp.async.wait_group 1;"
    source, out = copied(start + second + READ + "cp.async.wait_group 0;")
    same(out, source)
    source, out = copied(start + second + READ.replace("[%r2]", "[%r2+512]") + "cp.async.wait_group 0;")
    assert (out == 0xFFFFFFFF).all(), "the second group is in flight"
    with pytest.raises(ptx.Fault, match="exit with copies in flight"):
        copied(start)


def test_groups_of_copies_belong_to_their_threads() -> None:
    """Odd lanes commit one group more, so that the same wait retires another lane's copy and not theirs."""
    body = (
        """cp.async.cg.shared.global [%r2], [%rd2], 16; cp.async.commit_group; and.b32 %r3, %r0, 1; setp.eq.s32 %p1, %r3, 1; @%p1 cp.async.commit_group; cp.async.wait_group 1;"""
    )
    source, out = copied(body + READ + "cp.async.wait_all;")
    same(out[1::2], source[1::2])
    assert (out[::2] == 0xFFFFFFFF).all()


def test_copies_of_fewer_bytes_fill_with_zeros() -> None:
    source, out = copied("and.b32 %r3, %r0, 3; shl.b32 %r3, %r3, 2; cp.async.cg.shared.global [%r2], [%rd2], 16, %r3; cp.async.commit_group; cp.async.wait_group 0;" + READ)
    assert (out == np.where(np.arange(4) < np.arange(32)[:, None] % 4, source, 0)).all()
    nowhere = "mov.u64 %rd2, 8; "
    source, out = copied(nowhere.replace("8", "16") + "cp.async.cg.shared.global [%r2], [%rd2], 16, 0; cp.async.commit_group; cp.async.wait_group 0;" + READ)
    assert not out.any(), "an address of which no byte is read may be anything"
    with pytest.raises(ptx.Fault, match="global read of 16 bytes"):
        copied(nowhere.replace("8", "16") + "cp.async.cg.shared.global [%r2], [%rd2], 16; cp.async.commit_group; cp.async.wait_group 0;")


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_matrix_loads(count: int, trans: bool) -> None:
    """Lane 8 j + k names row k of matrix j; lane l gets elements 2 (l % 4) and the next of row l / 4 of each matrix, or of its transpose."""
    rows, out = RANDOM.integers(0, 1 << 16, (32, 8), dtype=np.uint16), np.zeros((32, 4), np.uint32)
    registers = ", ".join(f"%r{k}" for k in range(5, 5 + count))
    body = f"""setp.ge.u32 %p1, %r0, 32; @%p1 ret; cp.async.cg.shared.global [%r2], [%rd2], 16; cp.async.commit_group; cp.async.wait_group 0; bar.warp.sync -1;
        xor.b32 %r3, %r1, 48; mov.u32 %r4, shared; add.u32 %r3, %r3, %r4;
        mov.b32 %r6, 0; mov.b32 %r7, 0; mov.b32 %r8, 0; ldmatrix.sync.aligned.m8n8.x{count}{".trans" if trans else ""}.shared.b16 {{{registers}}}, [%r3];
        st.global.v4.b32 [%rd3], {{%r5, %r6, %r7, %r8}};"""
    launch(assemble(COPY + body, 2), rows, out, threads=64, shared=512, readonly=1)  # the second warp leaves
    rows = rows[np.arange(32) ^ 3]  # the order in which the lanes name them
    for lane in range(32):
        for j in range(count):
            matrix = rows[8 * j : 8 * j + 8].T if trans else rows[8 * j : 8 * j + 8]
            pair = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert out[lane, j] == int(pair[0]) | int(pair[1]) << 16


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("warps", [1, 2])
def test_matrix_products(kind: str, warps: int) -> None:
    """d = a b + c, then d + a b once more and, independent of both, a' b with the halves of a swapped; one warp of two or both. Of these integers fp32 sums are exact."""
    a, b, c = (RANDOM.integers(-8, 9, shape).astype(np.float64) for shape in ((2, 16, 16), (2, 16, 8), (2, 16, 8)))
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    pair = lambda *v: torch.tensor(v, dtype=dtype).view(torch.int16).numpy().view(np.uint32)[0]
    fragments, out = np.zeros((64, 12), np.uint32), np.zeros((64, 8), np.float32)
    for thread in range(64):
        w, g, t = thread // 32, thread % 32 // 4, 2 * (thread % 4)
        fragments[thread, :4] = [pair(*a[w, g + r, t + k : t + k + 2]) for k in (0, 8) for r in (0, 8)]
        fragments[thread, 4:6] = [pair(*b[w, t + k : t + k + 2, g]) for k in (0, 8)]
        fragments[thread, 8:] = np.array([c[w, g + r, t + k] for r in (0, 8) for k in (0, 1)], np.float32).view(np.uint32)
    multiply = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    body = f"""setp.ge.u32 %p1, %r0, {32 * warps}; @%p1 ret; mul.wide.u32 %rd2, %r0, 48; add.s64 %rd2, %rd2, %rd0; mul.wide.u32 %rd3, %r0, 32; add.s64 %rd3, %rd3, %rd1;
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd2]; ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%rd2+16]; ld.global.v4.f32 {{%f1, %f2, %f3, %f4}}, [%rd2+32];
        mov.f32 %f5, %f1; mov.f32 %f6, %f2; mov.f32 %f7, %f3; mov.f32 %f8, %f4;
        {multiply} {{%f1, %f2, %f3, %f4}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%f1, %f2, %f3, %f4}};
        {multiply} {{%f5, %f6, %f7, %f8}}, {{%r3, %r4, %r1, %r2}}, {{%r5, %r6}}, {{%f5, %f6, %f7, %f8}};
        {multiply} {{%f1, %f2, %f3, %f4}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%f1, %f2, %f3, %f4}};
        mov.b32 %r5, 0; mov.b32 %r6, 0;
        st.global.v4.f32 [%rd3], {{%f1, %f2, %f3, %f4}}; st.global.v4.f32 [%rd3+16], {{%f5, %f6, %f7, %f8}};"""
    launch(assemble(body, 2), fragments, out, threads=64, readonly=1)
    twice, swapped = 2 * a @ b + c, np.roll(a, 8, 2) @ b + c
    for thread in range(32 * warps):
        w, g, t = thread // 32, thread % 32 // 4, 2 * (thread % 4)
        for n, expected in enumerate((twice, swapped)):
            assert (out[thread, 4 * n : 4 * n + 4] == [expected[w, g + r, t + k] for r in (0, 8) for k in (0, 1)]).all(), (thread, n)
    assert not out[32 * warps :].any()


# ---- what is not known


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("frobnicate.b32 %r1, %r0;", "frobnicate.b32"),
        ("add.cc.s32 %r1, %r0, 1;", "modifier cc"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1, %r2, %r3, %r4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r1, %r2, %r3, %r4};", "m16n8k32"),
        ("ld.local.u32 %r1, [%rd0];", "local memory"),
        (".local .align 4 .b8 depot[16]; mov.u32 %r1, 0;", "local memory"),
        ("mov.u32 %r1, %clock;", "operand %clock"),
        ("call.uni (%r1), f, (%r0);", "call.uni"),
        ("cvt.rz.bf16.f32 %rs1, %f1;", "cvt.rz.bf16.f32"),
        ("@%p1 bar.sync 0;", "under a predicate"),
    ],
)
def test_what_is_not_known_is_named(code: str, message: str) -> None:
    with pytest.raises(ptx.Unknown, match=message):
        launch(assemble(code), np.zeros(4))


def test_launches_that_no_device_would_accept() -> None:
    for threads, message in [(288, "288 threads"), (40, "40 threads")]:
        with pytest.raises(ptx.Fault, match=message):
            launch(assemble(""), np.zeros(4), threads=threads)
    with pytest.raises(KeyError, match="is in 0 of the names"):
        ptx.load(HEADER)["kernel"]


# ---- what nvcc makes of CUDA

PRODUCT = """
#include "common/ptx.cuh"
using namespace fastadapt;
struct Params { const void *a, *b; float* d; };
// d (16 x 16) = a (16 x 16) b, b row-major (kTrans) or column-major
template <class T, bool kTrans>
FASTADAPT_KERNEL(32) product(const __grid_constant__ Params p) {
  FASTADAPT_SHARED(shared);
  const int lane = threadIdx.x, row = lane / 2, half = lane % 2;
  ptx::cp_async16(shared + row * 32 + half * 16, static_cast<const char*>(p.a) + row * 32 + half * 16, true);
  ptx::cp_async16(shared + 512 + row * 32 + half * 16, static_cast<const char*>(p.b) + row * 32 + half * 16, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::sync_warp();
  uint32_t a[4], b[4];
  float d[2][4] = {};
  ptx::ldmatrix_x4(a, shared + lane % 16 * 32 + lane / 16 * 16);
  if (kTrans) ptx::ldmatrix_x4_trans(b, shared + 512 + lane % 16 * 32 + lane / 16 * 16);
  else ptx::ldmatrix_x4(b, shared + 512 + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16);
  ptx::mma(d[0], a, b[0], b[1], T{});
  ptx::mma(d[1], a, b[2], b[3], T{});
  for (int n = 0; n < 2; ++n)
    for (int k = 0; k < 4; ++k) p.d[(lane / 4 + k / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + k % 2] = d[n][k];
}
template __global__ void product<bf16, false>(const __grid_constant__ Params);
template __global__ void product<bf16, true>(const __grid_constant__ Params);
template __global__ void product<half, false>(const __grid_constant__ Params);
template __global__ void product<half, true>(const __grid_constant__ Params);
"""


class Product(ctypes.Structure):
    _fields_ = [("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("d", ctypes.c_void_p)]


def product(text: str, dtype: torch.dtype, trans: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel gives for integers, of which fp32 sums are exact, and the product."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (16, 16), generator=generator).to(dtype) for _ in range(2))
    d, memory = torch.full((16, 16), math.nan), ptx.Memory()
    kernel = ptx.load(text)[f"product<{'__nv_bfloat16' if dtype == torch.bfloat16 else '__half'}, {'true' if trans else 'false'}"]
    kernel.launch((1,), (32,), 1024, memory.pack(Product, writable={"d"}, a=a, b=b, d=d), memory)
    return d.double(), a.double() @ (b.double() if trans else b.double().T)


@needs_nvcc
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_products_through_our_own_inline_assembly(dtype: torch.dtype, trans: bool) -> None:
    got, expected = product(nvcc.ptx(nvcc.written(PRODUCT, "product/right.cu")), dtype, trans)
    assert torch.equal(got, expected)


@needs_nvcc
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("{%8, %9}", "{%9, %8}"),
        ("{%4, %5, %6, %7}", "{%4, %6, %5, %7}"),
        ("x4.trans.shared", "x4.shared"),
        ('"r"(valid ? 16 : 0)', '"r"(valid ? 8 : 0)'),
    ],
)
def test_slips_in_the_inline_assembly_are_caught(right: str, wrong: str) -> None:
    """The emulator cannot see these: it has C++ in their place."""
    header = (nvcc.ROOT / "csrc" / "common" / "ptx.cuh").read_text()
    assert right in header
    folder = f"product/{''.join(c for c in wrong if c.isalnum())}"
    nvcc.written(header.replace(right, wrong), f"{folder}/common/ptx.cuh")
    nvcc.written((nvcc.ROOT / "csrc" / "common" / "platform.cuh").read_text(), f"{folder}/common/platform.cuh")
    got, expected = product(nvcc.ptx(nvcc.written(PRODUCT, f"{folder}/wrong.cu")), torch.bfloat16, True)
    assert not torch.equal(got, expected)


LIBRARY = """
#include <cuda_runtime.h>
struct Params { const float* x; float* y; long long rows, pitch; int n; };
__global__ void __launch_bounds__(128) functions(const __grid_constant__ Params p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float v = p.x[i];
  float* y = p.y + i * p.pitch;
  y[0] = erff(v); y[1] = expf(v); y[2] = tanhf(v); y[3] = log1pf(fabsf(v)); y[4] = v / (1.f + v * v); y[5] = rsqrtf(v * v + 1.f);
  y[6] = static_cast<float>((p.rows * 977 + i) / (p.pitch + i % 5)); y[7] = static_cast<float>((i * 7919 - 4000) % p.n);
  float sum = v;
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  y[8] = sum; y[9] = static_cast<float>(__popc(__ballot_sync(0xffffffffu, v > 0)));
  y[10] = exp2f(v); y[11] = roundf(v);
}
"""


@needs_nvcc
def test_functions_of_the_cuda_library() -> None:
    class Params(ctypes.Structure):
        _fields_ = [("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("rows", ctypes.c_int64), ("pitch", ctypes.c_int64), ("n", ctypes.c_int32)]

    kernel = ptx.load(nvcc.ptx(nvcc.written(LIBRARY, "functions.cu")))["functions"]
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)) * 3
    y, memory = torch.full((256, 12), math.nan), ptx.Memory()
    kernel.launch((2,), (128,), 0, memory.pack(Params, writable={"y"}, x=x, y=y, rows=10**12, pitch=12, n=37), memory)
    v, i = x.double(), torch.arange(256)
    sums = v.view(8, 32).sum(1, keepdim=True).expand(8, 32).reshape(-1)
    positive = (v > 0).view(8, 32).sum(1, keepdim=True).expand(8, 32).reshape(-1)
    expected = [v.erf(), v.exp(), v.tanh(), v.abs().log1p(), v / (1 + v * v), (v * v + 1).rsqrt()]
    expected += [(10**12 * 977 + i) // (12 + i % 5), torch.fmod(i * 7919 - 4000, 37), sums, positive, v.exp2(), (v.abs() + 0.5).floor() * v.sign()]
    for k, e in enumerate(expected):
        assert ((y[:, k].double() - e).norm() / e.double().norm()).item() < 2e-7, f"function {k}"
