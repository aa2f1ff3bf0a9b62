// Raw CUDA ops: allocates outputs and one workspace, fills the calls of include/cuda.h on the current device and stream. The only CUDA-side file that sees torch, and only through
// its stable ABI: one library for every torch from 2.10 on, CPU builds included, so nothing here links to libtorch_cuda.
// With FASTADAPT_EMULATED (tests) the same ops run the emulated kernels on CPU tensors: uninitialised memory holds NaN, and the emulator knows what a launch may read and write.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "include/cuda.h"
#include "include/dropout_add_norm_cuda.h"
#include "include/phm_bottleneck_cuda.h"

#ifndef FASTADAPT_EMULATED
#define FASTADAPT_EMULATED 0
#endif

#if FASTADAPT_EMULATED
#include "emulator/emulator.h"
#define FASTADAPT_NAMESPACE fastadapt_cuda_emulated
#define FASTADAPT_KEY CPU
#else
#define FASTADAPT_NAMESPACE fastadapt_cuda
#define FASTADAPT_KEY CUDA
#endif

namespace {

using std::optional;
using torch::stable::Tensor;
using namespace fastadapt;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

#if FASTADAPT_EMULATED
struct DeviceGuard {
  explicit DeviceGuard(int32_t) { emulator::clear_ranges(); }
  ~DeviceGuard() { emulator::clear_ranges(); }
};
int32_t device_type() { return aoti_torch_device_type_cpu(); }
void* current_stream(int32_t) { return nullptr; }
void may_read(const void* begin, int64_t bytes) { emulator::register_range(begin, bytes, false); }
void may_write(void* begin, int64_t bytes) {
  if (bytes) std::memset(begin, 0xff, bytes), emulator::register_range(begin, bytes, true);
}
#else
using torch::stable::accelerator::DeviceGuard;
int32_t device_type() { return aoti_torch_device_type_cuda(); }
void may_read(const void*, int64_t) {}
void may_write(void*, int64_t) {}

void* current_stream(int32_t device) {
  // In libtorch_cuda, which a process with CUDA tensors has loaded.
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(getter, "fastadapt: this torch has no CUDA streams");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}
#endif

// Where a tensor lies and what it holds.
struct Kind {
  int32_t dtype, device;
  explicit Kind(const Tensor& t) : device(t.get_device_index()) { STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype)); }
  Kind(int32_t type, const Kind& beside) : dtype(type), device(beside.device) {}
  Type type() const {
    if (dtype == aoti_torch_dtype_bfloat16()) return kBFloat16;
    if (dtype == aoti_torch_dtype_float16()) return kHalf;
    STD_TORCH_CHECK(dtype == aoti_torch_dtype_float32(), "fastadapt: the cuda kernels take bfloat16, float16 and float32 parameters, not dtype number ", dtype);
    return kFloat;
  }
  int64_t size() const { return dtype == aoti_torch_dtype_float32() ? 4 : dtype == aoti_torch_dtype_uint8() ? 1 : dtype == aoti_torch_dtype_int64() ? 8 : 2; }
};

Tensor allocate(Shape shape, const Kind& kind) {
  std::array<int64_t, 64> strides;  // torch's own limit of dimensions
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0; step *= shape[i]) strides[i] = step;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), kind.dtype, device_type(), kind.device, &handle));
  return Tensor(handle);
}

Tensor empty(Shape shape, const Kind& kind) {
  Tensor t = allocate(shape, kind);
  if (FASTADAPT_EMULATED) may_write(t.mutable_data_ptr(), t.numel() * kind.size());
  return t;
}

Tensor empty(std::initializer_list<int64_t> shape, const Kind& kind) { return empty(Shape(shape.begin(), shape.size()), kind); }

// An output that is asked for, or the empty placeholder.
Tensor output(bool need, std::initializer_list<int64_t> shape, const Kind& kind) { return need ? empty(shape, kind) : empty({0}, kind); }
// A gradient, whose placeholder has the type of the activations, like the fake implementations'.
Tensor output(bool need, std::initializer_list<int64_t> shape, const Kind& kind, const Kind& wide) { return output(need, shape, need ? kind : wide); }

