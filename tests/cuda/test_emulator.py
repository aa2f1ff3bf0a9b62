"""The emulated device: what it computes is right, what it finds is there, and it finds nothing in a kernel that is right."""

from __future__ import annotations

import ctypes
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.cuda import emulator
from tests.tolerance import assert_close_to_f64

KERNELS = Path(__file__).parent / "kernels"
SCHEDULES = emulator.schedules(2)
each_schedule = pytest.mark.parametrize(("policy", "seed"), SCHEDULES)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "half"])


@cache
def library() -> ctypes.CDLL:
    return emulator.load(emulator.build([KERNELS / "probes.cu", KERNELS / "product.cu"]))


def call(name: str, *arguments: torch.Tensor | int) -> int:
    """A launcher's status."""
    return library()[name](*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments))


def place(error: str) -> str:
    """The source line that an error names first."""
    file, line = re.search(r"at (\w+\.cu):(\d+)", error).groups()
    return (KERNELS / file).read_text().splitlines()[int(line) - 1]


# ---- A kernel of the usual kind, right and wrong


class ProductParams(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("a", "b", "y")] + [(n, ctypes.c_int64) for n in ("rows", "depth", "a_stride")] + [("pitch", ctypes.c_int), ("mistake", ctypes.c_int)]


MISTAKES = ("none", "missing barrier", "late wait", "missing sync_warp", "unmasked load", "unmasked store", "narrow offset")
PADDED, UNPADDED = 40, 32


def product(
    a: torch.Tensor, b: torch.Tensor, policy: str = "priority", seed: int = 0, mistake: str = "none", pitch: int = PADDED, **options
) -> tuple[torch.Tensor, dict[str, int]]:
    y = emulator.apart(torch.full((a.shape[0], 64), math.nan, dtype=a.dtype))
    params = ProductParams(a.data_ptr(), b.data_ptr(), y.data_ptr(), a.shape[0], a.shape[1], a.stride(0), pitch, MISTAKES.index(mistake))
    with emulator.device(policy, seed, **options) as machine:
        machine.register(a, b, writable=False)
        machine.register(y)
        status = library().product(ctypes.byref(params), int(a.dtype == torch.float16))
        assert (status == 0) == (machine.last_error() == "")
    return y, machine.stats()["product"]


def operands(rows: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + depth)
    return emulator.apart(torch.randn(rows, depth, generator=generator).to(dtype)), emulator.apart(torch.randn(64, depth, generator=generator).to(dtype))


@each_dtype
@pytest.mark.parametrize(("rows", "depth"), [(1, 8), (64, 32), (77, 104), (130, 96)])
def test_a_right_kernel_is_right_under_every_schedule(dtype: torch.dtype, rows: int, depth: int) -> None:
    a, b = operands(rows, depth, dtype)
    results = [product(a, b, policy, seed, global_races=True, patterns=seed == 1)[0] for policy, seed in SCHEDULES]
    assert_close_to_f64("y", results[0], a.double() @ b.double().T, a @ b.T, gradient=False)
    assert all(torch.equal(y, results[0]) for y in results)


FOUND = {  # the message and the line; a race has two ends, and the schedule says which one comes last and is named
    "missing barrier": ("race: (write after read|read of an asynchronous copy in flight)", "cp_async16|ldmatrix_x4"),
    "late wait": ("race: read of an asynchronous copy in flight", "ldmatrix_x4"),
    "missing sync_warp": ("race: (write after read|read after write)|read of uninitialised", "load_shared|store_shared"),
    "unmasked load": ("global memory out of bounds", "cp_async16"),
    "unmasked store": ("global memory out of bounds", "store_global"),
}


@each_schedule
@pytest.mark.parametrize("mistake", FOUND)
def test_mistakes_are_found_under_every_schedule(mistake: str, policy: str, seed: int) -> None:
    with pytest.raises(emulator.EmulatorError) as error:
        product(*operands(77, 128, torch.bfloat16), policy, seed, mistake)
    what, where = FOUND[mistake]
    assert re.match(f"product: ({what})", str(error.value)), error.value
    assert re.search(f"ptx::({where})", place(str(error.value))), error.value


@each_schedule
def test_late_data_is_nan_without_the_race_detector(policy: str, seed: int) -> None:
    a, b = operands(64, 128, torch.bfloat16)
    assert product(a, b, policy, seed, "late wait", races=False)[0].isnan().any()
    immediately = product(a, b, policy, seed, races=False, defer=False)[0]
    assert torch.equal(immediately, product(a, b)[0])


