// Raw CPU ops: allocates, fills the params structs, runs the kernels' ranges in parallel. With cpu_entrance.cpp the only CPU-side file that sees the torch library API.
// Arguments were checked in Python; rows have unit stride, weights are contiguous.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "cpu/dropout_add_norm.h"
#include "cpu/kernels.h"
#include "cpu/phm_bottleneck.h"
#include "cpu_ops.h"
#include "include/plan.h"

namespace fastadapt::raw {

using namespace fastadapt::plan;

Type type_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return kFloat;
    case at::kBFloat16: return kBFloat16;
    case at::kHalf: return kHalf;
    default: TORCH_CHECK_TYPE(false, "fastadapt: the cpu kernels take float32, bfloat16 and float16, not ", dtype);
  }
}
Type type_of(const Tensor& t) { return type_of(t.scalar_type()); }

// Whether GEMMs take bf16 operands. oneDNN may be switched off at any time, or held below the processor's level (ONEDNN_MAX_CPU_ISA), where its bf16 GEMM throws.
bool native(Type activations) {
  if (activations != kBFloat16 || !at::globalContext().userEnabledMkldnn()) return false;
  static const bool able = __builtin_cpu_supports("avx512bf16") && [] {
    const at::BFloat16 a[8 * 2]{}, b[2 * 8]{};
    float c[8 * 8];
    try {
      at::native::cpublas::brgemm(8, 8, 2, 2, 8, 8, false, a, b, c, true);
      at::native::cpublas::brgemm_release();
    } catch (const std::exception&) {
      return false;
    }
    return true;
  }();
  return able;
}

const void* data(const Tensor& t) { return t.const_data_ptr(); }
const void* data(const optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// Memory that is new, as that of a large tensor mostly is, costs a fault a page where it is touched first: 48 MB take 16 ms in pages of 4 KB, 2.7 in those of 2 MB (measured on CPU). Linux
// gives the large ones to those who ask, in its usual setting.
Tensor fresh(at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor t = at::cpu::empty(shape, options);
#ifdef __linux__
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t at = reinterpret_cast<uintptr_t>(t.const_data_ptr()), begin = (at + page - 1) / page * page, end = (at + t.nbytes()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return t;
}

// An output that is asked for, or the empty placeholder.
Tensor output(bool need, at::IntArrayRef shape, const Tensor& like) { return fresh(need ? shape : at::IntArrayRef{0}, like.options()); }
void* pointer(bool need, Tensor& t) { return need ? t.mutable_data_ptr() : nullptr; }

template <class Range>
void parallel(int64_t n, Range&& range) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { range(begin, end); });
}

// A kernel's function of params and a range.
template <class Kernel, class Params>
void parallel(int64_t n, Kernel&& kernel, const Params& p) {
  parallel(n, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

Tensor floats(int64_t n) { return fresh({n}, at::TensorOptions().dtype(at::kFloat)); }

// Working memory of a call, up to 32 MB of which a thread keeps for its next ones: the first touch of new pages took longer than all the rest of VL-PET-large's backward at 128 rows (bf16,
// measured on CPU). A block is free when nobody else holds it. Where torch fills new memory, nothing is kept, so that it is filled.
Tensor working_memory(int64_t n) {
  static thread_local std::vector<Tensor> kept;
  constexpr int64_t most = (32 << 20) / sizeof(float);
  if (n == 0 || n > most || (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory())) return floats(n);
  const auto free = [](const Tensor& t) { return t.use_count() == 1; };
  Tensor* best = nullptr;
  for (Tensor& t : kept)
    if (free(t) && t.numel() >= n && (!best || t.numel() < best->numel())) best = &t;
  if (best) return *best;
  kept.erase(std::remove_if(kept.begin(), kept.end(), free), kept.end());  // too small, all of them
  int64_t sum = n;
  for (const Tensor& t : kept) sum += t.numel();
  Tensor t = floats(n);
  if (sum <= most) kept.push_back(t);
  return t;
}

// Backward over chunks of rows, whose partials of `size` floats are added in order: run(chunk, partial) for each, where total(chunk) says which partial it belongs to, and that of a
// total's first chunk is the total itself. So a thread has one partial beside it: one a chunk would be memory that is touched once, by products that took 1.4 times as long (VL-PET-large
// in bf16, 2048 rows, measured on CPU). A thread whose turn to add has not come waits; chunks are handed out in order, so somebody works on that whose turn it is.
template <class Total, class Run>
void over_chunks(int64_t chunks, int64_t totals, int64_t size, Total&& total, Run&& run) {
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), chunks), own = std::min(workers, chunks - totals);
  Tensor storage = working_memory(own * size);
  float* const partials = storage.mutable_data_ptr<float>();
  std::atomic<int64_t> next{0}, turn{0}, taken{0};
  std::atomic<bool> failed{false};
  parallel(workers, [&](int64_t, int64_t) {
    float* partial = nullptr;
    try {
      for (int64_t chunk; (chunk = next++) < chunks;) {
        const auto [to, first] = total(chunk);
        if (!first && !partial) partial = partials + taken++ * size;
        run(chunk, first ? to : partial);
        while (turn != chunk) {
          if (failed) return;
          std::this_thread::yield();
        }
        if (!first) cpu::add_partial(to, partial, size);
        turn = chunk + 1;
      }
    } catch (...) {
      failed = true;
      throw;
    }
  });
}

void carve(BottleneckParams& p, Tensor& storage) {
  const int64_t width = padded(p.width), out = padded(p.out), rank = padded(p.rank);
  const int64_t size = p.native ? 2 : 1;  // numbers in the place of a float
  storage = working_memory((width + out) * rank / size + rank + 2 * out);
  p.packed_down = storage.mutable_data_ptr<float>(), p.packed_up = p.packed_down + width * rank / size, p.vectors = p.packed_up + out * rank / size;
}