// Pointers to arguments as the kernels take them, and the copies of those that lie otherwise in memory.
class Arguments {
 public:
  // Rows a multiple of 8 elements apart, each contiguous: true of every row slice of a contiguous tensor. Where the kernels read number by number (`multiple` 1) they lie anywhere.
  const void* rows(const Tensor& t, int64_t& stride, int64_t multiple = 8) {
    const void* data = t.const_data_ptr();
    const int64_t rows = t.size(0), width = t.size(1);
    stride = rows == 1 ? width : t.stride(0);
    if (t.stride(1) != 1 || (multiple > 1 && (stride % multiple != 0 || !aligned(data)))) return stride = width, copy(t);
    const int64_t size = Kind(t).size();
    for (int64_t r = 0; FASTADAPT_EMULATED && r < rows; ++r) may_read(static_cast<const char*>(data) + size * r * stride, size * width);
    return data;
  }
  const void* rows(const optional<Tensor>& t, int64_t& stride, int64_t multiple = 8) { return t ? rows(*t, stride, multiple) : nullptr; }
  const void* whole(const Tensor& t) {
    const void* data = t.const_data_ptr();
    if (!aligned(data) || !t.is_contiguous()) return copy(t);
    if (FASTADAPT_EMULATED) may_read(data, t.numel() * Kind(t).size());
    return data;
  }
  const void* whole(const optional<Tensor>& t) { return t ? whole(*t) : nullptr; }
  // Rows of whole pairs: what lies behind a ragged one is not read.
  const void* paired_rows(const optional<Tensor>& t, int64_t& stride) {
    if (!t || t->size(0) == 1 || t->size(1) % 2 == 0) return stride = t ? t->size(1) : 0, whole(t);
    stride = t->size(1) + 1;
    copies_.push_back(empty({t->size(0), stride}, Kind(*t)));
    const int64_t sizes[] = {t->size(0), t->size(1)}, strides[] = {stride, 1};
    AtenTensorHandle rows;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(copies_.back().get(), 2, sizes, strides, 0, &rows));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(Tensor(rows).get(), t->get(), 0));
    return copies_.back().const_data_ptr();
  }
  // A tensor saved by forward, null where it is the placeholder.
  void* saved(const Tensor& t) { return t.numel() ? const_cast<void*>(whole(t)) : nullptr; }

 private:
  static bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
  const void* copy(const Tensor& t) {
    copies_.push_back(empty(t.sizes(), Kind(t)));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copies_.back().get(), t.get(), 0));
    return copies_.back().const_data_ptr();
  }
  std::vector<Tensor> copies_;
};

void* pointer(bool need, const Tensor& t) { return need ? t.mutable_data_ptr() : nullptr; }

// Runs a sequence in a workspace of its own.
template <class Call>
void launch(Call& p, size_t bytes, int (*run)(const Call&), const Kind& kind, const char* why, int64_t rows, int64_t width, int64_t rank) {
  STD_TORCH_CHECK(!why, "fastadapt: ", why, " (width ", width, ", rank ", rank, ")");
  constexpr int64_t kAlignment = 256, kSlack = FASTADAPT_EMULATED ? kAlignment : 0;  // a CUDA allocation is aligned, a CPU allocation need not be
  const int64_t size = static_cast<int64_t>(bytes) + kSlack;
  const Tensor workspace = allocate({&size, 1}, Kind(aoti_torch_dtype_uint8(), kind));
  p.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr()) + kSlack) / kAlignment * kAlignment);
  may_write(p.workspace, static_cast<int64_t>(bytes));
  p.stream = current_stream(kind.device);
  const int code = run(p);
  STD_TORCH_CHECK(code == 0, "fastadapt: the cuda kernels failed: ", cuda::error_text(code), " (rows ", rows, ", width ", width, ", rank ", rank, ", code ", code, ")");
}

template <class Call>
void launch(Call& p, size_t bytes, int (*run)(const Call&), const Kind& kind, int64_t gate_rank) {
  launch(p, bytes, run, kind, cuda::why_not(p.activation_type, p.parameter_type, p.width, p.rank, gate_rank), p.rows, p.width, p.rank);
}

cuda::BottleneckCall bottleneck_call(Arguments& in, const Tensor& x, const Tensor& w_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& gate,
                                     const optional<Tensor>& scale_tensor, double scale, int64_t activation, bool add_input) {
  cuda::BottleneckCall p{};
  p.activation_type = Kind(x).type(), p.parameter_type = Kind(w_down).type();
  p.rows = x.size(0), p.width = x.size(1), p.rank = w_down.size(0);
  p.x = in.rows(x, p.x_stride);
  p.w_down = in.whole(w_down), p.w_up = in.whole(w_up), p.b_up = in.whole(b_up), p.gate = in.whole(gate), p.scale_tensor = in.whole(scale_tensor);
  p.scale = static_cast<float>(scale), p.activation = static_cast<Activation>(activation), p.add_input = add_input;
  return p;
}

