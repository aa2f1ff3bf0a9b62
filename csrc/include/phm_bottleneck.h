// Parameters of the CPU kernels of Compacter's bottleneck. Conventions as in bottleneck.h.
#pragma once
#include "bottleneck.h"
#include "plan.h"

namespace fastadapt {

// The n k pairs (i, q) of a projection are taken four at a time, the missing ones zero: four and a block of rows fill half the vector registers with sums.
constexpr int64_t kGroup = 4;
// Floats of the longest vector: rows of factors are padded to it.
constexpr int64_t kVector = 16;

// One projection: rule (n, n, n), left (n, in, k), right (n, k, out), where in and out are the widths of one of n parts.
struct PhmFactors {
  int64_t in, out;
  const void *rule, *left, *right;
  void *drule, *dleft, *dright;
};

struct PhmParams {
  Type activation_type, parameter_type;
  int64_t rows, width, rank, division, factor_rank;
  const void *x, *residual, *dy;
  int64_t x_stride, residual_stride, dy_stride;
  PhmFactors down, up;
  const void *b_down, *b_up;
  void *db_down, *db_up;
  float scale;
  Activation activation;
  bool add_input;
  void *y, *z, *dx;  // forward writes z (may be null), backward reads it
  float *packed, *partials;  // PhmNumbers: one of the parameters, and one a chunk of rows
};

// Factors in fp32, as [n n n], [pairs][in] and [pairs][out], all padded with zeros.
struct PhmPacked {
  int64_t pairs, in, out;
  float *rule, *left, *right;
  PhmPacked(float* base, const PhmParams& p, const PhmFactors& f)
      : pairs(plan::round_up(p.division * p.factor_rank, kGroup)), in(plan::round_up(f.in, kVector)), out(plan::round_up(f.out, kVector)), rule(base), left(rule + rule_size(p)),
        right(left + pairs * in) {}
  static int64_t rule_size(const PhmParams& p) { return plan::round_up(p.division * p.division * p.division, kVector); }
  static int64_t size(const PhmParams& p, const PhmFactors& f) {
    return rule_size(p) + plan::round_up(p.division * p.factor_rank, kGroup) * (plan::round_up(f.in, kVector) + plan::round_up(f.out, kVector));
  }
};

// All parameters of a call, or the sums of their gradients over a chunk.
struct PhmNumbers {
  PhmPacked down, up;
  float *b_down, *b_up;
  PhmNumbers(float* base, const PhmParams& p)
      : down(base, p, p.down), up(base + PhmPacked::size(p, p.down), p, p.up), b_down(up.rule + PhmPacked::size(p, p.up)), b_up(b_down + plan::round_up(p.rank, kVector)) {}
  static int64_t size(const PhmParams& p) { return PhmPacked::size(p, p.down) + PhmPacked::size(p, p.up) + plan::round_up(p.rank, kVector) + plan::round_up(p.width, kVector); }
};

}  // namespace fastadapt
