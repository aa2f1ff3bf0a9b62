"""Modelled time of a call on a CUDA device: what `auto` chooses by, and what ``fastadapt explain`` prints.

Nothing here has been measured on a GPU, except what a calibration file says. A backend runs a direction of an op as a list of `Kernel`s, each with its arithmetic, its bytes and
its blocks; the formulas are those of the study (kernels.md, D.2 to D.6), the tiles and launches those of the code. A kernel takes the longest of four times, and then the time
until the next:

* ``flops``: arithmetic on the busiest SM, at the rate that skinny products reach;
* ``hbm``: bytes that must come from or go to memory, and those of tensors that an earlier kernel touched unless they all fit in L2;
* ``l2``: every byte that enters or leaves the SMs, again on the busiest SM: few blocks cannot draw the whole bandwidth;
* ``latency``: the steps of a block that wait for memory one after another.

A direction takes the longer of its kernels' sum and the time that the host needs to launch them, which decides small calls.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastadapt.backend import Call


@dataclass(frozen=True)
class Device:
    """A device that stands for its architecture. Rates are of dense products with fp32 sums, as the vendor publishes them."""

    name: str
    arch: int
    sms: int
    matrix: float  # TFLOP/s, bf16 and fp16
    fma: float  # TFLOP/s, fp32 outside the matrix units
    hbm: float  # TB/s
    l2: float  # TB/s from L2 to the SMs, as microbenchmarks reach it
    l2_mb: float
    shared_kb: int  # most shared memory of one block
    library: float  # fraction of `matrix` that cuBLAS and Triton reach in skinny products
    mma_sync: float  # the same for kernels that issue mma.sync

    def rate(self, unit: str) -> float:
        """TFLOP/s of a `Kernel`'s unit."""
        if unit == "fma":
            return self.fma * FMA_LIBRARY
        if unit == "fma.triton":
            return self.fma * FMA_TRITON
        return self.matrix * (self.mma_sync if unit == "mma.sync" else self.library)


# matrix, fma, hbm, sms, L2 size: NVIDIA's A100, H100, B200 data sheets and GA102, AD102, RTX Blackwell white papers. shared_kb: CUDA programming guide, compute capabilities.
# l2 of sm_80 and sm_90, and their library fractions: the study's roofline.py ("measured class", 0.70 and 0.62). Other l2 and fractions are assumed: scaled by SMs and clock, 0.6
# where only wgmma or tcgen05 reaches the peak, 0.7 where mma.sync does. mma.sync reaches 0.63 of wgmma's rate on sm_90 (microbenchmarks): 0.62 x 0.63 = 0.39. On sm_100, assumed no
# faster an SM than on sm_90: 0.39 x 989 / 132 x 148 / 2250 = 0.19.
DEVICES = (
    Device("A100-SXM4-80GB", 80, 108, 312, 19.5, 2.04, 4.8, 40, 163, 0.70, 0.70),
    Device("RTX 3090", 86, 82, 71, 35.6, 0.936, 2.5, 6, 99, 0.70, 0.70),
    Device("RTX 4090", 89, 128, 165, 82.6, 1.01, 5.0, 72, 99, 0.70, 0.70),
    Device("H100-SXM5", 90, 132, 989, 66.9, 3.35, 5.8, 50, 227, 0.62, 0.39),
    Device("B200", 100, 148, 2250, 80.0, 8.0, 10.0, 126, 227, 0.60, 0.19),
    Device("RTX 5090", 120, 170, 209, 104.8, 1.79, 7.0, 96, 99, 0.70, 0.70),
)

HBM = 0.88  # achievable fraction of the memory's peak: the study's roofline.py; quack reports 0.897 for softmax on an H100
# Fractions of `fma`. cuBLAS reaches 0.85 to 0.95 of an A100's at 1024 and more (triton#2491), less when skinny. Triton's is assumed: its tiles here are 32 x 32.
FMA_LIBRARY, FMA_TRITON = 0.80, 0.50
UNALIGNED = 0.5  # assumed: a Triton kernel over a width that 64 does not divide loads 2 bytes at a time under masks
LAUNCH = 2.0  # us from the end of a kernel to the start of the next on one stream: assumed, 1 to 2.5 are reported
STEP = 0.3  # us that a step of a two-stage pipeline waits, beside another block: assumed; L2 takes 200 cycles, memory 400 to 600, at 1.4 to 1.8 GHz, half of it hidden
RESIDENT = 2  # blocks an SM, for the number of rounds of `latency`: by registers and shared memory 1 to 4 (kernels.md, D.3 and section 9)
WARM = 0.6  # of L2 in which what one kernel touched is still there for the next: kernels.md, D.4 (d)