std::tuple<Tensor, Tensor> bottleneck(const Tensor& x, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& gate,
                                      const optional<Tensor>& scale_tensor, const optional<Tensor>& residual, double scale, int64_t activation, bool add_input, bool save) {
  const Kind wide(x);
  const DeviceGuard guard(wide.device);
  const int64_t rows = x.size(0), width = x.size(1), rank = w_down.size(0);
  Tensor y = empty({rows, width}, wide), z = output(save, {rows, rank}, wide);
  if (rows == 0) return {y, z};
  Arguments in;
  cuda::BottleneckCall p = bottleneck_call(in, x, w_down, w_up, b_up, gate, scale_tensor, scale, activation, add_input);
  p.b_down = in.whole(b_down), p.residual = in.rows(residual, p.residual_stride);
  p.y = y.mutable_data_ptr(), p.z = pointer(save, z);
  launch(p, cuda::bottleneck_forward_workspace(p), cuda::bottleneck_forward, wide, 0);
  return {y, z};
}

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SevenTensors bottleneck_backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& gate,
                                 const optional<Tensor>& scale_tensor, double scale, int64_t activation, bool add_input, int64_t needs) {
  const Kind wide(x), parameters(w_down);
  const DeviceGuard guard(wide.device);
  const int64_t rows = x.size(0), width = x.size(1), rank = w_down.size(0);
  const auto need = [needs](int i) { return (needs >> i & 1) != 0; };
  Tensor dx = output(need(0), {rows, width}, wide), dwd = output(need(1), {rank, width}, parameters, wide), dbd = output(need(2), {rank}, parameters, wide),
         dwu = output(need(3), {width, rank}, parameters, wide), dbu = output(need(4), {width}, parameters, wide), dg = output(need(5), {width}, parameters, wide),
         ds = need(6) ? empty(scale_tensor->sizes(), parameters) : empty({0}, wide);
  if (rows == 0) {
    for (const Tensor* t : {&dwd, &dbd, &dwu, &dbu, &dg, &ds}) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t->get()));
    return {dx, dwd, dbd, dwu, dbu, dg, ds};
  }
  Arguments in;
  cuda::BottleneckCall p = bottleneck_call(in, x, w_down, w_up, b_up, gate, scale_tensor, scale, activation, add_input);
  p.dy = in.rows(dy, p.dy_stride), p.z = in.saved(z);
  p.dx = pointer(need(0), dx), p.dw_down = pointer(need(1), dwd), p.db_down = pointer(need(2), dbd), p.dw_up = pointer(need(3), dwu), p.db_up = pointer(need(4), dbu);
  p.dgate = pointer(need(5), dg), p.dscale = pointer(need(6), ds), p.need_scale = need(6);
  launch(p, cuda::bottleneck_backward_workspace(p), cuda::bottleneck_backward, wide, 0);
  return {dx, dwd, dbd, dwu, dbu, dg, ds};
}

cuda::RoutedCall routed_call(Arguments& in, const Tensor& x, const Tensor& ids, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up,
                             double scale, int64_t activation, bool add_input) {
  cuda::RoutedCall p{};
  p.activation_type = Kind(x).type(), p.parameter_type = Kind(w_down).type();
  p.rows = x.size(0), p.width = x.size(1), p.rank = w_down.size(1), p.count = ids.numel();
  const auto shared = [&p](const Tensor& bank) { return p.tasks = std::max(p.tasks, bank.size(0)), bank.size(0) == 1; };
  p.shares_w_down = shared(w_down), p.shares_w_up = shared(w_up), p.shares_b_down = b_down && shared(*b_down), p.shares_b_up = b_up && shared(*b_up);
  // Positions, also those that a last tile has beyond the rows, are numbers of 32 bits.
  STD_TORCH_CHECK(p.rows <= (int64_t{1} << 31) - 256, "fastadapt: the cuda kernels route at most 2^31 - 256 rows (rows ", p.rows, ")");
  p.ids = static_cast<const int64_t*>(in.whole(ids));
  p.x = in.rows(x, p.x_stride);
  p.w_down = in.whole(w_down), p.b_down = in.paired_rows(b_down, p.b_down_stride), p.w_up = in.whole(w_up), p.b_up = in.whole(b_up);
  p.scale = static_cast<float>(scale), p.activation = static_cast<Activation>(activation), p.add_input = add_input;
  return p;
}

std::tuple<Tensor, Tensor> routed_bottleneck(const Tensor& x, const Tensor& ids, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up,
                                             const optional<Tensor>& residual, double scale, int64_t activation, bool add_input, bool save) {
  const Kind wide(x);
  const DeviceGuard guard(wide.device);
  const int64_t rows = x.size(0), rank = w_down.size(1);
  Tensor y = empty(x.sizes(), wide), z = output(save, {rows, rank}, wide);
  if (rows == 0) return {y, z};
  Arguments in;
  cuda::RoutedCall p = routed_call(in, x, ids, w_down, b_down, w_up, b_up, scale, activation, add_input);
  p.residual = in.rows(residual, p.residual_stride);
  p.y = y.mutable_data_ptr(), p.z = pointer(save, z);
  launch(p, cuda::routed_forward_workspace(p), cuda::routed_forward, wide, 0);
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> routed_bottleneck_backward(const Tensor& dy, const Tensor& x, const Tensor& ids, const Tensor& z, const Tensor& w_down,
                                                                              const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up, double scale, int64_t activation,
                                                                              bool add_input, int64_t needs) {
  const Kind wide(x), parameters(w_down);
  const DeviceGuard guard(wide.device);
  const auto need = [needs](int i) { return (needs >> i & 1) != 0; };
  const auto gradient = [&](int i, const optional<Tensor>& t) { return need(i) ? empty(t->sizes(), parameters) : empty({0}, wide); };
  Tensor dx = need(0) ? empty(x.sizes(), wide) : empty({0}, wide), dwd = gradient(1, w_down), dbd = gradient(2, b_down), dwu = gradient(3, w_up), dbu = gradient(4, b_up);
  if (x.size(0) == 0) {
    for (const Tensor* t : {&dwd, &dbd, &dwu, &dbu}) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t->get()));
    return {dx, dwd, dbd, dwu, dbu};
  }
  Arguments in;
  cuda::RoutedCall p = routed_call(in, x, ids, w_down, b_down, w_up, b_up, scale, activation, add_input);
  p.dy = in.rows(dy, p.dy_stride), p.z = in.saved(z);
  p.dx = pointer(need(0), dx), p.dw_down = pointer(need(1), dwd), p.db_down = pointer(need(2), dbd), p.dw_up = pointer(need(3), dwu), p.db_up = pointer(need(4), dbu);
  const char* why = cuda::routed_why_not(p.rows, p.width, p.tasks);
  STD_TORCH_CHECK(!why, "fastadapt: ", why, " (rows ", p.rows, ", width ", p.width, ", tasks ", p.tasks, ")");
  launch(p, cuda::routed_backward_workspace(p), cuda::routed_backward, wide, 0);
  return {dx, dwd, dbd, dwu, dbu};
}

