// The bottleneck: prologue (fp32 parameters or ragged ranks), forward (ragged ranks: and z without its padding); prologue, rows, slab, reduce, and one more sum for a trained scale.
#include "sequence.h"

namespace fastadapt::cuda {

const char* why_not(Type activation_type, Type parameter_type, int64_t width, int64_t rank, int64_t gate_rank) {
  if (activation_type != kBFloat16 && activation_type != kHalf) return "the cuda kernels take bfloat16 and float16 activations";
  if (parameter_type != activation_type && parameter_type != kFloat) return "the parameters must have the activations' type or float32";
  if (width < 8 || width % 8 != 0) return "the cuda kernels need a width that is a multiple of 8";
  if (rank < 1 || rank > plan::kMaxRank || gate_rank < 0 || gate_rank > plan::kMaxRank) return "the cuda kernels take ranks from 1 to 256";
  return nullptr;
}

Projections prepare(PrologueParams& prologue, Workspace& workspace, Type activations, Type parameters, int64_t width, int64_t rank, const void* w_down, const void* b_down, const void* w_up,
                    const void* b_up, int64_t downs, int64_t up_rows) {
  const bool cast = activations != parameters;
  const auto copied = [&](const void* from, int64_t rows, int64_t columns) -> const void* {
    const int stride = plan::round8(columns);
    if (!from || (!cast && stride == columns)) return from;
    void* to = workspace.take(true, 2 * rows * stride);
    prologue.copies[prologue.count++] = {from, to, rows, static_cast<int>(columns), static_cast<int>(columns), stride, parameters == kFloat};
    return to;
  };
  prologue.float_parameters = parameters == kFloat;
  return {copied(w_down, downs * rank, width), b_down, copied(w_up, up_rows ? up_rows : width, rank), b_up, static_cast<int>(rank), plan::round8(rank)};
}

void* padded(Workspace& workspace, int64_t rows, int64_t rank) { return workspace.take(true, 2 * rows * plan::round8(rank)); }

const void* padded(PrologueParams& prologue, Workspace& workspace, const void* z, int64_t rows, int64_t rank) {
  if (!z || !ragged(rank)) return z;
  void* to = padded(workspace, rows, rank);
  prologue.copies[prologue.count++] = {z, to, rows, static_cast<int>(rank), static_cast<int>(rank), plan::round8(rank), false};
  return to;
}

void unpad(PrologueParams& epilogue, const void* z, void* to, int64_t rows, int64_t rank) {
  if (to && z != to) epilogue.copies[epilogue.count++] = {z, to, rows, static_cast<int>(rank), plan::round8(rank), static_cast<int>(rank), false};
}

BackwardSequence::BackwardSequence(int64_t rows, int64_t width, bool float_parameters, Activation activation, const void* scale_tensor, int64_t tasks, int64_t in_width)
    : tasks(tasks), in_width(in_width ? in_width : width) {
  const plan::Splits splits = plan::splits(rows, this->in_width > width ? this->in_width : width);
  backward.rows = rows, backward.rows_per_split = splits.rows, backward.width = static_cast<int>(width);
  backward.float_parameters = float_parameters, backward.activation = activation, backward.scale_tensor = scale_tensor;
  reduce.splits = tasks ? plan::routed_splits(rows, width, tasks) : splits.count, reduce.width = backward.width, reduce.float_parameters = last.float_parameters = float_parameters, reduce.scale_tensor = scale_tensor;
}

void BackwardSequence::add_problem(Workspace& workspace, const Projections& weights, int bucket, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const void* z,
                                   const void* gate, float scale, float add, const BottleneckGradients& wanted, bool a_is_z) {
  const int64_t rows = backward.rows, width = backward.width, stride = weights.up_stride, splits = reduce.splits, tile = plan::row_tile(bucket).rows();
  const int64_t tiles = tasks ? plan::routed_pieces(rows, tasks, tile) : plan::ceil_div(rows, tile);
  const bool bracket = wanted.dgate || wanted.dscale, needs_a = wanted.dw_up || bracket;
  backward.bucket = bucket;
  BackwardProblem& b = backward.problems[problems++];
  b = {dy, x, z, dy_stride, x_stride, weights, gate};
  b.scale = scale, b.add = add, b.dx = wanted.dx;
  b.needs_dz = wanted.dx || wanted.dw_down || wanted.db_down;
  b.a = a_is_z ? const_cast<void*>(z) : workspace.take(needs_a, 2 * rows * stride);
  b.dz = workspace.take(wanted.dx || wanted.dw_down, 2 * rows * stride);
  b.bias_sums = workspace.take<float>(wanted.db_down != nullptr, tiles * weights.rank);
  b.p = workspace.take<float>(needs_a, splits * width * stride);
  b.q = workspace.take<float>(wanted.dw_down != nullptr, splits * in_width * weights.rank);
  b.s = workspace.take<float>(wanted.db_up || (bracket && weights.b_up), splits * width);
  rows_needed |= b.needs_dz || (needs_a && !a_is_z);
  slab_needed |= needs_a || wanted.dw_down || wanted.dx || wanted.db_up;

  ReduceProblem r{b.p, b.q, b.s, weights.w_up, weights.b_up, gate, wanted.dw_down, wanted.dw_up, wanted.db_up, wanted.dgate, nullptr, weights.rank, weights.up_stride, scale};
  r.dscale = workspace.take<float>(wanted.dscale != nullptr, width);
  if (wanted.dw_down || wanted.dw_up || wanted.db_up || bracket) reduce.problems[reduce.problem_count++] = r;
  if (wanted.db_down) add_sums(b.bias_sums, tiles, weights.rank, weights.rank, wanted.db_down, nullptr);
  if (wanted.dscale) last.sums[last.sum_count++] = {r.dscale, width, 1, 1, wanted.dscale, nullptr};
}

void BackwardSequence::add_sums(const float* parts, int64_t count, int stride, int columns, void* out, void* rest) {
  reduce.sums[reduce.sum_count++] = {parts, count, stride, columns, out, rest};
}

namespace {

struct ForwardSequence {
  PrologueParams prologue{}, epilogue{};
  ForwardParams forward{};
  Workspace workspace;

