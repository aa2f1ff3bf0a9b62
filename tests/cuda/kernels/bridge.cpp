// Linked in front of the emulator: launches go to a function of Python's, and with them the memory that the op says they may touch. Everything else is the emulator's.
#include <cxxabi.h>
#include <dlfcn.h>

#include <vector>

#include "emulator/emulator.h"

namespace {

struct Range {
  const char* begin;
  int64_t bytes, writable;
};
using Launcher = int (*)(const char* kernel, const dim3* grid, const dim3* block, size_t shared_bytes, const void* arguments);

std::vector<Range> ranges;
Launcher launcher = nullptr;

}  // namespace

namespace fastadapt::emulator {

void clear_ranges() { ranges.clear(); }

// The rows of a matrix without gaps come one by one and are joined.
void register_range(const void* begin, size_t bytes, bool writable) {
  const char* const at = static_cast<const char*>(begin);
  if (!ranges.empty() && ranges.back().begin + ranges.back().bytes == at && ranges.back().writable == writable) ranges.back().bytes += bytes;
  else ranges.push_back({at, static_cast<int64_t>(bytes), writable});
}

int launch(const char*, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*)(void*), void* call) {
  Dl_info info;
  int status = 0;
  if (!launcher || !dladdr(kernel, &info) || !info.dli_sname) return 1;
  char* const name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  status = launcher(name, &grid, &block, shared_bytes, static_cast<const char*>(call) + sizeof(kernel));  // platform.cuh: the arguments lie behind the kernel's address
  free(name);
  return status;
}

}  // namespace fastadapt::emulator

extern "C" void set_launcher(Launcher function) { launcher = function; }
extern "C" const Range* known_ranges(size_t* count) { return *count = ranges.size(), ranges.data(); }