cuda::GatedCall gated_call(Arguments& in, const Tensor& h, const optional<Tensor>& x, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up,
                           const optional<Tensor>& g, const optional<Tensor>& g_bias, const optional<Tensor>& g_up, const optional<Tensor>& g_up_bias, double input_scale,
                           double adapter_scale, double scale, int64_t activation, int64_t kind, bool add, int64_t samples) {
  cuda::GatedCall p{};
  p.activation_type = Kind(h).type(), p.parameter_type = Kind(w_down).type();
  p.kind = static_cast<Granularity>(kind);
  p.rows = h.size(0), p.width = h.size(1), p.rank = w_down.size(0), p.gate_rank = p.kind == kLarge ? g->size(0) : 0, p.samples = samples;
  p.h = in.rows(h, p.h_stride), p.x = in.rows(x, p.x_stride);
  p.w_down = in.whole(w_down), p.b_down = in.whole(b_down), p.w_up = in.whole(w_up), p.b_up = in.whole(b_up);
  p.gate_weight = in.whole(g), p.gate_bias = in.whole(g_bias), p.gate_up_weight = in.whole(g_up), p.gate_up_bias = in.whole(g_up_bias);
  p.input_scale = static_cast<float>(input_scale), p.adapter_scale = static_cast<float>(adapter_scale), p.scale = static_cast<float>(scale);
  p.activation = static_cast<Activation>(activation), p.add = add;
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_bottleneck(const Tensor& h, const optional<Tensor>& x, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up,
                                                                            const optional<Tensor>& b_up, const optional<Tensor>& g, const optional<Tensor>& g_bias,
                                                                            const optional<Tensor>& g_up, const optional<Tensor>& g_up_bias, double input_scale, double adapter_scale,
                                                                            double scale, int64_t activation, int64_t kind, bool add, int64_t samples, int64_t save_gate, bool save) {
  const Kind wide(h), exact(aoti_torch_dtype_float32(), wide);
  const DeviceGuard guard(wide.device);
  const int64_t rows = h.size(0), width = h.size(1), rank = w_down.size(0), gate_rank = kind == kLarge ? g->size(0) : 0;
  const bool large = kind == kLarge, row_gate = kind == kMiddleX || kind == kSmall, keep = save && save_gate == 1;
  Tensor y = empty({rows, width}, wide), z = output(save, {rows, rank}, wide), zg = output(save && large, {rows, gate_rank}, wide), logits = output(save && row_gate, {rows}, exact),
         total = output(keep, {rows, width}, wide), gate = output(keep && large, {rows, width}, wide);
  if (rows == 0) return {y, z, zg, logits, total, gate};
  Arguments in;
  cuda::GatedCall p = gated_call(in, h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, input_scale, adapter_scale, scale, activation, kind, add, samples);
  p.y = y.mutable_data_ptr(), p.z = pointer(save, z), p.zg = pointer(save && large, zg), p.logits = static_cast<float*>(pointer(save && row_gate, logits));
  p.total = pointer(keep, total), p.gate = pointer(keep && large, gate);
  launch(p, cuda::gated_forward_workspace(p), cuda::gated_forward, wide, gate_rank);
  return {y, z, zg, logits, total, gate};
}

using TenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

TenTensors gated_bottleneck_backward(const Tensor& dy, const Tensor& h, const optional<Tensor>& x, const Tensor& z, const Tensor& zg, const Tensor& logits, const Tensor& total, const Tensor& gate,
                                     const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& g,
                                     const optional<Tensor>& g_bias, const optional<Tensor>& g_up, const optional<Tensor>& g_up_bias, double input_scale, double adapter_scale, double scale,
                                     int64_t activation, int64_t kind, bool add, int64_t samples, int64_t needs) {
  const Kind wide(h), parameters(w_down);
  const DeviceGuard guard(wide.device);
  const int64_t rows = h.size(0);
  const auto like = [](const optional<Tensor>& t) { return t ? &*t : nullptr; };
  const std::array<const Tensor*, 10> given{&h, like(x), &w_down, like(b_down), &w_up, like(b_up), like(g), like(g_bias), like(g_up), like(g_up_bias)};
  const auto need = [&](int i) { return (needs >> i & 1) && given[i]; };
  const auto gradient = [&](int i) { return need(i) ? empty(given[i]->sizes(), i < 2 ? wide : parameters) : empty({0}, wide); };
  std::array<Tensor, 10> grads{gradient(0), gradient(1), gradient(2), gradient(3), gradient(4), gradient(5), gradient(6), gradient(7), gradient(8), gradient(9)};
  if (rows == 0) {
    for (const Tensor& t : grads) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t.get()));
  } else {
    Arguments in;
    cuda::GatedCall p = gated_call(in, h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, input_scale, adapter_scale, scale, activation, kind, add, samples);
    void** pointers[] = {&p.dh, &p.dx, &p.dw_down, &p.db_down, &p.dw_up, &p.db_up, &p.dgate_weight, &p.dgate_bias, &p.dgate_up_weight, &p.dgate_up_bias};
    for (int i = 0; i < 10; ++i) *pointers[i] = pointer(need(i), grads[i]);
    p.dy = in.rows(dy, p.dy_stride);
    p.z = in.saved(z), p.zg = in.saved(zg), p.total = in.saved(total), p.gate = in.saved(gate), p.logits = static_cast<float*>(in.saved(logits));
    launch(p, cuda::gated_backward_workspace(p), cuda::gated_backward, wide, p.gate_rank);
  }
  return std::tuple_cat(grads);
}

