// Parameters of the CPU bottleneck kernels. Strides count elements; row tensors are contiguous within a row. Null pointers: not given, or not asked for.
#pragma once
#include <cstdint>

namespace fastadapt {

enum Type : int { kFloat, kBFloat16, kHalf };
enum Activation : int { kIdentity, kRelu, kGelu, kGeluNew, kSilu };

struct BottleneckParams {
  Type activation_type, parameter_type;
  int64_t rows, width, rank;
  const int64_t* order;  // routed: the rows of one task, in ascending order; else null
  int64_t chunks;        // of rows, each with a partial
  const void *x, *residual, *dy;
  int64_t x_stride, residual_stride, dy_stride;
  const void *w_down, *b_down, *w_up, *b_up, *gate, *scale_tensor;
  float scale;
  Activation activation;
  bool add_input;
  void *y, *z;  // forward writes z (may be null), backward reads it
  void* dx;
  void *dw_down, *db_down, *dw_up, *db_up, *dgate;
  bool need_scale;
  // Scratch of one call, filled by prepare_*: packed weights and fp32 vectors padded to whole panels.
  float *packed_down, *packed_up, *vectors;
  // One partial per chunk of rows, see PartialLayout.
  float* partials;
  float* dscale_panels;  // one summand per panel of columns
};

// Where the pieces of a chunk's partial lie: dWd as [panels][R][32], P = dy' a transposed likewise, S, dbd.
struct PartialLayout {
  int64_t outer, total;
  constexpr PartialLayout(int64_t padded_width, int64_t rank, int64_t padded_rank) : outer(padded_width * rank), total(2 * outer + padded_width + padded_rank) {}
};

}  // namespace fastadapt
