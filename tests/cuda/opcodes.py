"""What the instructions of PTX do: for each opcode, a function that builds its step for a `Machine` of ptx.py.

Operands are resolved once, to live numpy views of the registers; a step then takes the mask of the lanes that run it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .ptx import Instruction, Machine

WARP = 32
SHARED_WINDOW, PARAM_WINDOW = 1 << 60, 1 << 61  # where generic addresses mean shared memory and parameters
POISON = 0xFF  # bytes of uninitialised shared memory and registers: NaN in every float type

Mask = Any  # True: all lanes; or one bool per lane
Step = Callable[[Mask], None]


@functools.cache
def bits_of(kind: str) -> int:
    """Width of a type such as u32, bf16, f16x2, pred."""
    return 1 if kind == "pred" else 32 if kind.endswith("x2") else int(re.search(r"\d+", kind)[0])


@functools.cache
def dtype_of(kind: str) -> np.dtype:
    """How numpy holds a type; 16-bit floats as bits."""
    letter = "i" if kind[0] == "s" else "f" if kind in ("f32", "f64") else "u"
    return np.dtype(np.bool_) if kind == "pred" else np.dtype(f"{letter}{bits_of(kind) // 8}")


def nothing(mask: Mask) -> None:
    pass


OPCODES: dict[str, tuple[Callable[[Machine, Instruction], Step], set[str] | None]] = {}


def opcodes(names: str, modifiers: str | None = "") -> Callable:
    """Registers what builds the steps of some opcodes. Between opcode and type only the modifiers listed are known; None: any."""

    def register(build: Callable[[Machine, Instruction], Step]) -> Callable[[Machine, Instruction], Step]:
        OPCODES.update((name, (build, None if modifiers is None else set(modifiers.split()))) for name in names.split())
        return build

    return register


class Copy(NamedTuple):
    """A cp.async in flight: per lane its group, the rows of shared memory it fills, how many bytes of its source count."""

    group: np.ndarray
    lanes: np.ndarray
    rows: np.ndarray
    bytes_: np.ndarray
    size: int
    sources: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # words, rows in them, which of the lanes

    def at(self, which: np.ndarray) -> Copy:
        position = np.cumsum(which) - 1
        sources = [(words, rows[which[of]], position[of[which[of]]]) for words, rows, of in self.sources]
        return Copy(self.group[which], self.lanes[which], self.rows[which], self.bytes_[which], self.size, sources)


def _listed(argument: str) -> list[str]:
    """The operands in braces, or the one without."""
    return [a.strip() for a in argument.strip("{}").split(",")]


def _half(kind: str) -> bool:
    return kind.removesuffix("x2") in ("f16", "bf16")


_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """16-bit floats, two per number for x2, as fp32."""
    bits = np.ascontiguousarray(bits).view(np.uint16)
    return _HALVES[bits] if kind.startswith("f16") else (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _encode(value: np.ndarray, kind: str) -> np.ndarray:
    """fp32 to the nearest 16-bit floats, ties to even; the inverse of `_decode`."""
    value = np.ascontiguousarray(value, np.float32)
    if kind.startswith("f16"):
        bits = value.astype(np.float16).view(np.uint16)
    else:
        u = value.view(np.uint32)
        bits = ((u + np.uint32(0x7FFF) + (u >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    bits[np.isnan(value)] = 0x7FFF
    return bits.view(np.uint32) if kind.endswith("x2") else bits


def _flush(value: np.ndarray) -> np.ndarray:
    """Subnormal fp32 numbers as zero of their sign."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(value.dtype.type(0), value), value)


def _directed(value: np.ndarray, mode: str) -> np.ndarray:
    """fp64 to fp32: to the nearest (rn), towards zero (rz), down (rm) or up (rp)."""
    near = value.astype(np.float32)
    if mode == "rn":
        return near
    down, up = np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))
    low, high = np.where(near > value, down, near), np.where(near < value, up, near)
    return {"rm": low, "rp": high, "rz": np.where(value > 0, low, high)}[mode]


