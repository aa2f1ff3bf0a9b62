// Every PTX instruction of the kernels, and nothing else holds inline PTX. Each function has two bodies: the instruction, and what it does on the emulated
// machine, where each access is checked and counted and errors name the caller's line. Only what sm_80 has, which sm_80 to sm_120 all run.
#pragma once
#include "platform.cuh"

namespace fastadapt::ptx {

#if !FASTADAPT_EMULATED

FASTADAPT_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes to shared memory, or of 16 zero bytes, for which global memory is not read. Both addresses are multiples of 16. The bytes are there
// for this thread after a wait that retires their group, for the block after a barrier that follows it.
FASTADAPT_DEVICE void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

FASTADAPT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most N of this thread's latest groups are in flight.
template <int N>
FASTADAPT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 2-byte elements. Lane l names row l % 8 of matrix l / 8; it gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each matrix, or
// of its transpose.
FASTADAPT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

FASTADAPT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// d += a b: 16 x 16 times 16 x 8 in fp32. With g = lane / 4, t = 2 (lane % 4): a holds (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8), each with its right
// neighbour; b0 holds (t, g) and (t + 1, g), b1 the same 8 rows below; d holds (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1).
FASTADAPT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FASTADAPT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Values of 2, 4, 8 or 16 bytes at multiples of their size.
template <class V>
FASTADAPT_DEVICE V load_shared(const void* p) {
  return *static_cast<const V*>(p);
}

template <class V>
FASTADAPT_DEVICE void store_shared(void* p, V v) {
  *static_cast<V*>(p) = v;
}

template <class V>
FASTADAPT_DEVICE V load_global(const void* p) {
  return *static_cast<const V*>(p);
}

template <class V>
FASTADAPT_DEVICE void store_global(void* p, V v) {
  *static_cast<V*>(p) = v;
}

// 2^v, relative error at most 2^-22; subnormal arguments and results are zero (PTX ISA, "ex2").
FASTADAPT_DEVICE float exp2_approx(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(v));
  return r;
}

// 1 / v, error at most 1 ulp over the whole range; subnormal arguments and results are zero (PTX ISA, "rcp").
FASTADAPT_DEVICE float rcp_approx(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(v));
  return r;
}

// The value of lane ^ mask. All 32 lanes call it; it orders no memory.
FASTADAPT_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
FASTADAPT_DEVICE uint32_t shuffle_xor(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

FASTADAPT_DEVICE void sync_block() { __syncthreads(); }

FASTADAPT_DEVICE void sync_warp() { __syncwarp(); }

// Two neighbours in memory, the lower address in the lower half, and two fp32 numbers; round to nearest even.
FASTADAPT_DEVICE float2 unpack(uint32_t v, bf16) { return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)); }
FASTADAPT_DEVICE float2 unpack(uint32_t v, half) { return __half22float2(*reinterpret_cast<const __half2*>(&v)); }
FASTADAPT_DEVICE uint32_t pack(float lo, float hi, bf16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&v);
}
FASTADAPT_DEVICE uint32_t pack(float lo, float hi, half) {
  const __half2 v = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&v);
}
FASTADAPT_DEVICE float to_float(float v) { return v; }
FASTADAPT_DEVICE float to_float(bf16 v) { return __bfloat162float(v); }
FASTADAPT_DEVICE float to_float(half v) { return __half2float(v); }
FASTADAPT_DEVICE float from_float(float v, float) { return v; }
FASTADAPT_DEVICE bf16 from_float(float v, bf16) { return __float2bfloat16_rn(v); }
FASTADAPT_DEVICE half from_float(float v, half) { return __float2half_rn(v); }

#else

using emulator::here;
using emulator::Site;

FASTADAPT_DEVICE void cp_async16(void* shared, const void* global, bool valid, Site site = here()) { emulator::cp_async16(shared, global, valid, site); }
FASTADAPT_DEVICE void cp_async_commit() { emulator::cp_async_commit(); }
template <int N>
FASTADAPT_DEVICE void cp_async_wait() {
  emulator::cp_async_wait(N);
}
FASTADAPT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared, Site site = here()) { emulator::ldmatrix_x4(r, shared, false, site); }
FASTADAPT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared, Site site = here()) { emulator::ldmatrix_x4(r, shared, true, site); }
FASTADAPT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16, Site site = here()) { emulator::mma_bf16(d, a, b0, b1, site); }
FASTADAPT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, half, Site site = here()) { emulator::mma_half(d, a, b0, b1, site); }

template <class V>
constexpr void check_width() {
  static_assert(std::is_trivially_copyable_v<V> && (sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16),
                "a memory instruction moves 2, 4, 8 or 16 bytes");
}
template <class V>
FASTADAPT_DEVICE V load_shared(const void* p, Site site = here()) {
  check_width<V>();
  V v;
  emulator::load_shared(&v, p, sizeof(V), site);
  return v;
}
template <class V>
FASTADAPT_DEVICE void store_shared(void* p, V v, Site site = here()) {
  check_width<V>();
  emulator::store_shared(p, &v, sizeof(V), site);
}
template <class V>
FASTADAPT_DEVICE V load_global(const void* p, Site site = here()) {
  check_width<V>();
  V v;
  emulator::load_global(&v, p, sizeof(V), site);
  return v;
}
template <class V>
FASTADAPT_DEVICE void store_global(void* p, V v, Site site = here()) {
  check_width<V>();
  emulator::store_global(p, &v, sizeof(V), site);
}

FASTADAPT_DEVICE float exp2_approx(float v) { return emulator::exp2_approx(v); }
FASTADAPT_DEVICE float rcp_approx(float v) { return emulator::rcp_approx(v); }
FASTADAPT_DEVICE float shuffle_xor(float v, int mask, Site site = here()) { return __uint_as_float(emulator::shuffle_xor(__float_as_uint(v), mask, site)); }
FASTADAPT_DEVICE uint32_t shuffle_xor(uint32_t v, int mask, Site site = here()) { return emulator::shuffle_xor(v, mask, site); }
FASTADAPT_DEVICE void sync_block(Site site = here()) { emulator::sync_block(site); }
FASTADAPT_DEVICE void sync_warp(Site site = here()) { emulator::sync_warp(site); }

FASTADAPT_DEVICE float to_float(float v) { return v; }
FASTADAPT_DEVICE float to_float(bf16 v) { return emulator::bf16_to_float(v.bits); }
FASTADAPT_DEVICE float to_float(half v) { return emulator::half_to_float(v.bits); }
FASTADAPT_DEVICE float from_float(float v, float) { return v; }
FASTADAPT_DEVICE bf16 from_float(float v, bf16) { return {emulator::float_to_bf16(v)}; }
FASTADAPT_DEVICE half from_float(float v, half) { return {emulator::float_to_half(v)}; }
template <class T>
FASTADAPT_DEVICE float2 unpack(uint32_t v, T) {
  return {to_float(T{static_cast<uint16_t>(v)}), to_float(T{static_cast<uint16_t>(v >> 16)})};
}
template <class T>
FASTADAPT_DEVICE uint32_t pack(float lo, float hi, T) {
  return from_float(lo, T{}).bits | static_cast<uint32_t>(from_float(hi, T{}).bits) << 16;
}

#endif

}  // namespace fastadapt::ptx

namespace fastadapt {
using ptx::from_float;
using ptx::pack;
using ptx::to_float;
using ptx::unpack;
}  // namespace fastadapt