# Host time, us. HOST_ENTRANCE: what every backend pays for one call of an op (Function, op, choice), measured on one core of an AMD EPYC with kernels that do nothing. HOST_LAUNCH:
# eager ops 5 (the study's roofline.py); Triton 20 (12.5 for 19 arguments on a GB200 host, facebookexperimental/triton#1231; the kernels here have 30 to 45); the runtime 3.
# HOST_CALL: the raw op and its allocations 10 (verification.md, 1b: 5 to 8, and 1 to 2 an output).
HOST_ENTRANCE = {"forward": 90.0, "backward": 160.0}
HOST_LAUNCH = {"reference": 5.0, "triton": 20.0, "cuda": 3.0}
HOST_CALL = {"reference": 0.0, "triton": 10.0, "cuda": 10.0}


def device_of(arch: int) -> Device | None:
    """The device by which calls on ``arch`` are modelled: the newest one that is not newer; None below compute capability 8.0, which no fused kernel runs on."""
    return next((device for device in reversed(DEVICES) if device.arch <= arch), None)


class Kernel(NamedTuple):
    """A launch, or ``launches`` of one kind together."""

    name: str
    flops: float = 0.0
    hbm: float = 0.0  # bytes of tensors that this direction has not touched before, read or written
    again: float = 0.0  # bytes of tensors that an earlier kernel of this direction touched
    l2: float = 0.0  # bytes that L2 holds whatever the size: weights, second readings of a block's own rows, partial sums
    blocks: int = 0  # 0: enough to fill any device
    steps: float = 0.0  # of one block, each waiting for memory
    launches: int = 1
    unit: str = "library"  # what its products run on: library, triton, mma.sync, fma, fma.triton
    efficiency: float = 1.0


class Term(NamedTuple):
    """A kernel's modelled time and the one of flops, hbm, l2, latency and launch that it is mostly made of."""

    kernel: str
    microseconds: float
    dominant: str


@dataclass(frozen=True)
class Direction:
    """Forward or backward of a call on one backend."""

    microseconds: float  # the longer of gpu and host, times the calibration's factor
    gpu: float
    host: float
    launches: int
    bytes: float  # to and from memory
    terms: tuple[Term, ...]
    factor: float = 1.0

    @property
    def dominant(self) -> str:
        """What the direction's time is mostly made of."""
        if self.host >= self.gpu:
            return "host"
        total: dict[str, float] = {}
        for term in self.terms:
            total[term.dominant] = total.get(term.dominant, 0.0) + term.microseconds
        return max(total, key=lambda name: total[name])


@dataclass(frozen=True)
class Estimate:
    """Modelled time of forward and backward of a call on one backend."""

    backend: str
    device: str
    forward: Direction
    backward: Direction
    basis: str  # "modelled", or "calibrated on <device>, <date>"

    @property
    def microseconds(self) -> float:
        """Of both directions: one choice is made for the two."""
        return self.forward.microseconds + self.backward.microseconds

    @property
    def launches(self) -> int:
        """Of both directions."""
        return self.forward.launches + self.backward.launches

    def __str__(self) -> str:
        parts = (
            f"{name} {d.microseconds:.0f} (gpu {d.gpu:.0f}, host {d.host:.0f}{'' if d.factor == 1 else f', x {d.factor:.2f}'}; {d.launches} launches, mostly {d.dominant})"
            for name, d in (("forward", self.forward), ("backward", self.backward))
        )
        return f"{self.microseconds:.0f} us {self.basis.split(' ')[0]}: {', '.join(parts)}"


def time_of(kernel: Kernel, device: Device, warm: bool) -> Term:
    """The modelled time of a kernel; ``warm``: the tensors that it reads again are still in L2."""
    rate = device.rate(kernel.unit)
    busiest = math.ceil(kernel.blocks / device.sms) * device.sms / kernel.blocks if kernel.blocks else 1.0
    times = {
        "flops": kernel.flops * busiest / (rate * kernel.efficiency),
        "hbm": (kernel.hbm + (0.0 if warm else kernel.again)) / (device.hbm * HBM),
        "l2": (kernel.hbm + kernel.again + kernel.l2) * busiest / device.l2,
        "latency": max(1, math.ceil(kernel.blocks / (device.sms * RESIDENT))) * kernel.steps * STEP * 1e6,
        "launch": kernel.launches * LAUNCH * 1e6,
    }
    work = max(times["flops"], times["hbm"], times["l2"], times["latency"])
    return Term(kernel.name, (work + times["launch"]) / 1e6, max(times, key=lambda name: times[name]))


