// VL-PET's gated bottleneck: prologue, forward (small: twice); prologue, gates (small: twice), then rows, slab and reduce of its one or two bottlenecks.
#include "sequence.h"

namespace fastadapt::cuda {
namespace {

bool row_gated(Granularity kind) { return kind == kMiddleX || kind == kSmall; }

GateParams gating(PrologueParams& prologue, Workspace& workspace, const GatedCall& p, bool forward) {
  GateParams g{};
  g.kind = p.kind, g.add = p.add, g.input_scale = p.input_scale, g.adapter_scale = p.adapter_scale;
  g.length = p.samples > 0 ? p.rows / p.samples : p.rows;
  g.zg = p.zg, g.total = p.total, g.gate = p.gate, g.logits = p.logits;
  if (p.kind == kLarge) {
    g.large = prepare(prologue, workspace, p.activation_type, p.parameter_type, p.width, p.gate_rank, forward || p.dx ? p.gate_weight : nullptr, p.gate_bias, p.gate_up_weight, p.gate_up_bias);
  } else {
    g.weight = p.gate_weight, g.bias = p.gate_bias;
  }
  if (forward && row_gated(p.kind)) {
    g.fold = prologue.fold = workspace.take<float>(true, p.rank + 1);
    prologue.fold_up = p.w_up, prologue.fold_bias = p.b_up, prologue.fold_width = static_cast<int>(p.width), prologue.fold_rank = static_cast<int>(p.rank);
    const int64_t size = p.parameter_type == kFloat ? 4 : 2;
    prologue.fold_weight = static_cast<const char*>(p.gate_weight) + (p.kind == kSmall ? p.width * size : 0);
  }
  return g;
}

struct ForwardSequence {
  PrologueParams prologue{}, epilogue{};
  GatedForwardParams forward{};
  Workspace workspace;

  explicit ForwardSequence(const GatedCall& p, void* base) : workspace(base) {
    forward.rows = p.rows, forward.width = static_cast<int>(p.width), forward.float_parameters = p.parameter_type == kFloat, forward.activation = p.activation;
    forward.x = p.h, forward.x_stride = p.h_stride, forward.other = p.x, forward.other_stride = p.x_stride;
    forward.adapter = prepare(prologue, workspace, p.activation_type, p.parameter_type, p.width, p.rank, p.w_down, p.b_down, p.w_up, p.b_up);
    forward.y = p.y, forward.z = p.z, forward.scale = p.scale;
    forward.gating = gating(prologue, workspace, p, true);
    // The second launch of `small` reads both.
    if ((p.z && ragged(p.rank)) || (!p.z && p.kind == kSmall)) forward.z = padded(workspace, p.rows, p.rank);
    if (p.zg && ragged(p.gate_rank)) forward.gating.zg = padded(workspace, p.rows, p.gate_rank);
    if (!p.logits && p.kind == kSmall) forward.gating.logits = workspace.take<float>(true, p.rows);
    unpad(epilogue, forward.z, p.z, p.rows, p.rank);
    unpad(epilogue, forward.gating.zg, p.zg, p.rows, p.gate_rank);
  }
};

struct BackwardPlan {
  PrologueParams prologue{};
  Workspace workspace;
  GatesParams gates{};
  BackwardSequence sequence;