uint32_t dropout_threshold(double dropout) { return static_cast<uint32_t>(std::min(std::nearbyint(dropout * 0x1p32), 0x1p32 - 1)); }

cuda::LoraCall lora_call(Arguments& in, const Tensor& x, const Tensor& w_down, const Tensor& w_up, const optional<Tensor>& seed, double scale, double dropout) {
  cuda::LoraCall p{};
  p.activation_type = Kind(x).type(), p.parameter_type = Kind(w_down).type();
  p.rows = x.size(0), p.width = x.size(1), p.out = w_up.size(0), p.rank = w_down.size(0);
  const char* why = cuda::why_not(p.activation_type, p.parameter_type, p.out, p.rank, 0);
  STD_TORCH_CHECK(!why, "fastadapt: ", why, " (width of y ", p.out, ", rank ", p.rank, ")");
  p.x = in.rows(x, p.x_stride), p.w_down = in.whole(w_down), p.w_up = in.whole(w_up), p.scale = static_cast<float>(scale);
  p.seed = static_cast<const int64_t*>(in.whole(seed));
  p.threshold = dropout_threshold(dropout), p.kept = static_cast<float>(1 / (1 - dropout));
  return p;
}

std::tuple<Tensor, Tensor> lora(const Tensor& x, const Tensor& y, const Tensor& w_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& seed, double scale,
                                double dropout, bool save) {
  const Kind wide(x);
  const DeviceGuard guard(wide.device);
  Tensor out = empty({x.size(0), w_up.size(0)}, wide), z = output(save, {x.size(0), w_down.size(0)}, wide);
  if (x.size(0) == 0) return {out, z};
  Arguments in;
  cuda::LoraCall p = lora_call(in, x, w_down, w_up, seed, scale, dropout);
  p.residual = in.rows(y, p.residual_stride), p.b_up = in.whole(b_up);
  p.y = out.mutable_data_ptr(), p.z = pointer(save, z);
  launch(p, cuda::lora_forward_workspace(p), cuda::lora_forward, wide, 0);
  return {out, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w_down, const Tensor& w_up, const optional<Tensor>& seed,
                                                         double scale, double dropout, int64_t needs) {
  const Kind wide(x), parameters(w_down);
  const DeviceGuard guard(wide.device);
  const int64_t rows = x.size(0), rank = w_down.size(0), out = w_up.size(0);
  const auto need = [needs](int i) { return (needs >> i & 1) != 0; };
  Tensor dx = output(need(0), {rows, x.size(1)}, wide), dwd = output(need(1), {rank, x.size(1)}, parameters, wide),
         dwu = output(need(2), {out, rank}, parameters, wide), dbu = output(need(3), {out}, parameters, wide);
  if (rows == 0) {
    for (const Tensor* t : {&dwd, &dwu, &dbu}) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t->get()));
    return {dx, dwd, dwu, dbu};
  }
  Arguments in;
  cuda::LoraCall p = lora_call(in, x, w_down, w_up, seed, scale, dropout);
  p.dy = in.rows(dy, p.dy_stride), p.z = in.saved(z);
  p.dx = pointer(need(0), dx), p.dw_down = pointer(need(1), dwd), p.dw_up = pointer(need(2), dwu), p.db_up = pointer(need(3), dbu);
  launch(p, cuda::lora_backward_workspace(p), cuda::lora_backward, wide, 0);
  return {dx, dwd, dwu, dbu};
}

// Parts of a multiple of 8 columns are read 16 bytes at a time.
int64_t multiple_of(const cuda::PhmShape& shape) { return shape.whole() ? 8 : 1; }

