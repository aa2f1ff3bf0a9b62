// Kernels that show one behaviour of the emulator each.
#include "common/ptx.cuh"

namespace fastadapt {

// One warp multiplies (16, 16) by (16, 8), operands and result in fragments: a warp's 32 lanes hold a[4], b[2], d[4].
template <class T>
FASTADAPT_KERNEL(32) multiply_fragments(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t fa[4];
  float fd[4];
  for (int i = 0; i < 4; ++i) fa[i] = ptx::load_global<uint32_t>(a + lane * 4 + i), fd[i] = ptx::load_global<float>(d + lane * 4 + i);
  ptx::mma(fd, fa, ptx::load_global<uint32_t>(b + lane * 2), ptx::load_global<uint32_t>(b + lane * 2 + 1), T{});
  for (int i = 0; i < 4; ++i) ptx::store_global(d + lane * 4 + i, fd[i]);
}

FASTADAPT_KERNEL(32) load_matrices(const uint16_t* from, uint32_t* to, bool transpose) {
  FASTADAPT_SHARED(arena);
  const int lane = threadIdx.x;
  ptx::cp_async16(arena + lane * 16, from + lane * 8, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::sync_warp();
  uint32_t r[4];
  if (transpose)
    ptx::ldmatrix_x4_trans(r, arena + lane * 16);
  else
    ptx::ldmatrix_x4(r, arena + lane * 16);
  for (int i = 0; i < 4; ++i) ptx::store_global(to + lane * 4 + i, r[i]);
}

FASTADAPT_KERNEL(32) approximate(const float* from, float* exp2, float* rcp) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  const float v = ptx::load_global<float>(from + i);
  ptx::store_global(exp2 + i, ptx::exp2_approx(v));
  ptx::store_global(rcp + i, ptx::rcp_approx(v));
}

template <class T>
FASTADAPT_KERNEL(32) convert(const float* from, uint32_t* packed, float* back) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  const float2 v = ptx::load_global<float2>(from + 2 * i);
  const uint32_t p = pack(v.x, v.y, T{});
  ptx::store_global(packed + i, p);
  const float2 u = unpack(p, T{});
  ptx::store_global(back + 2 * i, float2{u.x, to_float(from_float(v.y, T{}))});
}

FASTADAPT_KERNEL(64) shuffle(uint32_t* out, int mask) {
  const int i = threadIdx.x;
  ptx::store_global(out + i, ptx::shuffle_xor(static_cast<uint32_t>(i), mask) + static_cast<uint32_t>(ptx::shuffle_xor(100.f * static_cast<float>(i), mask)));
}

// What can go wrong that a product of matrices has no place for.
enum Wrong : int {
  kNothing,
  kPartialBarrier,
  kTwoBarriers,
  kMissingLane,
  kEarlyEnd,
  kLeftInFlight,
  kUninitialised,
  kSharedBounds,
  kSharedAlignment,
  kGlobalAlignment,
  kOneForAll,
  kReadsAnother,
  kWritesAnother,
  kInterlocked,
  kWarpWriteAfterRead,
  kReadOnly,
};

FASTADAPT_KERNEL(64) misbehave(float* data, int wrong) {
  FASTADAPT_SHARED(arena);
  const int tid = threadIdx.x;
  float v = 1.f;
  ptx::store_shared(arena + tid * 4, v);
  if (wrong == kEarlyEnd && tid == 5) return;
  if (wrong == kPartialBarrier) {
    if (tid < 32) ptx::sync_block();
  } else if (wrong == kTwoBarriers && tid < 32) {
    ptx::sync_block();
  } else {
    ptx::sync_block();
  }
  if (wrong == kMissingLane && tid != 7) ptx::sync_warp();
  if (wrong == kLeftInFlight) ptx::cp_async16(arena + 1024 + tid * 16, data, false), ptx::cp_async_commit();
  if (wrong == kUninitialised) v += ptx::load_shared<float>(arena + 512 + tid * 4);
  if (wrong == kSharedBounds) v += ptx::load_shared<float>(arena + 2048 + tid * 4);
  if (wrong == kSharedAlignment) v += ptx::load_shared<float2>(arena + 4).x;
  if (wrong == kGlobalAlignment) v += ptx::load_global<float4>(data + 1).x;
  if (wrong == kWarpWriteAfterRead) v += ptx::load_shared<float>(arena + (tid ^ 1) * 4), ptx::store_shared(arena + tid * 4, v);
  if (wrong == kInterlocked) {
    if (tid == 63) ptx::sync_warp();
    ptx::sync_block();
  }
  const int own = blockIdx.x * 64 + tid;
  if (wrong == kReadsAnother) v += ptx::load_global<float>(data + (own + 64) % (gridDim.x * 64));
  ptx::store_global(data + (wrong == kOneForAll ? tid : own), v);
  if (wrong == kWritesAnother) ptx::store_global(data + (own + 64) % (gridDim.x * 64), v);
}

