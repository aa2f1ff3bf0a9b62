// Dropout, sum and norm on the CUDA side: what the registration asks of the kernels (conventions of cuda.h), their arguments (of cuda_kernels.h), and who owns which columns.
#pragma once
#include <cstddef>
#include <initializer_list>

#include "cuda_kernels.h"
#include "cuda_plan.h"

namespace fastadapt::cuda {

enum Norm : int { kNoNorm, kLayerNorm, kRmsNorm };

namespace plan {
// The 64, 256 or 512 threads that have a row hold 16 numbers of it each. 32 would take 150 to 250 registers in the backward.
constexpr int kNormValues = 16, kNormNarrow = 64, kNormMiddle = 256, kNormWide = 512, kNormMaxWidth = kNormWide * kNormValues;
constexpr int kNormSumRows = 4;  // narrow rows that a block adds at a time to the parameters' gradients
constexpr int kNormReduceThreads = 256;
constexpr int64_t kNormSplits = 256;  // of the rows, at most, each with a partial of these gradients; a nominal number, so that all devices add in the same order

constexpr int norm_unit(int bytes) { return 16 / bytes; }  // neighbouring numbers of v, `bytes` each, that a thread owns
constexpr int norm_lanes(int64_t width) {
  for (int lanes : {kNormNarrow, kNormMiddle})
    if (width <= lanes * kNormValues) return lanes;
  return kNormWide;
}
constexpr int norm_rows(int lanes, bool sums) { return sums && lanes == kNormNarrow ? kNormSumRows : 1; }  // of a block, at a time
// Two turns of two sums a warp; where rows share a block, their sums for the gradients of weight and bias behind it.
constexpr int norm_stage(int lanes, bool sums) { return 2 * 2 * 4 * norm_rows(lanes, sums) * lanes / 32; }
constexpr int norm_shared(int lanes, bool sums) { return norm_stage(lanes, sums) + (norm_rows(lanes, sums) > 1 ? 2 * 4 * lanes * kNormValues : 0); }
constexpr int64_t norm_rows_per_split(int64_t rows, int64_t width) {
  const int64_t at_once = norm_rows(norm_lanes(width), true);
  return ceil_div(ceil_div(rows, at_once), kNormSplits) * at_once;
}
constexpr int64_t norm_splits(int64_t rows, int64_t width) { return ceil_div(rows, norm_rows_per_split(rows, width)); }
}  // namespace plan

struct NormParams {
  int64_t rows;
  int width;
  int64_t rows_per_block;
  Norm norm;
  float eps;
  bool float_parameters;
  Dropout dropout;
  const void *x, *residual;     // A, V
  const void *dy, *dv, *saved;  // V; saved: v, or the x that it is
  int64_t x_stride, residual_stride, dy_stride, dv_stride, saved_stride;
  const void *weight, *bias;  // P
  void *y, *v;                // V
  float *mean, *rstd;         // forward writes them where they are not null, backward reads them
  void *dx, *dresidual;       // A, V
  float *d_weight, *d_bias;   // a split's partials, the other splits' `partial` numbers behind it each
  int64_t partial;
};

struct NormSum {
  const float* parts;
  void* out;  // P
};
struct NormReduceParams {
  int64_t splits, partial;
  int width;
  bool float_parameters;
  NormSum sums[2];
};

struct NormCall {
  Type x_type, sum_type, parameter_type;  // A, V, P
  NormParams params;                      // but for what follows from the shape, and what points into the workspace
  void *dweight, *dbias;                  // P
  void* workspace;
  void* stream;
};

// Why the kernels cannot run a call, or null.
const char* norm_why_not(Type x_type, Type sum_type, Type parameter_type, int64_t rows, int64_t width);
int norm_forward(const NormCall& call);
size_t norm_backward_workspace(const NormCall& call);
int norm_backward(const NormCall& call);

template <class A, class V>
int launch_norm_forward(const NormParams& p, void* stream);
template <class A, class V>
int launch_norm_rows(const NormParams& p, void* stream);
template <class A>
int launch_norm_reduce(const NormReduceParams& p, int count, void* stream);

}  // namespace fastadapt::cuda