def test_offsets_past_32_bits() -> None:
    a = emulator.sparse(3, 2**30, torch.bfloat16)[:, :32]
    values, b = operands(3, 32, torch.bfloat16)
    a.copy_(values)
    assert torch.equal(product(a, b)[0], product(values, b)[0])
    with pytest.raises(emulator.EmulatorError, match="global memory out of bounds"):
        product(a, b, mistake="narrow offset")


def test_counters() -> None:
    rows, depth = 130, 96
    _, counted = product(*operands(rows, depth, torch.bfloat16))
    steps, blocks = depth // 32, 3
    assert (counted["launches"], counted["blocks"]) == (1, blocks)
    assert counted["mma"] == blocks * steps * 4 * 2 * 8
    assert counted["ldmatrix"] == blocks * steps * 4 * 2 * 5
    assert counted["block_barriers"] == blocks * steps * 2
    assert counted["cp_async_bytes"] == (rows * depth + blocks * 64 * depth) * 2
    assert counted["global_store_bytes"] == rows * 64 * 2
    assert counted["shared_store_bytes"] == blocks * 64 * 64 * 2
    assert counted["global_load_bytes"] == 0
    assert counted["ldmatrix_conflicts"] == 0
    _, unpadded = product(*operands(rows, depth, torch.bfloat16), pitch=UNPADDED, mistake="none")
    assert unpadded["ldmatrix_conflicts"] == 3 * 4 * unpadded["ldmatrix"]  # 8 rows of 64 bytes meet in 2 of 8 bank groups: 4 passes for each of 4 matrices


@pytest.mark.parametrize(("pitch", "step", "conflicts", "sectors"), [(33, 1, 0, 4), (32, 1, 62, 4), (36, 8, 2 * 3, 32)])
def test_bank_conflicts_and_sectors(pitch: int, step: int, conflicts: int, sectors: int) -> None:
    out = torch.zeros(32 * step)
    assert out.data_ptr() % 32 == 0
    with emulator.device(patterns=True) as machine:
        call("probe_columns", out, pitch, step)
    counted = machine.stats()["columns"]
    assert (counted["shared_conflicts"], counted["global_sectors"], counted["global_groups"]) == (conflicts, sectors, 1)


# ---- What else a kernel can do wrong

WRONG = {  # in the order of probes.cu
    "partial barrier": "divergence: .*sync_block",
    "two barriers": "divergence: sync_block at .* while other threads of the block are in sync_block",
    "missing lane": "divergence: .*sync_warp",
    "early end": "divergence: .*sync_block",
    "left in flight": "the thread ends with an asynchronous copy in flight",
    "uninitialised": "read of uninitialised shared memory",
    "shared bounds": "shared memory out of bounds .* of 2048",
    "shared alignment": "misaligned shared address",
    "global alignment": "misaligned global address",
    "one for all": "race between blocks: store to what block .* stored in the same launch",
    "reads another": "race between blocks: (load of what block .* stored|store to what block .* loaded) in the same launch",
    "writes another": "race between blocks: store to what block .* stored in the same launch",
    "interlocked": "deadlock: (63 threads in sync_block at .*, 1 threads in sync_warp at .*|)",
    "write after read": "race: (read after write|write after read) without a barrier",
    "read only": "store to read-only global memory",
}


@each_schedule
@pytest.mark.parametrize("wrong", WRONG)
def test_everything_else_is_found_under_every_schedule(wrong: str, policy: str, seed: int) -> None:
    data = emulator.apart(torch.zeros(4 * 64))
    with (
        pytest.raises(emulator.EmulatorError, match=rf"misbehave: {WRONG[wrong]}.*\[block \(\d, 0, 0\), thread \d+\]"),
        emulator.device(policy, seed, global_races=True) as machine,
    ):
        machine.register(data, writable=wrong != "read only")
        assert call("probe_misbehave", data, 1 + list(WRONG).index(wrong), 4) == 719


def test_the_status_need_not_be_looked_at() -> None:
    data = torch.zeros(128)
    with pytest.raises(emulator.EmulatorError, match="uninitialised"), emulator.device():
        call("probe_unchecked", data, 6)
    with emulator.device() as machine:  # and the next launch starts afresh
        call("probe_unchecked", data, 0)
    assert machine.stats()["misbehave"]["launches"] == 1 and data.eq(1).all()


def test_gaps_between_rows_are_no_part_of_a_matrix() -> None:
    wide = torch.zeros(4, 96)
    with emulator.device() as machine:
        machine.register(wide[:2, :64])
        call("probe_misbehave", wide, 0, 1)
    with pytest.raises(emulator.EmulatorError, match="out of bounds"), emulator.device() as machine:
        machine.register(wide[:2, :64])
        call("probe_misbehave", wide, 0, 2)


