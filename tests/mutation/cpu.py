"""Mutants of the CPU kernels: `python -m tests.mutation.cpu` writes tests/data/cpu_mutants.json, `python -m tests.mutation.cpu phm` those of phm_bottleneck, cpu_phm_mutants.json,
and `norm` those of dropout_add_norm, cpu_norm_mutants.json.

They are compiled for AVX2, for fp32 and for bf16 over fp32 parameters, and run in memory that is full of NaN and ends at an unreadable page (guard.cpp).
bf16 runs on its own GEMMs, for which the processor must have AVX512-BF16, and again, with oneDNN switched off, on those of fp32.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["ATEN_CPU_CAPABILITY"] = "avx2"  # read when torch is loaded; the mutants are compiled for it, whatever the processor has

import torch

from fastadapt.ops import _cpu
from tests.mutation import calls, cpp, schemata
from tests.ops import checks
from tests.ops.specs import ACTIVATIONS, FP32, GRANULARITIES, MIXED, PHM, Bottleneck, Gated, Lora, Norm, Routed, Spec

SOURCES = ("csrc/cpu_ops.cpp", "csrc/cpu/bottleneck.cpp", "csrc/cpu/gated_bottleneck.cpp", "csrc/cpu/phm_bottleneck.cpp", "csrc/cpu/dropout_add_norm.cpp", "csrc/cpu_entrance.cpp")
FILES = ("csrc/cpu/tile.h", *SOURCES[1:3], "csrc/cpu/dropout.h", "csrc/cpu/columns.h")
NORM_FILES = ("csrc/include/dropout_add_norm.h", "csrc/cpu/dropout_add_norm.cpp")
PHM_FILES = ("csrc/include/phm_bottleneck.h", "csrc/cpu/phm_bottleneck.cpp")
FLAGS = "-O1 -std=c++20 -fPIC -fopenmp -fvisibility=hidden -mavx2 -mfma -mf16c -DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2 -DFASTADAPT_MUTATION".split()

PAD = "what stands in this padding gives only results beyond the width or the rows, which are cleared or not stored"
ZERO = "these zeros meet zeros on the other side of each product; only a NaN would show, and a number is none"
LAST = "one more block, of 0 columns or rows: nothing is done"
TAIL = "the last whole vector is then left to the loop over single numbers: the same numbers"
MORE = "computes, packs or loads what nobody reads then: slower, the same results"
WHOLE = "computes whole panels or blocks, whose further columns nobody reads: slower, the same results"
SAME = "the other path of the two gives the same numbers, slower"
COPIES = "a tile of a task's rows that lie one after the other is then copied too: the same numbers, slower; no check watches reads behind the list of rows"
SHARE = "two pieces of scratch then share memory, but are not in use at the same time"
ONE = "multiplies by 1, or asks for a scale that no call has: the same numbers"
FLOAT = "the mutants have fp32 parameters alone; the tests of the ops, with parameters of half precision too, see it"
ROWS = "also computes rows of other ranges, the same numbers, and tiles of no rows, which store nothing"
MATRIX = "only a processor with a matrix unit (AMX) holds anything"
# (kind, a part of "before -> after in line") -> why no test can see it.
EXPLAINED: dict[tuple[str, str], str] = {
    ("loop", "q < end -> q <= end in for (int64_t q = begin; q < end; ++q)"): "a panel too many has no columns and is left at once; the next range's first one is computed twice",
    ("bound", "stride < kMaxStride"): "rows of that stride are then copied: the same numbers",
    ("sign", "i - m in bool consecutive("): COPIES,
    ("sign", "i + m + 1 in bool consecutive("): COPIES,
    ("sign", "m + 1 in bool consecutive("): COPIES,
    ("sign", "order[i + m - 1] + order[i] in bool consecutive("): COPIES,
    ("condition", "static_cast<bool>(!order) in bool consecutive("): COPIES,
    ("loop", "q < end -> q <= end in for (int64_t q = begin; q < end; q += kBlockPanels)"): LAST,
    ("offset", "in p.direct ? in_gradient(static_cast<float*>(p.dw_down) + c"): FLOAT,
    ("offset", "kTileRows * kBlockColumns -> kTileRows in G *panels"): SHARE,
    ("bound", "std::min(p.rows, end * kTileRows) -> std::max(p.rows, end * kTileRows)"): ROWS,
    ("loop", "row < std::min(p.rows, end * kTileRows) -> row <= std::min(p.rows, end * kTileRows)"): ROWS,
    ("loop", "i + step < n in"): TAIL,
    ("loop", "i + 4 * v < n in"): TAIL,
    ("loop", "i + Vec::size() < n in"): TAIL,
    ("deleted", "load_fp32_from_fp16"): "the mutants are compiled for fp32 and bf16 alone; the fp16 calls of the tests of the ops see it",
    **{
        (kind, line): "prefetching, from any address, changes the speed alone"
        for kind in ("bound", "condition", "constant", "offset", "sign", "loop", "product", "scale", "deleted")
        for line in ("__builtin_prefetch(", " fetch(", " fetch<1>(", "const int64_t ahead = ", "const auto later = ", "const T* at, int64_t n")
    },
    ("bound", "j + 2 * v >= k in if (j + 2 * v > k)"): "the last whole vectors then go through a copy: the same numbers",
    ("constant", "std::fill(std::copy(of[g], of[g] + k - j"): ZERO,
    ("loop", "n <= end in for (int64_t n = begin"): LAST,
    ("loop", "i <= v in for (int64_t i = 0; i < v; ++i) sums[i]"): "reads and writes behind local arrays, by an address that no check watches",
    ("sign", "end + n in for (int64_t g = 0; g < std::min(group, end - n)"): "columns behind the last lie in the padding: 32 is a multiple of a group's",
    ("bound", "in for (int64_t g = 0; g < std::min(group, end - n)"): "columns behind the last lie in the padding: 32 is a multiple of a group's",
    ("loop", "i <= p.rows in for (int64_t i = 0; i < p.rows; ++i) widen(static_cast<const T*>(src)"): "one more row, of those that are multiplied for nobody",
    **{(kind, "std::fill(to + p.rows * ld"): "rows that are multiplied for nobody" for kind in ("constant", "deleted", "offset")},
    ("deleted", "std::fill(sums, sums + v, Vec(0.f))"): "a Vec begins as zero",
    **{
        ("offset", f"begin * kPanel -> begin in {line}"): "also computes columns of other ranges, the same numbers"
        for line in ("few_products<P, A>(p.rows, x", "const int64_t ld = few_stride(p.rank)")
    },
    ("bound", "in if (i + v <= rows && j + v <= cols)"): SAME,
    ("constant", "1.f -> 1.1f in } else if (scale != 1.f) {"): ONE,
    ("constant", "1.f -> 1.1f in if (scale != 1.f) scale_by("): ONE,
    ("sign", "reinterpret_cast<uintptr_t>(base)"): "the size is asked of a room that begins at null alone",
    ("offset", "reinterpret_cast<uintptr_t>(base)"): "more room than is used",
    ("constant", "1.f -> 1.1f in if (before != 1.f)"): ONE,
    ("constant", "1.f -> 1.1f in if (after != 1.f)"): ONE,
    ("constant", "1.f -> 1.1f in if (a_scale != 1.f)"): ONE,
    ("constant", "1.f -> 1.1f in if (need.dz && scale != 1.f)"): ONE,
    ("condition", "need.dz && scale != 1.f"): MORE,
    ("constant", "1.f -> 1.1f in if (need_dz && scale != 1.f)"): ONE,
    ("constant", "1.f -> 1.1f in if (p.adapter_scale == 1.f)"): ONE,
    ("constant", "1.f -> 1.1f in reduce_pair<P>(p.partials, layout.adapter"): ONE,
    ("condition", "static_cast<bool>(need_dz) in if (need_dz && scale != 1.f)"): ONE,
    ("condition", "static_cast<bool>(scale != 1.f) in if (need_dz && scale != 1.f)"): MORE,
    ("condition", "static_cast<bool>(scales_p(p)) in if (need_p && scales_p(p))"): MORE,
    ("deleted", "in std::memcpy(dst, src, n * sizeof(G));"): FLOAT,
    ("offset", "in std::memcpy(dst, src, n * sizeof(G));"): FLOAT,
    ("constant", "1.f -> 1.1f in for (int64_t j = 0; j < n; ++j) scale_by(scaled ?"): FLOAT,
    ("condition", "p.parameter_type != kFloat in bool is_direct("): SAME,
    ("condition", "in bool is_direct("): FLOAT,
    ("bound", "in bool is_direct("): SAME,
    ("constant", "std::fill(dst + n, dst + to, G(0.f))"): ZERO,
    ("constant", "std::fill(to + width, to + padded_width, G(0.f))"): ZERO,
    ("constant", "std::fill(panel + cols, panel + whole, 0.f)"): PAD,
    ("deleted", "std::fill(panel + cols, panel + whole, 0.f)"): PAD,
    ("condition", "static_cast<bool>(scale) in if (scale || cols < whole)"): PAD,
    ("bound", "in if (scale || cols < whole)"): MORE,
    ("bound", "in if (cols < whole) std::memset("): MORE,
    ("condition", "true -> false in inline Product in_partial("): "columns beyond the width then keep what was there, which nobody reads",
    ("bound", "n < 0 in if (n <= 0) return of;"): LAST,
    ("deleted", "at::native::cpublas::brgemm_release();"): MATRIX,
    ("deleted", "release<G>();"): MATRIX,
    ("deleted", "std::fill(dst + n, dst + to, G(0.f))"): "what the stack then has there meets zeros on the other side: only a NaN would show",
    ("condition", "in if constexpr (std::is_same_v<G, BFloat16>) at::native"): MATRIX,
    ("condition", "static_cast<bool>(dw_down) in if (dw_down && j0 < width)"): MORE,
    ("condition", "(!(std::is_same_v<P, float>)) in if constexpr (std::is_same_v<P, float>)"): SAME,
    ("loop", "tile <= end in for (int64_t tile = begin"): "also computes a tile of another range, the same numbers, or one of no rows, which stores nothing",
    ("offset", "kTileRows * s.width -> kTileRows in G *x_tile"): SHARE,
    ("constant", "std::fill(dst + n, dst + to, 0.f)"): PAD,
    ("deleted", "std::fill(dst + n, dst + to, 0.f)"): PAD,
    ("constant", "std::fill(buffer + m * padded_width"): PAD,
    ("deleted", "std::fill(buffer + m * padded_width"): PAD,
    ("constant", "std::fill(a + m * ld"): ZERO,
    ("constant", "std::fill(da + m * ld"): PAD,
    ("deleted", "std::fill(da + m * ld"): PAD,
    ("constant", "Vec(0.f).store(panel + i * kPanel + j)"): ZERO,
    ("constant", "std::fill(tile + m * ld"): PAD,
    ("deleted", "std::fill(tile + m * ld"): PAD,
    ("constant", "vector_or<P, A>(p.gate_weight, v.w_x"): PAD,
    ("constant", "vector_or<P, A>(w, v.w_h"): PAD,
    ("deleted", "std::memset(block, 0, sizeof(block))"): PAD,
    ("bound", "v <= Vec(-80.f)"): "at the bound sigma is exp(-80) or 0, which is nothing beside a tensor's other numbers",
    ("constant", "-80.f"): "any bound below 88 keeps exp in range, and above 17 its result exact",
    ("deleted", "if constexpr (!std::is_same_v<A, float>) narrow(row + j0, rounded, n)"): "without the rounding of the pre-activation the result is nearer to the exact one",
    ("loop", "i <= rows in"): WHOLE,
    ("loop", "j <= cols in"): WHOLE,
    ("bound", "std::min(v, "): WHOLE,
    ("offset", "static_cast<int>(std::min(v, rows - i))"): WHOLE,
    ("sign", "static_cast<int>(std::min(v, rows - i))"): WHOLE,
    ("loop", "k0 <= k in"): LAST,
    ("loop", "j0 <= rank in"): LAST,
    ("loop", "j0 <= width in"): LAST,
    ("bound", "j0 <= width in"): LAST,
    ("loop", "r0 <= rank in"): LAST,
    ("loop", "c <= p.width in"): LAST,
    ("loop", "c <= p.out in"): LAST,
    ("loop", "row <= chunk_end in"): LAST,
    ("condition", "if constexpr (std::is_same_v<P, float> && std::is_same_v<A, float>)"): SAME,
    ("condition", "if constexpr (!std::is_same_v<A, float>) narrow(row + j0"): "without the rounding of the pre-activation the result is nearer to the exact one",
    ("deleted", "continue;"): MORE,
    ("sign", "round_up(n - j, 8)"): WHOLE,
    ("offset", "round_up(width - j0, 8)"): WHOLE,
    ("offset", "round_up(width - j, 8)"): WHOLE,
    ("deleted", "if (!(dw_up || need_p)) return;"): MORE,
    ("deleted", "if (begin != 0) return;"): "every range then adds up the same sums in the same order",
    ("scale", "p.dscale_panels[q]"): "where the scale is a tensor, the number beside it is 1",
    ("deleted", "break;"): "the next case fills vectors that this granularity does not read",
    ("loop", "i <= n in for (int64_t i = 0; i < n; i += kPanel)"): LAST,
    ("sign", "n + i in for (int64_t i = 0; i < n; i += kPanel)"): "rounds numbers of the padding too",
    ("loop", "i <= k in for (int64_t i = 0; i < k; i += depth)"): LAST,
    ("accumulation", "at = panels[i++]"): "the ranges together still cover each operand once, only cut elsewhere",
    ("sign", "std::clamp<int64_t>(begin - at"): "every range then also packs panels of other ranges: the same numbers",
    ("offset", "const int64_t panels[4]"): "the bound of the last operand: the ranges end there by themselves",
    ("condition", "p.kind == kLarge && !p.gate"): MORE,
    ("condition", "!p.total && !p.add"): MORE,
    ("condition", "p.kind == kLarge && (p.dx || p.dgate_weight || p.dgate_bias)"): MORE,
    ("condition", "gate && !p.add"): MORE,
    ("condition", "need.total && !p.total"): MORE,
    ("condition", "p.kind != kMiddleY && p.dgate_weight"): MORE,
    ("condition", "has_row_gate(p.kind) && p.dgate_weight"): MORE,
    ("condition", "has_row_gate(p.kind) && t < p.rows"): MORE,
    ("condition", "large && !p.gate"): MORE,
    ("condition", "large && p.gate"): "only large has a saved gate: the other condition includes this one",
    ("condition", "p.add || !need.total"): "need.total is false where the gate is added, and what is not needed is not read",
    ("condition", "p.kind == kLogits && p.dx"): "for the other granularities dx is written again afterwards, or was written with the same numbers",
    ("condition", "!large || !need.gate"): MORE,
    ("offset", "i * ld -> i in row_gate_gradients<A>("): "H' of rows that are done, where this room lies then, is not needed any more",
    ("offset", "total + kBlockColumns -> total - kBlockColumns in float *total = scratch("): "before the block, where no check watches; the other pieces move with it",
    ("offset", "begin * kTileRows -> begin in for (int64_t row = begin * kTileRows"): ROWS,
    **{("constant", f"std::fill(b.{d}.copy + at"): ZERO for d in ("dt", "dl")},
    **{("offset", f"{change} in multiply(thin.dz + thin_row"): FLOAT for change in ("c * rank -> c", "partial + c * rank -> partial - c * rank")},
    ("offset", "float *wu = panel + p.rank * kPanel, *sums"): SHARE,
    ("bias", "float *wu = panel + p.rank * kPanel, *sums"): SHARE,
    ("offset", "kTileRows * mask_stride(p.width) / "): "more room than is used",
    ("offset", "kMultiplier1) * row_high"): "rows from 2^32 on, more than a test's memory has",
    ("loop", "i <= kRegister / 8"): "the compiler drops a write beyond a register",
    ("condition", "p.dw_down, p.dw_up, p.db_up, false, false"): MORE,
    ("condition", "p.dgate_up_bias, false, false"): MORE,
}

NEARER = "without the rounding of the pre-activation, which goes to z all the same, the result is nearer to the exact one"
LATER = "writes further into a place that is written after it: the next pair's, the next part's, the next factor's or scratch that the next step fills"
BEYOND = "a turn too many reads a row behind the factors or behind a local array, by an address that no check watches, and writes where something is written later"
PHM_EXPLAINED: dict[tuple[str, str], str] = {
    **{
        (kind, line): "prefetching, from any address, changes the speed alone" for kind in ("offset", "product", "sign", "deleted") for line in ("__builtin_prefetch(", "fetch<1>(")
    },
    ("bound", "count >= kBlock"): SAME,
    ("loop", "i < kBlock -> i <= kBlock in for (int64_t i = 0; i < kBlock; ++i) widen"): LATER,
    ("loop", "q < kGroup -> q <= kGroup in for (int64_t q = 0; q < kGroup; ++q)"): BEYOND,
    ("loop", "j < part -> j <= part in for (int64_t j = 0; j < part; j += kLanes) {"): LATER,
    ("loop", "j + kBlock * kLanes <= part -> j + kBlock * kLanes < part"): SAME,
    ("loop", "g < s.pairs -> g <= s.pairs in for (int64_t g = 0"): LATER,
    **{(kind, "round_to<A>(z"): NEARER for kind in ("offset", "deleted")},
    **{(kind, "in for (int64_t i = 0; i < n; i += kPanel) narrow(v + i, rounded"): NEARER for kind in ("loop", "sign", "offset", "deleted")},
    ("condition", "if constexpr (!std::is_same_v<A, float>) {"): NEARER,
    ("loop", "pair < round_up(pairs, kGroup) -> pair <= round_up(pairs, kGroup)"): LATER,
    ("loop", "j < ld -> j <= ld"): LATER,
    ("offset", "kBlock * s.line -> kBlock in"): SHARE,
    ("offset", "s.rank * kLanes -> s.rank in carve("): SHARE,
    ("constant", "std::fill(mixed, mixed + s.thin, 0.f)"): ZERO,
    ("constant", "std::fill(d_inner, d_inner + s.thin, 0.f)"): ZERO,
    ("offset", "begin * kTileRows -> begin in"): ROWS,
    ("bound", "std::min(p.rows, end * kTileRows) -> std::max(p.rows, end * kTileRows)"): ROWS,
    ("loop", "row < std::min(p.rows, end * kTileRows) -> row <= std::min(p.rows, end * kTileRows)"): ROWS,
    ("loop", "i < p.rank -> i <= p.rank in for (int64_t i = 0; i < p.rank; ++i) (Vec::loadu(z"): LATER,
    ("loop", "r < m -> r <= m"): MORE,
    ("loop", "row < chunk_end -> row <= chunk_end"): "a tile of no rows: adds zeros",
    ("deleted", "continue; -> ; in if (!need_"): MORE,
    ("loop", "r <= kBlock in for (int64_t r = 0; r < kBlock; ++r) by["): BEYOND,
}
NORM_EXPLAINED: dict[tuple[str, str], str] = {
    ("deleted", "widen(static_cast<const Half*>(src)"): "the mutants are compiled for fp32 and bf16 alone; the fp16 calls of the tests of the op see it",
    ("product", "begin * kNormRows -> begin in for (int64_t row"): "also computes rows of other ranges, with masks that may be wrong: only where it writes them last is it seen",
    ("bound", "n < v -> n <= v"): "a whole vector, kept as it is or as its first numbers: the same",
    ("bound", "i + kBlock <= n -> i + kBlock < n"): "the last whole block then goes through a copy: the same numbers",
    ("bound", "i + kBlock > n -> i + kBlock >= n"): "all numbers of a whole block are its first ones",
    ("offset", "p.rows - row -> p.rows + row"): "also draws masks of rows that are not there, in their place",
    ("offset", "kNormRows * mask_stride(p.width) / int64_t{sizeof(float)} -> "): "more room than is used",
    ("loop", "i < n -> i <= n in for (int64_t i = 0; i < n; i += kBlock) {"): "one more block, of which no number is left",
    ("constant", "std::fill(weight + n, weight + padded, 0.f)"): ZERO,
    ("constant", "0.f -> 0.5f in Block sum(0.f), squares(0.f);"): "what the deviations from the mean add up to puts it right, whatever the first sum began with",
    ("loop", "tile < last -> tile <= last"): "a tile of no rows: adds zeros",
    ("condition", "p.seed && p.dx"): MORE,
    ("condition", "p.seed && dx"): MORE,
    ("constant", "p.norm ? p.rstd[row] : 1.f"): "nobody reads it where there is no norm",
    ("deleted", "if (!dx && !dresidual) continue;"): MORE,
}


def over(dtypes: tuple[torch.dtype, torch.dtype], kind: type[Spec] = Bottleneck, **options: Any) -> Spec:
    return kind(dtype=dtypes[0], param_dtype=dtypes[1], **options)


SCALES: dict[str, Any] = {"input_scale": 0.7, "adapter_scale": 1.3, "scale": 0.6}
BOTH = (FP32, MIXED)
# Cheap and telling ones first. Rows: whole tiles, one row more, a tile of 8, several chunks; widths and ranks: below a panel, whole panels, several column blocks, beyond a depth
# block.
# 64 x 36 floats end at a page, and rows of 36 are no whole vectors: a read beyond the last row is one beyond the page.
SPECS: list[Spec] = [
    over(FP32, lead=(65,), width=33, rank=7, residual="other", scale="tensor", gate=True),
    over(MIXED, lead=(9,), width=160, rank=40, residual="other", scale="tensor", gate=True),
    *(over(d, lead=(64,), width=64, rank=32, gate=True) for d in BOTH),
    over(MIXED, lead=(64,), width=48, rank=16, scale=0.7),
    over(FP32, lead=(4,), width=48, rank=20, scale=0.7),
    # Few rows, whose weights are not packed: each number of rows that they are rounded up to, panels and vectors that are not full, the last row at a page's end.
    over(FP32, lead=(1,), width=40, rank=33, residual="other", scale="tensor", gate=True),
    over(MIXED, lead=(2,), width=72, rank=36, scale=0.7),
    over(FP32, lead=(3,), width=36, rank=64, activation="silu", biases="none"),
    over(FP32, lead=(4,), width=256, rank=64, scale=0.7),
    over(MIXED, lead=(7,), width=33, rank=130, residual="other", gate=True),
    over(FP32, lead=(8,), width=64, rank=128, residual=None, scale="tensor"),
    over(MIXED, Lora, lead=(1,), width=77, out=160, rank=16, biases="up", scale=0.7),
    over(FP32, lead=(64,), width=36, rank=36, gate=True, scale=0.7),
    over(FP32, lead=(6,), width=64, rank=20),  # two rows more or fewer would be an operand in their place
    # Several tiles that go by columns, in place and copied, of more than a block of columns.
    over(MIXED, lead=(130,), width=72, rank=35, residual="other", scale="tensor", gate=True),
    over(FP32, lead=(192,), width=160, rank=64, scale=0.7),
    over(FP32, lead=(140,), width=264, rank=100, residual="other", gate=True),
    over(FP32, Lora, lead=(130,), width=40, out=264, rank=36, biases="up", scale=0.7, dropout=0.3),
    over(MIXED, Lora, lead=(150,), width=264, out=72, rank=40, dropout=0.3),
    over(FP32, lead=(9,), width=40, rank=20, scale="tensor"),
    *(over(FP32, lead=(65,), width=40, rank=35, activation=a, scale=0.7) for a in ACTIVATIONS),
    *(over(MIXED, lead=(30,), width=33, rank=7, activation=a, residual=None) for a in ACTIVATIONS),
    *(over(d, lead=(130,), width=72, rank=20, biases=b, residual=r, gate=g) for d in BOTH for b, r, g in (("none", "input", True), ("up", "other", False), ("down", None, True))),
    over(FP32, lead=(1,), width=264, rank=8, residual="other"),
    over(MIXED, lead=(620,), width=72, rank=20, scale="tensor", gate=True),
    over(FP32, lead=(300,), width=160, rank=32, residual="other", gate=True),
    over(FP32, lead=(300,), width=40, rank=20, scale="tensor"),
    over(FP32, lead=(620,), width=200, rank=200, gate=True),
    over(FP32, Routed, lead=(5, 23), width=33, rank=7, outside=True, residual="other"),
    over(FP32, Routed, lead=(6, 64), width=64, rank=32),
    over(FP32, Routed, lead=(300,), width=40, rank=20, ids="row", tasks=2, residual=None),
    *(over(d, Routed, lead=(130,), width=72, rank=20, ids="row", shared=s) for d, s in ((MIXED, "down"), (MIXED, "up"), (FP32, "up"))),
    # x narrower and wider than y, by more than a panel; masks of several tiles, of rows of several vectors and of a part of one, in place and copied.
    over(FP32, Lora, lead=(130,), width=40, out=72, rank=7, biases="up", scale=0.7, dropout=0.3),
    over(MIXED, Lora, lead=(65,), width=160, out=33, rank=20, scale=0.7, dropout=0.3),
    over(FP32, Lora, lead=(64,), width=64, out=32, rank=32, dropout=0.5),
    over(FP32, Lora, lead=(64,), width=36, out=264, rank=36, dropout=0.5),
    over(MIXED, Lora, lead=(620,), width=264, out=72, rank=20, dropout=0.1),
    over(FP32, Lora, lead=(9,), width=200, out=40, rank=200),
    over(FP32, Lora, lead=(1,), width=1, rank=1, dropout=0x92C9B44 / 2**32),  # the number of its one element
    *(
        over(d, Gated, lead=(2, 33), width=33, rank=7, gate_rank=5, granularity=g, combine=c, save_gate=s, **SCALES)
        for g in GRANULARITIES
        for d, c, s in ((FP32, "multiply", True), (FP32, "add", False), (MIXED, "multiply", False), (MIXED, "add", True))
    ),
    *(over(FP32, Gated, lead=(2, 32), width=w, rank=w, gate_rank=w, granularity=g, save_gate=False) for g in GRANULARITIES for w in (64, 36)),
    *(over(d, Gated, lead=(1, 9), width=160, rank=40, gate_rank=35, granularity=g, save_gate=s) for g in GRANULARITIES for d, s in ((FP32, False), (MIXED, True))),
    *(over(d, Gated, lead=(3, 23), width=72, rank=20, gate_rank=36, granularity=g, biases="none", gate_bias=False) for g in GRANULARITIES for d in BOTH),
    *(
        over(d, Gated, lead=(2, 310), width=72, rank=20, gate_rank=36, granularity=g, combine=c, save_gate=False)
        for g in GRANULARITIES
        for d, c in ((FP32, "multiply"), (MIXED, "add"))
    ),
    # One tile and two that go by columns, of more than a block of columns, in place and copied; tiles of rows with what forward saved.
    *(
        over(d, Gated, lead=lead, width=w, rank=40, gate_rank=35, granularity=g, combine=c, save_gate=True, **SCALES)
        for g in GRANULARITIES
        for d, c, lead, w in (
            (FP32, "multiply", (2, 60), 264),
            (MIXED, "add", (2, 50), 160),
            (FP32, "add", (1, 64), 160),
            (MIXED, "multiply", (4, 32), 192),
            (MIXED, "multiply", (2, 100), 72),
        )
    ),
    *(over(FP32, Gated, lead=(2, 65), width=264, rank=200, gate_rank=200, granularity=g, save_gate=False) for g in ("large", "middleX", "small")),
    *(over(d, Gated, lead=(2, 70), width=160, rank=20, gate_rank=12, granularity=g, save_gate=True) for g in GRANULARITIES for d in BOTH),
]
CALLS: list[Spec] = [
    over(MIXED, lead=(70,), width=33, rank=7, residual="other", scale="tensor", gate=True),
    over(FP32, lead=(70,), width=40, rank=7),
    over(FP32, Routed, lead=(70,), width=40, rank=7, residual="other"),
    # Few rows and few tiles, whose panels two threads share.
    over(FP32, lead=(3,), width=600, rank=288),
    over(MIXED, lead=(3,), width=600, rank=288, residual="other", scale="tensor", gate=True),
    over(FP32, lead=(40,), width=72, rank=40),
    over(MIXED, lead=(70,), width=72, rank=40, residual="other", scale="tensor", gate=True),
    over(FP32, Lora, lead=(70,), width=40, out=72, rank=40, dropout=0.3),
    over(FP32, Lora, lead=(70,), width=40, out=72, rank=7, dropout=0.3),
    over(MIXED, Lora, lead=(70,), width=72, out=33, rank=7, biases="up", dropout=0.3),
    *(
        over(d, Gated, lead=(2, t), width=40, rank=7, gate_rank=5, granularity=g, combine=c, save_gate=s)
        for g in GRANULARITIES
        for d, c, t, s in ((FP32, "multiply", 9, False), (MIXED, "add", 9, True), (FP32, "multiply", 9, True), (MIXED, "multiply", 70, True))
    ),
]
# Parts of less than a vector, whole vectors and beyond; one to four groups of pairs; a block and a tile less than whole, several chunks.
PHM_SPECS: list[Spec] = [
    over(FP32, PHM, lead=(65,), width=33, rank=9, division=3, residual="other", scale=0.7),
    over(MIXED, PHM, lead=(9,), width=160, rank=40, scale=0.7),
    *(over(d, PHM, lead=(64,), width=64, rank=64) for d in BOTH),
    over(FP32, PHM, lead=(64,), width=36, rank=36, scale=0.7),
    *(over(FP32, PHM, lead=(13,), width=40, rank=20, activation=a, scale=0.7) for a in ACTIVATIONS),
    *(over(MIXED, PHM, lead=(30,), width=36, rank=12, activation=a, residual=None) for a in ACTIVATIONS),
    *(over(d, PHM, lead=(130,), width=72, rank=24, biases=b, residual=r) for d in BOTH for b, r in (("none", "input"), ("up", "other"), ("down", None))),
    *(
        over(d, PHM, lead=(20,), width=80, rank=20, division=n, factor_rank=k, residual=r)
        for d, n, k, r in ((FP32, 1, 1, "other"), (MIXED, 2, 3, None), (FP32, 5, 2, "input"), (MIXED, 4, 4, "other"))
    ),
    over(FP32, PHM, lead=(1,), width=264, rank=8),
    over(MIXED, PHM, lead=(620,), width=72, rank=20),
    over(FP32, PHM, lead=(620,), width=200, rank=200, factor_rank=2),
]
PHM_CALLS: list[Spec] = [over(MIXED, PHM, lead=(70,), width=36, rank=12, factor_rank=2, residual="other", scale=0.7), over(FP32, PHM, lead=(70,), width=64, rank=12)]
# Rows of less than a block, of whole ones and beyond, that end at a page; tiles of 16 rows, whole and not, in several chunks; each option with and without what is beside it.
NORM_SPECS: list[Spec] = [
    *(over(d, Norm, lead=(65,), width=w, norm=n, dropout=p) for d in BOTH for w, n, p in ((33, "layer", 0.3), (64, "rms", 0.0), (36, "rms", 0.3), (64, "layer", 0.3))),
    *(over(MIXED, Norm, lead=(33,), width=w, norm=n, residual="wide", dropout=p) for w, n, p in ((40, "layer", 0.3), (72, "rms", 0.0))),
    *(over(d, Norm, lead=(17,), width=40, norm=n, returns=v, biases=b) for d in BOTH for n, v, b in (("layer", "both", "weight"), ("rms", "both", "none"))),
    *(over(d, Norm, lead=(17,), width=40, biases="none") for d in BOTH),
    *(over(d, Norm, lead=(9,), width=70, norm=n, residual=None, biases=b, dropout=p) for d in BOTH for n, b, p in (("layer", "both", 0.0), ("rms", "weight", 0.5))),
    *(over(d, Norm, lead=(9,), width=70, residual=None, biases="none") for d in BOTH),
    *(over(d, Norm, lead=(40,), width=w, norm=None, residual=r, biases="none", dropout=p) for d in BOTH for w, r, p in ((33, "same", 0.3), (64, None, 0.5), (36, "wide", 0.0))),
    *(over(d, Norm, lead=(40,), width=40, norm="layer", biases="none", dropout=0.3, returns="sum") for d in BOTH),
    over(FP32, Norm, lead=(620,), width=100, dropout=0.1),
    over(MIXED, Norm, lead=(620,), width=33, norm="rms", returns="both", eps=0.1),
    over((torch.bfloat16, torch.bfloat16), Norm, lead=(40,), width=70),
    over(FP32, Norm, lead=(1,), width=1, norm="rms", dropout=0.5),
]
NORM_CALLS: list[Spec] = [
    over(MIXED, Norm, lead=(70,), width=36, dropout=0.3),
    over(FP32, Norm, lead=(150,), width=64, norm="rms"),
    over(FP32, Norm, lead=(20,), width=40, residual=None),
]


def concerns(mutant: cpp.Mutant | None, op: str) -> bool:
    files = {"bottleneck": FILES[1], "routed_bottleneck": FILES[1], "gated_bottleneck": FILES[2]}
    return mutant is None or mutant.file in (FILES[0], FILES[4]) or (mutant.file in (FILES[1], FILES[3]) if op == "lora" else mutant.file == files[op])


def includes() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [f"-isystem{path}" for path in include_paths()]


def commands(folder: Path) -> list[list[str]]:
    guard = str(Path(__file__).with_name("guard.cpp"))
    return [["g++", *FLAGS, *includes(), "-c", source, "-o", f"{Path(source).stem}.o"] for source in (*SOURCES[:0:-1], SOURCES[0], guard)]


def link(folder: Path) -> list[str]:
    from torch.utils.cpp_extension import library_paths

    (folder / "_cpu_build.json").write_text(json.dumps({"torch": ".".join(torch.__version__.split(".")[:2]), "levels": ["avx2"]}))
    objects = [f"{Path(source).stem}.o" for source in (*SOURCES, "guard")]
    return ["g++", "-shared", "-fopenmp", *objects, "-o", "_cpu_avx2.so", *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu"]


def load(folder: Path, mutant: cpp.Mutant | None) -> None:
    _cpu._FOLDER = folder
    assert _cpu.unavailable() is None
    library = ctypes.CDLL(str(folder / "_cpu_avx2.so"))
    library.fastadapt_guard()
    if mutant is not None and not mutant.static:
        ctypes.c_int.in_dll(library, "fastadapt_mutant").value = mutant.number


def prepared(specs: list[Spec]) -> list[calls.Prepared]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    return [calls.prepare(spec) for spec in specs]


def of_calls(specs: list[Spec]) -> list[Callable[[], str]]:
    """What is checked of each call beside its numbers."""
    return [
        partial(calls.first_failing, checks.assert_no_grad_path, specs, "cpu"),
        partial(calls.first_failing, checks.assert_single_gradients, specs, "cpu"),
        partial(calls.first_failing, checks.assert_deterministic, specs, "cpu"),  # for two threads too: ranges that do not begin at 0
        partial(calls.first_failing, checks.assert_rounds_parameters, [s for s in specs if s.param_dtype != s.dtype], "cpu"),
        partial(calls.first_failing, checks.assert_any_layout, [s for s in specs if "large_full" not in str(s)], "cpu"),  # large_full's gate is torch's own product
    ]


def without_onednn(step: Callable[[], str]) -> str:
    """bf16 then has the GEMMs of fp32."""
    torch.backends.mkldnn.enabled = False
    try:
        return step()
    finally:
        torch.backends.mkldnn.enabled = True


def prepare() -> schemata.Check:
    assert torch.cpu._is_avx512_bf16_supported(), "this processor cannot try the mutants of bf16's GEMMs"
    every = prepared(SPECS)

    def check(folder: Path, mutant: cpp.Mutant | None) -> str:
        load(folder, mutant)
        steps: list[Callable[[], str]] = [
            partial(calls.first_wrong, [p for p in every if concerns(mutant, p.spec.op)], "cpu"),
            partial(calls.relu_at_zero, "cpu"),
            partial(calls.rows_far_apart, "cpu"),
            partial(calls.extreme_pre_activations, "cpu", (torch.float32, torch.bfloat16)),
            partial(calls.gates_far_from_zero, "cpu") if concerns(mutant, "gated_bottleneck") else str,
            *of_calls([spec for spec in CALLS if concerns(mutant, spec.op)]),
            partial(without_onednn, partial(calls.first_wrong, [p for p in every if concerns(mutant, p.spec.op) and p.spec.dtype != torch.float32], "cpu")),
            partial(without_onednn, partial(calls.first_failing, checks.assert_rounds_parameters, [s for s in CALLS if concerns(mutant, s.op) and s.dtype == MIXED[0]], "cpu")),
        ]
        return next(filter(None, (step() for step in steps)), "")

    return check


def prepare_phm() -> schemata.Check:
    every = prepared(PHM_SPECS)

    def check(folder: Path, mutant: cpp.Mutant | None) -> str:
        load(folder, mutant)
        return next(filter(None, (step() for step in (partial(calls.first_wrong, every, "cpu"), *of_calls(PHM_CALLS)))), "")

    return check


def prepare_norm() -> schemata.Check:
    every = prepared(NORM_SPECS)

    def check(folder: Path, mutant: cpp.Mutant | None) -> str:
        load(folder, mutant)
        steps = of_calls(NORM_CALLS)
        del steps[3]  # parameters are not rounded
        steps += [partial(calls.statistics_of_the_exact_sum, "cpu"), partial(calls.long_sums, "cpu")]
        return next(filter(None, (step() for step in (partial(calls.first_wrong, every, "cpu"), *steps))), "")

    return check


FAMILY = schemata.Family("cpu", FILES, commands, ("cpu_ops.o", "cpu_entrance.o", "guard.o"), link, prepare, EXPLAINED)

PHM_FIXED = ("bottleneck.o", "gated_bottleneck.o", "dropout_add_norm.o", "cpu_entrance.o", "guard.o")
PHM_FAMILY = schemata.Family("cpu_phm", PHM_FILES, commands, PHM_FIXED, link, prepare_phm, PHM_EXPLAINED)

NORM_FAMILY = schemata.Family("cpu_norm", NORM_FILES, commands, ("bottleneck.o", "gated_bottleneck.o", "phm_bottleneck.o", "guard.o"), link, prepare_norm, NORM_EXPLAINED)

if __name__ == "__main__":
    family = {"phm": PHM_FAMILY, "norm": NORM_FAMILY}.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if family is not None:
        del sys.argv[1]
    sys.exit(schemata.main(family or FAMILY))
