// Dropout, sum and norm: one launch forward; rows and, of trained parameters, reduce backward.
#include "sequence.h"

#include "../include/dropout_add_norm_cuda.h"

namespace fastadapt::cuda {

const char* norm_why_not(Type x_type, Type sum_type, Type parameter_type, int64_t rows, int64_t width) {
  if (x_type != kFloat && x_type != kBFloat16 && x_type != kHalf) return "the cuda kernels take bfloat16, float16 and float32";
  if (sum_type != x_type && sum_type != kFloat) return "the residual must have x's type or float32";
  if (parameter_type != sum_type && parameter_type != kFloat) return "weight and bias must have the sum's type or float32";
  if (rows > plan::kMostBlocks) return "the cuda kernels take norms of fewer than 2^31 rows";  // each its own block
  return width < 1 || width > plan::kNormMaxWidth ? "the cuda kernels take norms of a width from 1 to 8192" : nullptr;
}

namespace {

// f(a number of x's type, one of the sum's type)
template <class F>
int with_norm_types(const NormCall& call, F f) {
  if (call.x_type == kFloat) return f(0.f, 0.f);
  return with_type(call.x_type, [&](auto a) { return call.sum_type == kFloat ? f(a, 0.f) : f(a, a); });
}

NormParams prepared(const NormCall& call) {
  NormParams p = call.params;
  p.float_parameters = call.parameter_type == kFloat;
  p.rows_per_block = call.dweight || call.dbias ? plan::norm_rows_per_split(p.rows, p.width) : 1;
  return p;
}

struct NormBackwardPlan {
  NormParams rows;
  NormReduceParams reduce{};
  int count = 0;
  Workspace workspace;

  NormBackwardPlan(const NormCall& call, void* base) : rows(prepared(call)), workspace(base) {
    for (void* out : {call.dweight, call.dbias})
      if (out) reduce.sums[count++].out = out;
    if (count == 0) return;
    reduce.splits = plan::norm_splits(rows.rows, rows.width), reduce.width = rows.width, reduce.float_parameters = rows.float_parameters;
    reduce.partial = rows.partial = static_cast<int64_t>(count) * rows.width;
    float* const parts = workspace.take<float>(true, reduce.splits * reduce.partial);
    for (int i = 0; i < count; ++i) reduce.sums[i].parts = parts + i * rows.width;
    if (call.dweight) rows.d_weight = parts;
    if (call.dbias) rows.d_bias = parts + (count - 1) * rows.width;
  }
};

}  // namespace

int norm_forward(const NormCall& call) {
  const NormParams p = prepared(call);
  return with_norm_types(call, [&](auto a, auto v) { return launch_norm_forward<decltype(a), decltype(v)>(p, call.stream); });
}

size_t norm_backward_workspace(const NormCall& call) { return NormBackwardPlan(call, nullptr).workspace.used; }

int norm_backward(const NormCall& call) {
  const NormBackwardPlan plan(call, call.workspace);
  return with_norm_types(call, [&](auto a, auto v) {
    FASTADAPT_RETURN_IF_FAILED((launch_norm_rows<decltype(a), decltype(v)>(plan.rows, call.stream)));
    return plan.count ? launch_norm_reduce<decltype(a)>(plan.reduce, plan.count, call.stream) : 0;
  });
}

}  // namespace fastadapt::cuda
