// The CUDA side of the ops: what the registration (cuda_ops.cpp, the emulator's binding) asks of the kernels. No torch, no CUDA types.
//
// An op is a fixed sequence of launches on one stream. Its caller allocates the outputs and one workspace of the bytes that `*_workspace` names, aligned to 256; nothing else is allocated.
// Activations are bf16 or fp16, their rows any multiple of 8 elements apart; parameters have the activations' type or fp32. Every pointer is aligned to 16 bytes.
// All functions return 0, a cudaError_t, or -1 where `why_not` gives a reason.
#pragma once
#include <cstddef>

#include "bottleneck.h"
#include "gated_bottleneck.h"

namespace fastadapt::cuda {

// The fields of the CPU's scratch (packed_*, vectors, partials, dscale_panels, ...) are not used.
struct BottleneckCall : BottleneckParams {
  void* dscale;  // one element in the parameters' type, or null
  void* workspace;
  void* stream;
};

struct GatedCall : GatedParams {
  void* workspace;
  void* stream;
};

// Parameters are those of `tasks` tasks one after the other, or one that all share; a ragged b_down lies b_down_stride numbers apart. Neither gate nor scale tensor.
struct RoutedCall : BottleneckParams {
  const int64_t* ids;  // (count), each of rows / count consecutive rows
  int64_t count, tasks, b_down_stride;
  bool shares_w_down, shares_b_down, shares_w_up, shares_b_up;
  void* workspace;
  void* stream;
};

// x has `width` columns, and the projection's output (residual), y and dy have `out`. Neither b_down, gate nor scale tensor, and no activation.
struct LoraCall : BottleneckParams {
  void* workspace;
  void* stream;
};

// Why the kernels cannot run a shape (width, rank, types), or null. `gate_rank` is 0 where there is none.
const char* why_not(Type activation_type, Type parameter_type, int64_t width, int64_t rank, int64_t gate_rank);

size_t bottleneck_forward_workspace(const BottleneckCall& p);
int bottleneck_forward(const BottleneckCall& p);  // y, and z where it is not null
size_t bottleneck_backward_workspace(const BottleneckCall& p);
int bottleneck_backward(const BottleneckCall& p);  // every gradient whose pointer is not null

size_t gated_forward_workspace(const GatedCall& p);
int gated_forward(const GatedCall& p);  // y, and of z, zg, logits, total, gate those that are not null
size_t gated_backward_workspace(const GatedCall& p);
int gated_backward(const GatedCall& p);

// Why the backward of so many rows and tasks cannot be launched, or null.
const char* routed_why_not(int64_t rows, int64_t width, int64_t tasks);

size_t routed_forward_workspace(const RoutedCall& p);
int routed_forward(const RoutedCall& p);
size_t routed_backward_workspace(const RoutedCall& p);
int routed_backward(const RoutedCall& p);

size_t lora_forward_workspace(const LoraCall& p);
int lora_forward(const LoraCall& p);
size_t lora_backward_workspace(const LoraCall& p);
int lora_backward(const LoraCall& p);

int device_count();                // 0 where there is no driver or no device
const char* error_text(int code);  // the name and description of a cudaError_t
int driver_version();              // as cuDriverGetVersion gives it (13000 is 13.0), 0 without a driver
int runtime_version();             // of the runtime linked in

}  // namespace fastadapt::cuda