  explicit ForwardSequence(const BottleneckCall& p, void* base) : workspace(base) {
    forward.rows = p.rows, forward.width = static_cast<int>(p.width), forward.float_parameters = p.parameter_type == kFloat, forward.activation = p.activation;
    forward.x = p.x, forward.x_stride = p.x_stride, forward.other = p.residual, forward.other_stride = p.residual_stride;
    forward.adapter = prepare(prologue, workspace, p.activation_type, p.parameter_type, p.width, p.rank, p.w_down, p.b_down, p.w_up, p.b_up);
    forward.z = p.z && ragged(p.rank) ? padded(workspace, p.rows, p.rank) : p.z;
    unpad(epilogue, forward.z, p.z, p.rows, p.rank);
    forward.y = p.y, forward.gate = p.gate, forward.scale_tensor = p.scale_tensor, forward.scale = p.scale, forward.add_input = p.add_input;
  }
};

struct BackwardPlan {
  PrologueParams prologue{};
  Workspace workspace;
  BackwardSequence sequence;

  explicit BackwardPlan(const BottleneckCall& p, void* base)
      : workspace(base), sequence(p.rows, p.width, p.parameter_type == kFloat, p.activation, p.scale_tensor) {
    const Projections weights = prepare(prologue, workspace, p.activation_type, p.parameter_type, p.width, p.rank, p.dx ? p.w_down : nullptr, nullptr, p.w_up, p.b_up);
    const void* z = padded(prologue, workspace, p.z, p.rows, p.rank);
    sequence.add_problem(workspace, weights, plan::bucket(p.rank), p.dy, p.dy_stride, p.x, p.x_stride, z, p.gate, p.scale, p.add_input ? 1.f : 0.f,
                         {p.dx, p.dw_down, p.db_down, p.dw_up, p.db_up, p.dgate, p.dscale});
  }
};

}  // namespace

size_t bottleneck_forward_workspace(const BottleneckCall& p) { return ForwardSequence(p, nullptr).workspace.used; }

int bottleneck_forward(const BottleneckCall& p) {
  const ForwardSequence sequence(p, p.workspace);
  return with_type(p.activation_type, [&](auto t) {
    FASTADAPT_RETURN_IF_FAILED(launch_if_needed<decltype(t)>(sequence.prologue, p.stream));
    FASTADAPT_RETURN_IF_FAILED(launch_forward<decltype(t)>(sequence.forward, p.stream));
    return launch_if_needed<decltype(t)>(sequence.epilogue, p.stream);
  });
}

size_t bottleneck_backward_workspace(const BottleneckCall& p) { return BackwardPlan(p, nullptr).workspace.used; }

int bottleneck_backward(const BottleneckCall& p) {
  const BackwardPlan plan(p, p.workspace);
  return with_type(p.activation_type, [&](auto t) {
    FASTADAPT_RETURN_IF_FAILED(launch_if_needed<decltype(t)>(plan.prologue, p.stream));
    return plan.sequence.launch<decltype(t)>(p.stream);
  });
}

#if FASTADAPT_EMULATED
int device_count() { return 1; }
const char* error_text(int code) { return code == -1 ? "the shape is not supported" : emulator::last_error().c_str(); }
int driver_version() { return 0; }
int runtime_version() { return 0; }
#else
int device_count() {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}
const char* error_text(int code) { return code == -1 ? "the shape is not supported" : cudaGetErrorString(static_cast<cudaError_t>(code)); }
int driver_version() {
  int v = 0;
  return cudaDriverGetVersion(&v) == cudaSuccess ? v : 0;
}
int runtime_version() {
  int v = 0;
  return cudaRuntimeGetVersion(&v) == cudaSuccess ? v : 0;
}
#endif

}  // namespace fastadapt::cuda