def _modified(i: Instruction, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """An fp32 function with the instruction's .ftz, .sat and rounding; computed in fp64."""
    mode = next((p for p in i.parts if p in ("rz", "rm", "rp")), "rn")
    ftz, sat = "ftz" in i.parts, "sat" in i.parts

    def run(*operands: np.ndarray) -> np.ndarray:
        value = _directed(function(*((_flush(x) if ftz else x).astype(np.float64) for x in operands)), mode)
        value = np.nan_to_num(np.clip(value, np.float32(0), np.float32(1)), nan=0.0) if sat else value
        return _flush(value) if ftz else value

    return run


def _elementwise(m: Machine, i: Instruction, function: Callable[..., np.ndarray]) -> Step:
    """d = function(operands), all of the instruction's type."""
    kind = i.parts[-1]
    if _half(kind):
        if {"sat", "ftz", "relu"} & set(i.parts):
            raise i.unknown()
        sources, write = [m.full(a, f"b{bits_of(kind)}", i) for a in i.args[1:]], m.writer(i.args[0], f"b{bits_of(kind)}", i)
        return lambda mask: write(_encode(function(*(_decode(x(), kind) for x in sources)), kind), mask)
    operands, write = [m.read(a, kind, i) for a in i.args[1:]], m.writer(i.args[0], kind, i)
    changed = {"rz", "rm", "rp", "ftz", "sat"} & set(i.parts)
    if changed and kind != "f32":
        raise i.unknown()
    if changed or not isinstance(function, np.ufunc):
        run = _modified(i, function) if changed else function
        return lambda mask: write(run(*operands), mask)
    target = m.target(i.args[0], kind, i)
    if target.dtype != dtype_of(kind):
        return lambda mask: write(function(*operands), mask)
    if len(operands) == 1:
        (x,) = operands
        return lambda mask: function(x, target, where=mask)
    x, y = operands
    return lambda mask: function(x, y, target, where=mask)


@opcodes("add sub and or xor not neg abs copysign", "rn rz rm rp ftz sat")
def _simple(m: Machine, i: Instruction) -> Step:
    functions = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative, "abs": np.absolute}
    return _elementwise(m, i, functions.get(i.parts[0], lambda sign, magnitude: np.copysign(magnitude, sign)))


@opcodes("min max", "ftz NaN")
def _extreme(m: Machine, i: Instruction) -> Step:
    names = {"min": ("fmin", "minimum"), "max": ("fmax", "maximum")}[i.parts[0]]
    return _elementwise(m, i, getattr(np, names["NaN" in i.parts or i.parts[-1][0] in "su"]))


@opcodes("mul mad", "rn rz rm rp ftz sat lo hi wide")
def _multiply(m: Machine, i: Instruction) -> Step:
    kind, form = i.parts[-1], next((p for p in i.parts if p in ("lo", "hi", "wide")), "")
    if not form or (form == "lo" and i.parts[0] == "mul"):
        return _fma(m, i) if i.parts[0] == "mad" else _elementwise(m, i, np.multiply)
    if "sat" in i.parts:
        raise i.unknown()
    x, y = (m.read(a, kind, i) for a in i.args[1:3])
    bits = bits_of(kind)
    wide = f"{kind[0]}{2 * bits}"
    result = wide if form == "wide" else kind
    z, write = m.read(i.args[3], result, i) if i.parts[0] == "mad" else None, m.writer(i.args[0], result, i)

    def product() -> np.ndarray:
        if form == "lo":
            return x * y
        if bits < 64:
            whole = x.astype(dtype_of(wide)) * y.astype(dtype_of(wide))
            return whole if form == "wide" else (whole >> whole.dtype.type(bits)).astype(x.dtype)
        return _high64(x, y)

    return (lambda mask: write(product(), mask)) if z is None else (lambda mask: write(product() + z, mask))


