// Linked to every library of mutants of the CPU kernels: which mutant runs, and memory in which an access behind the end of an allocation is a crash.
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>

extern "C" __attribute__((visibility("default"))) int fastadapt_mutant = 0;

namespace {

// `size` bytes that end, up to the alignment of 64, at an unreadable page; another lies before them.
class Guarded final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    void* data = take(size);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }

  static void* take(size_t size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), whole = (size + page - 1) / page * page;
    char* base = static_cast<char*>(mmap(nullptr, whole + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED || mprotect(base + page, whole, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
    void* data = base + page + whole - (size + 63) / 64 * 64;
    const std::lock_guard lock(mutex_);
    blocks_[data] = {base, whole + 2 * page};
    return data;
  }
  static void release(void* data) {
    if (!data) return;
    const std::lock_guard lock(mutex_);
    const auto [base, size] = blocks_.at(data);
    blocks_.erase(data);
    munmap(base, size);
  }

 private:
  static inline std::mutex mutex_;
  static inline std::unordered_map<void*, std::pair<char*, size_t>> blocks_;
};

Guarded guarded;

}  // namespace

namespace fastadapt::cpu {

float* scratch(int64_t floats) {
  static thread_local void* block = nullptr;
  Guarded::release(block);
  block = Guarded::take(static_cast<size_t>(floats) * sizeof(float));
  std::fill_n(static_cast<float*>(block), floats, NAN);
  return static_cast<float*>(block);
}

}  // namespace fastadapt::cpu

// Of tensors: every one that is made from here on. Not a static initialiser, so that whoever loads the library decides.
extern "C" __attribute__((visibility("default"))) void fastadapt_guard() { c10::SetCPUAllocator(&guarded, 1); }
