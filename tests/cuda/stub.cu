// Stands in for the kernels where a test is about the library around them: compiled in seconds, it launches one kernel that writes a byte.
#include <cuda_runtime.h>

#include "include/cuda.h"
#include "include/dropout_add_norm_cuda.h"
#include "include/phm_bottleneck_cuda.h"

namespace fastadapt::cuda {
namespace {

__global__ void touch(char* y) { *y = 0; }

int launch(void* y, void* stream) {
  touch<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<char*>(y));
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

const char* why_not(Type, Type, int64_t width, int64_t, int64_t) { return width % 8 ? "the stub needs a width that is a multiple of 8" : nullptr; }

size_t bottleneck_forward_workspace(const BottleneckCall&) { return 1; }
int bottleneck_forward(const BottleneckCall& p) { return launch(p.y, p.stream); }
size_t bottleneck_backward_workspace(const BottleneckCall&) { return 1; }
int bottleneck_backward(const BottleneckCall& p) { return launch(p.workspace, p.stream); }
size_t gated_forward_workspace(const GatedCall&) { return 1; }
int gated_forward(const GatedCall& p) { return launch(p.y, p.stream); }
size_t gated_backward_workspace(const GatedCall&) { return 1; }
int gated_backward(const GatedCall& p) { return launch(p.workspace, p.stream); }
const char* phm_why_not(Type, Type, int64_t, int64_t, int64_t division, int64_t) { return division > 16 ? "the stub takes divisions from 1 to 16" : nullptr; }
int phm_forward(const PhmCall& call) { return launch(call.params.y, call.stream); }
size_t phm_backward_workspace(const PhmCall&) { return 1; }
int phm_backward(const PhmCall& call) { return launch(call.workspace, call.stream); }
const char* norm_why_not(Type, Type, Type, int64_t, int64_t width) { return width > 8192 ? "the stub takes widths from 1 to 8192" : nullptr; }
int norm_forward(const NormCall& call) { return launch(call.params.norm ? call.params.y : call.params.v, call.stream); }
size_t norm_backward_workspace(const NormCall&) { return 1; }
int norm_backward(const NormCall& call) { return launch(call.workspace, call.stream); }
const char* routed_why_not(int64_t, int64_t, int64_t) { return nullptr; }
size_t routed_forward_workspace(const RoutedCall&) { return 1; }
int routed_forward(const RoutedCall& p) { return launch(p.y, p.stream); }
size_t routed_backward_workspace(const RoutedCall&) { return 1; }
int routed_backward(const RoutedCall& p) { return launch(p.workspace, p.stream); }
size_t lora_forward_workspace(const LoraCall&) { return 1; }
int lora_forward(const LoraCall& p) { return launch(p.y, p.stream); }
size_t lora_backward_workspace(const LoraCall&) { return 1; }
int lora_backward(const LoraCall& p) { return launch(p.workspace, p.stream); }

int device_count() {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}
const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
int driver_version() {
  int v = 0;
  return cudaDriverGetVersion(&v) == cudaSuccess ? v : 0;
}
int runtime_version() {
  int v = 0;
  return cudaRuntimeGetVersion(&v) == cudaSuccess ? v : 0;
}

}  // namespace fastadapt::cuda
