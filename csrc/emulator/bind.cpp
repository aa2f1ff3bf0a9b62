// The Python side of the emulator: tests/cuda/emulator.py gives it names and defaults.
#include <pybind11/pybind11.h>

#include "emulator.h"

namespace py = pybind11;
using namespace fastadapt::emulator;

namespace {

py::dict as_dict(const Counters& c) {
  py::dict d;
#define FASTADAPT_COUNTER(name) d[#name] = c.name
  FASTADAPT_COUNTER(launches);
  FASTADAPT_COUNTER(blocks);
  FASTADAPT_COUNTER(block_barriers);
  FASTADAPT_COUNTER(mma);
  FASTADAPT_COUNTER(ldmatrix);
  FASTADAPT_COUNTER(ldmatrix_conflicts);
  FASTADAPT_COUNTER(cp_async_bytes);
  FASTADAPT_COUNTER(global_load_bytes);
  FASTADAPT_COUNTER(global_store_bytes);
  FASTADAPT_COUNTER(shared_load_bytes);
  FASTADAPT_COUNTER(shared_store_bytes);
  FASTADAPT_COUNTER(shared_conflicts);
  FASTADAPT_COUNTER(global_sectors);
  FASTADAPT_COUNTER(global_groups);
#undef FASTADAPT_COUNTER
  return d;
}

}  // namespace

PYBIND11_MODULE(fastadapt_emulator, m) {
  m.def(
      "configure",
      [](int policy, uint64_t seed, bool races, bool defer, bool global_races, bool patterns, int arch, int exp2_error, int rcp_error) {
        configure({static_cast<Policy>(policy), seed, races, defer, global_races, patterns, arch, exp2_error, rcp_error});
      },
      py::kw_only(), py::arg("policy"), py::arg("seed"), py::arg("races"), py::arg("defer"), py::arg("global_races"), py::arg("patterns"), py::arg("arch"),
      py::arg("exp2_error"), py::arg("rcp_error"));
  m.def("last_error", [] { return last_error(); });
  m.def(
      "stats",
      [](bool reset) {
        py::dict d;
        for (const auto& [kernel, counters] : statistics()) d[kernel.c_str()] = as_dict(counters);
        if (reset) statistics().clear();
        return d;
      },
      py::arg("reset") = true);
  m.def(
      "register_range", [](uintptr_t begin, size_t bytes, bool writable) { register_range(reinterpret_cast<const void*>(begin), bytes, writable); },
      py::arg("begin"), py::arg("bytes"), py::arg("writable") = true);
  m.def("clear_ranges", clear_ranges);
}
