// A CUDA device on the host, for tests. Every thread of a block is a fiber; warp and block instructions are meeting points, between which the schedule is free:
// in order, by random priorities, or random at every switch. Blocks run one after another, in a random order under the random schedules. What a GPU does
// silently is an error here: races in shared memory, reads of what was never written or has not arrived, accesses outside an allocation, divergence around
// collective instructions. Errors end the launch, whose status is then not 0, and name the kernel's line.
//
// It does not show: timing, memory ordering weaker than the barriers', the rounding inside tensor cores (fp32 sums in order of k here), what ptxas makes of the
// code.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

// What CUDA declares outside every namespace.
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float __uint_as_float(uint32_t v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t v;
  std::memcpy(&v, &f, 4);
  return v;
}

namespace fastadapt::emulator {

// A place in a kernel's source in one register: the file's name (a 47-bit address) below the line.
struct Site {
  uint64_t packed;
  const char* file() const { return reinterpret_cast<const char*>(packed << 16 >> 16); }
  int line() const { return static_cast<int>(packed >> 48); }
  std::string text() const;
};
// As a default argument: the line that calls.
__attribute__((always_inline)) inline Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {reinterpret_cast<uint64_t>(file) | static_cast<uint64_t>(line) << 48};
}

enum Policy : int { kInOrder, kPriority, kRandom };

struct Options {
  Policy policy = kPriority;
  uint64_t seed = 0;
  bool races = true;          // watch every access to shared memory
  bool defer = true;          // asynchronous copies arrive at the last legal moment, and their destination holds NaN until then; false: at once
  bool global_races = false;  // watch global memory for bytes that two blocks of a launch touch, one of them storing
  bool patterns = false;      // count bank conflicts of scalar accesses and the sectors of global ones
  int arch = 80;
  int exp2_error = 0, rcp_error = 0;  // 1 or -1 adds the documented worst-case error of the approximate instruction, upwards or downwards in magnitude
};

// Of all launches of one kernel. Conflicts are extra passes over the banks; sectors are the 32-byte pieces of global memory that warps ask for, one instruction
// at a time. A group of accesses is what the lanes of a warp do at one line between two meeting points, so the last three are exact where lanes do not diverge.
struct Counters {
  uint64_t launches, blocks, block_barriers, mma, ldmatrix, ldmatrix_conflicts, cp_async_bytes, global_load_bytes, global_store_bytes, shared_load_bytes,
      shared_store_bytes;
  uint64_t shared_conflicts, global_sectors, global_groups;
};

void configure(const Options& options);  // a new device: it forgets the last error and what kernels were allowed
const std::string& last_error();         // empty: none since configure
std::map<std::string, Counters>& statistics();
// Once a range is known, global accesses outside all ranges are errors.
void register_range(const void* begin, size_t bytes, bool writable);
void clear_ranges();

size_t shared_limit();
int allow_shared(const void* kernel, size_t bytes);
int launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*run)(void*), void* call);

// What a kernel sees of the block that runs.
struct Thread {
  uint3 index;
};
struct Block {
  Thread* thread;
  char* shared;
  uint3 block_index;
  dim3 block_size, grid_size;
};
// Not thread_local: launches exclude each other, and a library that is loaded late may find no room for static thread-local storage (a dynamic one costs a call
// at every threadIdx).
extern Block* current;

void cp_async16(void* shared, const void* global, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(int in_flight);
void ldmatrix_x4(uint32_t (&r)[4], const void* shared, bool transpose, Site site);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
void load_shared(void* to, const void* from, unsigned bytes, Site site);
void store_shared(void* to, const void* from, unsigned bytes, Site site);
void load_global(void* to, const void* from, unsigned bytes, Site site);
void store_global(void* to, const void* from, unsigned bytes, Site site);
uint32_t shuffle_xor(uint32_t v, int mask, Site site);
void sync_block(Site site);
void sync_warp(Site site);
float exp2_approx(float v);
float rcp_approx(float v);

inline float bf16_to_float(uint16_t v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }
inline uint16_t float_to_bf16(float f) {
  const uint32_t v = __float_as_uint(f);
  if ((v & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // as cvt.rn.bf16.f32 has it
  return static_cast<uint16_t>((v + 0x7fffu + (v >> 16 & 1)) >> 16);
}
// The exponent is moved by a multiplication, which is right for subnormals too.
inline float half_to_float(uint16_t v) {
  const uint32_t magnitude = v & 0x7fffu, sign = static_cast<uint32_t>(v & 0x8000u) << 16;
  const float finite = __uint_as_float(magnitude << 13) * 0x1p112f;
  return __uint_as_float(sign | (magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : __float_as_uint(finite)));
}
inline uint16_t float_to_half(float f) {
  if (f != f) return 0x7fff;
  const _Float16 h = static_cast<_Float16>(f);
  uint16_t v;
  std::memcpy(&v, &h, 2);
  return v;
}

}  // namespace fastadapt::emulator
