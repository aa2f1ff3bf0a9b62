// Parameters of the CPU bottleneck kernels. Strides count elements; row tensors are contiguous within a row. Null pointers: not given, or not asked for.
#pragma once
#include <cstdint>

namespace fastadapt {

enum Type : int { kFloat, kBFloat16, kHalf };
enum Activation : int { kIdentity, kRelu, kGelu, kGeluNew, kSilu };

struct BottleneckParams {
  Type activation_type, parameter_type;
  bool native;  // GEMMs of bf16 operands: the activations are bf16, and the processor multiplies it
  int64_t rows, width, out, rank;  // x has `width` columns, y, dy and residual `out`
  const int64_t* order;  // routed: the rows of one task, in ascending order; else null
  int64_t chunks;        // partials that the reduction adds
  bool direct;           // by columns: dWd goes to dw_down, not to the partial
  const void *x, *residual, *dy;
  int64_t x_stride, residual_stride, dy_stride;
  const void *w_down, *b_down, *w_up, *b_up, *gate, *scale_tensor;
  float scale;
  Activation activation;
  bool add_input;
  // Dropout of x, null: none. An element is dropped where its number is below the threshold; what its row gives is multiplied by kept, 1 / (1 - p).
  const int64_t* seed;
  uint32_t threshold;
  float kept;
  void *y, *z;  // forward writes z (may be null), backward reads it
  void* dx;
  void *dw_down, *db_down, *dw_up, *db_up, *dgate;
  bool need_scale;
  // Scratch of one call: packed weights (where rows are few, their z without its bias in packed_down) and fp32 vectors, padded to whole panels.
  float *packed_down, *packed_up, *vectors;
  float* between;  // by columns: what one phase hands to the next
  // Partials, see PartialLayout: in backward that of its chunk of rows, in the reduction `chunks` of them.
  float* partials;
  float* dscale_panels;  // one summand per panel of columns
};

// Where the pieces of a chunk's partial lie: dWd as [panels][R][32], P = dy' a transposed likewise, S (the column sums of dy), dbd.
struct PartialLayout {
  int64_t p, sums, db_down, total;
  constexpr PartialLayout(int64_t padded_width, int64_t padded_out, int64_t rank, int64_t padded_rank)
      : p(padded_width * rank), sums(p + padded_out * rank), db_down(sums + padded_out), total(db_down + padded_rank) {}
};

}  // namespace fastadapt