def direction_of(name: str, backend: str, kernels: Sequence[Kernel], shared_bytes: float, device: Device, factor: float = 1.0) -> Direction:
    """The modelled time of one direction; ``shared_bytes``: the tensors that more than one of its kernels touch."""
    warm = shared_bytes <= WARM * device.l2_mb * 2**20
    terms = tuple(time_of(kernel, device, warm) for kernel in kernels)
    launches = sum(kernel.launches for kernel in kernels)
    gpu = sum(term.microseconds for term in terms)
    host = HOST_ENTRANCE[name] + HOST_CALL[backend] + launches * HOST_LAUNCH[backend]
    moved = sum(kernel.hbm + (0.0 if warm else kernel.again) for kernel in kernels)
    return Direction(max(gpu, host) * factor, gpu, host, launches, moved, terms, factor)


class Model(NamedTuple):
    """The kernels of a call on one backend, and the bytes that several kernels of a direction touch."""

    forward: list[Kernel]
    backward: list[Kernel]
    forward_shared: float = 0.0
    backward_shared: float = 0.0


def estimate(backend: str, call: Call, model: Model) -> Estimate | None:
    """The modelled time of a call, or None where no device stands for its architecture."""
    device = device_of(call.arch)
    if device is None:
        return None
    measured = calibration(call.arch)
    factors = measured.factors.get(backend, {}).get(call.op) if measured else None
    factors = factors or {}
    return Estimate(
        backend,
        device.name,
        direction_of("forward", backend, model.forward, model.forward_shared, device, factors.get("forward", 1.0)),
        direction_of("backward", backend, model.backward, model.backward_shared, device, factors.get("backward", 1.0)),
        f"calibrated on {measured.device}, {measured.date}" if measured and factors else "modelled",
    )


# Sizes of a call, and the kernels that several ops or backends share. T, D, R, A and P as everywhere: rows, width, rank, bytes of an activation and of a parameter.


class Sizes(NamedTuple):
    t: int
    d: int
    r: int
    rg: int  # rank of the large gate, else 0
    a: int
    p: int

    @property
    def wide(self) -> float:
        """Bytes of a (T, D) activation."""
        return float(self.t) * self.d * self.a

    def thin(self, rank: int) -> float:
        """Bytes of a (T, rank) activation."""
        return float(self.t) * rank * self.a

    def flops(self, rank: int) -> float:
        """Of one product of (T, D) with (D, rank)."""
        return 2.0 * self.t * self.d * rank


def sizes(call: Call) -> Sizes:
    return Sizes(call.rows, call.width, call.rank, call.option("gate_rank", 0), call.dtype.itemsize, call.param_dtype.itemsize)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pack(s: Sizes, ranks: Sequence[int], padded: Sequence[int] = ()) -> Kernel:
    """Both matrices of each bottleneck read in P and written in A, with ``padded`` ranks where the kernel wants them."""
    read, written = (2.0 * s.d * sum(rs) * size for rs, size in ((ranks, s.p), (padded or ranks, s.a)))
    return Kernel("pack", hbm=read, l2=written)


# Eager operations: what the backend `reference` runs.


def gemm(name: str, s: Sizes, rank: int, depth: int) -> Kernel:
    """A library product of (T, D), (T, rank) and (D, rank), in whatever roles, of the given depth. It is cut along the depth where it has few tiles, so never short of blocks."""
    return Kernel(name, s.flops(rank), again=s.wide + s.thin(rank), l2=float(rank) * s.d * s.a, steps=min(16, cdiv(depth, 64)), unit="fma" if s.a == 4 else "library")


def pointwise(name: str, launches: int, moved: float) -> Kernel:
    return Kernel(name, again=moved, launches=launches)


