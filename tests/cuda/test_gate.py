"""What the compiler makes of every shipped CUDA kernel is what tests/data/cuda_resources.json records, and none spills.

After a change of the kernels: python -m tests.cuda.gate --write.
"""

from __future__ import annotations

import pytest

from tests.cuda import gate, nvcc, ptx_device

needs_nvcc = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))


@needs_nvcc
@pytest.mark.parametrize(
    ("arch", "type_"), [pytest.param(arch, type_, marks=() if arch < 100 and type_ == "bf16" else pytest.mark.full) for arch in gate.ARCHS for type_ in gate.TYPES]
)
def test_compiled_kernels_are_those_recorded(arch: int, type_: str) -> None:
    """(The types' kernels differ in their matrix instruction and conversions; compiling both for two architectures takes four minutes.)"""
    found, record = gate.measured([arch], [type_]), gate.recorded()
    assert set(found) == {f"{name} sm_{arch}" for name in ptx_device.shipped() if gate.of_types(name, [type_])}
    assert_sound(found)
    expected = {key: row for key, row in record["kernels"].items() if key.endswith(f"sm_{arch}") and gate.of_types(key, [type_])}
    if nvcc.version() == record["nvcc"]:
        changed = [f"{key}: {found.get(key)} instead of {expected.get(key)}" for key in sorted(found.keys() | expected.keys()) if found.get(key) != expected.get(key)]
        assert not changed, "\n".join([*changed, "if that is meant: python -m tests.cuda.gate --write"])
    else:  # another compiler may count otherwise, but not lose blocks
        fewer = [f"{key}: {row['blocks']} blocks instead of {expected[key]['blocks']}" for key, row in found.items() if row["blocks"] < expected[key]["blocks"]]
        assert not fewer, "\n".join(fewer)


def test_the_table_above_each_kernel_is_the_recorded_one() -> None:
    headers = gate.headers(gate.recorded()["kernels"])
    for path, text in headers.items():
        assert path.read_text() == text, f"{path.name}: python -m tests.cuda.gate --write"
    named = {name for text in headers.values() for _, name in gate._ABOVE.findall(text)}
    assert named == {key.partition("<")[0] for key in gate.recorded()["kernels"]}


def test_no_recorded_kernel_spills() -> None:
    rows = gate.recorded()["kernels"]
    assert_sound(rows)
    assert {key.rsplit("_", 1)[1] for key in rows} == {str(arch) for arch in gate.ARCHS}


def assert_sound(rows: dict[str, dict[str, int]]) -> None:
    for key, row in rows.items():
        assert row["stack"] == row["spills"] == 0, f"{key} spills: {row}"
        assert row["narrow_copies"] == 0, f"{key} copies fewer than 16 bytes at a time"
        assert row["blocks"] >= 1, f"{key} does not fit a multiprocessor: {row}"
        streams = "prologue" not in key and "reduce" not in key and not key.startswith("norm_")  # which has no products
        copies = streams and not key.startswith("phm_")  # whose operands go from global memory to registers as they are
        assert (bool(row["matrix"]), bool(row["copies"])) == (streams, copies), f"{key}: {row['matrix']} matrix instructions, {row['copies']} copies"


def test_blocks_per_multiprocessor() -> None:
    """Against NVIDIA's occupancy tables: by registers, threads, shared memory and the number of blocks."""
    for arch, threads, registers, shared, blocks in [
        (80, 128, 128, 0, 4),  # 16 warps of 4096 registers
        (80, 128, 96, 0, 5),
        (80, 256, 255, 0, 1),
        (80, 128, 16, 0, 16),  # 2048 threads
        (80, 32, 16, 0, 32),
        (120, 32, 16, 0, 24),
        (120, 256, 40, 0, 6),  # 1536 threads
        (80, 128, 32, 48 * 1024, 3),
        (80, 128, 32, 163 * 1024, 1),
        (90, 128, 32, 100 * 1024, 2),
        (120, 128, 32, 49 * 1024, 2),
        (120, 128, 32, 50 * 1024, 1),
        (120, 128, 32, 99 * 1024 + 1, 0),
    ]:
        assert gate.blocks_per_multiprocessor(arch, threads, registers, shared) == blocks, (arch, threads, registers, shared)


@needs_nvcc
def test_the_gate_sees_spills_and_narrow_copies() -> None:
    code = """#include "common/ptx.cuh"
    __global__ void __launch_bounds__(1024) spilling(float* p, int n) {
      float v[96];
      for (int i = 0; i < 96; ++i) v[i] = p[i * 1024 + threadIdx.x];
      __syncthreads();
      for (int k = 0; k < n; ++k)
    #pragma unroll
        for (int i = 0; i < 96; ++i) v[i] = v[i] * v[(i + 1) % 96] + v[(i + 7) % 96];
      for (int i = 0; i < 96; ++i) p[i * 1024 + threadIdx.x] = v[i];
    }
    __global__ void __launch_bounds__(128) copying(const float* p, float* out) {
      __shared__ float s[128];
      const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(s + threadIdx.x));
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4; cp.async.wait_all;" ::"r"(to), "l"(p + threadIdx.x) : "memory");
      __syncthreads();
      out[threadIdx.x] = s[127 - threadIdx.x];
    }"""
    launch = ptx_device.Launch(1024, 0)
    for arch in (80, 90):
        rows = gate.inspect([nvcc.cubin(nvcc.written(code, "gate.cu"), arch)], arch, {"spilling": launch, "copying": launch})
        assert rows["spilling"].stack > 0 and rows["spilling"].spills > 0 and rows["spilling"].registers == 64
        assert rows["copying"].narrow_copies == 1 and rows["copying"].copies == 0 and rows["copying"].shared == 512 and rows["copying"].spills == 0
