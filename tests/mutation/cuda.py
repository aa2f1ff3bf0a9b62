"""Mutants of the CUDA kernels and their launch sequences: `python -m tests.mutation.cuda` writes tests/data/cuda_mutants.json; with `phm`, of Compacter's, cuda_phm_mutants.json;
with `norm`, of dropout, sum and norm, cuda_norm_mutants.json.

They run on the emulator, in bf16 over bf16 and fp32 parameters and in fp16, for a few ranks (csrc/cuda/launch.h), with races watched in shared and global memory, copies that
arrive at the last legal moment, every launch held to the ranges of its arguments and to the bytes of its kernel's table, and every local array to its bounds. Constants of
csrc/include/cuda_plan.h, phm_bottleneck_cuda.h and dropout_add_norm_cuda.h are sizes that all of it is built from: they are not mutated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastadapt import backend, functional
from fastadapt.ops import _cuda
from fastadapt.ops.philox import keep, philox
from tests.cuda import emulator, test_traffic
from tests.mutation import calls, cpp, forks, schemata
from tests.ops import checks
from tests.ops.specs import ACTIVATIONS, BF16, DTYPES, FP32, GRANULARITIES, MIXED, PHM, Bottleneck, Gated, Lora, Norm, Routed, Spec

FP16, FP16_MIXED = DTYPES[3:]
SHARED = ("csrc/common/activations.cuh", "csrc/common/tiles.cuh")
PHILOX = "csrc/common/philox.cuh"
OPS = ("bottleneck", "gated_bottleneck", "lora", "routed_bottleneck")
FILES = (*SHARED, PHILOX, *(f"csrc/cuda/{op}.cuh" for op in OPS), *(f"csrc/cuda/{op}.cu" for op in OPS), "csrc/cuda/sequence.h")
PHM_FILES = ("csrc/cuda/phm_bottleneck.cuh", "csrc/cuda/phm_bottleneck.cu")
NORM_FILES = ("csrc/cuda/dropout_add_norm.cuh", "csrc/cuda/dropout_add_norm.cu")
ONLY = {PHILOX: "lora", **{f"csrc/cuda/{op}{suffix}": op for op in OPS[1:] for suffix in (".cuh", ".cu")}}
"""Files that one op alone runs."""
SOURCES = {
    "_cuda_ops": "csrc/cuda_ops.cpp",
    **{op: f"csrc/cuda/{op}.cu" for op in (*OPS, "phm_bottleneck", "dropout_add_norm")},
    **{f"{op}_{t}": f"csrc/cuda/inst/{op}_{t}.cu" for op in (*OPS, "phm_bottleneck", "dropout_add_norm") for t in ("bf16", "fp16")},
    "dropout_add_norm_fp32": "csrc/cuda/inst/dropout_add_norm_fp32.cu",
    "guard": "tests/mutation/guard.cpp",
}

MORE = "computes what nobody reads then: slower, the same results, and the same bytes of global memory"
NO_ROW = "of a row that does not exist, whose results are not stored"
ONE_DUAL = "the dual kernels have no kind but large, and no other has a second projection to keep"
DROPPED = "sums that a problem reads and drops only where a bias is shared and its matrix is not, or the reverse: slower, the same results"
BEYOND_LAST = "of fragments beyond the last, which the other condition leaves out"
EARLIER = "written before it is read"
# (kind, a part of "before -> after in line") -> why no test can see it.
EXPLAINED: dict[tuple[str, str], str] = {
    ("bound", "z < least -> z <= least"): "at the least value both branches give it",
    ("bound", "v < -80.f -> v <= -80.f"): "at the bound both branches give it",
    ("constant", "80.f -> 88.0f"): "any bound up to 88 keeps e finite; a sigma of exp(-80) or less is nothing beside a tensor's other numbers",
    ("constant", "-80.f -> -88.0f"): "as the bound on the other side of the condition",
    ("condition", "kAll % kThreads != 0 && i >= kAll -> static_cast<bool>(i >= kAll)"): "i does not get to kAll where kThreads divides it",
    ("loop", "j < kTiles -> j <= kTiles in for (int j = 0; j < kTiles; j += 4)"): BEYOND_LAST,
    ("bound", "k < 4 -> k <= 4 in for (int k = 0; k < 4 && j + k < kTiles; ++k)"): "no call has more than 4 fragments, so the other bound ends the loop",
    ("condition", "k < 4 && j + k < kTiles -> static_cast<bool>(j + k < kTiles)"): "no call has more than 4 fragments, so the other bound ends the loop",
    (
        "offset",
        "j + k -> j - k in for (int k = 0; k < 4; ++k) v[k] = j + k < kTiles",
    ): "one of two equal conditions: the other keeps the index in bounds",
    ("bound", "j + k < kTiles -> j + k <= kTiles in for (int k = 0; k < 4; ++k) v[k] = j + k < kTiles"): "one of two equal conditions: the other keeps the index in bounds",
    ("constant", "0.f -> 0.5f in if (c + 1 >= count) return {c < count ?"): "behind the last parameter it meets a factor that is zero there, or is not stored",
    (
        "loop",
        "j0 < Tr::kTiles -> j0 <= Tr::kTiles",
    ): "a turn too many stores no column; the numbers it changes lie beyond a local array, by an address that no check watches",
    ("bound", "first + p.rows_per_split < p.rows -> first + p.rows_per_split <= p.rows"): "where the two are equal, either is the smaller one",
    ("deleted", "not_bias.s = nullptr -> static_cast<void>(not_bias.db_up = nullptr)"): DROPPED,
    ("deleted", "not_bias.s = nullptr -> static_cast<void>(not_bias.db_up = nullptr, not_bias.s = nullptr)"): DROPPED,
    ("deleted", "return; -> ; in if (share.empty()) return;"): MORE,
    ("condition", "Params::kGates && problem.b_up -> static_cast<bool>(Params::kGates)"): "column sums of dy are there only beside a bias",
    ("bound", "first + each < end -> first + each <= end"): "where the two are equal, either is the smaller one",
    ("bound", "first + each < routing.count -> first + each <= routing.count"): "where the two are equal, either is the smaller one",
    ("condition", "false -> true in FASTADAPT_DEVICE Projections weights"): "says how long a bias is, and the slab kernel reads none",
    ("bound", "id < routing.tasks -> id <= routing.tasks"): "the number of tasks stands for no task as well",
    ("loop", "mask < 32 -> mask < (32) - (2)"): "the last mask is 16",
    ("bound", "first < last -> first <= last in const int steps"): "every split has a row",
    ("sign", "last - first -> last + first in const int steps"): "turns over rows behind the split, which are read as zero and not stored: slower, the same results",
    ("condition", "owns_p && problem.s -> static_cast<bool>(owns_p)"): MORE,
    ("condition", "owns_p && problem.s -> static_cast<bool>(problem.s)"): MORE,
    ("loop", "j < Tr::kTiles -> j <= Tr::kTiles in for (int j = 0; j < Tr::kTiles; ++j)"): "columns from the rank on are left out in the loop",
    ("bound", "kEach < kOwn -> kEach <= kOwn"): "where the two are equal, every thread's numbers lie in the tile",
    (
        "condition",
        "kEach < kOwn && first >= kRows * kColumns -> static_cast<bool>(first >= kRows * kColumns)",
    ): "where kEach is not smaller, every thread's numbers lie in the tile",
    ("loop", "j < kTiles -> j <= kTiles in for (int j = 0; j < kTiles; ++j)"): "what a turn too many changes lies beyond a local array, by an address that no check watches",
    ("deleted", "forward.activation = kIdentity, forward.dropout = dropout(p) -> static_cast<void>(forward.dropout = dropout(p))"): "kIdentity is 0, which it is before",
    ("condition", "of_y && (problem.p || problem.s) -> static_cast<bool>((problem.p || problem.s))"): MORE,
    ("condition", "of_x && problem.dx -> static_cast<bool>(problem.dx)"): MORE,
    ("condition", "of_x && problem.q -> static_cast<bool>(problem.q)"): MORE,
    ("bound", "column < x_width -> column <= x_width"): MORE,
    ("bound", "column < y_width -> column <= y_width"): MORE,
    ("bound", "this->in_width > width -> this->in_width >= width"): "where the two are equal, either is the larger one",
    ("bound", "d >= p.width -> d > p.width in if (d >= p.width) return;"): "8 divides the width, so each warp of a block has a row of dWu",
    ("deleted", "return; -> ; in if (d >= p.width) return;"): "8 divides the width, so each warp of a block has a row of dWu",
    ("scale", "problem.scale -> 1.f in if (problem.dscale)"): "a scale is a number or a tensor: beside a trained one the number is 1",
    ("loop", "n < p.sum_count -> n <= p.sum_count"): "each block has found its part before",
    ("loop", "n < p.count -> n <= p.count"): "a copy that is not there has no blocks",
    ("constant", "0.f -> 0.5f in return first + column < columns ?"): "sums of columns that do not exist are not stored",
    ("constant", "0.f -> 0.5f in float mean = 0.f"): EARLIER,
    ("constant", "0.f -> 0.5f in means[0] = means[1] = 0.f"): NO_ROW,
    ("deleted", "means[0] = means[1] = 0.f; -> ;"): NO_ROW,
    ("bound", "r < 16 -> r <= 16"): "no lane has a seventeenth row; the sample's mean is at hand, or the loop ends with the rows of a tile",
    ("condition", "!Tr::kDual && g.kind == kLogits -> static_cast<bool>(g.kind == kLogits)"): ONE_DUAL,
    ("condition", "!Tr::kDual && g.kind == kMiddleY -> static_cast<bool>(g.kind == kMiddleY)"): ONE_DUAL,
    ("condition", "!Tr::kDual && g.kind == kSmall -> static_cast<bool>(g.kind == kSmall)"): ONE_DUAL,
    ("condition", "!Tr::kDual && row_gate(g.kind) -> static_cast<bool>(row_gate(g.kind))"): ONE_DUAL,
    ("condition", "Tr::kDual && g.gate -> static_cast<bool>(g.gate)"): ONE_DUAL,
    ("constant", "0.f -> 0.5f in float2 own{0.f, 0.f}"): EARLIER,
    ("condition", "by_row && !g.add -> static_cast<bool>(!g.add)"): "what follows is said of a gate a row alone",
    ("constant", "0.f -> 0.5f in float slopes[2] = {0.f, 0.f}, gates[2]"): "read for a gate a row alone, which writes them first for all rows that exist",
    ("condition", "step == (sweeps_twice ? ups : 0) && by_row -> static_cast<bool>(step == (sweeps_twice ? ups : 0))"): MORE,
    ("condition", "step == (sweeps_twice ? ups : 0) && by_row && !p.row_sums_only -> static_cast<bool>(step == (sweeps_twice ? ups : 0) && by_row)"): MORE,
    ("constant", "0.f -> 0.5f in float2 of_x{0.f, 0.f}"): EARLIER,
    ("constant", "0.f -> 0.5f in float2 total{0.f, 0.f}"): "written first wherever what comes of it is kept",
    ("deleted", "continue; -> ; in continue; }"): MORE,
    ("constant", "0.f -> 0.5f in Logistic gate_x"): "the rest of a gate a row or of a given one is not read, or written first",
    ("condition", "p.sums && !summing -> static_cast<bool>(p.sums) in if (p.sums && !summing) {"): MORE,
    ("condition", "p.sums && !summing -> static_cast<bool>(!summing) in if (p.sums && !summing) {"): MORE,
    ("constant", "0.f -> 0.5f in const float sums[4]"): "stored for small alone, which has other numbers there",
    ("bound", "k < 2 -> k <= 2 in if (k < 2 || small)"): MORE,
    ("barrier", "ptx::sync_block(); -> ; in ptx::sync_block(); if (lane() == 0)"): "parts a read and a write of places that lie apart; the barrier before it parts the others",
    ("condition", "!z || !ragged(rank) -> static_cast<bool>(!ragged(rank))"): "z is missing where its rank is 0, which is not ragged",
    ("bound", "p.samples > 0 -> p.samples >= 0"): "there are no rows without samples",
    ("bound", "p.gate_rank > p.rank -> p.gate_rank >= p.rank"): "where the two are equal, either is the larger one",
    ("condition", "large && p.gate_rank > p.rank -> static_cast<bool>(p.gate_rank > p.rank)"): "without a second bottleneck its rank is 0",
    ("deleted", "first.sums = nullptr -> static_cast<void>(first.sums = nullptr)"): "no step of the first launch gets to these stores",
    ("offset", "row >> 32"): "rows from 2^32 on, more than a test's memory has",
    ("offset", "sizeof(V) + 255) / 256 -> (static_cast<size_t>(count) * sizeof(V) + 255)"): "a workspace of more bytes than it needs, its parts aligned as well",
}


NO_COLUMN = "columns behind a part's meet zeros of the factor, or are not stored"
NO_TOKEN = "rows behind the tile are read as zero and not stored: slower, the same results"
PHM_EXPLAINED: dict[tuple[str, str], str] = {
    ("bound", "rows - first_token < tile -> rows - first_token <= tile"): "where the two are equal, either is the smaller one",
    ("constant", "0.f -> 0.5f in return pack(column + j < columns"): NO_COLUMN,
    ("condition", "true -> false in bool begins = true;"): "written for every tile before it is read",
    ("constant", "0.f -> 0.5f in ptx::store_shared(to + 2 * (pair * pitch + c)"): "meets zeros of the rows, or padded pairs, which mix leaves zero; only NaN would show",
    ("loop", "item < groups * plan::ceil_div(rows, 16) -> item <= groups"): NO_TOKEN,
    ("condition", "Tr::kWhole || column + j < s.wide -> static_cast<bool>(column + j < s.wide)"): "a whole part has all 8 columns: slower, the same results",
    ("loop", "t0 < tokens -> t0 <= tokens"): NO_TOKEN,
    ("constant", "0.f -> 0.5f in const float4 v = out ?"): "without a factor's gradient its sums are not stored",
    ("sign", "pair + half -> pair - half in if (!out || pair + half >= pairs) break;"): MORE,
    ("bound", "pair + half >= pairs -> pair + half > pairs in if (!out"): MORE,
    ("condition", "!out || pair + half >= pairs -> static_cast<bool>(!out)"): MORE,
    ("offset", "arena + tile.at.factors[0][0] -> arena - tile.at.factors[0][0]"): "this piece lies at 0",
    ("loop", "i < p.count -> i <= p.count"): "each block has found its part before",
    ("constant", "0.f -> 0.5f in return first + column < of.columns ?"): "sums of columns that do not exist are not stored",
    ("condition", "false -> true in return with_type(call.activation_type"): "the forward gets as much shared memory as the backward, and uses the beginning of it",
    ("bound", "width > kMost -> width >= kMost"): "so wide a part does not fit shared memory either",
    ("bound", "rank > kMost -> rank >= kMost"): "so wide a part does not fit shared memory either",
}

NO_UNIT = "of a unit without columns, which adds zeros and is not stored"
ONLY_TYPES = "stands for its type"
NORM_EXPLAINED: dict[tuple[str, str], str] = {
    ("condition", "sizeof(V) == 4 || p.float_parameters -> static_cast<bool>(p.float_parameters)"): "of sums in fp32 the parameters are too: a branch more",
    ("deleted", "return; -> ; in if (!p.dropout.seed) return;"): "without dropout every number is kept, and multiplied by 1: slower, the same results",
    ("loop", "i < Tr::kUnits -> i <= Tr::kUnits"): NO_UNIT,
    ("bound", "row.left(i) <= 0 -> row.left(i) < 0"): NO_UNIT,
    ("deleted", "break; -> ; in if (row.left(i) <= 0) break;"): NO_UNIT,
    ("condition", "Tr::kWhole || j < row.left(i) -> static_cast<bool>(j < row.left(i))"): "of a whole unit each number has a column",
    ("loop", "r < Tr::kRows -> r <= Tr::kRows"): "no thread has a row of that number",
    ("sign", "r + 1 -> r - 1 in if (r + 1 < Tr::kRows) ptx::sync_block();"): "a barrier more at the end",
    ("bound", "r + 1 < Tr::kRows -> r + 1 <= Tr::kRows in if (r + 1 < Tr::kRows) ptx::sync_block();"): "a barrier more at the end",
    ("bound", "first + p.rows_per_block < p.rows -> first + p.rows_per_block <= p.rows"): "where the two are equal, either is the smaller one",
    ("loop", "at < end -> at <= end"): "rows behind the block's have no columns",
    ("constant", "0.f -> 0.5f in const float mean = normed"): "rstd of what is zero, or not read",
    ("constant", "0.f -> 0.5f in return first + column < p.width ?"): "sums of columns that do not exist are not stored",
    ("deleted", "return; -> ; in if (count == 0) return;"): "without such gradients there are no partials: what follows is not read, and of no bytes",
    ("constant", "0.f -> 0.5f in if (call.x_type == kFloat) return f(0.f, 0.f);"): ONLY_TYPES,
    ("constant", "0.f -> 0.5f in return with_type(call.x_type"): ONLY_TYPES,
}


def over(dtypes: tuple[torch.dtype, torch.dtype], kind: type[Spec] = Bottleneck, **options: Any) -> Spec:
    return kind(dtype=dtypes[0], param_dtype=dtypes[1], **options)


SCALES: dict[str, Any] = {"input_scale": 0.7, "adapter_scale": 1.3, "scale": 0.6}
# Cheap and telling ones first. Widths of part of a slab, ranks with and without padding, rows of part of a tile, of several tiles and of several splits.
SPECS: list[Spec] = [
    over(MIXED, lead=(37,), width=72, rank=7, residual="other", scale="tensor", gate=True),
    over(BF16, lead=(70,), width=136, rank=16),
    over(FP16, lead=(9,), width=40, rank=32, residual=None, gate=True, scale=0.7),
    over(FP16_MIXED, lead=(9,), width=40, rank=8, gate=True, scale="tensor"),
    *(over(d, lead=(20,), width=64, rank=16, activation=a, scale=0.7) for d, a in zip((BF16, FP16, MIXED, FP16, FP16), ACTIVATIONS, strict=True)),
    *(over(BF16, lead=(20,), width=40, rank=24, biases=b, residual=r) for b, r in (("none", "input"), ("up", "other"), ("down", None))),
    over(BF16, lead=(600,), width=64, rank=16, gate=True, scale="tensor"),
    over(MIXED, lead=(130,), width=72, rank=170, gate=True),
    over(BF16, lead=(70,), width=72, rank=256),
    over(BF16, lead=(3,), width=40, rank=255),  # z without padding ends where the workspace does
    *(
        over(d, Gated, lead=(2, 33), width=72, rank=r, gate_rank=q, granularity=g, combine=c, save_gate=s, **SCALES)
        for g in GRANULARITIES
        for d, r, q, c, s in ((BF16, 16, 24, "multiply", True), (MIXED, 7, 9, "add", False), (FP16, 32, 8, "multiply", False), (BF16, 8, 32, "add", True))
    ),
    *(over(BF16, Gated, lead=(3, 23), width=40, rank=8, gate_rank=8, granularity=g, biases="none", gate_bias=False) for g in GRANULARITIES),
    *(over(BF16, Gated, lead=(2, 70), width=72, rank=200, gate_rank=130, granularity=g, save_gate=False) for g in GRANULARITIES),
    *(over(BF16, Gated, lead=(2, 70), width=136, rank=192, gate_rank=q, granularity=g, save_gate=False) for g, q in (("middleX", 8), ("large", 170))),
    # Segments of part of a tile, of several tiles and splits; more ids than the routing has threads.
    over(MIXED, Routed, lead=(7, 60), width=72, rank=7, tasks=4, residual="other", scale=0.7, outside=True, shared="up"),
    over(FP16, Routed, lead=(300,), width=40, rank=24, tasks=3, ids="row", outside=True, shared="down"),
    over(BF16, Routed, lead=(700,), width=64, rank=16, tasks=2, ids="row", outside=True, residual=None),
    over(BF16, Routed, lead=(11, 13), width=72, rank=250, tasks=2, biases="none"),
    over(FP16_MIXED, Routed, lead=(9,), width=40, rank=9, tasks=20, biases="up"),
    over(BF16, Routed, lead=(24, 5), width=40, rank=32, tasks=12),  # many more tiles than rows would fill
    # Slabs that only x or only y has; masks of tiles whose threads draw 8, 16 and 32 bits each; the number of the one element that is kept, and not dropped.
    over(MIXED, Lora, lead=(37,), width=72, out=136, rank=7, biases="up", scale=0.6, dropout=0.3),
    over(BF16, Lora, lead=(70,), width=200, out=40, rank=16, dropout=0.5, seed=-3),
    over(FP16, Lora, lead=(20,), width=40, out=136, rank=8),
    over(BF16, Lora, lead=(1,), width=8, out=8, rank=1, dropout=0x92C9B44 / 2**32),
    over(FP16, Lora, lead=(600,), width=64, out=136, rank=24, dropout=0.1),
    over(BF16, Lora, lead=(130,), width=136, out=72, rank=170, dropout=0.3),
    over(FP16_MIXED, Lora, lead=(70,), width=40, out=72, rank=250, biases="up", dropout=0.2),
    *(over(BF16, Gated, lead=(2, 300), width=64, rank=8, gate_rank=8, granularity=g, save_gate=False) for g in ("large", "middleX", "middleY", "small")),
]
CALLS: list[Spec] = [
    over(MIXED, lead=(20,), width=40, rank=7, residual="other", scale="tensor", gate=True),
    over(MIXED, Routed, lead=(5, 7), width=40, rank=7, residual="other", outside=True, shared="up"),
    over(BF16, Routed, lead=(20,), width=40, rank=8, ids="row", outside=True),
    over(MIXED, Lora, lead=(3, 7), width=40, out=72, rank=7, biases="up", dropout=0.3),
    over(FP16, Lora, lead=(20,), width=72, out=40, rank=8, dropout=0.3),
    *(
        over(d, Gated, lead=(2, 9), width=40, rank=8, gate_rank=7, granularity=g, combine=c, save_gate=s)
        for g in GRANULARITIES
        for d, c, s in ((BF16, "multiply", False), (MIXED, "add", True))
    ),
    over(MIXED, Gated, lead=(3, 23), width=40, rank=24, gate_rank=200),
]
NOTHING, EVERYTHING = (), None
# And what is trained.
TRAFFIC: list[tuple[Spec, tuple[str, ...] | None]] = [
    *(
        (over(MIXED, lead=(37,), width=72, rank=7, residual="other", scale="tensor", gate=True), needs)
        for needs in (EVERYTHING, NOTHING, ("x",), ("b_up",), ("w_up",), ("b_down",), ("gate",))
    ),
    *((over(BF16, lead=(20,), width=40, rank=16), needs) for needs in (EVERYTHING, NOTHING, ("x",), ("w_down",))),
    (over(BF16, lead=(20,), width=40, rank=16, residual=None), ("x",)),
    (over(BF16, lead=(600,), width=72, rank=200, biases="none", gate=True), EVERYTHING),
    *(
        (over(d, Gated, lead=(2, 9), width=40, rank=8, gate_rank=7, granularity=g, combine=c, save_gate=s), needs)
        for g in GRANULARITIES
        for d, c, s in ((BF16, "multiply", False), (MIXED, "add", True), (FP16, "multiply", True))
        for needs in (EVERYTHING, NOTHING, ("h",), ("gate_weight",))
    ),
    *((over(BF16, Gated, lead=(2, 9), width=40, rank=7, gate_rank=8, granularity=g, save_gate=False), needs) for g in GRANULARITIES for needs in (EVERYTHING, NOTHING)),
    *((over(BF16, Gated, lead=(2, 70), width=40, rank=200, gate_rank=8, granularity=g, save_gate=False), EVERYTHING) for g in ("large", "small")),
    *(
        (over(MIXED, Routed, lead=(9, 17), width=72, rank=7, tasks=4, outside=True, shared="up", residual="other"), needs)
        for needs in (EVERYTHING, NOTHING, ("x",), ("b_up",), ("w_up",), ("b_down",), ("w_down",))
    ),
    *((over(BF16, Routed, lead=(700,), width=64, rank=16, tasks=2, ids="row", outside=True, shared="down"), needs) for needs in (EVERYTHING, ("x",), ("b_down",), ("b_up",))),
    (over(BF16, Routed, lead=(11, 13), width=72, rank=250, tasks=2, biases="none"), EVERYTHING),
    *(
        (over(MIXED, Lora, lead=(37,), width=72, out=200, rank=7, biases="up", dropout=0.3), needs)
        for needs in (EVERYTHING, NOTHING, ("x",), ("w_down",), ("w_up",), ("b_up",), ("y",))
    ),
    *((over(BF16, Lora, lead=(600,), width=200, out=72, rank=200, dropout=p), EVERYTHING) for p in (0.0, 0.3)),
]
# Types (activations, parameters), width, rank, rank of a gate; whether the kernels take them.
SHAPES = [
    *(((1, 1, width, 8, 0), taken) for width, taken in ((0, False), (4, False), (8, True), (12, False), (16, True))),
    *(((2, 0, 8, rank, 0), taken) for rank, taken in ((0, False), (1, True), (256, True), (257, False))),
    *(((1, 0, 8, 8, rank), taken) for rank, taken in ((-1, False), (0, True), (256, True), (257, False))),
    *(((*types, 8, 8, 0), taken) for types, taken in (((0, 0), False), ((1, 2), False), ((2, 1), False), ((2, 2), True))),
]
# Rows, width, tasks: a row a task, and splits of 256 rows.
ROUTED_SHAPES = [((rows, 64, tasks), taken) for rows, tasks, taken in ((65535, 65279, True), (65535, 65280, False), (2**31 - 1, 340, True), (2**31 - 1, 341, False))]
# The same of Compacter's: parts of a multiple of 8 columns or not, pairs that 4 and 8 divide or not, tiles of 32 tokens and of fewer, several turns over a row and tiles a split.
PHM_SPECS: list[Spec] = [
    over(MIXED, PHM, lead=(37,), width=64, rank=20, residual="other", scale=0.7, factor_rank=2),
    over(FP16, PHM, lead=(40,), width=45, rank=21, division=3, factor_rank=3, scale=0.7),
    over(BF16, PHM, lead=(11,), width=128, rank=32, division=16, factor_rank=2, residual=None),
    over(FP16_MIXED, PHM, lead=(5,), width=56, rank=7, division=1),
    over(BF16, PHM, lead=(70,), width=288, rank=160),
    *(over(d, PHM, lead=(20,), width=64, rank=16, activation=a, scale=0.7) for d, a in zip((BF16, FP16, MIXED, FP16, FP16), ACTIVATIONS, strict=True)),
    *(over(BF16, PHM, lead=(20,), width=40, rank=24, biases=b, residual=r) for b, r in (("none", "input"), ("up", "other"), ("down", None))),
    over(BF16, PHM, lead=(9,), width=2144, rank=8, division=1),
    over(MIXED, PHM, lead=(6,), width=8, rank=4160),
    # Tiles of 8 and of 4 tokens, of 24 and 36 rows: they end in the lower and in the upper half of a product's 16.
    over(BF16, PHM, lead=(9,), width=24, rank=2400, division=3),
    over(BF16, PHM, lead=(5,), width=72, rank=18, division=9, factor_rank=8),
    over(BF16, PHM, lead=(8210,), width=32, rank=4),
]
PHM_CALLS: list[Spec] = [
    over(MIXED, PHM, lead=(20,), width=64, rank=20, residual="other", scale=0.7, factor_rank=2),
    over(FP16, PHM, lead=(3, 13), width=36, rank=12, biases="both"),
]
PHM_TRAFFIC: list[tuple[Spec, tuple[str, ...] | None]] = [
    *(
        (over(MIXED, PHM, lead=(37,), width=64, rank=20, residual="other", scale=0.7, factor_rank=3), needs)
        for needs in (
            EVERYTHING,
            NOTHING,
            *((name,) for name in ("x", "rule_down", "left_down", "right_down", "b_down", "rule_up", "left_up", "right_up", "b_up")),
            ("left_up", "right_up"),
        )
    ),
    *((over(FP16, PHM, lead=(20,), width=36, rank=12, biases=b), EVERYTHING) for b in ("none", "both")),
    (over(BF16, PHM, lead=(20,), width=36, rank=12, residual=None), ("x",)),
    (over(BF16, PHM, lead=(9,), width=2144, rank=8, division=1), EVERYTHING),
    (over(BF16, PHM, lead=(6,), width=8, rank=4160), EVERYTHING),
    (over(BF16, PHM, lead=(11,), width=128, rank=32, division=16, factor_rank=2), EVERYTHING),
    (over(BF16, PHM, lead=(257 * 32,), width=32, rank=4), EVERYTHING),  # the last split has one whole tile of two
]
LARGE = ((1 << 14, 4, True), (1 << 15, 4, False), (4, 1 << 15, False), (1 << 16, 1 << 16, False), (1 << 33, 4, False), (4, 1 << 33, False))
# Types (activations, parameters), width, rank, division, factor rank.
PHM_SHAPES = [
    *(((1, 1, width, 8, 4, 1), taken) for width, taken in ((0, False), (3, False), (4, True), (6, False), (8, True))),
    *(((2, 0, 8, rank, 4, 1), taken) for rank, taken in ((0, False), (2, False), (4, True), (7, False))),
    *(((1, 0, 16 * n, 16 * n, n, 1), taken) for n, taken in ((-1, False), (0, False), (1, True), (16, True), (17, False))),
    *(((1, 0, 16, 16, 4, k), taken) for k, taken in ((-1, False), (0, False), (1, True), (8, True), (9, False))),
    *(((1, 0, width, rank, 4, 1), taken) for width, rank, taken in LARGE),
    *(((*types, 8, 8, 4, 1), taken) for types, taken in (((0, 0), False), ((1, 2), False), ((2, 1), False), ((2, 2), True))),
]
# Rows of part of a block's, of several and of several a split; whole vectors and ragged rows, a narrow and a wide block, every type of x, sum and parameters.
NORM_SPECS: list[Spec] = [
    over(MIXED, Norm, lead=(37,), width=72, residual="wide", dropout=0.3, returns="both"),
    over(BF16, Norm, lead=(9,), width=1100, norm="rms", dropout=0.1, returns="both", eps=0.1),
    over(FP16_MIXED, Norm, lead=(21,), width=77, returns="both", eps=0.1),
    over(FP32, Norm, lead=(21,), width=530, dropout=0.5, norm="rms", biases="weight"),
    over(FP16, Norm, lead=(9,), width=2050, dropout=0.3, returns="both"),
    over(FP32, Norm, lead=(9,), width=4100, residual=None, biases="both"),
    over(MIXED, Norm, lead=(9,), width=1031, residual="wide", dropout=0.3, norm="rms", biases="none"),
    over(BF16, Norm, lead=(33,), width=64, norm=None, biases="none", dropout=0.5),
    over(FP16_MIXED, Norm, lead=(33,), width=65, norm=None, biases="none", residual="wide"),
    over(FP32, Norm, lead=(5,), width=3, residual="same", returns="both"),
    over(FP32, Norm, lead=(40,), width=12, returns="both"),  # of so few numbers the mean is far from zero
    over(FP16_MIXED, Norm, lead=(9,), width=80, norm="rms", returns="both"),
    over(BF16, Norm, lead=(1,), width=1024, dropout=0.1, returns="both"),
    over(FP16_MIXED, Norm, lead=(2,), width=8192, residual="wide", returns="both"),
    over(BF16, Norm, lead=(1029,), width=40, returns="both", dropout=0.1),
    over(FP32, Norm, lead=(515,), width=1028, norm="rms"),
]
NORM_CALLS: list[Spec] = [
    over(MIXED, Norm, lead=(3, 7), width=40, residual="wide", dropout=0.3),
    over(FP32, Norm, lead=(13,), width=1029, norm="rms"),
    over(FP16, Norm, lead=(13,), width=31, residual=None, norm="rms"),
]
NORM_BOTH: list[Spec] = [over(BF16, Norm, lead=(11,), width=40, dropout=0.3, returns="both")]
NORM_TRAFFIC: list[tuple[Spec, tuple[str, ...] | None]] = [
    (spec, needs)
    for spec in (
        over(BF16, Norm, lead=(70,), width=72, dropout=0.3, returns="both"),
        over(MIXED, Norm, lead=(9,), width=1030, residual="wide", norm="rms", dropout=0.1),
        over(FP32, Norm, lead=(21,), width=64, returns="both"),
    )
    for needs in (EVERYTHING, NOTHING, ("x",), ("residual",), ("weight",), ("bias",), ("x", "bias"), ("residual", "weight"))
]
NORM_TRAFFIC += [
    (over(FP16_MIXED, Norm, lead=(1030,), width=17, residual=None), EVERYTHING),
    (over(BF16, Norm, lead=(37,), width=64, norm=None, biases="none", dropout=0.5), EVERYTHING),
    (over(MIXED, Norm, lead=(20,), width=64, residual="wide", biases="none", returns="sum"), EVERYTHING),
    (over(FP32, Norm, lead=(20,), width=64, residual="same", biases="none", norm="rms"), NOTHING),
]
# Types of x, of the sum and of the parameters, width, rows.
NORM_SHAPES = [
    *(((1, 1, 0, 8, rows), taken) for rows, taken in ((2**31 - 1, True), (2**31, False))),
    *(((1, 1, 0, width), taken) for width, taken in ((0, False), (1, True), (8192, True), (8193, False))),
    *(((*types, 8), True) for types in ((0, 0, 0), (1, 1, 1), (2, 2, 2), (1, 0, 0), (2, 0, 0), (2, 2, 0))),
    *(((*types, 8), False) for types in ((0, 1, 1), (1, 2, 2), (2, 1, 0), (1, 0, 1), (0, 0, 2), (1, 1, 2), (3, 3, 3), (3, 0, 0), (1, 1, -1))),
]
SCHEDULES = (("in_order", 0), ("priority", 1), ("random", 2))


def concerns(mutant: cpp.Mutant | None, op: str) -> bool:
    return mutant is None or ONLY.get(mutant.file, op) == op


BOUNDS = "-fsanitize=bounds -fsanitize-undefined-trap-on-error"
"""An index outside a local array, which C++ leaves open, ends the process."""


def commands(folder: Path) -> list[list[str]]:
    out = []
    for name, source in SOURCES.items():
        path = emulator.ROOT / source if name == "guard" else Path(source)
        language = "-std=c++20" if name == "guard" else emulator._language(emulator.ROOT / source)
        flags = f"{language} {emulator.FLAGS} -DFASTADAPT_MUTATION -Icsrc -O1 {BOUNDS}" + (" " + " ".join(f"-isystem{p}" for p in _torch_includes()) if name == "guard" else "")
        out.append(["g++", *flags.split(), "-c", str(path), "-o", f"{name}.o"])
    return sorted(out, key=lambda command: not any(f"inst/{op}" in str(command) for op in OPS))  # the longest first


def _torch_includes() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return include_paths()


def link(folder: Path) -> list[str]:
    return ["g++", "-shared", *(f"{name}.o" for name in SOURCES), "-o", "_cuda.so", str(emulator._emulator(emulator.CSRC, False)), *emulator._torch_link().split()]


class Trial(NamedTuple):
    """The calls that a family's mutants go through; ``few``: those under every schedule."""

    specs: list[Spec]
    few: Callable[[list[calls.Prepared]], list[calls.Prepared]]
    calls: list[Spec]
    traffic: list[tuple[Spec, tuple[str, ...] | None]]
    more: tuple[tuple[str, Callable[[], str]], ...]
    """What else is to hold: of an op, or ("") in any case."""
    refusals: Callable[[], str]


