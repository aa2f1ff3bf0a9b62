// Arguments of the CUDA kernels, passed by value. Strides count elements of the activations' type. "A": in the activations' type; "P": in the parameters' type, fp32 or A, rounded to A
// when read. Weight matrices are in A: down-projections (rank, width) without gaps, up-projections (width, up_stride) with zeros from rank up to up_stride, the next multiple of 8; and so are
// pre-activations, (rows, up_stride). Null: not given, or not asked for.
#pragma once
#include "bottleneck.h"
#include "cuda_plan.h"
#include "gated_bottleneck.h"

namespace fastadapt::cuda {

// One bottleneck as the row kernels read it.
struct Projections {
  const void *w_down, *b_down, *w_up, *b_up;  // A, P, A, P
  int rank, up_stride;
};

struct ForwardParams {
  int64_t rows;
  int width;  // of y
  bool float_parameters;
  Activation activation;
  const void *x, *other;  // A; of the gated op h and x
  int64_t x_stride, other_stride;
  Projections adapter;
  void *y, *z;  // A
  // The plain op. `other` is a residual, or null.
  const void *gate, *scale_tensor;  // P
  float scale;
  bool add_input;
  constexpr int x_width() const { return width; }
};

struct GateParams {
  Granularity kind;
  bool add, apply_only;   // apply_only: the second launch of kSmall, which reads z and the logits that the first wrote
  float input_scale, adapter_scale;
  Projections large;      // kLarge
  const void* weight;     // P: kMiddleX and kMiddleY (width), kSmall (2 width)
  const void* bias;       // P, one element
  const float* fold;      // kMiddleX, kSmall: Wu' w_h and, behind it, bu w_h
  int64_t length;         // kSmall: rows of a sample
  void *zg, *total, *gate;  // A
  float* logits;
};

struct GatedForwardParams : ForwardParams {
  GateParams gating;
};

// From dy to the gradient of H' and of the gate's logits.
struct GatesParams {
  int64_t rows;
  int width;
  bool float_parameters;
  Activation activation;
  const void *dy, *h, *x;
  int64_t dy_stride, h_stride, x_stride;
  float scale;
  Projections adapter;
  const void* z;
  GateParams gating;        // zg, total, gate, logits are read
  bool row_sums_only;       // the first launch of kSmall: fills row_sums
  float* row_sums;          // kSmall
  void *d_total, *d_logits, *dx;  // A, (rows, width) without gaps
  float* sums;              // one row of sums_width a row tile: gradient of the gate's weight and, of a gate a row, its bias
  int sums_width;
};

// The backward of one bottleneck: y = scale g (.) u + add x.
struct BackwardProblem {
  const void *dy, *x, *z;  // A
  int64_t dy_stride, x_stride;
  Projections weights;
  const void* gate;     // P
  void *a, *dz;         // A, (rows, up_stride): written by the rows kernel, read by the slab kernel
  float* bias_sums;     // (row tiles, rank)
  void* dx;             // A
  float *p, *q, *s;     // partials: dy' a (splits, width, up_stride), dz' x (splits, rank, width), column sums of dy (splits, width)
  float scale, add;
  bool needs_dz;        // dz is asked for by dx, q or bias_sums
};

struct BackwardParams {
  int64_t rows, rows_per_split;
  int width;
  int bucket;  // of the kernels' instance: of the call's widest rank, also where the problem that has it is not asked for
  bool float_parameters;
  Activation activation;
  const void* scale_tensor;  // P
  BackwardProblem problems[2];
  constexpr int x_width() const { return width; }
};

// Sums of the partials, in order.
struct ReduceProblem {
  const float *p, *q, *s;
  const void *w_up, *b_up, *gate;                  // A, P, P
  void *dw_down, *dw_up, *db_up, *dgate;           // P
  float* dscale;                                   // (width): summands
  int rank, up_stride;
  float scale;
};
// Blocks of a problem: 8 rows of dWu each, 1024 numbers of dWd each.
struct ReduceBlocks {
  int64_t up, down;
};
constexpr int kReduceThreads = 256;
constexpr ReduceBlocks reduce_blocks(const ReduceProblem& problem, int width, int x_width) {
  const bool any = problem.dw_up || problem.db_up || problem.dgate || problem.dscale;
  return {any ? plan::ceil_div(width, 8) : 0, problem.dw_down ? plan::ceil_div(static_cast<int64_t>(problem.rank) * x_width, 4 * kReduceThreads) : 0};
}
struct ColumnSums {
  const float* parts;  // (count, stride)
  int64_t count;
  int stride, columns;
  void *out, *rest;    // P: columns below `columns`, and column `columns` where rest is given
};
struct ReduceParams {
  static constexpr bool kGates = true;
  int64_t splits;
  int width, problem_count, sum_count;
  bool float_parameters;
  const void* scale_tensor;
  ReduceProblem problems[2];
  ColumnSums sums[3];
  constexpr int x_width() const { return width; }
};

template <class Params>
constexpr int64_t reduce_blocks(const Params& p) {
  int64_t blocks = 0;
  for (int n = 0; n < p.problem_count; ++n) {
    const ReduceBlocks of = reduce_blocks(p.problems[n], p.width, p.x_width());
    blocks += of.up + of.down;
  }
  for (int n = 0; n < p.sum_count; ++n) blocks += plan::ceil_div(p.sums[n].columns + (p.sums[n].rest ? 1 : 0), 32);
  return blocks;
}

// What comes before the kernels, in one launch: matrices rounded to A with padded rows, and the fold of an up-projection with a gate's weight. Where 8 does not divide the rank, also the
// pre-activations, and behind the forward a launch that takes their padding off.
struct MatrixCopy {
  const void* from;  // fp32 or A
  void* to;          // A
  int64_t rows;
  int columns, from_stride, to_stride;
  bool from_float;
};
constexpr int kPrologueThreads = 256;
constexpr int64_t copy_blocks(const MatrixCopy& copy) { return plan::ceil_div(copy.rows * copy.to_stride, 8 * kPrologueThreads); }
struct PrologueParams {
  int count;
  bool float_parameters;
  MatrixCopy copies[6];
  const void *fold_up, *fold_bias, *fold_weight;  // P: (width, rank), (width), (width)
  float* fold;                                    // (rank + 1)
  int fold_width, fold_rank;
};
constexpr int64_t prologue_blocks(const PrologueParams& p) {
  int64_t blocks = p.fold ? plan::ceil_div(p.fold_rank + 1, 32) : 0;
  for (int n = 0; n < p.count; ++n) blocks += copy_blocks(p.copies[n]);
  return blocks;
}

// A batch that mixes tasks: rows by position, those of one task after those of another and those of no task last, in ascending order each. What a block works on is of one task, of which
// the row kernels have a tile and the slab kernel a split.
struct Routing {
  const int64_t* ids;  // (count): of `each` consecutive rows; none of 0 .. tasks - 1: no task
  int count, each, tasks, tile_rows;
  int* order;                      // (count): the ids' places by task
  int *rows, *tiles, *splits;      // (tasks + 2): the first of each task's, of no task, and the end
  int64_t down, up, b_down, b_up;  // numbers from one task's parameters to the next's; 0: shared by all
};
struct RoutedForwardParams : ForwardParams {
  Routing routing;
};
struct RoutedBackwardParams : BackwardParams {
  Routing routing;
};
// problems[0] and sums[0] add each task's partials, problems[1] and sums[1] those of all tasks.
struct RoutedReduceParams : ReduceParams {
  static constexpr bool kGates = false;
  Routing routing;
};
struct RoutedPrologueParams : PrologueParams {
  Routing routing;
  int width;
};

// LoRA: x has `in` columns and y `width`; some of x may be dropped. An element is where its number is below the threshold; what the others give is multiplied by `kept`.
struct Dropout {
  const int64_t* seed;  // null: nothing is dropped
  uint32_t threshold;
  float kept;
};
struct LoraForwardParams : ForwardParams {
  int in;
  Dropout dropout;
  constexpr int x_width() const { return in; }
};
struct LoraBackwardParams : BackwardParams {
  int in;
  Dropout dropout;
  constexpr int x_width() const { return in; }
};
struct LoraReduceParams : ReduceParams {
  static constexpr bool kGates = false;
  int in;
  constexpr int x_width() const { return in; }
};

}  // namespace fastadapt::cuda