cuda::PhmCall phm_call(Arguments& in, const Tensor& x, const std::array<const Tensor*, 6>& factors, double scale, int64_t activation, bool add_input) {
  cuda::PhmCall call{};
  cuda::PhmParams& p = call.params;
  const Tensor &left = *factors[1], &right = *factors[2];
  const int64_t division = left.size(0), factor_rank = left.size(2), rank = division * right.size(2);
  call.activation_type = Kind(x).type(), call.parameter_type = Kind(left).type();
  const char* why = cuda::phm_why_not(call.activation_type, call.parameter_type, x.size(1), rank, division, factor_rank);
  STD_TORCH_CHECK(!why, "fastadapt: ", why, " (width ", x.size(1), ", rank ", rank, ", division ", division, ", factor rank ", factor_rank, ")");
  p.rows = x.size(0);
  p.shape = cuda::phm_shape(x.size(1), rank, division, factor_rank);
  p.x = in.rows(x, p.x_stride, multiple_of(p.shape));
  for (int side = 0; side < 2; ++side) p.sides[side] = {in.whole(*factors[3 * side]), in.whole(*factors[3 * side + 1]), in.whole(*factors[3 * side + 2])};
  p.scale = static_cast<float>(scale), p.activation = static_cast<Activation>(activation), p.add_input = add_input;
  return call;
}

std::tuple<Tensor, Tensor> phm_bottleneck(const Tensor& x, const Tensor& rule_down, const Tensor& left_down, const Tensor& right_down, const optional<Tensor>& b_down, const Tensor& rule_up,
                                          const Tensor& left_up, const Tensor& right_up, const optional<Tensor>& b_up, const optional<Tensor>& residual, double scale, int64_t activation,
                                          bool add_input, bool save) {
  const Kind wide(x);
  const DeviceGuard guard(wide.device);
  const int64_t rows = x.size(0), width = x.size(1), rank = right_down.size(0) * right_down.size(2);
  Tensor y = empty({rows, width}, wide), z = output(save, {rows, rank}, wide);
  if (rows == 0) return {y, z};
  Arguments in;
  cuda::PhmCall call = phm_call(in, x, {&rule_down, &left_down, &right_down, &rule_up, &left_up, &right_up}, scale, activation, add_input);
  call.params.sides[0].bias = in.whole(b_down), call.params.sides[1].bias = in.whole(b_up), call.params.residual = in.rows(residual, call.params.residual_stride, multiple_of(call.params.shape));
  call.params.y = y.mutable_data_ptr(), call.params.z = pointer(save, z);
  launch(call, 0, cuda::phm_forward, wide, nullptr, rows, width, rank);
  return {y, z};
}

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors phm_bottleneck_backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& rule_down, const Tensor& left_down, const Tensor& right_down, const Tensor& rule_up,
                                    const Tensor& left_up, const Tensor& right_up, double scale, int64_t activation, bool add_input, int64_t needs) {
  const Kind wide(x), parameters(left_down);
  const DeviceGuard guard(wide.device);
  const int64_t rows = x.size(0), width = x.size(1), rank = right_down.size(0) * right_down.size(2);
  const std::array<const Tensor*, 6> factors{&rule_down, &left_down, &right_down, &rule_up, &left_up, &right_up};
  const auto need = [needs](int i) { return (needs >> i & 1) != 0; };
  const auto gradient = [&](int i, int factor) { return need(i) ? empty(factors[factor]->sizes(), parameters) : empty({0}, wide); };
  std::array<Tensor, 9> grads{output(need(0), {rows, width}, wide), gradient(1, 0), gradient(2, 1), gradient(3, 2), output(need(4), {rank}, parameters, wide),
                              gradient(5, 3), gradient(6, 4), gradient(7, 5), output(need(8), {width}, parameters, wide)};
  if (rows == 0) {
    for (const Tensor& t : grads) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t.get()));
  } else {
    Arguments in;
    cuda::PhmCall call = phm_call(in, x, factors, scale, activation, add_input);
    call.params.dy = in.rows(dy, call.params.dy_stride, multiple_of(call.params.shape)), call.params.z = in.saved(z), call.params.dx = pointer(need(0), grads[0]);
    for (int i = 0; i < 8; ++i) call.gradients[i / 4][i % 4] = pointer(need(i + 1), grads[i + 1]);
    launch(call, cuda::phm_backward_workspace(call), cuda::phm_backward, wide, nullptr, rows, width, rank);
  }
  return std::tuple_cat(grads);
}

// A call over rows like those of `like`, of v's type.
cuda::NormCall norm_call(Arguments& in, const Tensor& like, const Kind& x, const optional<Tensor>& weight, const optional<Tensor>& seed, int64_t norm, double dropout) {
  cuda::NormCall call{};
  cuda::NormParams& p = call.params;
  call.x_type = x.type(), call.sum_type = Kind(like).type(), call.parameter_type = weight ? Kind(*weight).type() : call.sum_type;
  const char* why = cuda::norm_why_not(call.x_type, call.sum_type, call.parameter_type, like.size(0), like.size(1));
  STD_TORCH_CHECK(!why, "fastadapt: ", why, " (rows ", like.size(0), ", width ", like.size(1), ")");
  p.rows = like.size(0), p.width = static_cast<int>(like.size(1)), p.norm = static_cast<cuda::Norm>(norm), p.weight = in.whole(weight);
  p.dropout = {static_cast<const int64_t*>(in.whole(seed)), dropout_threshold(dropout), static_cast<float>(1 / (1 - dropout))};
  return call;
}