def prepare(trial: Trial) -> schemata.Check:
    import ctypes

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    emulator.Machine()  # builds and loads the emulator itself, which is not mutated, before the forks
    prepared = [calls.prepare(spec) for spec in trial.specs]

    def check(folder: Path, mutant: cpp.Mutant | None) -> str:
        _cuda.load_emulated(folder / "_cuda.so")
        library = ctypes.CDLL(str(folder / "_cuda.so"))
        library.fastadapt_guard()
        if mutant is not None and not mutant.static:
            ctypes.c_int.in_dll(library, "fastadapt_mutant").value = mutant.number
        own = [p for p in prepared if concerns(mutant, p.spec.op)]
        concerned = [spec for spec in trial.calls if concerns(mutant, spec.op)]

        def on(number: int, step: Callable[[], str]) -> Callable[[], str]:
            policy, seed = SCHEDULES[number]
            return partial(_on_device, policy, seed, step)

        few = trial.few(own)
        steps = [
            on(1, partial(calls.first_wrong, own, "emulated-cuda")),
            on(1, partial(calls.first_failing, checks.assert_single_gradients, concerned, "emulated-cuda")),
            on(1, partial(calls.first_failing, checks.assert_no_grad_path, concerned, "emulated-cuda")),
            *(on(1, step) for op, step in trial.more if not op or concerns(mutant, op)),
            on(0, partial(calls.first_wrong, few, "emulated-cuda")),
            on(2, partial(calls.first_wrong, few, "emulated-cuda")),
            on(1, partial(first_traffic, [(spec, needs) for spec, needs in trial.traffic if concerns(mutant, spec.op)])),
            trial.refusals,
        ]
        return next(filter(None, (step() for step in steps)), "")

    return check


