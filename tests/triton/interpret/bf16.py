"""Makes Triton's interpreter exact for bf16, and lets tf32 products show.

The interpreter of Triton 3.9 keeps bf16 as 16-bit integers: products multiply the bit patterns, and conversions from fp32 truncate where devices round to nearest even. Here
conversions and products are those of a device. The kernels compute in fp32 only, so arithmetic on bf16 tiles is refused instead of emulated. tf32 products round their operands to
10 bits, which the interpreter leaves out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_float(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def from_float(values: np.ndarray) -> np.ndarray:
    """Round to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), ((bits >> 16) | 0x40).astype(np.uint16), nearest)


def to_tf32(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


def is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(handle: Any) -> Any:
    return TensorHandle(to_float(handle.data), tl.float32) if is_bf16(handle) else handle


def install() -> None:
    """Patches the interpreter of this process, once."""
    if getattr(InterpreterBuilder, "exact_bf16", False):
        return
    InterpreterBuilder.exact_bf16 = True
    if not hasattr(InterpreterBuilder, "get_bf16"):  # Triton before 3.8
        InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(from_float(np.array([value])), tl.bfloat16)
    cast, fp_to_fp, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot

    def exact_cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16:
            values = source if source.dtype.scalar == tl.float32 else cast(self, widened(source), tl.float32)
            return TensorHandle(from_float(values.data), tl.bfloat16)
        return widened(source) if is_bf16(source) and target.scalar == tl.float32 else cast(self, widened(source), target)

    def exact_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        wide = source.dtype.scalar.primitive_bitwidth >= 16 and target.scalar.primitive_bitwidth >= 16
        exact = wide and tl.bfloat16 in (source.dtype.scalar, target.scalar) and rounding in (None, ir.ROUNDING_MODE.RTNE)
        return exact_cast(self, source, target) if exact else fp_to_fp(self, source, target, rounding)

    def exact_dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, imprecise: Any) -> Any:
        assert a.dtype.scalar == b.dtype.scalar and accumulator.dtype.scalar == tl.float32, "products take one dtype and accumulate in fp32"
        if a.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle(to_tf32(t.data), tl.float32) for t in (a, b))
        a, b = widened(a), widened(b)
        return dot(self, a, b, accumulator, precision, imprecise)

    def refusing(original: Any) -> Any:
        def refuse(self: Any, *args: Any) -> Any:
            if original.__name__ != "ternary_op" or args[-1] is not np.where:
                assert not any(is_bf16(a) for a in args if isinstance(a, TensorHandle)), "arithmetic on bf16 tiles: the kernels compute in fp32"
            return original(self, *args)

        return refuse

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot = exact_cast, exact_fp_to_fp, exact_dot
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        setattr(InterpreterBuilder, name, refusing(getattr(InterpreterBuilder, name)))
    reduce_sum = interpreter.ReduceOps.sum

    def guarded_sum(self: Any, values: Any) -> Any:
        assert values.dtype.scalar != tl.bfloat16, "sum of a bf16 tile: the kernels sum in fp32"
        return reduce_sum(self, values)

    interpreter.ReduceOps.sum = guarded_sum