int64_t panels_of(int64_t columns) { return padded(columns) / kPanel; }

BottleneckParams common(const Tensor& x, const Tensor& w_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& gate, const optional<Tensor>& scale_tensor,
                        double scale, int64_t activation, bool add_input) {
  BottleneckParams p{};
  p.activation_type = type_of(x), p.parameter_type = type_of(w_down), p.native = native(p.activation_type);
  p.rows = x.size(0), p.width = x.size(1), p.out = w_up.size(0), p.rank = w_down.size(0);
  p.x = data(x), p.x_stride = x.stride(0);
  p.w_down = data(w_down), p.w_up = data(w_up), p.b_up = data(b_up), p.gate = data(gate), p.scale_tensor = data(scale_tensor);
  p.scale = static_cast<float>(scale), p.activation = static_cast<Activation>(activation), p.add_input = add_input;
  return p;
}

// Panels of 32 columns, of weights of 32 x `depth` numbers, as many a thread as make it worth one.
template <class Range>
void parallel_panels(int64_t panels, int64_t depth, Range&& range) {
  at::parallel_for(0, panels, ceil_div(2048, depth), [&](int64_t begin, int64_t end) { range(begin, end); });
}

// A call by columns: thin(begin, end) over panels of the rank, then wide(begin, end) over `panels`.
template <class Range>
void by_columns(BottleneckParams& p, int64_t panels, Range&& thin, Range&& wide) {
  Tensor between = working_memory(cpu::bottleneck_between(p));
  p.between = between.mutable_data_ptr<float>();
  if (cpu::bottleneck_needs_load(p)) parallel(ceil_div(p.rows, kTileRows), cpu::bottleneck_load, p);
  parallel(panels_of(p.rank), thin, p), parallel(panels, wide, p);
}

void run_forward(BottleneckParams& p) {
  Tensor storage;
  if (are_few(p.rows, p.rank) && !p.seed) {
    const int64_t z = kFewRows * padded(p.rank);
    storage = working_memory(z + padded(p.rank) + 2 * padded(p.out));
    p.packed_down = storage.mutable_data_ptr<float>(), p.vectors = p.packed_down + z;
    cpu::bottleneck_prepare(p);
    parallel_panels(panels_of(p.rank), p.width, [&](int64_t b, int64_t e) { cpu::bottleneck_few_down(p, b, e); });
    return parallel_panels(panels_of(p.out), p.rank, [&](int64_t b, int64_t e) { cpu::bottleneck_few_up(p, b, e); });
  }
  carve(p, storage);
  cpu::bottleneck_prepare(p);
  if (go_by_columns(p.rows, kTilesByColumns, panels_of(p.rank))) return by_columns(p, panels_of(p.out), cpu::bottleneck_forward_thin, cpu::bottleneck_forward_wide);
  parallel(panels_of(p.rank) + panels_of(p.out), cpu::bottleneck_pack_forward, p);
  parallel(ceil_div(p.rows, kTileRows), cpu::bottleneck_forward, p);
}

void run_chunk(BottleneckParams p, int64_t chunk, float* partial) {
  p.partials = partial;
  cpu::bottleneck_backward(p, chunk);
}

// The scale's gradient, where it needs one, is the sum of what this returns.
Tensor run_backward(BottleneckParams& p, bool parameters) {
  Tensor storage;
  carve(p, storage);
  const bool columns = go_by_columns(p.rows, kTilesByColumns, panels_of(p.rank));
  const int64_t chunks = ceil_div(p.rows, chunk_rows(p.rows)), size = PartialLayout(padded(p.width), padded(p.out), p.rank, padded(p.rank)).total;
  const int64_t panels = std::max(panels_of(p.width), panels_of(p.out));
  Tensor total = working_memory(size), dscale = floats(panels_of(p.out));
  p.chunks = 1, p.direct = columns && p.parameter_type == kFloat;
  p.partials = total.mutable_data_ptr<float>(), p.dscale_panels = dscale.mutable_data_ptr<float>();
  cpu::bottleneck_prepare(p);
  if (columns) {
    by_columns(p, panels, cpu::bottleneck_backward_thin, cpu::bottleneck_backward_wide);
    return dscale;
  }
  parallel(panels_of(p.rank) + panels_of(p.width), cpu::bottleneck_pack_backward, p);
  over_chunks(chunks, 1, size, [&](int64_t chunk) { return std::pair(p.partials, chunk == 0); }, [&](int64_t chunk, float* partial) { run_chunk(p, chunk, partial); });
  if (parameters) parallel(panels, cpu::bottleneck_reduce, p);
  return dscale;
}

