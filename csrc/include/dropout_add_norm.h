// Parameters of the CPU kernels of dropout_add_norm. Conventions as in bottleneck.h.
#pragma once
#include "bottleneck.h"
#include "plan.h"

namespace fastadapt {

enum Norm : int { kNoNorm, kLayerNorm, kRmsNorm };

// Rows that draw their masks together, and whose gradients of weight and bias are summed before they are added to the chunk's. The unit of parallel work without such gradients.
constexpr int64_t kNormRows = 16;

struct NormParams {
  Type x_type, sum_type, parameter_type;  // of x and dx; of v, y, the residual and their gradients; of weight and bias
  int64_t rows, width;
  Norm norm;
  float eps;
  const void *x, *residual, *dy, *dv, *saved;  // saved: the v that forward wrote, or x
  int64_t x_stride, residual_stride, dy_stride, dv_stride, saved_stride;
  const void *weight, *bias;
  // Dropout of x, null: none. An element is dropped where its number is below the threshold, and else multiplied by kept, 1 / (1 - p); 1 without dropout.
  const int64_t* seed;
  uint32_t threshold;
  float kept;
  void *y, *v;         // v may be null where there is a norm
  float *mean, *rstd;  // forward writes them (may be null), backward reads them; mean: of a layer norm alone
  void *dx, *dresidual, *dweight, *dbias;
  float* partials;  // sums of a chunk for the gradients of weight and bias, 2 padded widths a chunk; null: neither is asked for

  int64_t padded() const { return plan::round_up(width, 32); }  // two of the longest vectors
  int64_t unit_rows() const { return partials ? plan::chunk_rows(rows) : kNormRows; }
};

}  // namespace fastadapt
