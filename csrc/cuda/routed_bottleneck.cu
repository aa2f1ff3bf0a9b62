// The bottleneck over a batch that mixes tasks: prologue (the routing, and the bottleneck's), forward (ragged ranks: and z without its padding); prologue, rows, slab, reduce.
#include "sequence.h"

namespace fastadapt::cuda {

const char* routed_why_not(int64_t rows, int64_t width, int64_t tasks) {
  return plan::routed_splits(rows, width, tasks) > plan::kMostSplits ? "the rows of so many tasks make more splits than a grid has blocks (65535)" : nullptr;
}

namespace {

Routing routing(Workspace& workspace, const RoutedCall& p) {
  Routing r{p.ids, static_cast<int>(p.count), static_cast<int>(p.rows / p.count), static_cast<int>(p.tasks), plan::row_tile(plan::gated_bucket(p.rank)).rows()};
  r.order = workspace.take<int>(true, p.count);
  r.rows = workspace.take<int>(true, p.tasks + 2), r.tiles = workspace.take<int>(true, p.tasks + 2), r.splits = workspace.take<int>(true, p.tasks + 2);
  r.down = p.shares_w_down ? 0 : p.rank * p.width, r.up = p.shares_w_up ? 0 : p.width * plan::round8(p.rank);
  r.b_down = p.shares_b_down ? 0 : p.b_down_stride, r.b_up = p.shares_b_up ? 0 : p.width;
  return r;
}

Projections projections(PrologueParams& prologue, Workspace& workspace, const RoutedCall& p, const void* w_down) {
  return prepare(prologue, workspace, p.activation_type, p.parameter_type, p.width, p.rank, w_down, p.b_down, p.w_up, p.b_up, p.shares_w_down ? 1 : p.tasks, (p.shares_w_up ? 1 : p.tasks) * p.width);
}

struct ForwardSequence {
  RoutedPrologueParams prologue{};
  PrologueParams epilogue{};
  RoutedForwardParams forward{};
  Workspace workspace;

  explicit ForwardSequence(const RoutedCall& p, void* base) : workspace(base) {
    forward.rows = p.rows, forward.width = prologue.width = static_cast<int>(p.width), forward.float_parameters = p.parameter_type == kFloat, forward.activation = p.activation;
    forward.x = p.x, forward.x_stride = p.x_stride, forward.other = p.residual, forward.other_stride = p.residual_stride;
    forward.routing = prologue.routing = routing(workspace, p);
    forward.adapter = projections(prologue, workspace, p, p.w_down);
    forward.z = p.z && ragged(p.rank) ? padded(workspace, p.rows, p.rank) : p.z;
    unpad(epilogue, forward.z, p.z, p.rows, p.rank);
    forward.y = p.y, forward.scale = p.scale, forward.add_input = p.add_input;
  }
};

struct BackwardPlan {
  RoutedPrologueParams prologue{};
  Workspace workspace;
  BackwardSequence sequence;
  RoutedReduceParams reduce{};

  explicit BackwardPlan(const RoutedCall& p, void* base) : workspace(base), sequence(p.rows, p.width, p.parameter_type == kFloat, p.activation, nullptr, p.tasks) {
    prologue.routing = routing(workspace, p), prologue.width = static_cast<int>(p.width);
    const Projections weights = projections(prologue, workspace, p, p.dx ? p.w_down : nullptr);
    const void* z = padded(prologue, workspace, p.z, p.rows, p.rank);
    sequence.add_problem(workspace, weights, plan::gated_bucket(p.rank), p.dy, p.dy_stride, p.x, p.x_stride, z, nullptr, p.scale, p.add_input ? 1.f : 0.f,
                         {p.dx, p.dw_down, p.db_down, p.dw_up, p.db_up, nullptr, nullptr});
    static_cast<ReduceParams&>(reduce) = sequence.reduce;
    reduce.routing = prologue.routing;
    if (reduce.problem_count) {
      ReduceProblem &own = reduce.problems[0], &shared = reduce.problems[1] = own;
      ReduceProblem &not_down = p.shares_w_down ? own : shared, &not_up = p.shares_w_up ? own : shared, &not_bias = p.shares_b_up ? own : shared;
      not_down.dw_down = nullptr, not_up.dw_up = nullptr, not_up.p = nullptr, not_bias.db_up = nullptr, not_bias.s = nullptr;
      reduce.problem_count = 2;
    }
  }
};

}  // namespace

size_t routed_forward_workspace(const RoutedCall& p) { return ForwardSequence(p, nullptr).workspace.used; }

int routed_forward(const RoutedCall& p) {
  const ForwardSequence sequence(p, p.workspace);
  return with_type(p.activation_type, [&](auto t) {
    FASTADAPT_RETURN_IF_FAILED(launch_routed_prologue<decltype(t)>(sequence.prologue, p.stream));
    FASTADAPT_RETURN_IF_FAILED(launch_routed_forward<decltype(t)>(sequence.forward, p.stream));
    return launch_if_needed<decltype(t)>(sequence.epilogue, p.stream);
  });
}

size_t routed_backward_workspace(const RoutedCall& p) { return BackwardPlan(p, nullptr).workspace.used; }

int routed_backward(const RoutedCall& p) {
  const BackwardPlan plan(p, p.workspace);
  const RoutedBackwardParams backward{plan.sequence.backward, plan.prologue.routing};
  return with_type(p.activation_type, [&](auto t) {
    FASTADAPT_RETURN_IF_FAILED(launch_routed_prologue<decltype(t)>(plan.prologue, p.stream));
    if (plan.sequence.rows_needed) FASTADAPT_RETURN_IF_FAILED(launch_routed_rows<decltype(t)>(backward, p.stream));
    if (plan.sequence.slab_needed) FASTADAPT_RETURN_IF_FAILED(launch_routed_slab<decltype(t)>(backward, plan.reduce.splits, p.stream));
    return plan.reduce.problem_count || plan.reduce.sum_count ? launch_routed_reduce<decltype(t)>(plan.reduce, p.stream) : 0;
  });
}

}  // namespace fastadapt::cuda
