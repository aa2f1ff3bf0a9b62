// y = a b' for a (rows, depth) and b (64, depth): asynchronous copies in two stages, matrix loads, tensor cores, and an epilogue through shared memory, with
// the mistakes that such a kernel invites. `mistake` is the same for all threads, so every variant is one launch away.
#include "common/ptx.cuh"

namespace fastadapt {

enum Mistake : int { kNone, kMissingBarrier, kLateWait, kMissingSyncWarp, kUnmaskedLoad, kUnmaskedStore, kNarrowOffset };

constexpr int kRows = 64, kColumns = 64, kDepth = 32, kThreads = 128;

struct ProductParams {
  const void *a, *b;
  void* y;
  int64_t rows, depth, a_stride;
  int pitch, mistake;  // elements between rows in shared memory
};

template <class T>
FASTADAPT_DEVICE void load(char* stage, const ProductParams& p, int64_t row0, int64_t k0) {
  for (int i = threadIdx.x; i < (kRows + kColumns) * kDepth / 8; i += kThreads) {
    const int r = i / (kDepth / 8), c = i % (kDepth / 8) * 8;
    const bool is_a = r < kRows, in_depth = k0 + c < p.depth;
    const int64_t row = row0 + r;
    const bool valid = in_depth && (!is_a || row < p.rows || p.mistake == kUnmaskedLoad);
    int64_t offset = row * p.a_stride + k0 + c;
    if (p.mistake == kNarrowOffset) offset = static_cast<int>(offset);
    const T* from = is_a ? static_cast<const T*>(p.a) + (valid ? offset : 0) : static_cast<const T*>(p.b) + (valid ? (r - kRows) * p.depth + k0 + c : 0);
    ptx::cp_async16(stage + (r * p.pitch + c) * 2, from, valid);
  }
}

template <class T>
FASTADAPT_KERNEL(kThreads) product(const ProductParams p) {
  FASTADAPT_SHARED(arena);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, steps = static_cast<int>((p.depth + kDepth - 1) / kDepth);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows;
  const int stage_bytes = (kRows + kColumns) * p.pitch * 2;
  float sum[kColumns / 8][4] = {};
  load<T>(arena, p, row0, 0);
  ptx::cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load<T>(arena + (step + 1) % 2 * stage_bytes, p, row0, (step + 1) * kDepth);
    ptx::cp_async_commit();
    if (p.mistake == kLateWait)
      ptx::cp_async_wait<2>();
    else
      ptx::cp_async_wait<1>();
    ptx::sync_block();
    const char* stage = arena + step % 2 * stage_bytes;
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, stage + ((warp * 16 + lane % 16) * p.pitch + k + lane / 16 * 8) * 2);
      for (int j = 0; j < kColumns / 8; j += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, stage + ((kRows + j * 8 + lane % 8 + lane / 16 * 8) * p.pitch + k + lane / 8 % 2 * 8) * 2);
        ptx::mma(sum[j], a, b[0], b[1], T{});
        ptx::mma(sum[j + 1], a, b[2], b[3], T{});
      }
    }
    if (p.mistake != kMissingBarrier || step != 1) ptx::sync_block();
  }
  constexpr int kPitchY = kColumns + 8;  // as wide as what the copies left, whatever the pitch
  ptx::cp_async_wait<0>();
  char* own = arena + warp * 16 * kPitchY * 2;
  for (int j = 0; j < kColumns / 8; ++j)
    for (int i = 0; i < 2; ++i) ptx::store_shared(own + ((lane / 4 + i * 8) * kPitchY + j * 8 + lane % 4 * 2) * 2, pack(sum[j][i * 2], sum[j][i * 2 + 1], T{}));
  if (p.mistake != kMissingSyncWarp) ptx::sync_warp();
  for (int i = lane; i < 16 * kColumns / 8; i += 32) {
    const int r = i / (kColumns / 8), c = i % (kColumns / 8) * 8;
    const int64_t row = row0 + warp * 16 + r;
    if (row < p.rows || p.mistake == kUnmaskedStore)
      ptx::store_global(static_cast<T*>(p.y) + row * kColumns + c, ptx::load_shared<uint4>(own + (r * kPitchY + c) * 2));
  }
}

template <class T>
int launch_product(const ProductParams& p) {
  const int bytes = 2 * (kRows + kColumns) * p.pitch * 2;
  auto kernel = &product<T>;
  return FASTADAPT_LAUNCH(kernel, dim3(static_cast<unsigned>((p.rows + kRows - 1) / kRows)), dim3(kThreads), bytes, nullptr, p);
}

}  // namespace fastadapt

extern "C" int product(const fastadapt::ProductParams* p, int is_half) {
  return is_half ? fastadapt::launch_product<fastadapt::half>(*p) : fastadapt::launch_product<fastadapt::bf16>(*p);
}