def eager_bottleneck_backward(s: Sizes, rank: int) -> list[Kernel]:
    """dz, dx, and the gradients of the weights and biases, of one bottleneck: the derivative of gelu_new is 17 operations, 43 passes over (T, rank) with the product (counted)."""
    return [
        gemm("da = dy Wu", s, rank, s.d),
        pointwise("phi'", 18, 43 * s.thin(rank)),
        gemm("dz Wd", s, rank, rank),
        gemm("dWd", s, rank, s.t),
        gemm("dWu", s, rank, s.t),
        pointwise("bias sums", 2, s.wide + s.thin(rank)),
    ]


# The CUDA kernels. Tiles and splits of csrc/include/cuda_plan.h, which a test compiles and compares.

CUDA_RANKS = (32, 64, 96, 128, 192, 256)
CUDA_GATED_RANKS = (32, 96, 192, 256)
SLAB = 64


class RowTile(NamedTuple):
    rows: int
    depth: int  # columns of D that a step of a down-projection takes
    columns: int  # of an up-projection
    stages: int


def bucket(rank: int, ranks: tuple[int, ...] = CUDA_RANKS) -> int:
    """The rank that the CUDA kernels are compiled for and run ``rank`` in."""
    return next(r for r in ranks if rank <= r)


def row_tile(rank: int, dual: bool = False) -> RowTile:
    """Tiles of the kernels over rows, by rank bucket; ``dual``: of two bottlenecks at once."""
    return RowTile(64, 64, 32, 2) if rank <= 96 else RowTile(128, 64, 32, 2) if rank <= 128 else RowTile(128, 32, 16 if dual and rank == 256 else 32, 2)


def down_part(rank: int, dual: bool) -> int:
    """The rank of a down-projection that a pass over x computes."""
    return rank // 2 if dual and rank >= 192 else rank


def slab_tile(rank: int) -> tuple[int, int]:
    """Rows and stages of the kernel over slabs of D."""
    return (64, 2) if rank <= 64 else (32, 2) if rank <= 192 else (32, 1)


def slab_splits(rows: int, width: int) -> tuple[int, int]:
    """Splits of the rows, and rows in each: a function of the shape alone."""
    most = max(1, min(cdiv(192, cdiv(width, SLAB)), cdiv(rows, 256)))
    each = max(64, cdiv(cdiv(rows, most), 64) * 64)
    return cdiv(rows, each), each


def tile_bytes(rows: int, columns: int) -> int:
    """A tile in shared memory: rows of 2-byte elements and 16 bytes more, against bank conflicts."""
    return 2 * rows * (columns + 8)