std::tuple<Tensor, Tensor> bottleneck(const Tensor& x, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& gate,
                                      const optional<Tensor>& scale_tensor, const optional<Tensor>& residual, double scale, int64_t activation, bool add_input, bool save) {
  BottleneckParams p = common(x, w_down, w_up, b_up, gate, scale_tensor, scale, activation, add_input);
  p.b_down = data(b_down), p.residual = data(residual), p.residual_stride = residual ? residual->stride(0) : 0;
  Tensor y = output(true, {p.rows, p.width}, x), z = output(save, {p.rows, p.rank}, x);
  if (p.rows == 0) return {y, z};
  p.y = y.mutable_data_ptr(), p.z = pointer(save, z);
  run_forward(p);
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w_down, const Tensor& w_up,
                                                                                       const optional<Tensor>& b_up, const optional<Tensor>& gate, const optional<Tensor>& scale_tensor,
                                                                                       double scale, int64_t activation, bool add_input, int64_t needs) {
  const auto need = [needs](int i) { return (needs >> i & 1) != 0; };
  BottleneckParams p = common(x, w_down, w_up, b_up, gate, scale_tensor, scale, activation, add_input);
  p.dy = data(dy), p.dy_stride = dy.stride(0), p.z = const_cast<void*>(data(z));
  Tensor dx = output(need(0), {p.rows, p.width}, x), dwd = output(need(1), {p.rank, p.width}, w_down), dbd = output(need(2), {p.rank}, w_down), dwu = output(need(3), {p.width, p.rank}, w_down),
         dbu = output(need(4), {p.width}, w_down), dg = output(need(5), {p.width}, w_down), ds = need(6) ? fresh(scale_tensor->sizes(), w_down.options()) : output(false, {}, w_down);
  if (p.rows == 0) {
    for (Tensor* t : {&dwd, &dbd, &dwu, &dbu, &dg, &ds}) t->zero_();
    return {dx, dwd, dbd, dwu, dbu, dg, ds};
  }
  p.dx = pointer(need(0), dx), p.dw_down = pointer(need(1), dwd), p.db_down = pointer(need(2), dbd), p.dw_up = pointer(need(3), dwu), p.db_up = pointer(need(4), dbu);
  p.dgate = pointer(need(5), dg), p.need_scale = need(6);
  const Tensor dscale = run_backward(p, needs > 1);
  if (need(6)) {
    double total = 0;
    for (int64_t i = 0; i < dscale.numel(); ++i) total += p.dscale_panels[i];
    ds.fill_(total);
  }
  return {dx, dwd, dbd, dwu, dbu, dg, ds};
}

uint32_t dropout_threshold(double dropout) { return static_cast<uint32_t>(std::min(std::nearbyint(dropout * 0x1p32), 0x1p32 - 1)); }

BottleneckParams lora_common(const Tensor& x, const Tensor& w_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& seed, double scale, double dropout) {
  BottleneckParams p = common(x, w_down, w_up, b_up, {}, {}, scale, kIdentity, false);
  if (seed)
    p.seed = seed->const_data_ptr<int64_t>(), p.threshold = dropout_threshold(dropout), p.kept = static_cast<float>(1 / (1 - dropout));
  return p;
}

std::tuple<Tensor, Tensor> lora(const Tensor& x, const Tensor& y, const Tensor& w_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& seed, double scale,
                                double dropout, bool save) {
  BottleneckParams p = lora_common(x, w_down, w_up, b_up, seed, scale, dropout);
  p.residual = data(y), p.residual_stride = y.stride(0);
  Tensor out = output(true, {p.rows, p.out}, x), z = output(save, {p.rows, p.rank}, x);
  if (p.rows == 0) return {out, z};
  p.y = out.mutable_data_ptr(), p.z = pointer(save, z);
  run_forward(p);
  return {out, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w_down, const Tensor& w_up, const optional<Tensor>& seed,
                                                         double scale, double dropout, int64_t needs) {
  const auto need = [needs](int i) { return (needs >> i & 1) != 0; };
  BottleneckParams p = lora_common(x, w_down, w_up, {}, seed, scale, dropout);
  p.dy = data(dy), p.dy_stride = dy.stride(0), p.z = const_cast<void*>(data(z));
  Tensor dx = output(need(0), {p.rows, p.width}, x), dwd = output(need(1), {p.rank, p.width}, w_down), dwu = output(need(2), {p.out, p.rank}, w_down), dbu = output(need(3), {p.out}, w_down);
  if (p.rows == 0) {
    for (Tensor* t : {&dwd, &dwu, &dbu}) t->zero_();
    return {dx, dwd, dwu, dbu};
  }
  p.dx = pointer(need(0), dx), p.dw_down = pointer(need(1), dwd), p.dw_up = pointer(need(2), dwu), p.db_up = pointer(need(3), dbu);
  run_backward(p, needs > 1);
  return {dx, dwd, dwu, dbu};
}

// The rows of each task in ascending order, those of no task behind them, and where each task's begin.
struct Routing {
  std::vector<int64_t> order, begin;
  Routing(const Tensor& task_ids, int64_t rows, int64_t tasks) : order(rows), begin(tasks + 2) {
    const int64_t *ids = task_ids.const_data_ptr<int64_t>(), count = task_ids.numel(), each = count ? rows / count : 0;
    const auto task = [&](int64_t i) { return ids[i] >= 0 && ids[i] < tasks ? ids[i] : tasks; };
    for (int64_t i = 0; i < count; ++i) begin[task(i) + 1] += each;
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<int64_t> at(begin);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t row = i * each; row < (i + 1) * each; ++row) order[at[task(i)]++] = row;
  }
  int64_t tasks() const { return static_cast<int64_t>(begin.size()) - 2; }
  int64_t rows_of(int64_t task) const { return begin[task + 1] - begin[task]; }

  // Rows of no task: a copy of those of `from`, or zeros.
  void fill_outside(const Tensor& to, const Tensor* from) const {
    const int64_t bytes = to.size(1) * to.element_size();
    for (int64_t i = begin[tasks()]; i < begin[tasks() + 1]; ++i) {
      char* row = static_cast<char*>(to.mutable_data_ptr()) + order[i] * bytes;
      if (from)
        std::memcpy(row, static_cast<const char*>(from->const_data_ptr()) + order[i] * from->stride(0) * from->element_size(), bytes);
      else
        std::memset(row, 0, bytes);
    }
  }
};

// One task's part of tasks' parameters or gradients, (G, ...), or what all share, (1, ...).
void* part(const Tensor& bank, int64_t task) {
  return static_cast<char*>(const_cast<void*>(bank.const_data_ptr())) + (bank.size(0) > 1 ? task * bank.stride(0) * bank.element_size() : 0);
}
const void* part(const optional<Tensor>& bank, int64_t task) { return bank ? part(*bank, task) : nullptr; }

// The calls of a routed bottleneck: one a task that has rows.
struct RoutedCalls {
  Routing routing;
  std::vector<BottleneckParams> calls;
  std::vector<int64_t> tasks;
  std::vector<Tensor> storages;

