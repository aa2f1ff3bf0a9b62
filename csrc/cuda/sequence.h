// What the launch sequences of the ops share: the workspace, the weights as the kernels want them, and the backward of one or two bottlenecks.
//
// A sequence is planned once to learn the workspace (base null) and once to run, by the same function: the two cannot differ.
#pragma once
#include "../include/cuda.h"
#include "launch.h"

namespace fastadapt::cuda {

struct Workspace {
  char* base;
  size_t used = 0;

  explicit Workspace(void* base) : base(base ? static_cast<char*>(base) : reinterpret_cast<char*>(256)) {}

  template <class V = char>
  V* take(bool wanted, int64_t count) {
    if (!wanted) return nullptr;
    const size_t at = used;
    used += (static_cast<size_t>(count) * sizeof(V) + 255) / 256 * 256;
    return reinterpret_cast<V*>(base + at);
  }
};

template <class F>
int with_type(Type type, F f) {
  return type == kBFloat16 ? f(bf16{}) : f(half{});
}

// Whether rows of `columns` numbers are as the kernels want them: 16-byte aligned.
inline bool ragged(int64_t columns) { return columns % 8 != 0; }

// The projections of one bottleneck, or of several that lie one after the other: `downs` of them, and up-projections of `up_rows` rows in all (0: of width). Matrices in other than the
// activations' type, and up-projections with ragged rows, are copied by the prologue.
Projections prepare(PrologueParams& prologue, Workspace& workspace, Type activations, Type parameters, int64_t width, int64_t rank, const void* w_down, const void* b_down, const void* w_up,
                    const void* b_up, int64_t downs = 1, int64_t up_rows = 0);

// The padded pre-activations of a ragged rank: a place for the forward to write, and a copy for the backward to read.
void* padded(Workspace& workspace, int64_t rows, int64_t rank);
const void* padded(PrologueParams& prologue, Workspace& workspace, const void* z, int64_t rows, int64_t rank);
// Behind the forward, from the padded to the given place.
void unpad(PrologueParams& epilogue, const void* z, void* to, int64_t rows, int64_t rank);

struct BottleneckGradients {
  void *dx, *dw_down, *db_down, *dw_up, *db_up, *dgate, *dscale;
};

// Rows, slab and reduce of up to two problems. add_problem fills the kernels' arguments for what is asked for; a_is_z: phi is the identity, and no kernel need write a.
struct BackwardSequence {
  BackwardParams backward{};
  ReduceParams reduce{};
  ReduceParams last{};  // the sum over D behind the gradient of a scale
  int problems = 0;
  int64_t tasks;     // of a routed bottleneck, else 0
  int64_t in_width;  // of x
  bool rows_needed = false, slab_needed = false;

  BackwardSequence(int64_t rows, int64_t width, bool float_parameters, Activation activation, const void* scale_tensor, int64_t tasks = 0, int64_t in_width = 0);
  void add_problem(Workspace& workspace, const Projections& weights, int bucket, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const void* z, const void* gate, float scale,
                   float add, const BottleneckGradients& wanted, bool a_is_z = false);
  void add_sums(const float* parts, int64_t count, int stride, int columns, void* out, void* rest);
  template <class T>
  int launch(void* stream) const;
};

#define FASTADAPT_RETURN_IF_FAILED(call) \
  if (const int status = (call)) return status

template <class T>
int BackwardSequence::launch(void* stream) const {
  if (rows_needed) FASTADAPT_RETURN_IF_FAILED(launch_rows<T>(backward, problems, stream));
  if (slab_needed) FASTADAPT_RETURN_IF_FAILED(launch_slab<T>(backward, problems, stream));
  if (reduce.problem_count || reduce.sum_count) FASTADAPT_RETURN_IF_FAILED(launch_reduce<T>(reduce, stream));
  if (last.sum_count) FASTADAPT_RETURN_IF_FAILED(launch_reduce<T>(last, stream));
  return 0;
}

template <class T>
int launch_if_needed(const PrologueParams& prologue, void* stream) {
  return prologue.count || prologue.fold ? launch_prologue<T>(prologue, stream) : 0;
}

}  // namespace fastadapt::cuda