def modelled_shared_bytes(kernel: str, rank: int) -> int:
    """Shared memory of a CUDA kernel's block, as csrc/include/cuda_plan.h computes it."""
    dual = kernel.endswith("dual")
    tile = row_tile(rank, dual)
    if kernel.startswith("forward"):
        return tile.stages * max(tile_bytes(tile.rows, tile.depth) + tile_bytes(down_part(rank, dual), tile.depth), (2 if dual else 1) * tile_bytes(tile.columns, rank))
    if kernel.startswith("gates"):
        return tile.stages * (2 if dual else 1) * tile_bytes(tile.columns, rank) + 2 * (tile.rows // 16) * 2 * tile.columns * 4
    if kernel == "rows":
        return tile.stages * (tile_bytes(tile.rows, tile.depth) + tile_bytes(tile.depth, rank))
    rows, stages = slab_tile(rank)
    return stages * 2 * (tile_bytes(rows, SLAB) + tile_bytes(rows, rank)) + tile_bytes(rank, SLAB)


def shared_bytes(kernel: str, rank: int) -> int:
    """The compiled library's own answer where `_cuda` hands it on, else the formula."""
    try:
        from fastadapt.ops import _cuda
    except ImportError:
        return modelled_shared_bytes(kernel, rank)
    answer = getattr(_cuda, "shared_bytes", modelled_shared_bytes)
    return int(answer(kernel, rank))


def too_large(kernels: Sequence[str], call: Call) -> list[str]:
    """Why a block of the CUDA kernels does not fit the call's architecture: an empty list where each does, or where the architecture is not known."""
    device = device_of(call.arch)
    if device is None or not kernels:
        return []
    rank = bucket(max(call.rank, call.option("gate_rank", 0)), CUDA_GATED_RANKS if call.op in ("gated_bottleneck", "routed_bottleneck") else CUDA_RANKS)
    name, most = max(((kernel, shared_bytes(kernel, rank)) for kernel in kernels), key=lambda item: item[1])
    room = device.shared_kb * 1024
    return [] if most <= room else [f"its {name} kernel needs {most} bytes of shared memory at rank {rank}, a block has {room} on sm_{call.arch}"]


def cuda_limits(call: Call) -> list[str]:
    """What the CUDA kernels do not take on any device, as csrc/cuda/bottleneck.cu says it where the library is built."""
    if call.op == "dropout_add_norm":
        return cuda_norm_limits(call)
    if call.dtype not in (torch.bfloat16, torch.float16):
        return [f"the cuda kernels take bfloat16 and float16, not {call.dtype}"]
    if call.op == "phm_bottleneck":
        return cuda_phm_limits(call)
    if any(width < 8 or width % 8 for width in (call.width, call.option("out_width", call.width))):
        return ["the cuda kernels need a width that is a multiple of 8"]
    return [] if 1 <= call.rank <= CUDA_RANKS[-1] and call.option("gate_rank", 0) <= CUDA_RANKS[-1] else [f"the cuda kernels take ranks from 1 to {CUDA_RANKS[-1]}"]


# csrc/include/phm_bottleneck_cuda.h: tiles, shared memory and splits of Compacter's kernels.


def cuda_phm_owners(division: int, columns: int, tokens: int) -> tuple[int, int, int]:
    """Threads that own 8 columns of a row each, tokens side by side, and turns over a row."""
    vectors = division * cdiv(columns, 8)
    each = min(vectors, 256)
    return each, min(256 // each, tokens), cdiv(vectors, each)


def cuda_phm_shared_bytes(call: Call, tokens: int) -> int:
    """Shared memory of a backward block over tiles of ``tokens``."""
    n, k = call.option("division", 1), call.option("factor_rank", 1)
    columns, pairs = (call.width // n, call.rank // n), 4 * cdiv(n * k, 4)
    whole = [32 * cdiv(c, 32) for c in columns]
    factors = 4 * pairs * sum(c + (32 if c % 64 == 0 else 0) for c in whole) + 32 * cdiv(n**3, 8)
    staging = max(each * slots for each, slots, _ in (cuda_phm_owners(n, c, tokens) for c in columns))
    return factors + tokens * n * (2 * whole[1] + 16 * pairs) + 80 * staging


def cuda_phm_tokens(call: Call) -> int:
    """Tokens of a tile: 32, or as many as leave room on the smallest device; 0 where none do."""
    return next((tokens for tokens in (32, 16, 8, 4, 2, 1) if cuda_phm_shared_bytes(call, tokens) <= 99 * 1024), 0)


def cuda_phm_splits(rows: int, tokens: int) -> int:
    tiles = cdiv(rows, tokens)
    return cdiv(tiles, cdiv(tiles, 256))


def cuda_phm_limits(call: Call) -> list[str]:
    n, k = call.option("division", 1), call.option("factor_rank", 1)
    if not 1 <= n <= 16:
        return ["the cuda kernels take divisions from 1 to 16"]
    if not 1 <= k <= 8:
        return ["the cuda kernels take factor ranks from 1 to 8"]
    return [] if cuda_phm_tokens(call) else ["the factors and a token's products do not fit the 99 KB of shared memory that every device has"]


# csrc/include/dropout_add_norm_cuda.h: threads of a row and splits of the rows.


def cuda_norm_lanes(width: int) -> int:
    return next((lanes for lanes in (64, 256) if width <= 16 * lanes), 512)


def cuda_norm_splits(rows: int, width: int) -> int:
    """Splits of the rows, each with a partial of the gradients of weight and bias."""
    at_once = 4 if cuda_norm_lanes(width) == 64 else 1
    return cdiv(rows, cdiv(rows, 256 * at_once) * at_once)


def cuda_norm_limits(call: Call) -> list[str]:
    if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return [f"the cuda kernels take bfloat16, float16 and float32, not {call.dtype}"]
    return [] if 1 <= call.width <= 8192 else ["the cuda kernels take norms of a width from 1 to 8192"]


def cuda_needs_pack(s: Sizes) -> bool:
    return s.p != s.a or s.r % 8 != 0 or s.rg % 8 != 0


def cuda_unpad(s: Sizes, ranks: Sequence[int]) -> list[Kernel]:
    """Behind the forward: pre-activations of a ragged rank without their padding."""
    ragged = sum(2 * s.thin(rank) for rank in ranks if rank % 8)
    return [Kernel("unpad", hbm=0.0, l2=ragged)] if ragged else []


def cuda_rows(s: Sizes, ranks: Sequence[int], *, again: bool) -> Kernel:
    """da = s dy Wu and dz = da (.) phi'(z) of each bottleneck; writes dz, a and column sums of dz a row tile. ``again``: a kernel of this direction wrote dy."""
    r, n = bucket(max(ranks)), len(ranks)
    tile = row_tile(r)
    blocks = n * cdiv(s.t, tile.rows)
    thin = sum(3 * s.thin(rank) for rank in ranks)  # z in, dz and a out
    dy = n * s.wide
    l2 = blocks * (float(s.d) * r * s.a + 4.0 * r)
    return Kernel("rows", n * s.flops(r), thin + (0.0 if again else dy), dy if again else 0.0, l2, blocks, cdiv(s.d, tile.depth), unit="mma.sync")


def cuda_slabs(s: Sizes, ranks: Sequence[int], fresh: int) -> Kernel:
    """dx, and fp32 partials of dWd, dWu and dbu a split: x in, dx out, dy again, a and dz once a slab. ``fresh``: how many of the inputs x no kernel of this direction has read."""
    r, n = bucket(max(ranks)), len(ranks)
    splits, each = slab_splits(s.t, s.d)
    slabs = cdiv(s.d, SLAB)
    thin = sum(2 * s.thin(rank) for rank in ranks)
    partials = 4.0 * splits * s.d * (2 * sum(ranks) + n)
    steps = cdiv(each, slab_tile(r)[0])
    return Kernel("slabs", 3 * n * s.flops(r), (n + fresh) * s.wide, (2 * n - fresh) * s.wide + thin, (slabs - 1) * thin + partials, n * slabs * splits, steps, unit="mma.sync")


def cuda_reduce(s: Sizes, ranks: Sequence[int]) -> Kernel:
    """Adds the partials in order, and writes the weight gradients in P."""
    splits, _ = slab_splits(s.t, s.d)
    elements = s.d * (2.0 * sum(ranks) + len(ranks))
    return Kernel("reduce", 0.0, s.p * elements, 0.0, 4.0 * splits * elements, steps=splits)


# The Triton kernels. Tiles of fastadapt/ops/_triton.py.


def triton_unit(s: Sizes) -> str:
    return "fma.triton" if s.a == 4 else "triton"


def triton_efficiency(s: Sizes) -> float:
    return UNALIGNED if s.d % 64 else 1.0


def triton_tile(kernel: str, rank: int, call: Call, weights: torch.dtype | None = None) -> Any:
    from fastadapt.ops import _triton

    return _triton.tile(kernel, rank, call.width, call.dtype, weights)


def triton_rank(rank: int) -> int:
    """The rank as the kernels multiply it, padded to its chunks."""
    from fastadapt.ops import _triton

    return sum(size for _, size in _triton.chunks(rank))


def triton_weights(s: Sizes, call: Call, ranks: Sequence[int]) -> tuple[list[Kernel], torch.dtype]:
    """The launch that rounds fp32 weights, where there is one, and the dtype in which the other kernels read them."""
    from fastadapt.ops import _triton

    if s.p == s.a or _triton.rounds_on_load(s.t, s.d, max(ranks), 2 * s.d * sum(ranks)):
        return [], call.param_dtype
    return [pack(s, ranks)], call.dtype


def triton_bottleneck_backward(
    s: Sizes, call: Call, ranks: Sequence[int], *, again: bool = False, fresh: bool = True, biases: bool = True, beside: tuple[int, int] = (0, 0)
) -> list[Kernel]:
    """The launches of `_triton.bottleneck_backward`, of one bottleneck or two, with all gradients; of biases behind the down-projection where there are ``biases``. Two of
    different ranks share the last alone. ``again``: a kernel of this direction wrote dy; ``fresh``: whether none has read x, of two the second's; ``beside``: parts and columns of
    the sums that are not of a bottleneck."""
    from fastadapt.ops import _triton

    unit, efficiency, kernels, sums, steps, partials = triton_unit(s), triton_efficiency(s), [], [beside], 0.0, 0.0
    _, weights = triton_weights(s, call, ranks)
    for rank in dict.fromkeys(ranks):
        n, padded, thin = ranks.count(rank), triton_rank(rank), s.thin(rank)
        unread = int(fresh and rank == ranks[-1])
        tile = triton_tile("rows", rank, call, weights)
        tiles = cdiv(s.t, tile.block_t)
        kernels.append(Kernel(
            "rows", n * 2 * s.flops(padded), n * ((1 if again else 2) * s.wide + 3 * thin), n * s.wide if again else 0.0,
            n * (s.wide + tiles * (2.0 * s.d * padded * weights.itemsize + 4.0 * rank)), n * tiles, 2 * cdiv(s.d, tile.block_d), unit=unit, efficiency=efficiency,
        ))  # fmt: skip
        tile = triton_tile("weights", rank, call)
        slabs, parts = cdiv(s.d, tile.block_d), cdiv(rank, tile.block_r)
        splits, each = _triton.token_splits(s.t, slabs * parts)
        moved = 4.0 * splits * n * s.d * (2.0 * rank + 1)
        kernels.append(Kernel(
            "weights", n * (2 * s.flops(parts * tile.block_r) + parts * s.flops(16)), unread * s.wide, (2 * n - unread) * s.wide + n * 2 * thin,
            n * ((parts - 1) * 2 * s.wide + (slabs - 1) * 2 * thin) + moved, n * slabs * splits * parts, cdiv(each, tile.block_t), unit=unit, efficiency=efficiency,
        ))  # fmt: skip
        partials += moved
        sums += [(tiles, rank)] * (n * biases)
        steps = max(steps, 2 * splits * cdiv(rank, 128))
    blocks = len(ranks) * cdiv(s.d, 8) + sum(cdiv(columns, 64) for _, columns in sums)
    steps = max(steps, *(cdiv(of_tiles, 16) for of_tiles, _ in sums))
    written = s.p * s.d * (2.0 * sum(ranks) + len(ranks))
    return [*kernels, Kernel("reduce", 0.0, written, 0.0, partials + sum(4.0 * of_tiles * columns for of_tiles, columns in sums), blocks, steps)]


# Calibration: how much longer or shorter a backend takes on a real device than is modelled, written by ``make gpu-check``.


@dataclass(frozen=True)
class Calibration:
    """Measured over modelled time by backend, op and direction, on one device."""

    device: str
    arch: int
    date: str
    factors: dict[str, dict[str, dict[str, float]]]


def calibration_path(arch: int) -> Path | None:
    """FASTADAPT_CALIBRATION, where it is set (empty: none), else this user's file for the architecture."""
    named = os.environ.get("FASTADAPT_CALIBRATION")
    if named is not None:
        return Path(named) if named else None
    try:
        return Path.home() / ".cache" / "fastadapt" / f"calibration-sm_{arch}.json"
    except RuntimeError:  # a user without a home
        return None


@functools.cache
def calibration(arch: int) -> Calibration | None:
    """The calibration of an architecture, read once a process. A file that cannot be used is named in a warning and ignored; one of another architecture is ignored without."""
    path = calibration_path(arch)
    try:
        if path is None or ("FASTADAPT_CALIBRATION" not in os.environ and not os.path.exists(path)):  # nor is it in a folder that cannot be entered
            return None
        found = read_calibration(path)
    except (OSError, ValueError) as error:
        if str(path) not in _warned:
            _warned.add(str(path))
            warnings.warn(f"fastadapt: the calibration {path} is not used: {error}; choices are by modelled times. `make gpu-check` writes a new one", stacklevel=2)
        return None
    return found if found.arch == arch else None


_warned: set[str] = set()
FORMAT = 1


def read_calibration(path: Path) -> Calibration:
    """Reads and checks a calibration file.

    Raises:
        ValueError: it is not one, or holds a factor that no measurement gives.
    """
    content: Any = json.loads(path.read_text())
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a calibration of format {FORMAT}")
    try:
        found = Calibration(str(content["device"]), int(content["arch"]), str(content["date"]), content["factors"])
        numbers = [value for ops in found.factors.values() for directions in ops.values() for value in directions.values()]
        names = {name for ops in found.factors.values() for directions in ops.values() for name in directions}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if names - {"forward", "backward"}:
        raise ValueError(f"unknown direction {sorted(names - {'forward', 'backward'})}")
    if bad := [value for value in numbers if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.01 <= value <= 100]:
        raise ValueError(f"factor {bad[0]!r} is not between 0.01 and 100")
    return found


def write_calibration(path: Path, found: Calibration) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, "device": found.device, "arch": found.arch, "date": found.date, "factors": found.factors}, indent=1, sort_keys=True) + "\n")