def _high64(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The upper half of 128-bit products."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b = x.view(np.uint64), y.view(np.uint64)
    a0, a1, b0, b1 = a & low, a >> shift, b & low, b >> shift
    middle = a1 * b0 + (a0 * b0 >> shift)
    high = a1 * b1 + (middle >> shift) + ((middle & low) + a0 * b1 >> shift)
    if x.dtype == np.int64:
        high = high - np.where(x < 0, b, np.uint64(0)) - np.where(y < 0, a, np.uint64(0))
    return high.view(x.dtype)


@opcodes("fma", "rn rz rm rp ftz sat")
def _fma(m: Machine, i: Instruction) -> Step:
    kind = i.parts[-1]
    if kind == "f64":
        raise i.unknown()
    if kind != "f32" or {"rz", "rm", "rp", "ftz", "sat"} & set(i.parts):
        return _elementwise(m, i, lambda x, y, z: x * y + z)
    x, y, z = (m.read(a, kind, i) for a in i.args[1:])
    target, scratch = m.target(i.args[0], kind, i), m.scratch64

    def step(mask: Mask) -> None:
        np.multiply(x, y, scratch, dtype=np.float64)
        np.add(scratch, z, scratch)
        np.copyto(target, scratch, where=mask, casting="unsafe")

    return step


@opcodes("div rem", "rn approx full ftz")
def _divide(m: Machine, i: Instruction) -> Step:
    if i.parts[-1] == "f32":
        return _approximation(m, i, np.divide, ulps=0 if "rn" in i.parts else 2)
    if i.parts[-1][0] not in "su":
        raise i.unknown()
    return _elementwise(m, i, np.fmod if i.parts[0] == "rem" else lambda x, y: (x - np.fmod(x, y)) // y)


@opcodes("rcp sqrt rsqrt ex2 lg2 tanh", "rn approx ftz")
def _special_function(m: Machine, i: Instruction) -> Step:
    function = {"rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2, "lg2": np.log2, "tanh": np.tanh}[i.parts[0]]
    if "rn" in i.parts:
        return _approximation(m, i, function)
    # PTX ISA, maximum errors of the .approx forms; lg2's is absolute around 1.
    relative = {"sqrt": 2.0**-23, "rsqrt": 2.0**-22.9, "ex2": 2.0**-22, "lg2": 2.0**-22, "tanh": 2.0**-11}
    return _approximation(m, i, function, relative=relative.get(i.parts[0], 0.0), ulps=i.parts[0] == "rcp", least=1.0 if i.parts[0] == "lg2" else 0.0)


def _approximation(m: Machine, i: Instruction, function: Callable[..., np.ndarray], *, relative: float = 0.0, ulps: int = 0, least: float = 0.0) -> Step:
    """An fp32 function that, if asked to, is wrong by its bound: away from zero for ``perturb=1``, towards it for -1. From magnitude ``least`` the error is relative."""
    if i.parts[-1] != "f32":
        raise i.unknown()

    def run(*operands: np.ndarray) -> np.ndarray:
        value = function(*operands)
        sign = m.perturb if isinstance(m.perturb, int) else m.perturb.get(i.parts[0], 0)
        if not sign:
            return value
        error = relative * np.maximum(np.abs(value), least) + ulps * np.spacing(np.abs(value).astype(np.float32))
        return np.where(np.isfinite(value) & (value != 0), value + sign * np.copysign(error, value), value)

    operands, write, exact = [m.read(a, "f32", i) for a in i.args[1:]], m.writer(i.args[0], "f32", i), _modified(i, run)
    return lambda mask: write(exact(*operands), mask)


@opcodes("shl shr")
def _shift(m: Machine, i: Instruction) -> Step:
    kind = i.parts[-1]
    x, amount, write = m.read(i.args[1], kind, i), m.read(i.args[2], "u32", i), m.writer(i.args[0], kind, i)
    shift = np.left_shift if i.parts[0] == "shl" else np.right_shift  # numpy's, like PTX's, give 0 or the sign for amounts beyond the width
    last = np.uint32(bits_of(kind))
    if amount.size == 1:
        fixed, target = np.minimum(amount, last).astype(x.dtype), m.target(i.args[0], kind, i)
        if target.dtype == x.dtype:
            return lambda mask: shift(x, fixed, target, where=mask)
    return lambda mask: write(shift(x, np.minimum(amount, last).astype(x.dtype)), mask)


@opcodes("shf", "l r wrap clamp")
def _funnel(m: Machine, i: Instruction) -> Step:
    low, high, amount = (m.read(a, "u32", i) for a in i.args[1:])
    write, left, wrap = m.writer(i.args[0], "b32", i), "l" in i.parts, "wrap" in i.parts

    def step(mask: Mask) -> None:
        both = high.astype(np.uint64) << np.uint64(32) | low
        n = ((amount & np.uint32(31)) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        write(((both << n >> np.uint64(32)) if left else both >> n).astype(np.uint32), mask)

    return step


@opcodes("bfe bfi")
def _bit_field(m: Machine, i: Instruction) -> Step:
    kind, bits, insert = i.parts[-1], bits_of(i.parts[-1]), i.parts[0] == "bfi"
    unsigned = dtype_of(f"u{bits}")
    values = [m.read(a, f"u{bits}", i) for a in i.args[1:-2]]
    position, length = (m.read(a, "u32", i) for a in i.args[-2:])
    write = m.writer(i.args[0], kind, i)

    def step(mask: Mask) -> None:
        p, n = ((v & np.uint32(0xFF)).astype(unsigned) for v in (position, length))
        ones = np.where(n >= bits, ~unsigned.type(0), (unsigned.type(1) << n) - unsigned.type(1))
        if insert:
            new, old = values
            return write((old & ~(ones << p)) | (new & ones) << p, mask)
        field = values[0] >> p & ones
        if kind[0] == "s":
            top = values[0] >> np.minimum(p + n - unsigned.type(1), unsigned.type(bits - 1)) & unsigned.type(1)
            field = np.where((top == 1) & (n > 0), field | ~(ones >> np.where(p + n > bits, p + n - unsigned.type(bits), unsigned.type(0))), field)
        write(field.view(dtype_of(kind)), mask)

    return step


@opcodes("popc clz brev bfind", "shiftamt")
def _bit_count(m: Machine, i: Instruction) -> Step:
    kind, bits = i.parts[-1], bits_of(i.parts[-1])
    if kind[0] == "s" or bits != 32:
        raise i.unknown()
    x, write = m.full(i.args[1], kind, i), m.writer(i.args[0], "u32", i)
    length = lambda v: np.frexp(v.astype(np.float64))[1].astype(np.uint32)  # position of the highest 1, from 1
    zeros = lambda v: np.uint32(32) - length(v)
    function = {
        "popc": np.bitwise_count,
        "clz": zeros,
        "bfind": (lambda v: np.where(v == 0, np.uint32(0xFFFFFFFF), zeros(v))) if "shiftamt" in i.parts else lambda v: length(v) - np.uint32(1),
        "brev": lambda v: np.packbits(np.unpackbits(np.ascontiguousarray(v).view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")).view(">u4"),
    }[i.parts[0]]
    return lambda mask: write(function(x()), mask)


@opcodes("prmt")
def _permute(m: Machine, i: Instruction) -> Step:
    a, b, selector = (m.full(v, "b32", i) for v in i.args[1:])
    write = m.writer(i.args[0], "b32", i)

    def step(mask: Mask) -> None:
        bytes_ = np.stack([a(), b()], 1).view(np.uint8)
        nibbles = selector()[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
        chosen = np.take_along_axis(bytes_, (nibbles & np.uint32(7)).astype(np.int64), 1)
        signs = np.where(chosen >= 0x80, np.uint8(0xFF), np.uint8(0))
        write(np.where(nibbles >= 8, signs, chosen).view(np.uint32)[:, 0], mask)

    return step


@opcodes("lop3")
def _logic(m: Machine, i: Instruction) -> Step:
    a, b, c = (m.full(v, "b32", i) for v in i.args[1:4])
    table, write = int(i.args[4], 0), m.writer(i.args[0], "b32", i)

    def step(mask: Mask) -> None:
        x, y, z = a(), b(), c()
        terms = [(x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z) for k in range(8) if table >> k & 1]
        write(functools.reduce(np.bitwise_or, terms, np.zeros(m.n, np.uint32)), mask)

    return step


@opcodes("mov")
def _move(m: Machine, i: Instruction) -> Step:
    kind = i.parts[-1]
    if i.args[1].startswith("{"):
        return _pack(m, i, _listed(i.args[1]))
    if i.args[0].startswith("{"):
        return _unpack(m, i, _listed(i.args[0]))
    value, target = m.read(i.args[1], kind, i), m.target(i.args[0], kind, i)
    return lambda mask: np.copyto(target, value, where=mask)


def _pack(m: Machine, i: Instruction, elements: list[str]) -> Step:
    kind = i.parts[-1]
    sources, write = [m.full(e, f"b{bits_of(kind) // len(elements)}", i) for e in elements], m.writer(i.args[0], kind, i)
    return lambda mask: write(np.stack([s() for s in sources], 1).view(dtype_of(kind))[:, 0], mask)


def _unpack(m: Machine, i: Instruction, elements: list[str]) -> Step:
    kind, part = i.parts[-1], f"b{bits_of(i.parts[-1]) // len(elements)}"
    source, writers = m.full(i.args[1], kind, i), [m.writer(e, part, i) for e in elements]

    def step(mask: Mask) -> None:
        pieces = np.ascontiguousarray(source()).view(dtype_of(part)).reshape(m.n, -1)
        for k, write in enumerate(writers):
            write(pieces[:, k], mask)

    return step


@opcodes("cvta", "to global shared param")
def _change_address(m: Machine, i: Instruction) -> Step:
    if i.parts[-1] != "u64":
        raise i.unknown()
    window = np.uint64({"global": 0, "shared": SHARED_WINDOW, "param": PARAM_WINDOW}[i.parts[-2]])
    value, target = m.read(i.args[1], "u64", i), m.target(i.args[0], "u64", i)
    change = np.subtract if "to" in i.parts else np.add
    return lambda mask: change(value, window, target, where=mask)


@opcodes("selp")
def _select(m: Machine, i: Instruction) -> Step:
    x, y = (m.read(a, i.parts[-1], i) for a in i.args[1:3])
    choice, write = m.read(i.args[3], "pred", i), m.writer(i.args[0], i.parts[-1], i)
    return lambda mask: write(np.where(choice, x, y), mask)


def _value(m: Machine, operand: str, kind: str, i: Instruction) -> Callable[[], np.ndarray]:
    """What reads an operand as numbers, 16-bit floats too."""
    if _half(kind):
        bits = m.read(operand, f"b{bits_of(kind)}", i)
        return lambda: _decode(bits, kind)
    value = m.read(operand, kind, i)
    return lambda: value


_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


def _comparison(name: str, kind: str, i: Instruction) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Floats compare as false with NaN, the forms with u as true."""
    if name in ("num", "nan"):
        return (lambda x, y: ~(np.isnan(x) | np.isnan(y))) if name == "num" else (lambda x, y: np.isnan(x) | np.isnan(y))
    if "f" in kind and name == "ne":
        return lambda x, y: (x < y) | (x > y)
    if name in _COMPARE:
        return _COMPARE[name]
    if name[:-1] in _OPPOSITE and name.endswith("u") and "f" in kind:
        ordered = _comparison(_OPPOSITE[name[:-1]], kind, i)
        return lambda x, y: ~ordered(x, y)
    raise i.unknown(f"comparison {name}")


@opcodes("setp", None)
def _set_predicate(m: Machine, i: Instruction) -> Step:
    kind, rest = i.parts[-1], i.parts[2:-1]
    combine = next((p for p in rest if p in ("and", "or", "xor")), None)
    if [p for p in rest if p not in ("ftz", combine)] or kind.endswith("x2"):
        raise i.unknown()
    compare = _comparison(i.parts[1], kind, i)
    x, y = (_value(m, a, kind, i) for a in i.args[1:3])
    flush = _flush if "ftz" in rest else lambda v: v
    targets = [m.target(t.strip(), "pred", i) if t.strip() != "_" else None for t in i.args[0].split("|")]
    if combine is None and len(targets) == 1 and isinstance(compare, np.ufunc) and not _half(kind) and "ftz" not in rest:
        a, b, target = x(), y(), targets[0]
        return lambda mask: compare(a, b, target, where=mask)
    third = m.read(i.args[3].lstrip("!"), "pred", i) if combine else np.array([True])
    negated, function = combine is not None and i.args[3].startswith("!"), {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine or "and"]

    def step(mask: Mask) -> None:
        result, other = compare(flush(x()), flush(y())), ~third if negated else third
        values = function(result, other), function(~result, other)
        for target, value in zip(targets, values):
            if target is not None:
                np.copyto(target, value, where=mask)

    return step


_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcodes("cvt", "rn rz rm rp rni rzi rmi rpi ftz sat relu satfinite f16 bf16 f32 f64 f16x2 bf16x2 u8 u16 u32 u64 s8 s16 s32 s64")
def _convert(m: Machine, i: Instruction) -> Step:
    to, from_ = i.parts[-2:]
    modifiers = set(i.parts[1:-2])
    sources = [_value(m, a, from_, i) for a in i.args[1:]]
    write = m.writer(i.args[0], f"b{bits_of(to)}" if _half(to) else to, i)
    integral = next((_INTEGRAL[p] for p in modifiers if p in _INTEGRAL), None)
    mode = next((p for p in ("rz", "rm", "rp") if p in modifiers), "rn")
    dtype = dtype_of(to)
    if _half(to):
        if modifiers - {"rn", "relu", "satfinite"} or (len(sources) == 2) != to.endswith("x2"):
            raise i.unknown()
        largest = 65504.0 if to.startswith("f16") else float.fromhex("0x1.fep127")

        def narrowed() -> np.ndarray:
            # The first operand is the upper half.
            value = sources[0]() if len(sources) == 1 else np.stack([np.broadcast_to(s(), m.n) for s in reversed(sources)], 1).reshape(-1)
            value = value.astype(np.float32)
            value = np.maximum(value, np.float32(0)) if "relu" in modifiers else value
            return _encode(np.clip(value, -largest, largest) if "satfinite" in modifiers else value, to)

        return lambda mask: write(narrowed(), mask)
    if modifiers & {"relu", "satfinite"}:
        raise i.unknown()
    (source,) = sources
    flush = _flush if "ftz" in modifiers and from_ == "f32" else lambda v: v
    if "f" in to:

        def number() -> np.ndarray:
            value = flush(source())
            value = integral(value) if integral else value
            value = _directed(value.astype(np.float64), mode) if mode != "rn" else value.astype(dtype)
            value = np.nan_to_num(np.clip(value, 0, 1), nan=0.0) if "sat" in modifiers else value
            return _flush(value) if "ftz" in modifiers and to == "f32" else value

        return lambda mask: write(number(), mask)
    limits = np.iinfo(dtype)
    if "f" in from_:
        # The largest fp64 number that still fits; 2^63 - 1 itself does not exist in fp64.
        highest = float(limits.max) if dtype.itemsize < 8 else np.nextafter(float(limits.max), 0.0)

        def integer() -> np.ndarray:
            value = (integral or np.trunc)(flush(source()).astype(np.float64))
            fits = np.nan_to_num(np.clip(value, float(limits.min), highest), nan=0.0).astype(dtype)
            return np.where(value > highest, dtype.type(limits.max), fits)

        return lambda mask: write(integer(), mask)
    if "sat" in modifiers:
        low, high = max(limits.min, np.iinfo(dtype_of(from_)).min), min(limits.max, np.iinfo(dtype_of(from_)).max)
        return lambda mask: write(np.clip(source(), low, high).astype(dtype), mask)
    return lambda mask: write(source().astype(dtype), mask)


# ---- memory

_CACHE = "nc ca cg cs cv lu wb wt weak volatile relaxed acquire release cta gpu sys L2::64B L2::128B L2::256B"
_CACHE += " L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate"
_SPACES = "global shared param local shared::cta"


def _space(i: Instruction) -> str:
    space = next((p for p in i.parts if p in _SPACES.split()), "generic").removesuffix("::cta")
    if space == "local":
        raise i.unknown("local memory (a spill, or an array that is indexed at run time)")
    return space


def _lanes(mask: Mask) -> np.ndarray | None:
    return None if mask is True else np.flatnonzero(mask)


@opcodes("ld ldu", f"{_CACHE} {_SPACES} v2 v4")
def _load(m: Machine, i: Instruction) -> Step:
    kind, registers = i.parts[-1], _listed(i.args[0])
    size, space = bits_of(kind) // 8, _space(i)
    address, constant = m.address(i.args[1], i)
    targets = [m.target(r, kind, i) for r in registers]
    bytes_ = size * len(registers)
    if space == "param" and constant is not None:
        m.locate(space, np.array([constant]), None, bytes_, i)
        values = [m.params[constant + k * size : constant + (k + 1) * size].view(dtype_of(kind)) for k in range(len(registers))]

        def parameter(mask: Mask) -> None:
            for target, value in zip(targets, values):
                np.copyto(target, value, where=mask, casting="unsafe")

        return parameter

    def step(mask: Mask) -> None:
        where, lanes = address(), _lanes(mask)
        if lanes is not None:
            if not lanes.size:
                return
            where = where[lanes]
        for buffer, part, which in m.locate(space, where, lanes, bytes_, i):
            rows = buffer.words(size, len(registers))[buffer.row(part, bytes_)].view(dtype_of(kind))
            into = which if lanes is None else lanes[which]
            for k, target in enumerate(targets):
                target[into] = rows[:, k]

    return step


@opcodes("st", f"{_CACHE} {_SPACES} v2 v4")
def _store(m: Machine, i: Instruction) -> Step:
    kind, operands = f"b{bits_of(i.parts[-1])}", _listed(i.args[1])
    size, space = bits_of(kind) // 8, _space(i)
    address, _ = m.address(i.args[0], i)
    values = [m.full(o, kind, i) for o in operands]
    bytes_ = size * len(operands)

    def step(mask: Mask) -> None:
        where, lanes = address(), _lanes(mask)
        rows = np.stack([v() for v in values], 1) if len(values) > 1 else values[0]()[:, None]
        if lanes is not None:
            if not lanes.size:
                return
            where, rows = where[lanes], rows[lanes]
        for buffer, part, which in m.locate(space, where, lanes, bytes_, i, write=True):
            buffer.words(size, len(operands))[buffer.row(part, bytes_)] = rows[which]

    return step


_ATOMIC = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda old, new: new}


@opcodes("atom red", f"{' '.join(_ATOMIC)} global shared relaxed gpu cta sys acquire release acq_rel")
def _atomic(m: Machine, i: Instruction) -> Step:
    """One lane after the other."""
    kind, space, args = i.parts[-1], _space(i), i.args if i.parts[0] == "atom" else ["_", *i.args]
    function = next(_ATOMIC[p] for p in i.parts if p in _ATOMIC)
    if _half(kind):
        raise i.unknown()
    address, _ = m.address(args[1], i)
    operand, write, bytes_ = m.full(args[2], kind, i), m.writer(args[0], kind, i), bits_of(kind) // 8

    def step(mask: Mask) -> None:
        where, values, old = address(), operand(), np.zeros(m.n, dtype_of(kind))
        for lane in range(m.n) if mask is True else np.flatnonzero(mask):
            ((buffer, part, _),) = m.locate(space, where[lane : lane + 1], np.array([lane]), bytes_, i, write=True)
            word = buffer.words(bytes_)[buffer.row(part, bytes_)[0]].view(dtype_of(kind))
            old[lane] = word[0]
            word[0] = function(word[0], values[lane])
        write(old, mask)

    return step


@opcodes("cp.async", None)
def _copy_async(m: Machine, i: Instruction) -> Step:
    form = i.parts[2]
    if form == "commit_group":
        return lambda mask: np.add(m.committed, 1, m.committed, where=mask)
    if form in ("wait_group", "wait_all"):
        return _wait(m, int(i.args[0]) if i.args else None)
    if form not in ("ca", "cg") or set(i.parts[3:]) - {"shared", "shared::cta", "global", "L2::64B", "L2::128B", "L2::256B"} or len(i.args) not in (3, 4):
        raise i.unknown()
    (to, _), (source, _), size = m.address(i.args[0], i), m.address(i.args[1], i), int(i.args[2])
    counted = m.full(i.args[3], "u32", i) if len(i.args) == 4 else lambda: np.broadcast_to(np.uint32(size), m.n)
    if size not in ((16,) if form == "cg" else (4, 8, 16)):
        raise i.unknown(f"{size} bytes")

    def step(mask: Mask) -> None:
        lanes = np.arange(m.n) if mask is True else np.flatnonzero(mask)
        if not lanes.size:
            return
        ((_, part, _),) = m.locate("shared", to()[lanes], lanes, size, i, write=True)
        rows, bytes_ = part // size, counted()[lanes].astype(np.int64)
        if bytes_.max() > size:
            raise i.fault(f"{int(bytes_.max())} source bytes of {size}")
        used = np.flatnonzero(bytes_)
        sources = []
        if used.size:
            pieces = m.locate("global", source()[lanes[used]], lanes[used], size, i)
            sources = [(buffer.words(1, size), buffer.row(where, size), used[which]) for buffer, where, which in pieces]
        m.shared.words(1, size)[rows] = POISON
        m.copies.append(Copy(m.committed[lanes], lanes, rows, bytes_, size, sources))

    return step


def _wait(m: Machine, keep: int | None) -> Step:
    """Retires copies of all but the last `keep` groups of each lane; with None also those that no group holds yet."""

    def step(mask: Mask) -> None:
        flying, m.copies = m.copies, []
        for copy in flying:
            due = copy.group < (m.committed[copy.lanes] - keep if keep is not None else m.committed[copy.lanes] + 1)
            if mask is not True:
                due &= mask[copy.lanes]
            if not due.any():
                m.copies.append(copy)
                continue
            if not due.all():
                m.copies.append(copy.at(~due))
                copy = copy.at(due)
            data = np.zeros((copy.rows.size, copy.size), np.uint8)
            for words, rows, which in copy.sources:
                data[which] = words[rows]
            if (copy.bytes_ < copy.size).any():
                data[np.arange(copy.size) >= copy.bytes_[:, None]] = 0
            m.shared.words(1, copy.size)[copy.rows] = data

    return step


# ---- warps and blocks


@opcodes("bar.sync barrier.sync bar.warp", None)
def _barrier(m: Machine, i: Instruction) -> Step:
    """The machine itself brings the lanes together."""
    if i.parts[1] == "sync" and (len(i.args) > 1 and i.args[1] != str(m.threads)):
        raise i.unknown("a barrier of a part of the block")
    return nothing


@opcodes("membar fence prefetch prefetchu griddepcontrol nanosleep", None)
def _order(m: Machine, i: Instruction) -> Step:
    """Lock step and blocks that do not wait for each other need no fences."""
    return nothing


@opcodes("trap", None)
def _trap(m: Machine, i: Instruction) -> Step:
    def step(mask: Mask) -> None:
        if np.any(mask):
            raise i.fault("trap")

    return step


@opcodes("shfl.sync", "up down bfly idx")
def _shuffle(m: Machine, i: Instruction) -> Step:
    mode, targets = i.parts[2], [t.strip() for t in i.args[0].split("|")]
    write, predicate = m.writer(targets[0], "b32", i), m.writer(targets[1], "pred", i) if len(targets) > 1 else None
    value, offset, clamp = m.full(i.args[1], "b32", i), m.read(i.args[2], "u32", i), m.read(i.args[3], "u32", i)
    lane, first = m.lane, np.arange(m.n) // WARP * WARP

    def step(mask: Mask) -> None:
        segment, c, b = (clamp >> np.uint32(8) & 31).astype(np.int64), (clamp & 31).astype(np.int64), (offset & 31).astype(np.int64)
        last, start = (lane & segment) | (c & ~segment), lane & segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": start | (b & ~segment)}[mode]
        inside = source >= last if mode == "up" else source <= last
        source = first + np.where(inside, source, lane)
        result = value()[source]
        if mask is not True:
            result = np.where(mask[source], result, np.uint32(0xFFFFFFFF))  # what a lane that is not here would send is undefined
        write(result, mask)
        if predicate:
            predicate(inside, mask)

    return step


@opcodes("vote.sync activemask", "any all uni ballot")
def _vote(m: Machine, i: Instruction) -> Step:
    mode = "ballot" if i.parts[0] == "activemask" else i.parts[2]
    write = m.writer(i.args[0], i.parts[-1], i)
    negated = len(i.args) > 1 and i.args[1].startswith("!")
    source = m.full(i.args[1].lstrip("!"), "pred", i) if len(i.args) > 1 else lambda: np.ones(m.n, bool)

    def step(mask: Mask) -> None:
        votes = (~source() if negated else source()).reshape(-1, WARP)
        here = np.broadcast_to(mask, m.n).reshape(-1, WARP)
        any_, all_ = (votes & here).any(1), (votes | ~here).all(1)
        ballot = ((votes & here) << np.arange(WARP, dtype=np.uint32)).sum(1).astype(np.uint32)
        result = {"any": any_, "all": all_, "uni": all_ | ~any_, "ballot": ballot}[mode]
        write(np.repeat(result, WARP), mask)

    return step


@opcodes("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def _load_matrix(m: Machine, i: Instruction) -> Step:
    count, trans = next(int(p[1]) for p in i.parts if re.fullmatch(r"x[124]", p)), "trans" in i.parts
    file, rows = m.files[32], [m.row(r) for r in _listed(i.args[0])]
    address, _ = m.address(i.args[1], i)
    if len(rows) != count or i.parts[-1] != "b16":
        raise i.unknown()
    # Lane 8 j + k of a warp names row k of matrix j.
    lanes = np.flatnonzero(m.lane < 8 * count)

    def step(mask: Mask) -> None:
        here = lanes if mask is True else lanes[mask[lanes]]
        ((_, part, _),) = m.locate("shared", address()[here], here, 16, i)
        if trans:
            elements = m.shared.words(2, 8)[part // 16].reshape(-1, count, 8, 8).transpose(1, 0, 3, 2)
            fragments = np.ascontiguousarray(elements).view(np.uint32).reshape(count, -1)
        else:
            fragments = m.shared.words(4, 4)[part // 16].reshape(-1, count, WARP).transpose(1, 0, 2).reshape(count, -1)
        if mask is True:
            file[rows] = fragments
        else:
            file[np.array(rows)[:, None], np.flatnonzero(mask)] = fragments

    return step


@opcodes("mma", None)
def _matrix(m: Machine, i: Instruction) -> Step:
    return mma(m, [i])


def mma(m: Machine, batch: list[Instruction]) -> Step:
    """mma.m16n8k16 of 16-bit floats with fp32 sums; several with the same opcode that do not depend on each other. PTX ISA, "Matrix Fragments for mma.m16n8k16"."""
    i = batch[0]
    form = re.fullmatch(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32", i.opcode)
    if form is None:
        raise i.unknown()
    kind, n = form[1], len(batch)
    rows = np.array([[m.row(r) for a in (1, 2, 3) for r in _listed(j.args[a])] for j in batch])
    into = np.array([[m.row(r) for r in _listed(j.args[0])] for j in batch])
    if rows.shape[1] != 10 or into.shape[1] != 4:
        raise i.unknown("number of registers")
    file, warps = m.files[32], m.n // WARP

    def step(mask: Mask) -> None:
        fragments = file[rows]
        operands = _decode(fragments[:, :6], kind).reshape(n, 6, warps, 8, 4, 2)  # lane = 4 g + t, which holds two neighbours
        # a: register 2 kh + rh holds row g + 8 rh, columns 8 kh + 2 t and the next; b: register kh holds rows 8 kh + 2 t and the next of column g
        a = operands[:, :4].reshape(n, 2, 2, warps, 8, 4, 2).transpose(0, 3, 2, 4, 1, 5, 6).reshape(n, warps, 16, 16)
        b = operands[:, 4:].transpose(0, 2, 3, 1, 4, 5).reshape(n, warps, 8, 16)
        product = np.matmul(a, b.swapaxes(-1, -2)).reshape(n, warps, 2, 8, 4, 2)  # d: register 2 rh + c holds row g + 8 rh, column 2 t + c
        sums = product.transpose(0, 2, 5, 1, 3, 4).reshape(n, 4, -1) + fragments[:, 6:].view(np.float32)
        if mask is True:
            file[into] = sums.view(np.uint32)
        else:
            file[into] = np.where(mask, sums.view(np.uint32), file[into])

    return step
