// One kernel source, two platforms: nvcc, and g++ with FASTADAPT_EMULATED=1, where every CUDA thread is a fiber of the emulator. What CUDA spells in ways that
// g++ cannot parse or the emulator cannot watch (launches, shared memory, thread coordinates) is spelled here. Under emulation __shared__, __syncthreads and
// the warp intrinsics do not exist: kernels take shared memory from one arena and synchronise through ptx.cuh, so the emulator sees all of it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifndef FASTADAPT_EMULATED
#define FASTADAPT_EMULATED 0
#endif

#if FASTADAPT_EMULATED
#include <cmath>
#include <tuple>
#include <utility>

#include "../emulator/emulator.h"

#define FASTADAPT_DEVICE __attribute__((always_inline)) inline
#define FASTADAPT_KERNEL(...) void
#define FASTADAPT_SHARED(name) char* const name = ::fastadapt::emulator::current->shared
#define __grid_constant__
#define threadIdx (::fastadapt::emulator::current->thread->index)
#define blockIdx (::fastadapt::emulator::current->block_index)
#define blockDim (::fastadapt::emulator::current->block_size)
#define gridDim (::fastadapt::emulator::current->grid_size)

#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FASTADAPT_DEVICE __device__ __forceinline__
// Threads per block and, if wanted, the least number of blocks that a multiprocessor must hold. Stands for the kernel's return type.
#define FASTADAPT_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
// The block's dynamic shared memory, the only shared memory there is: char*, 128-byte aligned.
#define FASTADAPT_SHARED(name) extern __shared__ __align__(128) char name[]
#endif

// FASTADAPT_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...) -> status, 0 for success. A kernel name with commas goes in parentheses. The stream
// is a void*.
#define FASTADAPT_LAUNCH(kernel, ...) ::fastadapt::launch(#kernel, kernel, __VA_ARGS__)

namespace fastadapt {

using launch_status = int;  // a cudaError_t
// Dynamic shared memory that a kernel may have without asking.
constexpr size_t kDefaultShared = 48 * 1024;
// What a kernel that needs more asks for at least, all that sm_86, sm_89 and sm_120 have: the permission is the kernel's, and between asking and launching another thread may ask for
// a shape that needs less.
constexpr size_t kAskedShared = 99 * 1024;
constexpr size_t asked_shared(size_t bytes) { return bytes > kAskedShared ? bytes : kAskedShared; }

#if FASTADAPT_EMULATED
struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

template <class... P>
launch_status prepare(void (*kernel)(P...), size_t shared_bytes) {
  return shared_bytes > kDefaultShared ? emulator::allow_shared(reinterpret_cast<const void*>(kernel), asked_shared(shared_bytes)) : 0;
}

inline size_t shared_limit() { return emulator::shared_limit(); }

template <class... P, class... A>
launch_status launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void*, A&&... arguments) {
  if (const launch_status status = prepare(kernel, shared_bytes)) return status;
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
  } call{kernel, {std::forward<A>(arguments)...}};
  const auto run = [](void* call) { std::apply(static_cast<Call*>(call)->kernel, static_cast<Call*>(call)->arguments); };
  return emulator::launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, run, &call);
}

#else
using bf16 = ::__nv_bfloat16;
using half = ::__half;

// More dynamic shared memory than the default must be asked for, per kernel and device.
template <class... P>
launch_status prepare(void (*kernel)(P...), size_t shared_bytes) {
  if (shared_bytes <= kDefaultShared) return 0;
  const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(asked_shared(shared_bytes)));
  if (status != cudaSuccess) cudaGetLastError();  // or the thread's next good launch would be reported as failed
  return static_cast<int>(status);
}

// The most that the current device gives one block; 0 without a device.
inline size_t shared_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return static_cast<size_t>(bytes);
}

template <class... P, class... A>
launch_status launch(const char*, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, A&&... arguments) {
  if (const launch_status status = prepare(kernel, shared_bytes)) return status;
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<A&&>(arguments)...);
  return static_cast<int>(cudaGetLastError());
}
#endif

}  // namespace fastadapt