// Rows of whole 16 bytes of v are read as vectors.
int64_t multiple_of(const Tensor& like) {
  const int64_t unit = cuda::plan::norm_unit(static_cast<int>(Kind(like).size()));
  return like.size(1) % unit == 0 ? unit : 1;
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FourTensors dropout_add_norm(const Tensor& x, const optional<Tensor>& residual, const optional<Tensor>& weight, const optional<Tensor>& bias, const optional<Tensor>& seed, int64_t norm,
                             double eps, double dropout, bool save) {
  const Tensor& like = residual ? *residual : x;
  const Kind wide(like), exact(aoti_torch_dtype_float32(), wide);
  const DeviceGuard guard(wide.device);
  const int64_t rows = x.size(0), width = x.size(1);
  const bool normed = norm != cuda::kNoNorm, keep_v = !normed || (save && (residual || seed)), keep_mean = save && norm == cuda::kLayerNorm, keep_rstd = save && normed;
  Tensor y = output(normed, {rows, width}, wide), v = output(keep_v, {rows, width}, wide), mean = output(keep_mean, {rows}, exact), rstd = output(keep_rstd, {rows}, exact);
  if (rows == 0) return {y, v, mean, rstd};
  Arguments in;
  cuda::NormCall call = norm_call(in, like, Kind(x), weight, seed, norm, dropout);
  cuda::NormParams& p = call.params;
  p.x = in.rows(x, p.x_stride, multiple_of(like)), p.residual = in.rows(residual, p.residual_stride, multiple_of(like));
  p.bias = in.whole(bias), p.eps = static_cast<float>(eps);
  p.y = pointer(normed, y), p.v = pointer(keep_v, v), p.mean = static_cast<float*>(pointer(keep_mean, mean)), p.rstd = static_cast<float*>(pointer(keep_rstd, rstd));
  launch(call, 0, cuda::norm_forward, wide, nullptr, rows, width, 0);
  return {y, v, mean, rstd};
}

FourTensors dropout_add_norm_backward(const optional<Tensor>& dy, const optional<Tensor>& dv, const optional<Tensor>& v, const optional<Tensor>& mean, const optional<Tensor>& rstd,
                                      const optional<Tensor>& weight, const optional<Tensor>& seed, int64_t norm, double dropout, torch::headeronly::ScalarType dtype, int64_t needs) {
  const Tensor& like = dy ? *dy : *dv;
  const Kind wide(like), thin(torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), wide), parameters(weight ? *weight : like);
  const DeviceGuard guard(wide.device);
  const int64_t rows = like.size(0), width = like.size(1);
  const auto need = [needs](int i) { return (needs >> i & 1) != 0; };
  Tensor dx = output(need(0), {rows, width}, thin, wide), dresidual = output(need(1), {rows, width}, wide), dweight = output(need(2), {width}, parameters, wide),
         dbias = output(need(3), {width}, parameters, wide);
  if (rows == 0) {
    for (const Tensor* t : {&dweight, &dbias}) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t->get()));
    return {dx, dresidual, dweight, dbias};
  }
  Arguments in;
  cuda::NormCall call = norm_call(in, like, thin, weight, seed, norm, dropout);
  cuda::NormParams& p = call.params;
  p.dy = in.rows(dy, p.dy_stride, multiple_of(like)), p.dv = in.rows(dv, p.dv_stride, multiple_of(like)), p.saved = in.rows(v, p.saved_stride, multiple_of(like));
  p.mean = static_cast<float*>(const_cast<void*>(in.whole(mean))), p.rstd = static_cast<float*>(const_cast<void*>(in.whole(rstd)));
  p.dx = pointer(need(0), dx), p.dresidual = pointer(need(1), dresidual), call.dweight = pointer(need(2), dweight), call.dbias = pointer(need(3), dbias);
  launch(call, cuda::norm_backward_workspace(call), cuda::norm_backward, wide, nullptr, rows, width, 0);
  return {dx, dresidual, dweight, dbias};
}

int64_t device_count() { return cuda::device_count(); }
int64_t driver_version() { return cuda::driver_version(); }
int64_t runtime_version() { return cuda::runtime_version(); }

std::string why_not(int64_t type, int64_t parameter_type, int64_t width, int64_t rank, int64_t gate_rank) {
  const char* why = cuda::why_not(static_cast<Type>(type), static_cast<Type>(parameter_type), width, rank, gate_rank);
  return why ? why : "";
}

std::string phm_why_not(int64_t type, int64_t parameter_type, int64_t width, int64_t rank, int64_t division, int64_t factor_rank) {
  const char* why = cuda::phm_why_not(static_cast<Type>(type), static_cast<Type>(parameter_type), width, rank, division, factor_rank);
  return why ? why : "";
}

std::string routed_why_not(int64_t rows, int64_t width, int64_t tasks) {
  const char* why = cuda::routed_why_not(rows, width, tasks);
  return why ? why : "";
}

std::string norm_why_not(int64_t type, int64_t sum_type, int64_t parameter_type, int64_t width, int64_t rows) {
  const char* why = cuda::norm_why_not(static_cast<Type>(type), static_cast<Type>(sum_type), static_cast<Type>(parameter_type), rows, width);
  return why ? why : "";
}

}  // namespace