  explicit BackwardPlan(const GatedCall& p, void* base) : workspace(base), sequence(p.rows, p.width, p.parameter_type == kFloat, p.activation, nullptr) {
    const bool large = p.kind == kLarge, inner = p.dh || p.dw_down || p.db_down || p.dw_up || p.db_up;
    const bool outer = large && (p.dx || p.dgate_weight || p.dgate_bias || p.dgate_up_weight || p.dgate_up_bias), sums = !large && (p.dgate_weight || p.dgate_bias);
    const Projections adapter = prepare(prologue, workspace, p.activation_type, p.parameter_type, p.width, p.rank, p.dh ? p.w_down : nullptr, nullptr, p.w_up, p.b_up);
    GateParams gate = gating(prologue, workspace, p, false);
    const void* z = padded(prologue, workspace, p.z, p.rows, p.rank);
    gate.zg = const_cast<void*>(padded(prologue, workspace, p.zg, p.rows, p.gate_rank));
    const int64_t elements = p.rows * p.width;
    gates.rows = p.rows, gates.width = static_cast<int>(p.width), gates.float_parameters = p.parameter_type == kFloat, gates.activation = p.activation;
    gates.dy = p.dy, gates.h = p.h, gates.x = p.x, gates.dy_stride = p.dy_stride, gates.h_stride = p.h_stride, gates.x_stride = p.x_stride;
    gates.scale = p.scale, gates.adapter = adapter, gates.z = z, gates.gating = gate;
    gates.d_total = workspace.take(inner, 2 * elements);
    gates.d_logits = p.kind == kLogits ? p.dx : workspace.take(outer, 2 * elements);
    gates.dx = row_gated(p.kind) ? p.dx : nullptr;
    gates.row_sums = workspace.take<float>(p.kind == kSmall, p.rows);
    const int rank = static_cast<int>(large && p.gate_rank > p.rank ? p.gate_rank : p.rank), bucket = plan::bucket(rank);
    if (sums) {
      const int columns = static_cast<int>(p.kind == kSmall ? 2 * p.width : p.width);
      const int64_t tiles = plan::ceil_div(p.rows, plan::row_tile(plan::gated_bucket(rank)).rows());
      gates.sums_width = columns + (row_gated(p.kind) ? 1 : 0);
      gates.sums = workspace.take<float>(true, tiles * gates.sums_width);
      sequence.add_sums(gates.sums, tiles, gates.sums_width, columns, p.dgate_weight, p.dgate_bias);
    }
    if (inner)
      sequence.add_problem(workspace, adapter, bucket, gates.d_total, p.width, p.h, p.h_stride, z, nullptr, p.adapter_scale, p.input_scale,
                           {p.dh, p.dw_down, p.db_down, p.dw_up, p.db_up, nullptr, nullptr});
    if (outer)
      sequence.add_problem(workspace, gate.large, bucket, gates.d_logits, p.width, p.x, p.x_stride, gate.zg, nullptr, 1.f, 0.f,
                           {p.dx, p.dgate_weight, p.dgate_bias, p.dgate_up_weight, p.dgate_up_bias, nullptr, nullptr});
  }
};

}  // namespace

size_t gated_forward_workspace(const GatedCall& p) { return ForwardSequence(p, nullptr).workspace.used; }

int gated_forward(const GatedCall& p) {
  const ForwardSequence sequence(p, p.workspace);
  return with_type(p.activation_type, [&](auto t) {
    FASTADAPT_RETURN_IF_FAILED(launch_if_needed<decltype(t)>(sequence.prologue, p.stream));
    FASTADAPT_RETURN_IF_FAILED(launch_gated_forward<decltype(t)>(sequence.forward, p.stream));
    if (p.kind == kSmall) {
      GatedForwardParams second = sequence.forward;
      second.gating.apply_only = true;
      FASTADAPT_RETURN_IF_FAILED(launch_gated_forward<decltype(t)>(second, p.stream));
    }
    return launch_if_needed<decltype(t)>(sequence.epilogue, p.stream);
  });
}

size_t gated_backward_workspace(const GatedCall& p) { return BackwardPlan(p, nullptr).workspace.used; }

int gated_backward(const GatedCall& p) {
  const BackwardPlan plan(p, p.workspace);
  return with_type(p.activation_type, [&](auto t) {
    FASTADAPT_RETURN_IF_FAILED(launch_if_needed<decltype(t)>(plan.prologue, p.stream));
    if (p.kind == kSmall) {
      GatesParams first = plan.gates;
      first.row_sums_only = true, first.d_total = first.dx = nullptr, first.sums = nullptr;
      FASTADAPT_RETURN_IF_FAILED(launch_gates<decltype(t)>(first, p.stream));
    }
    FASTADAPT_RETURN_IF_FAILED(launch_gates<decltype(t)>(plan.gates, p.stream));
    return plan.sequence.launch<decltype(t)>(p.stream);
  });
}

}  // namespace fastadapt::cuda