FASTADAPT_KERNEL(64) touch_shared(int bytes) {
  FASTADAPT_SHARED(arena);
  ptx::store_shared(arena + bytes - 4 - 4 * static_cast<int>(threadIdx.x), 1.f);
}

// Column `tid` of a matrix of 32-bit words in shared memory; a pitch of 32 words puts all of it in one bank.
FASTADAPT_KERNEL(32) columns(float* out, int pitch, int step) {
  FASTADAPT_SHARED(arena);
  const int lane = threadIdx.x;
  ptx::store_shared(arena + lane * pitch * 4, 1.f);
  ptx::sync_warp();
  ptx::store_global(out + lane * step, ptx::load_shared<float>(arena + lane * pitch * 4));
}

// The thread and the block that come last leave their number: what a schedule decides.
FASTADAPT_KERNEL(64) last_to_come(int* out) {
  FASTADAPT_SHARED(arena);
  ptx::store_shared(arena, static_cast<int>(threadIdx.x));
  ptx::sync_block();
  if (threadIdx.x == 0) ptx::store_global(out + 1 + blockIdx.x, ptx::load_shared<int>(arena)), ptx::store_global(out, static_cast<int>(blockIdx.x));
}

// Past every check but AddressSanitizer's.
FASTADAPT_KERNEL(32) bare_pointer(float* data, int i) { data[i] = 1.f; }

}  // namespace fastadapt

using namespace fastadapt;

extern "C" {
int probe_mma(const uint32_t* a, const uint32_t* b, float* d, int is_half) {
  return is_half ? FASTADAPT_LAUNCH(multiply_fragments<half>, dim3(1), dim3(32), 0, nullptr, a, b, d)
                 : FASTADAPT_LAUNCH(multiply_fragments<bf16>, dim3(1), dim3(32), 0, nullptr, a, b, d);
}
int probe_ldmatrix(const uint16_t* from, uint32_t* to, int transpose) {
  return FASTADAPT_LAUNCH(load_matrices, dim3(1), dim3(32), 512, nullptr, from, to, transpose != 0);
}
int probe_approximate(const float* from, float* exp2, float* rcp, int count) {
  return FASTADAPT_LAUNCH(approximate, dim3(count / 32), dim3(32), 0, nullptr, from, exp2, rcp);
}
int probe_convert(const float* from, uint32_t* packed, float* back, int pairs, int is_half) {
  return is_half ? FASTADAPT_LAUNCH(convert<half>, dim3(pairs / 32), dim3(32), 0, nullptr, from, packed, back)
                 : FASTADAPT_LAUNCH(convert<bf16>, dim3(pairs / 32), dim3(32), 0, nullptr, from, packed, back);
}
int probe_shuffle(uint32_t* out, int mask) { return FASTADAPT_LAUNCH(shuffle, dim3(1), dim3(64), 0, nullptr, out, mask); }
int probe_misbehave(float* data, int wrong, int blocks) { return FASTADAPT_LAUNCH(misbehave, dim3(blocks), dim3(64), 2048, nullptr, data, wrong); }
int probe_touch_shared(int bytes) { return FASTADAPT_LAUNCH(touch_shared, dim3(1), dim3(64), bytes, nullptr, bytes); }
int probe_grid(unsigned x, unsigned y, unsigned z, unsigned threads) {
  return FASTADAPT_LAUNCH(touch_shared, dim3(x, y, z), dim3(threads), 4096, nullptr, 4096);
}
int probe_columns(float* out, int pitch, int step) { return FASTADAPT_LAUNCH(columns, dim3(1), dim3(32), 32 * 40 * 4, nullptr, out, pitch, step); }
int probe_last_to_come(int* out, int blocks) { return FASTADAPT_LAUNCH(last_to_come, dim3(blocks), dim3(64), 64, nullptr, out); }
int probe_bare_pointer(float* data, int i) { return FASTADAPT_LAUNCH(bare_pointer, dim3(1), dim3(32), 0, nullptr, data, i); }
int probe_shared_limit() { return static_cast<int>(shared_limit()); }
#if FASTADAPT_EMULATED
// A launcher that does not ask for more shared memory than every kernel has.
int probe_unprepared(int bytes) {
  return emulator::launch(
      "touch_shared", reinterpret_cast<const void*>(&touch_shared), dim3(1), dim3(64), bytes, [](void* bytes) { touch_shared(*static_cast<int*>(bytes)); },
      &bytes);
}
#endif
// A launcher that forgets the status.
void probe_unchecked(float* data, int wrong) { (void)FASTADAPT_LAUNCH(misbehave, dim3(2), dim3(64), 2048, nullptr, data, wrong); }
}
