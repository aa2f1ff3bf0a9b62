// Compacter's bottleneck on the CUDA side: what the registration asks of the kernels (conventions of cuda.h), their arguments (of cuda_kernels.h), tiles and shared memory.
//
// A pair is (i, q) of a factor, i < n and q < k: a projection takes n k products of each of a row's n parts. A row of a tile's thin tensors is (token, part).
#pragma once
#include <cstddef>

#include "bottleneck.h"
#include "cuda_plan.h"

namespace fastadapt::cuda {

struct PhmShape {
  int division, factor_rank, wide, thin;  // n, k, columns of a part of x and y (D / n) and of z (R / n)
  constexpr int width() const { return division * wide; }
  constexpr int rank() const { return division * thin; }
  constexpr bool whole() const { return wide % 8 == 0; }
  constexpr int pairs() const { return division * factor_rank; }
  constexpr int padded_pairs() const { return (pairs() + 3) / 4 * 4; }  // thin tensors are read 16 bytes at a time
};
constexpr PhmShape phm_shape(int64_t width, int64_t rank, int64_t division, int64_t factor_rank) {
  return {static_cast<int>(division), static_cast<int>(factor_rank), static_cast<int>(width / division), static_cast<int>(rank / division)};
}

namespace plan {
constexpr int kPhmThreads = 256, kPhmTokens = 32, kPhmSplits = 256, kPhmMaxDivision = 16, kPhmMaxFactorRank = 8;
// A thread stages its sums of 8 columns for 2 pairs at a time; 4 numbers more keep the 16-byte stores of 8 lanes in different banks.
constexpr int kPhmStage = 20;

constexpr int round32(int n) { return static_cast<int>(ceil_div(n, 32) * 32); }
// Columns of a factor's row in shared memory, an odd multiple of 64 bytes: the 16-byte loads of 8 lanes, 4 from each of two rows, fall into different banks.
constexpr int factor_pitch(int columns) { return round32(columns) % 64 == 0 ? round32(columns) + 32 : round32(columns); }

// Threads that own 8 columns of a row each, and tokens side by side.
struct PhmOwners {
  int vectors, all, each, slots;  // 8-column vectors of a part and of a row, and of those at a time
};
constexpr PhmOwners phm_owners(int division, int columns, int tokens) {
  const int vectors = (columns + 7) / 8, all = division * vectors, each = all < kPhmThreads ? all : kPhmThreads, most = kPhmThreads / each;
  return {vectors, all, each, most < tokens ? most : tokens};
}
// Where the pieces of a block's shared memory lie, in bytes, and who owns which columns.
struct PhmLayout {
  int factors[2][2];  // [down, up][left, right]: a row a padded pair
  int rules[2];
  int activated;      // phi(z), later dz
  int thin[4];        // fp32, (tokens n, padded pairs)
  int stage, bytes;
  PhmOwners of_wide, of_thin;
};
constexpr PhmLayout phm_layout(const PhmShape& s, int tokens, bool backward) {
  PhmLayout out{};
  int used = 0;
  const int rows = tokens * s.division;
  for (int side = 0; side < 2; ++side) {
    for (int right = 0; right < 2; ++right) {
      out.factors[side][right] = used;
      used += 2 * s.padded_pairs() * factor_pitch(side == right ? s.wide : s.thin);
    }
    out.rules[side] = used;
    used += round8(s.division * s.division * s.division) * 2;
  }
  out.activated = used;
  used += 2 * rows * round32(s.thin);
  for (int i = 0; i < (backward ? 4 : 2); ++i) out.thin[i] = used, used += 4 * rows * s.padded_pairs();
  out.stage = used;
  out.of_wide = phm_owners(s.division, s.wide, tokens), out.of_thin = phm_owners(s.division, s.thin, tokens);
  out.bytes = used + (backward ? 4 * kPhmStage * larger(out.of_wide.each * out.of_wide.slots, out.of_thin.each * out.of_thin.slots) : 0);
  return out;
}
// Tokens of a block's tile: 32, or as many as leave room for the backward's thin tensors on the smallest device; 0 where none do.
constexpr int phm_tokens(const PhmShape& s) {
  for (int tokens = kPhmTokens; tokens > 0; tokens /= 2)
    if (phm_layout(s, tokens, true).bytes <= kLargestShared) return tokens;
  return 0;
}
// Tiles of a split of the backward: at most 256 splits, two blocks an SM of an H100; a nominal number, so that all devices add in the same order.
constexpr int64_t phm_tiles_per_split(int64_t rows, int tokens) { return ceil_div(ceil_div(rows, tokens), kPhmSplits); }
constexpr int64_t phm_splits(int64_t rows, int tokens) { return ceil_div(ceil_div(rows, tokens), phm_tiles_per_split(rows, tokens)); }
}  // namespace plan

// A projection: its parameters (P), and one split's partial of their gradients, the other splits' `partial` numbers behind it each.
struct PhmSide {
  const void *rule, *left, *right, *bias;  // (n, n, n), (n, in / n, k), (n, k, out / n), (out)
  float *d_rule, *d_left, *d_right, *d_bias;
};

struct PhmParams {
  int64_t rows;
  PhmShape shape;
  int tokens, tiles_per_split;
  plan::PhmLayout at;
  bool float_parameters, add_input;
  Activation activation;
  float scale;
  const void *x, *residual, *dy;  // A
  int64_t x_stride, residual_stride, dy_stride;
  PhmSide sides[2];  // down, up
  void *y, *z, *dx;  // A; z: written by forward if not null, read by backward
  int64_t partial;
};

struct PhmSum {
  const float* parts;
  void* out;  // P
  int columns;
};
struct PhmReduceParams {
  int64_t splits, partial;
  bool float_parameters;
  int count;
  PhmSum sums[8];
};

struct PhmCall {
  Type activation_type, parameter_type;
  PhmParams params;       // but for what follows from the shape, and what points into the workspace
  void* gradients[2][4];  // of a side's rule, left, right, bias (P)
  void* workspace;
  void* stream;
};

// Why the kernels cannot run a shape, or null.
const char* phm_why_not(Type activation_type, Type parameter_type, int64_t width, int64_t rank, int64_t division, int64_t factor_rank);
int phm_forward(const PhmCall& call);
size_t phm_backward_workspace(const PhmCall& call);
int phm_backward(const PhmCall& call);

template <class T>
int launch_phm_forward(const PhmParams& p, void* stream);
template <class T>
int launch_phm_rows(const PhmParams& p, void* stream);
template <class T>
int launch_phm_reduce(const PhmReduceParams& p, void* stream);

}  // namespace fastadapt::cuda