@pytest.mark.parametrize(("arch", "limit"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_shared_memory_of_an_architecture(arch: int, limit: int) -> None:
    with emulator.device(arch=arch):
        assert call("probe_shared_limit") == limit * 1024
        assert call("probe_touch_shared", limit * 1024) == 0
    with pytest.raises(emulator.EmulatorError, match=f"sm_{arch} gives a block {limit * 1024}"), emulator.device(arch=arch):
        assert call("probe_touch_shared", limit * 1024 + 4) == 1


def test_limits_of_a_launch() -> None:
    refused = [(0, 1, 1, 64), (1, 0, 1, 64), (1, 65536, 1, 64), (1, 1, 65536, 64), (2**31, 1, 1, 64), (1, 1, 1, 0), (1, 1, 1, 1025)]
    for grid in refused:
        with pytest.raises(emulator.EmulatorError, match=r"touch_shared: a (grid|block) of \("), emulator.device():
            assert call("probe_grid", *map(ctypes.c_uint, grid)) == 9
    with emulator.device():
        assert call("probe_grid", 3, 2, 2, 1024) == 0
    with pytest.raises(emulator.EmulatorError, match="may have 49152"), emulator.device():
        library().probe_unprepared(48 * 1024)
        library().probe_unprepared(48 * 1024 + 4)


def test_a_seed_is_a_schedule() -> None:
    def last(policy: str, seed: int) -> tuple[int, ...]:
        out = torch.zeros(9, dtype=torch.int32)
        with emulator.device(policy, seed, races=False):
            call("probe_last_to_come", out, 8)
        return tuple(out.tolist())

    assert last("in_order", 0) == last("in_order", 1) == (7, *[63] * 8)
    for policy in ("priority", "random"):
        assert len({last(policy, seed) for seed in range(8)}) == 8
        assert last(policy, 3) == last(policy, 3)
        assert len({last(policy, seed)[0] for seed in range(8)}) > 2, "blocks always end in the same order"


# ---- What instructions compute


def fragment(shape: tuple[tuple[int, ...], ...], strides: tuple[tuple[int, ...], ...], thread: int, value: int) -> int:
    """Index of an element in the notation of CuTe's layouts: digits of thread and value, the first fastest, times strides."""
    index = 0
    for number, sizes, steps in zip((thread, value), shape, strides, strict=True):
        for size, step in zip(sizes, steps, strict=True):
            index += number % size * step
            number //= size
    return index


# SM80_16x8x16: where (thread, value) lies in column-major (m, k), (n, k), (m, n).
A_LAYOUT = ((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))
B_LAYOUT = ((4, 8), (2, 2)), ((16, 1), (8, 64))
C_LAYOUT = ((4, 8), (2, 2)), ((32, 1), (16, 8))


def gather(matrix: torch.Tensor, layout: tuple, values: int) -> torch.Tensor:
    """A matrix as the registers of 32 lanes."""
    flat = matrix.T.reshape(-1)
    return torch.stack([flat[[fragment(*layout, lane, v) for v in range(values)]] for lane in range(32)]).contiguous()


@each_dtype
def test_mma(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for whole in (True, False):
        a, b = (torch.randint(-8, 9, (n, 16), generator=generator).to(dtype) if whole else torch.randn(n, 16, generator=generator).to(dtype) for n in (16, 8))
        c = torch.randint(-8, 9, (16, 8), generator=generator).float() if whole else torch.randn(16, 8, generator=generator)
        d = gather(c, C_LAYOUT, 4)
        with emulator.device():
            call("probe_mma", gather(a, A_LAYOUT, 8), gather(b, B_LAYOUT, 4), d, int(dtype == torch.float16))
        exact = a.double() @ b.double().T + c.double()
        bound = 16 * 2**-24 * (a.double().abs() @ b.double().abs().T + c.double().abs())
        error = (d.double() - gather(exact, C_LAYOUT, 4)).abs()
        assert (error <= (0 if whole else gather(bound, C_LAYOUT, 4))).all()


@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix(transpose: bool) -> None:
    matrices = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    with emulator.device():
        call("probe_ldmatrix", matrices, out, int(transpose))
    for lane in range(32):
        for i, matrix in enumerate(matrices.transpose(1, 2) if transpose else matrices):
            assert out[lane, i].tolist() == matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()


def test_shuffle() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    for mask in (1, 2, 4, 8, 16, 31):
        with emulator.device():
            call("probe_shuffle", out, mask)
        assert out.tolist() == [101 * (i ^ mask) for i in range(64)]


@each_dtype
def test_conversions(dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    step = torch.tensor([-1, 0, 1], dtype=torch.int32)
    halfway = ((every.view(torch.int32) + (0x8000 if dtype == torch.bfloat16 else 0x1000))[:, None] + step).view(torch.float32).flatten()
    random = torch.randint(-(2**31), 2**31, (2**14,), generator=torch.Generator().manual_seed(0)).to(torch.int32).view(torch.float32)
    numbers = torch.cat([every, halfway, random])
    numbers = torch.cat([numbers, numbers.new_zeros(-len(numbers) % 64)])
    packed, back = torch.zeros(len(numbers), dtype=dtype), torch.zeros(len(numbers))
    with emulator.device(races=False):
        call("probe_convert", numbers, packed, back, len(numbers) // 2, int(dtype == torch.float16))
    torch.testing.assert_close(packed, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, numbers.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    assert packed[numbers.isnan()].view(torch.int16).eq(0x7FFF).all()


def approximate(numbers: torch.Tensor, error: int | tuple[int, int] = 0) -> tuple[torch.Tensor, torch.Tensor]:
    exp2, rcp = torch.zeros_like(numbers), torch.zeros_like(numbers)
    with emulator.device(approx_error=error):
        call("probe_approximate", numbers, exp2, rcp, len(numbers))
    return exp2, rcp


def test_approximate_instructions() -> None:
    smallest, subnormal = torch.finfo(torch.float32).smallest_normal, 1e-40
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, subnormal, -subnormal, 128.0, -127.0, 3e38, -3e38, 1.0, smallest, 2.0, 4.0, 8.0])
    exp2, rcp = approximate(torch.cat([special, special]))
    torch.testing.assert_close(exp2[:11], torch.tensor([1.0, 1, math.inf, 0, math.nan, 1, 1, math.inf, 0, math.inf, 0]), rtol=0, atol=0, equal_nan=True)
    expected = [math.inf, -math.inf, 0, -0.0, math.nan, math.inf, -math.inf, 1 / 128, -1 / 127, 0, -0.0]
    torch.testing.assert_close(rcp[:11], torch.tensor(expected), rtol=0, atol=0, equal_nan=True)

    numbers = torch.linspace(-126, 126, 32 * 63) + 0.1234
    exact = numbers.double().exp2(), numbers.double().reciprocal()
    right, above, below = approximate(numbers), approximate(numbers, 1), approximate(numbers, -1)
    assert torch.equal(right[0], exact[0].float()) and torch.equal(right[1], exact[1].float())
    for i, least in enumerate((2**-23, 2**-24)):  # at least half the documented error, after rounding
        for result, sign in ((above, 1), (below, -1)):
            relative = sign * (result[i].double() / exact[i] - 1)
            assert (relative.median() > least) and (relative <= 2 * 2**-22).all() and (relative > 0).float().mean() > 0.7
    mixed = approximate(numbers, (1, -1))
    assert torch.equal(mixed[0], above[0]) and torch.equal(mixed[1], below[1])


# ---- Builds


def test_what_was_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    header, source = tmp_path / "value.h", tmp_path / "value.cu"
    header.write_text("#define VALUE 1\n")
    source.write_text('#include "value.h"\nextern "C" int value() { return VALUE + EXTRA; }\n')
    first = emulator.build([source], defines=["EXTRA=10"])
    written = first.stat().st_mtime_ns
    assert emulator.build([source], defines=["EXTRA=10"]) == first and first.stat().st_mtime_ns == written
    header.write_text("#define VALUE 2\n")
    changed, defined = emulator.build([source], defines=["EXTRA=10"]), emulator.build([source], defines=["EXTRA=20"])
    assert [emulator.load(path).value() for path in (first, changed, defined)] == [11, 12, 22]
    source.write_text("no C++")
    with pytest.raises(RuntimeError, match=r"value\.cu"):
        emulator.build([source])


ASAN = """
from tests.cuda.test_emulator import *
product(*operands(77, 104, torch.float16))
with emulator.device():
    call("probe_bare_pointer", torch.zeros(101), 100)
    print("clean", flush=True)
    call("probe_bare_pointer", torch.zeros(100), 100)
print("not found")
"""


def test_address_sanitizer() -> None:
    done = emulator.under_asan("-c", ASAN)
    assert done.stdout.strip() == "clean", done.stdout + done.stderr
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "bare_pointer" in done.stderr, done.stderr