def ids_far_outside() -> str:
    """No drawn id is one of a task that does not exist."""
    x, w = torch.ones(5, 8, dtype=torch.half), torch.ones(2, 8, 8, dtype=torch.half)
    with backend.use("emulated-cuda"):
        y = functional.routed_bottleneck(x, torch.tensor([2, -(2**62), 2**62, 1, 3]), w, w)
    return "" if (y[[0, 1, 2, 4]] == 1).all() and (y[3] == 65).all() else "ids far outside"


def mixed_batch() -> str:
    """Every task has the very bits of its own batch: its rows in their order, cut as there. Of several splits a task, in fp32 parameters, whose gradients are not rounded."""
    spec = Routed(dtype=MIXED[0], param_dtype=MIXED[1], lead=(1100,), width=16, rank=8, tasks=2, ids="row", biases="none", residual=None)
    tensors, dy, ids = spec.draw(0), spec.cotangent(0), spec.task_ids()
    mixed = checks.fused(spec, "emulated-cuda", tensors, dy)
    for task in range(spec.tasks):
        own = ids == task
        of_task = {"x": tensors["x"][own], "w_down": tensors["w_down"][task], "w_up": tensors["w_up"][task]}
        alone = checks.fused(over(MIXED, lead=of_task["x"].shape[:1], width=16, rank=8, biases="none", residual=None), "emulated-cuda", of_task, dy[own])
        if any(not torch.equal(mixed[n][own] if n in ("y", "d x") else mixed[n][task], t) for n, t in alone.items()):
            return f"the bits of task {task} in a mixed batch"
    return ""


