// Compacter's bottleneck: one launch forward; rows and reduce backward.
#include "sequence.h"

#include "../include/phm_bottleneck_cuda.h"

namespace fastadapt::cuda {

const char* phm_why_not(Type activation_type, Type parameter_type, int64_t width, int64_t rank, int64_t division, int64_t factor_rank) {
  if (activation_type != kBFloat16 && activation_type != kHalf) return "the cuda kernels take bfloat16 and float16 activations";
  if (parameter_type != activation_type && parameter_type != kFloat) return "the parameters must have the activations' type or float32";
  if (division < 1 || division > plan::kPhmMaxDivision) return "the cuda kernels take divisions from 1 to 16";
  if (factor_rank < 1 || factor_rank > plan::kPhmMaxFactorRank) return "the cuda kernels take factor ranks from 1 to 8";
  if (width < division || width % division != 0 || rank < division || rank % division != 0) return "the width and the rank must be multiples of the division";
  constexpr int64_t kMost = 1 << 16;  // far beyond what fits: no number of bytes overflows
  if (width > kMost || rank > kMost || plan::phm_tokens(phm_shape(width, rank, division, factor_rank)) == 0)
    return "the factors and a token's products do not fit the 99 KB of shared memory that every device has";
  return nullptr;
}

namespace {

PhmParams prepared(const PhmCall& call, bool backward) {
  PhmParams p = call.params;
  p.float_parameters = call.parameter_type == kFloat;
  p.tokens = plan::phm_tokens(p.shape);
  p.at = plan::phm_layout(p.shape, p.tokens, backward);
  p.tiles_per_split = static_cast<int>(plan::phm_tiles_per_split(p.rows, p.tokens));
  return p;
}

struct BackwardPlan {
  PhmParams rows;
  PhmReduceParams reduce{};
  Workspace workspace;

  BackwardPlan(const PhmCall& call, void* base) : rows(prepared(call, true)), workspace(base) {
    const PhmShape& s = rows.shape;
    const int n = s.division, k = s.factor_rank;
    reduce.float_parameters = rows.float_parameters, reduce.splits = plan::phm_splits(rows.rows, rows.tokens);
    for (int side = 0; side < 2; ++side) {
      const int columns[4] = {n * n * n, k * (side == 0 ? s.width() : s.rank()), k * (side == 0 ? s.rank() : s.width()), side == 0 ? s.rank() : s.width()};
      for (int i = 0; i < 4; ++i) {
        if (!call.gradients[side][i]) continue;
        reduce.sums[reduce.count++] = {nullptr, call.gradients[side][i], columns[i]};
        rows.partial += columns[i];
      }
    }
    reduce.partial = rows.partial;
    float* part = workspace.take<float>(true, reduce.splits * rows.partial);
    int taken = 0;
    for (int side = 0; side < 2; ++side) {
      float** const to[4] = {&rows.sides[side].d_rule, &rows.sides[side].d_left, &rows.sides[side].d_right, &rows.sides[side].d_bias};
      for (int i = 0; i < 4; ++i)
        if (call.gradients[side][i]) *to[i] = part, reduce.sums[taken].parts = part, part += reduce.sums[taken++].columns;
    }
  }
};

}  // namespace

int phm_forward(const PhmCall& call) {
  return with_type(call.activation_type, [&](auto t) { return launch_phm_forward<decltype(t)>(prepared(call, false), call.stream); });
}

size_t phm_backward_workspace(const PhmCall& call) { return BackwardPlan(call, nullptr).workspace.used; }

int phm_backward(const PhmCall& call) {
  const BackwardPlan plan(call, call.workspace);
  return with_type(call.activation_type, [&](auto t) {
    FASTADAPT_RETURN_IF_FAILED(launch_phm_rows<decltype(t)>(plan.rows, call.stream));
    return plan.reduce.count ? launch_phm_reduce<decltype(t)>(plan.reduce, call.stream) : 0;
  });
}

}  // namespace fastadapt::cuda