  RoutedCalls(const Tensor& x, const Tensor& task_ids, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up, double scale, int64_t activation,
              bool add_input)
      : routing(task_ids, x.size(0), std::max({w_down.size(0), w_up.size(0), b_down ? b_down->size(0) : 1, b_up ? b_up->size(0) : 1})) {
    const Tensor down = w_down.select(0, 0), up = w_up.select(0, 0);
    for (int64_t task = 0; task < routing.tasks(); ++task) {
      if (routing.rows_of(task) == 0) continue;
      BottleneckParams p = common(x, down, up, {}, {}, {}, scale, activation, add_input);
      p.rows = routing.rows_of(task), p.order = routing.order.data() + routing.begin[task];
      p.w_down = part(w_down, task), p.b_down = part(b_down, task), p.w_up = part(w_up, task), p.b_up = part(b_up, task);
      carve(p, storages.emplace_back());
      calls.push_back(p), tasks.push_back(task);
    }
  }

  // f(call, begin, end) over the `count(call)` pieces of work of every call.
  template <class Count, class F>
  void over_all(Count&& count, F&& f) const {
    std::vector<int64_t> first{0};
    for (const BottleneckParams& p : calls) first.push_back(first.back() + count(p));
    parallel(first.back(), [&](int64_t begin, int64_t end) {
      for (size_t i = 0; i < calls.size(); ++i) {
        const int64_t b = std::max(begin, first[i]) - first[i], e = std::min(end, first[i + 1]) - first[i];
        if (b < e) f(calls[i], b, e);
      }
    });
  }
};