def refusals(why_not: str, shapes: Sequence[tuple[tuple[int, ...], bool]]) -> str:
    wrong = [shape for shape, taken in shapes if (getattr(torch.ops.fastadapt_cuda_emulated, why_not)(*shape) == "") != taken]
    return f"what the kernels take: {wrong[0]}" if wrong else ""


def phm_relu_at_zero() -> str:
    """As `calls.relu_at_zero`."""
    spec = over(BF16, PHM, lead=(3,), activation="relu", biases="none", residual=None)
    tensors = spec.draw(0)
    tensors["x"].zero_()
    try:
        return "d x of relu at 0" if checks.fused(spec, "emulated-cuda", tensors, spec.cotangent(0))["d x"].any() else ""
    except Exception as error:
        return f"relu at 0: {type(error).__name__}: {forks.last_line(error)}"


def norm_masks() -> str:
    """Forward and backward drop what the definition says: also a number that is the threshold, which is kept, and nothing of a row that is not finite but what is dropped."""
    seed = torch.tensor([-7])
    number = int(philox((9 // 4, 5, 0, 0), (-7 & 0xFFFFFFFF, 0xFFFFFFFF))[9 % 4])
    for width, p in ((24, number / 2**32), (24, (number + 1) / 2**32), (23, number / 2**32)):
        x, kept = torch.ones(7, width, dtype=torch.bfloat16, requires_grad=True), keep(seed, 7, width, p)
        with backend.use("emulated-cuda"):
            y, ones = (functional.dropout_add_norm(t, norm=None, dropout=p, seed=seed) for t in (torch.where(kept, x, torch.inf), x))
        (d_x,) = torch.autograd.grad(ones, x, torch.where(kept, 1.0, torch.inf).to(x.dtype))
        factor = torch.where(kept, 1 / (1 - p), 0.0).to(x.dtype)
        if not (torch.equal(y, factor) and torch.equal(d_x, factor)):
            return "the mask"
    return ""


def first_traffic(cases: Sequence[tuple[Spec, tuple[str, ...] | None]]) -> str:
    """The first call whose bytes are not those of the kernels' tables."""
    for spec, needs in cases:
        try:
            test_traffic.assert_bytes(spec, frozenset(spec.shapes() if needs is None else needs), emulator.Machine())
        except Exception as error:
            return f"bytes of {spec.op}[{spec}] for {'everything' if needs is None else ', '.join(needs) or 'nothing'}: {type(error).__name__}: {forks.last_line(error)}"
    return ""


def _on_device(policy: str, seed: int, step: Callable[[], str]) -> str:
    """What is wrong with the results, or what the emulated device found, bank conflicts included."""
    with emulator.device(policy, seed, arch=120, global_races=True) as machine:
        if said := step():
            return said
        conflicts = [kernel for kernel, counters in machine.stats().items() if counters["ldmatrix_conflicts"]]
        return f"bank conflicts in {conflicts[0]}" if conflicts else ""


RULES = cpp.Rules(spelled=(*cpp.Rules().spelled, (r"FASTADAPT_SHARED\(arena\)", "char* arena")))  # a declaration, not a call that can be deleted
TRIAL = Trial(
    SPECS,
    lambda own: own[:3] + [p for p in own if p.spec.op == "gated_bottleneck"][::4] + [p for p in own if p.spec.op in ("lora", "routed_bottleneck")][:4],
    CALLS,
    TRAFFIC,
    (("", partial(calls.relu_at_zero, "emulated-cuda", torch.bfloat16)), ("routed_bottleneck", ids_far_outside), ("routed_bottleneck", mixed_batch)),
    lambda: refusals("why_not", SHAPES) or refusals("routed_why_not", ROUTED_SHAPES),
)
PHM_TRIAL = Trial(PHM_SPECS, lambda own: own[:3], PHM_CALLS, PHM_TRAFFIC, (("", phm_relu_at_zero),), partial(refusals, "phm_why_not", PHM_SHAPES))
NORM_MORE = (
    ("", norm_masks),
    ("", partial(calls.statistics_of_the_exact_sum, "emulated-cuda")),
    ("", partial(calls.first_failing, checks.assert_single_gradients, NORM_BOTH, "emulated-cuda")),
)
NORM_TRIAL = Trial(NORM_SPECS, lambda own: own[:3], NORM_CALLS, NORM_TRAFFIC, NORM_MORE, partial(refusals, "norm_why_not", NORM_SHAPES))
FAMILY = schemata.Family("cuda", FILES, commands, ("guard.o",), link, partial(prepare, TRIAL), EXPLAINED, RULES)


def alone(name: str, files: tuple[str, ...], op: str, trial: Trial, explained: dict[tuple[str, str], str]) -> schemata.Family:
    """Of one op, without whose own sources the others' objects are as they are."""
    return schemata.Family(name, files, commands, tuple(f"{source}.o" for source in SOURCES if not source.startswith(op)), link, partial(prepare, trial), explained, RULES)


ALONE = {
    "phm": alone("cuda_phm", PHM_FILES, "phm_bottleneck", PHM_TRIAL, PHM_EXPLAINED),
    "norm": alone("cuda_norm", NORM_FILES, "dropout_add_norm", NORM_TRIAL, NORM_EXPLAINED),
}

if __name__ == "__main__":
    sys.exit(schemata.main(ALONE[sys.argv.pop(1)] if sys.argv[1:2] and sys.argv[1] in ALONE else FAMILY))