// One more level, so that the names are expanded before they are pasted.
#define FASTADAPT_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define FASTADAPT_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

FASTADAPT_LIBRARY(FASTADAPT_NAMESPACE, m) {
  m.def(
      "bottleneck(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? gate, Tensor? scale_tensor, Tensor? residual, float scale, int activation, bool add_input,"
      " bool save) -> (Tensor, Tensor)");
  m.def(
      "bottleneck_backward(Tensor dy, Tensor x, Tensor z, Tensor w_down, Tensor w_up, Tensor? b_up, Tensor? gate, Tensor? scale_tensor, float scale, int activation, bool add_input,"
      " int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
#define FASTADAPT_GATED                                                                                                                                        \
  "Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? gate_weight, Tensor? gate_bias, Tensor? gate_up_weight, Tensor? gate_up_bias,"            \
  " float input_scale, float adapter_scale, float scale, int activation, int kind, bool add, int samples, "
  m.def("gated_bottleneck(Tensor h, Tensor? x, " FASTADAPT_GATED "int save_gate, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gated_bottleneck_backward(Tensor dy, Tensor h, Tensor? x, Tensor z, Tensor zg, Tensor logits, Tensor total, Tensor gate, " FASTADAPT_GATED
        "int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "phm_bottleneck(Tensor x, Tensor rule_down, Tensor left_down, Tensor right_down, Tensor? b_down, Tensor rule_up, Tensor left_up, Tensor right_up, Tensor? b_up, Tensor? residual,"
      " float scale, int activation, bool add_input, bool save) -> (Tensor, Tensor)");
  m.def(
      "phm_bottleneck_backward(Tensor dy, Tensor x, Tensor z, Tensor rule_down, Tensor left_down, Tensor right_down, Tensor rule_up, Tensor left_up, Tensor right_up, float scale,"
      " int activation, bool add_input, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
#define FASTADAPT_ROUTED "Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, "
  m.def("routed_bottleneck(Tensor x, Tensor task_ids, " FASTADAPT_ROUTED "Tensor? residual, float scale, int activation, bool add_input, bool save) -> (Tensor, Tensor)");
  m.def("routed_bottleneck_backward(Tensor dy, Tensor x, Tensor task_ids, Tensor z, " FASTADAPT_ROUTED
        "float scale, int activation, bool add_input, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("lora(Tensor x, Tensor y, Tensor w_down, Tensor w_up, Tensor? b_up, Tensor? seed, float scale, float dropout, bool save) -> (Tensor, Tensor)");
  m.def(
      "lora_backward(Tensor dy, Tensor x, Tensor z, Tensor w_down, Tensor w_up, Tensor? seed, float scale, float dropout, int needs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "dropout_add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, int norm, float eps, float dropout, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "dropout_add_norm_backward(Tensor? dy, Tensor? dv, Tensor? v, Tensor? mean, Tensor? rstd, Tensor? weight, Tensor? seed, int norm, float dropout, ScalarType dtype, int needs)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("device_count() -> int");
  m.def("driver_version() -> int");
  m.def("runtime_version() -> int");
  m.def("why_not(int type, int parameter_type, int width, int rank, int gate_rank) -> str");
  m.def("phm_why_not(int type, int parameter_type, int width, int rank, int division, int factor_rank) -> str");
  m.def("routed_why_not(int rows, int width, int tasks) -> str");
  m.def("norm_why_not(int type, int sum_type, int parameter_type, int width, int rows=1) -> str");
}

FASTADAPT_IMPL(FASTADAPT_NAMESPACE, FASTADAPT_KEY, m) {
  m.impl("bottleneck", TORCH_BOX(&bottleneck));
  m.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward));
  m.impl("gated_bottleneck", TORCH_BOX(&gated_bottleneck));
  m.impl("gated_bottleneck_backward", TORCH_BOX(&gated_bottleneck_backward));
  m.impl("phm_bottleneck", TORCH_BOX(&phm_bottleneck));
  m.impl("phm_bottleneck_backward", TORCH_BOX(&phm_bottleneck_backward));
  m.impl("routed_bottleneck", TORCH_BOX(&routed_bottleneck));
  m.impl("routed_bottleneck_backward", TORCH_BOX(&routed_bottleneck_backward));
  m.impl("lora", TORCH_BOX(&lora));
  m.impl("lora_backward", TORCH_BOX(&lora_backward));
  m.impl("dropout_add_norm", TORCH_BOX(&dropout_add_norm));
  m.impl("dropout_add_norm_backward", TORCH_BOX(&dropout_add_norm_backward));
}

FASTADAPT_IMPL(FASTADAPT_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("device_count", TORCH_BOX(&device_count));
  m.impl("driver_version", TORCH_BOX(&driver_version));
  m.impl("runtime_version", TORCH_BOX(&runtime_version));
  m.impl("why_not", TORCH_BOX(&why_not));
  m.impl("phm_why_not", TORCH_BOX(&phm_why_not));
  m.impl("routed_why_not", TORCH_BOX(&routed_why_not));
  m.impl("norm_why_not", TORCH_BOX(&norm_why_not));
}