std::tuple<Tensor, Tensor> routed_bottleneck(const Tensor& x, const Tensor& task_ids, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up,
                                             const optional<Tensor>& residual, double scale, int64_t activation, bool add_input, bool save) {
  RoutedCalls routed(x, task_ids, w_down, b_down, w_up, b_up, scale, activation, add_input);
  Tensor y = output(true, x.sizes(), x), z = save ? fresh({x.size(0), w_down.size(1)}, x.options()) : output(false, {}, x);
  for (BottleneckParams& p : routed.calls) {
    p.residual = data(residual), p.residual_stride = residual ? residual->stride(0) : 0;
    p.y = y.mutable_data_ptr(), p.z = pointer(save, z);
    cpu::bottleneck_prepare(p);
  }
  routed.over_all([](const BottleneckParams& p) { return (padded(p.rank) + padded(p.width)) / kPanel; }, cpu::bottleneck_pack_forward);
  routed.over_all([](const BottleneckParams& p) { return ceil_div(p.rows, kTileRows); }, cpu::bottleneck_forward);
  routed.routing.fill_outside(y, residual ? &*residual : add_input ? &x : nullptr);
  if (save) routed.routing.fill_outside(z, nullptr);
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> routed_bottleneck_backward(const Tensor& dy, const Tensor& x, const Tensor& task_ids, const Tensor& z, const Tensor& w_down,
                                                                              const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up, double scale, int64_t activation,
                                                                              bool add_input, int64_t needs) {
  const auto need = [needs](int i) { return (needs >> i & 1) != 0; };
  RoutedCalls routed(x, task_ids, w_down, b_down, w_up, b_up, scale, activation, add_input);
  Tensor dx = output(need(0), x.sizes(), x), dwd = output(need(1), w_down.sizes(), w_down), dbd = need(2) ? at::empty_like(*b_down) : output(false, {}, w_down),
         dwu = output(need(3), w_up.sizes(), w_down), dbu = need(4) ? at::empty_like(*b_up) : output(false, {}, w_down);
  const bool absent = static_cast<int64_t>(routed.calls.size()) < routed.routing.tasks();
  if (absent)
    for (Tensor* t : {&dwd, &dbd, &dwu, &dbu}) t->zero_();
  if (need(0)) routed.routing.fill_outside(dx, add_input ? &dy : nullptr);
  if (routed.calls.empty()) return {dx, dwd, dbd, dwu, dbu};
  const int64_t width = padded(x.size(1)), rank = w_down.size(1), partial = PartialLayout(width, width, rank, padded(rank)).total;
  const int64_t calls = static_cast<int64_t>(routed.calls.size());
  Tensor totals = working_memory(calls * partial);
  float* at = totals.mutable_data_ptr<float>();
  std::vector<std::pair<int64_t, int64_t>> chunks;  // of all calls: which call's, and which of its own
  for (BottleneckParams& p : routed.calls) {
    for (int64_t chunk = 0; chunk < ceil_div(p.rows, chunk_rows(p.rows)); ++chunk) chunks.emplace_back(&p - routed.calls.data(), chunk);
    p.dy = data(dy), p.dy_stride = dy.stride(0), p.z = const_cast<void*>(data(z)), p.dx = pointer(need(0), dx);
    p.chunks = 1, p.partials = at, at += partial;
    cpu::bottleneck_prepare(p);
  }
  // The gradients of one task, or, over the chunks of all tasks, of what they share.
  const auto set = [&](BottleneckParams& p, int64_t task, bool shared) {
    const auto wanted = [&](int i, const Tensor& t) { return need(i) && (t.size(0) == 1) == shared ? part(t, task) : nullptr; };
    p.dw_down = wanted(1, dwd), p.db_down = wanted(2, dbd), p.dw_up = wanted(3, dwu), p.db_up = wanted(4, dbu);
  };
  for (BottleneckParams& p : routed.calls) p.dw_down = pointer(need(1), dwd), p.db_down = pointer(need(2), dbd), p.dw_up = pointer(need(3), dwu), p.db_up = pointer(need(4), dbu);
  routed.over_all([&](const BottleneckParams& p) { return (padded(p.rank) + width) / kPanel; }, cpu::bottleneck_pack_backward);
  over_chunks(
      static_cast<int64_t>(chunks.size()), calls, partial, [&](int64_t i) { return std::pair(routed.calls[chunks[i].first].partials, chunks[i].second == 0); },
      [&](int64_t i, float* own) { run_chunk(routed.calls[chunks[i].first], chunks[i].second, own); });
  const auto panels = [width](const BottleneckParams&) { return width / kPanel; };
  for (size_t i = 0; i < routed.calls.size(); ++i) set(routed.calls[i], routed.tasks[i], false);
  if (needs > 1 && routed.routing.tasks() > 1) routed.over_all(panels, cpu::bottleneck_reduce);
  BottleneckParams all = routed.calls[0];
  all.chunks = calls, set(all, 0, true);
  if (needs > 1) parallel(width / kPanel, cpu::bottleneck_reduce, all);
  return {dx, dwd, dbd, dwu, dbu};
}

struct GatedWorkspace {
  Tensor floats_;
  // Carves packs (for backward its own operands, and those that recompute what was not saved), vectors and per-row numbers from one allocation.
  GatedWorkspace(GatedParams& p, bool backward) {
    const int64_t width = padded(p.width), rank = padded(p.rank), gate_rank = padded(p.gate_rank), vectors = GatedVectors::size(width, rank, gate_rank);
    const int64_t again = backward ? width * ((p.total ? 0 : rank) + (p.gate ? 0 : gate_rank)) : 0;
    const int64_t packs = (GatedPacks<float>::size(width, rank, gate_rank) + again) / (p.native ? 2 : 1);
    floats_ = working_memory(packs + vectors + p.samples + 2 * p.rows);
    p.packed = floats_.mutable_data_ptr<float>(), p.vectors = p.packed + packs;
    p.sample_gates = p.vectors + vectors, p.row_gradients = p.sample_gates + p.samples;
    if (!p.logits) p.logits = p.row_gradients + p.rows;
  }
};

GatedParams gated_common(const Tensor& h, const optional<Tensor>& x, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up,
                         const optional<Tensor>& g, const optional<Tensor>& g_bias, const optional<Tensor>& g_up, const optional<Tensor>& g_up_bias, double input_scale, double adapter_scale,
                         double scale, int64_t activation, int64_t kind, bool add, int64_t samples) {
  GatedParams p{};
  p.activation_type = type_of(h), p.parameter_type = type_of(w_down), p.native = native(p.activation_type);
  p.kind = static_cast<Granularity>(kind);
  p.rows = h.size(0), p.width = h.size(1), p.rank = w_down.size(0), p.gate_rank = p.kind == kLarge ? g->size(0) : 0, p.samples = samples;
  p.h = data(h), p.h_stride = h.stride(0), p.x = data(x), p.x_stride = x ? x->stride(0) : 0;
  p.w_down = data(w_down), p.b_down = data(b_down), p.w_up = data(w_up), p.b_up = data(b_up);
  p.gate_weight = data(g), p.gate_bias = data(g_bias), p.gate_up_weight = data(g_up), p.gate_up_bias = data(g_up_bias);
  p.input_scale = static_cast<float>(input_scale), p.adapter_scale = static_cast<float>(adapter_scale), p.scale = static_cast<float>(scale);
  p.activation = static_cast<Activation>(activation), p.add = add;
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_bottleneck(const Tensor& h, const optional<Tensor>& x, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up,
                                                                            const optional<Tensor>& b_up, const optional<Tensor>& g, const optional<Tensor>& g_bias,
                                                                            const optional<Tensor>& g_up, const optional<Tensor>& g_up_bias, double input_scale, double adapter_scale,
                                                                            double scale, int64_t activation, int64_t kind, bool add, int64_t samples, int64_t save_gate, bool save) {
  GatedParams p = gated_common(h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, input_scale, adapter_scale, scale, activation, kind, add, samples);
  const bool row_gate = has_row_gate(p.kind), large = p.kind == kLarge, keep = save && save_gate == 1;
  const std::array<int64_t, 2> wide{p.rows, p.width};
  Tensor y = output(true, wide, h), z = output(save, {}, h), zg = output(false, {}, h), total = output(keep, wide, h), gate = output(keep && large, wide, h);
  Tensor logits = floats(save && row_gate ? p.rows : 0);
  if (save) z = fresh({p.rows, p.rank}, h.options());
  if (save && large) zg = fresh({p.rows, p.gate_rank}, h.options());
  if (p.rows == 0) return {y, z, zg, logits, total, gate};
  p.y = y.mutable_data_ptr(), p.z = pointer(save, z), p.zg = pointer(save && large, zg), p.total = pointer(keep, total), p.gate = pointer(keep && large, gate);
  if (logits.numel()) p.logits = logits.mutable_data_ptr<float>();
  GatedWorkspace workspace(p, false);
  const int64_t panels = panels_of(p.width), thin = panels_of(p.rank) + panels_of(p.gate_rank);
  cpu::gated_prepare(p);
  if (go_by_columns(p.rows, kGatedTilesByColumns, thin)) {
    const Tensor between = working_memory(cpu::gated_between(p));
    p.between = between.mutable_data_ptr<float>();
    if (cpu::gated_needs_load(p)) parallel(ceil_div(p.rows, kTileRows), cpu::gated_load, p);
    parallel(thin, cpu::gated_forward_thin, p);
    parallel(panels, cpu::gated_forward_wide, p);
    if (row_gate) parallel(p.rows, cpu::gated_row_logits, p);
    if (p.kind == kSmall) cpu::gated_sample_gates(p, 0, p.samples);
    if (row_gate) parallel(p.rows, cpu::gated_apply_row_gates, p);
    return {y, z, zg, logits, total, gate};
  }
  parallel(panels * (large ? 2 : 1) + thin, cpu::gated_pack_forward, p);
  parallel(ceil_div(p.rows, kTileRows), cpu::gated_forward, p);
  if (p.kind == kSmall) {
    cpu::gated_sample_gates(p, 0, p.samples);
    parallel(p.rows, cpu::gated_apply, p);
  }
  return {y, z, zg, logits, total, gate};
}

TenTensors gated_bottleneck_backward(const Tensor& dy, const Tensor& h, const optional<Tensor>& x, const Tensor& z, const Tensor& zg, const Tensor& logits, const Tensor& total, const Tensor& gate,
                                     const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& g,
                                     const optional<Tensor>& g_bias, const optional<Tensor>& g_up, const optional<Tensor>& g_up_bias, double input_scale, double adapter_scale, double scale,
                                     int64_t activation, int64_t kind, bool add, int64_t samples, int64_t needs) {
  GatedParams p = gated_common(h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, input_scale, adapter_scale, scale, activation, kind, add, samples);
  const auto given = [&](int i, const optional<Tensor>& like) { return (needs >> i & 1) && like ? fresh(like->sizes(), like->options()) : fresh({0}, h.options()); };
  std::array<Tensor, 10> grads{given(0, fresh({0}, h.options())), given(1, fresh({0}, h.options())), given(2, w_down), given(3, b_down), given(4, w_up),
                               given(5, b_up), given(6, g), given(7, g_bias), given(8, g_up), given(9, g_up_bias)};
  for (int i = 0; i < 2; ++i)
    if (needs >> i & 1) grads[i] = fresh({p.rows, p.width}, h.options());
  auto& [dh, dx, dwd, dbd, dwu, dbu, dg, dgb, dgu, dgub] = grads;
  if (p.rows == 0) {
    for (Tensor& t : grads) t.zero_();
    return {dh, dx, dwd, dbd, dwu, dbu, dg, dgb, dgu, dgub};
  }
  void** pointers[] = {&p.dh, &p.dx, &p.dw_down, &p.db_down, &p.dw_up, &p.db_up, &p.dgate_weight, &p.dgate_bias, &p.dgate_up_weight, &p.dgate_up_bias};
  for (int i = 0; i < 10; ++i) *pointers[i] = pointer(needs >> i & 1, grads[i]);
  p.dy = data(dy), p.dy_stride = dy.stride(0);
  const auto saved = [](const Tensor& t) { return t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr; };
  p.z = saved(z), p.zg = saved(zg), p.total = saved(total), p.gate = saved(gate), p.logits = static_cast<float*>(saved(logits));
  GatedWorkspace workspace(p, true);
  const int64_t panels = panels_of(p.width), thin = panels_of(p.rank) + panels_of(p.gate_rank);
  const int64_t chunks = ceil_div(p.rows, chunk_rows(p.rows)), tiles = ceil_div(p.rows, kTileRows);
  const int64_t size = GatedPartial(padded(p.width), p.rank, padded(p.rank), p.gate_rank, padded(p.gate_rank)).total;
  Tensor sum = working_memory(size);
  p.partials = sum.mutable_data_ptr<float>();
  cpu::gated_prepare(p);
  if (go_by_columns(p.rows, kGatedTilesByColumns, thin) && p.total && (p.kind != kLarge || p.gate)) {
    const Tensor between = working_memory(cpu::gated_between(p));
    p.between = between.mutable_data_ptr<float>();
    if (p.kind == kSmall) cpu::gated_sample_gates(p, 0, p.samples);
    if (has_row_gate(p.kind)) parallel(p.rows, cpu::gated_backward_rows, p);
    if (p.kind == kSmall) cpu::gated_sample_gradients(p, 0, p.samples);
    parallel(panels, cpu::gated_backward_gate, p);
    parallel(thin, cpu::gated_backward_thin, p);
    parallel(panels, cpu::gated_backward_wide, p);
    return {dh, dx, dwd, dbd, dwu, dbu, dg, dgb, dgu, dgub};
  }
  parallel(panels * (p.kind == kLarge ? 2 : 1) + thin, cpu::gated_pack_backward, p);
  if (!p.total || (p.kind == kLarge && !p.gate)) parallel(panels, cpu::gated_pack_recompute, p);
  if (p.kind == kSmall) {
    cpu::gated_sample_gates(p, 0, p.samples);
    parallel(tiles, cpu::gated_row_gradients, p);
    cpu::gated_sample_gradients(p, 0, p.samples);
  }
  over_chunks(
      chunks, 1, size, [&](int64_t chunk) { return std::pair(p.partials, chunk == 0); },
      [&](int64_t chunk, float* partial) {
        GatedParams own = p;
        own.partials = partial;
        cpu::gated_backward(own, chunk);
      });
  if (needs > 3) parallel(panels, cpu::gated_reduce, p);
  return {dh, dx, dwd, dbd, dwu, dbu, dg, dgb, dgu, dgub};
}

PhmParams phm_common(const Tensor& x, const Tensor& rule_down, const Tensor& left_down, const Tensor& right_down, const Tensor& rule_up, const Tensor& left_up,
                     const Tensor& right_up, double scale, int64_t activation, bool add_input) {
  PhmParams p{};
  const auto factors = [](const Tensor& rule, const Tensor& left, const Tensor& right) { return PhmFactors{left.size(1), right.size(2), data(rule), data(left), data(right)}; };
  p.activation_type = type_of(x), p.parameter_type = type_of(rule_down);
  p.rows = x.size(0), p.width = x.size(1), p.division = left_down.size(0), p.factor_rank = left_down.size(2), p.rank = p.division * right_down.size(2);
  p.x = data(x), p.x_stride = x.stride(0);
  p.down = factors(rule_down, left_down, right_down), p.up = factors(rule_up, left_up, right_up);
  p.scale = static_cast<float>(scale), p.activation = static_cast<Activation>(activation), p.add_input = add_input;
  return p;
}

std::tuple<Tensor, Tensor> phm_bottleneck(const Tensor& x, const Tensor& rule_down, const Tensor& left_down, const Tensor& right_down, const optional<Tensor>& b_down,
                                          const Tensor& rule_up, const Tensor& left_up, const Tensor& right_up, const optional<Tensor>& b_up, const optional<Tensor>& residual,
                                          double scale, int64_t activation, bool add_input, bool save) {
  PhmParams p = phm_common(x, rule_down, left_down, right_down, rule_up, left_up, right_up, scale, activation, add_input);
  p.b_down = data(b_down), p.b_up = data(b_up), p.residual = data(residual), p.residual_stride = residual ? residual->stride(0) : 0;
  Tensor y = output(true, {p.rows, p.width}, x), z = save ? fresh({p.rows, p.rank}, x.options()) : output(false, {}, x);
  if (p.rows == 0) return {y, z};
  p.y = y.mutable_data_ptr(), p.z = pointer(save, z);
  Tensor packed = working_memory(PhmNumbers::size(p));
  p.packed = packed.mutable_data_ptr<float>();
  cpu::phm_prepare(p);
  parallel(ceil_div(p.rows, kTileRows), cpu::phm_forward, p);
  return {y, z};
}

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors phm_bottleneck_backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& rule_down, const Tensor& left_down, const Tensor& right_down,
                                    const Tensor& rule_up, const Tensor& left_up, const Tensor& right_up, double scale, int64_t activation, bool add_input, int64_t needs) {
  PhmParams p = phm_common(x, rule_down, left_down, right_down, rule_up, left_up, right_up, scale, activation, add_input);
  const auto gradient = [&](int i, at::IntArrayRef shape, const Tensor& like) { return output((needs >> i & 1) != 0, shape, like); };
  Tensor dx = gradient(0, {p.rows, p.width}, x), drd = gradient(1, rule_down.sizes(), rule_down), dld = gradient(2, left_down.sizes(), rule_down),
         drtd = gradient(3, right_down.sizes(), rule_down), dbd = gradient(4, {p.rank}, rule_down), dru = gradient(5, rule_up.sizes(), rule_down),
         dlu = gradient(6, left_up.sizes(), rule_down), drtu = gradient(7, right_up.sizes(), rule_down), dbu = gradient(8, {p.width}, rule_down);
  if (p.rows == 0) {
    for (Tensor* t : {&drd, &dld, &drtd, &dbd, &dru, &dlu, &drtu, &dbu}) t->zero_();
    return {dx, drd, dld, drtd, dbd, dru, dlu, drtu, dbu};
  }
  const auto to = [&](int i, Tensor& t) { return pointer((needs >> i & 1) != 0, t); };
  p.dx = to(0, dx), p.down.drule = to(1, drd), p.down.dleft = to(2, dld), p.down.dright = to(3, drtd), p.db_down = to(4, dbd);
  p.up.drule = to(5, dru), p.up.dleft = to(6, dlu), p.up.dright = to(7, drtu), p.db_up = to(8, dbu);
  p.dy = data(dy), p.dy_stride = dy.stride(0), p.z = const_cast<void*>(data(z));
  const int64_t chunks = ceil_div(p.rows, chunk_rows(p.rows)), size = PhmNumbers::size(p);
  Tensor packed = working_memory(size), partials = working_memory(chunks * size);
  p.packed = packed.mutable_data_ptr<float>(), p.partials = partials.mutable_data_ptr<float>();
  cpu::phm_prepare(p);
  parallel(chunks, cpu::phm_backward, p);
  if (needs > 1) cpu::phm_reduce(p);
  return {dx, drd, dld, drtd, dbd, dru, dlu, drtu, dbu};
}

NormParams norm_common(const Tensor& like, at::ScalarType dtype, const optional<Tensor>& weight, const optional<Tensor>& seed, int64_t norm, double dropout) {
  NormParams p{};
  p.x_type = type_of(dtype), p.sum_type = type_of(like), p.parameter_type = weight ? type_of(*weight) : kFloat;
  p.rows = like.size(0), p.width = like.size(1), p.norm = static_cast<Norm>(norm), p.weight = data(weight), p.kept = 1.f;
  if (seed) p.seed = seed->const_data_ptr<int64_t>(), p.threshold = dropout_threshold(dropout), p.kept = static_cast<float>(1 / (1 - dropout));
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_norm(const Tensor& x, const optional<Tensor>& residual, const optional<Tensor>& weight, const optional<Tensor>& bias,
                                                            const optional<Tensor>& seed, int64_t norm, double eps, double dropout, bool save) {
  const Tensor& like = residual ? *residual : x;
  NormParams p = norm_common(like, x.scalar_type(), weight, seed, norm, dropout);
  const bool statistics = save && norm, keeps_v = norm == kNoNorm || (save && (residual || seed));
  const std::array<int64_t, 2> wide{p.rows, p.width};
  Tensor y = output(norm, wide, like), v = output(keeps_v, wide, like), mean = floats(statistics && norm == kLayerNorm ? p.rows : 0), rstd = floats(statistics ? p.rows : 0);
  p.x = data(x), p.x_stride = x.stride(0), p.residual = data(residual), p.residual_stride = residual ? residual->stride(0) : 0, p.bias = data(bias), p.eps = static_cast<float>(eps);
  p.y = pointer(norm, y), p.v = pointer(keeps_v, v);
  p.mean = mean.numel() ? mean.mutable_data_ptr<float>() : nullptr, p.rstd = rstd.numel() ? rstd.mutable_data_ptr<float>() : nullptr;
  parallel(ceil_div(p.rows, p.unit_rows()), cpu::norm_forward, p);
  return {y, v, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_norm_backward(const optional<Tensor>& dy, const optional<Tensor>& dv, const optional<Tensor>& v, const optional<Tensor>& mean,
                                                                     const optional<Tensor>& rstd, const optional<Tensor>& weight, const optional<Tensor>& seed, int64_t norm,
                                                                     double dropout, at::ScalarType dtype, int64_t needs) {
  const auto need = [needs](int i) { return (needs >> i & 1) != 0; };
  const Tensor& like = dy ? *dy : *dv;
  NormParams p = norm_common(like, dtype, weight, seed, norm, dropout);
  const auto strided = [](const optional<Tensor>& t, const void*& base, int64_t& stride) { base = data(t), stride = t ? t->stride(0) : 0; };
  strided(dy, p.dy, p.dy_stride), strided(dv, p.dv, p.dv_stride), strided(v, p.saved, p.saved_stride);
  p.mean = const_cast<float*>(static_cast<const float*>(data(mean))), p.rstd = const_cast<float*>(static_cast<const float*>(data(rstd)));
  const std::array<int64_t, 2> wide{p.rows, p.width};
  const Tensor& vector = weight ? *weight : like;
  Tensor dx = fresh(need(0) ? at::IntArrayRef(wide) : at::IntArrayRef{0}, like.options().dtype(dtype)), dresidual = output(need(1), wide, like),
         dweight = output(need(2), {p.width}, vector), dbias = output(need(3), {p.width}, vector);
  if (p.rows == 0) {
    for (Tensor* t : {&dweight, &dbias}) t->zero_();
    return {dx, dresidual, dweight, dbias};
  }
  p.dx = pointer(need(0), dx), p.dresidual = pointer(need(1), dresidual), p.dweight = pointer(need(2), dweight), p.dbias = pointer(need(3), dbias);
  Tensor partials = working_memory(need(2) || need(3) ? 2 * p.padded() * ceil_div(p.rows, chunk_rows(p.rows)) : 0);
  p.partials = partials.numel() ? partials.mutable_data_ptr<float>() : nullptr;
  parallel(ceil_div(p.rows, p.unit_rows()), cpu::norm_backward, p);
  if (p.partials) cpu::norm_reduce(p);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace fastadapt::raw

TORCH_LIBRARY_FRAGMENT(fastadapt_cpu, m) {
  m.def(
      "bottleneck(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? gate, Tensor? scale_tensor, Tensor? residual, float scale, int activation, bool add_input,"
      " bool save) -> (Tensor, Tensor)");
  m.def(
      "bottleneck_backward(Tensor dy, Tensor x, Tensor z, Tensor w_down, Tensor w_up, Tensor? b_up, Tensor? gate, Tensor? scale_tensor, float scale, int activation, bool add_input,"
      " int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "routed_bottleneck(Tensor x, Tensor task_ids, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? residual, float scale, int activation, bool add_input, bool save)"
      " -> (Tensor, Tensor)");
  m.def(
      "routed_bottleneck_backward(Tensor dy, Tensor x, Tensor task_ids, Tensor z, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, float scale, int activation, bool add_input,"
      " int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("lora(Tensor x, Tensor y, Tensor w_down, Tensor w_up, Tensor? b_up, Tensor? seed, float scale, float dropout, bool save) -> (Tensor, Tensor)");
  m.def(
      "lora_backward(Tensor dy, Tensor x, Tensor z, Tensor w_down, Tensor w_up, Tensor? seed, float scale, float dropout, int needs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "dropout_add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, int norm, float eps, float dropout, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "dropout_add_norm_backward(Tensor? dy, Tensor? dv, Tensor? v, Tensor? mean, Tensor? rstd, Tensor? weight, Tensor? seed, int norm, float dropout, ScalarType dtype, int needs)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
#define FASTADAPT_GATED                                                                                                                                        \
  "Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? gate_weight, Tensor? gate_bias, Tensor? gate_up_weight, Tensor? gate_up_bias,"            \
  " float input_scale, float adapter_scale, float scale, int activation, int kind, bool add, int samples, "
  m.def("gated_bottleneck(Tensor h, Tensor? x, " FASTADAPT_GATED "int save_gate, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gated_bottleneck_backward(Tensor dy, Tensor h, Tensor? x, Tensor z, Tensor zg, Tensor logits, Tensor total, Tensor gate, " FASTADAPT_GATED
        "int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
#define FASTADAPT_PHM(LEFT, RIGHT) \
  "Tensor rule_down, Tensor left_down, Tensor right_down, " LEFT "Tensor rule_up, Tensor left_up, Tensor right_up, " RIGHT "float scale, int activation, bool add_input, "
  m.def("phm_bottleneck(Tensor x, " FASTADAPT_PHM("Tensor? b_down, ", "Tensor? b_up, Tensor? residual, ") "bool save) -> (Tensor, Tensor)");
  m.def("phm_bottleneck_backward(Tensor dy, Tensor x, Tensor z, " FASTADAPT_PHM("", "") "int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fastadapt_cpu, CPU, m) {
  using namespace fastadapt::raw;
  m.impl("gated_bottleneck", &gated_bottleneck);
  m.impl("gated_bottleneck_backward", &gated_bottleneck_backward);
  m.impl("routed_bottleneck", &routed_bottleneck);
  m.impl("routed_bottleneck_backward", &routed_bottleneck_backward);
  m.impl("bottleneck", &bottleneck);
  m.impl("bottleneck_backward", &bottleneck_backward);
  m.impl("lora", &lora);
  m.impl("lora_backward", &lora_backward);
  m.impl("dropout_add_norm", &dropout_add_norm);
  m.impl("dropout_add_norm_backward", &dropout_add_norm_backward);
  m.impl("phm_bottleneck", &phm_bottleneck);
  m.impl("phm_bottleneck_backward", &phm_bottleneck_backward);
}
