// LoRA's update: prologue (fp32 parameters or ragged ranks), forward (ragged ranks: and z without its padding); prologue, the bottleneck's rows, slab, reduce.
#include "sequence.h"

namespace fastadapt::cuda {
namespace {

Dropout dropout(const LoraCall& p) { return {p.seed, p.threshold, p.kept}; }

struct ForwardSequence {
  PrologueParams prologue{}, epilogue{};
  LoraForwardParams forward{};
  Workspace workspace;

  explicit ForwardSequence(const LoraCall& p, void* base) : workspace(base) {
    forward.rows = p.rows, forward.width = static_cast<int>(p.out), forward.in = static_cast<int>(p.width), forward.float_parameters = p.parameter_type == kFloat;
    forward.activation = kIdentity, forward.dropout = dropout(p);
    forward.x = p.x, forward.x_stride = p.x_stride, forward.other = p.residual, forward.other_stride = p.residual_stride;
    forward.adapter = prepare(prologue, workspace, p.activation_type, p.parameter_type, p.width, p.rank, p.w_down, nullptr, p.w_up, p.b_up, 1, p.out);
    forward.z = p.z && ragged(p.rank) ? padded(workspace, p.rows, p.rank) : p.z;
    unpad(epilogue, forward.z, p.z, p.rows, p.rank);
    forward.y = p.y, forward.scale = p.scale;
  }
};

struct BackwardPlan {
  PrologueParams prologue{};
  Workspace workspace;
  BackwardSequence sequence;
  BackwardParams rows;
  LoraBackwardParams slab{};
  LoraReduceParams reduce{};

  explicit BackwardPlan(const LoraCall& p, void* base) : workspace(base), sequence(p.rows, p.out, p.parameter_type == kFloat, kIdentity, nullptr, 0, p.width) {
    const Projections weights = prepare(prologue, workspace, p.activation_type, p.parameter_type, p.width, p.rank, p.dx ? p.w_down : nullptr, nullptr,
                                        p.dx || p.dw_down ? p.w_up : nullptr, nullptr, 1, p.out);
    const void* z = padded(prologue, workspace, p.dx || p.dw_down || p.dw_up ? p.z : nullptr, p.rows, p.rank);
    sequence.add_problem(workspace, weights, plan::bucket(p.rank), p.dy, p.dy_stride, p.x, p.x_stride, z, nullptr, p.scale, 0.f,
                         {p.dx, p.dw_down, nullptr, p.dw_up, p.db_up, nullptr, nullptr}, true);
    static_cast<BackwardParams&>(slab) = rows = sequence.backward;
    rows.problems[0].a = nullptr;
    if (p.seed) rows.problems[0].scale *= p.kept;
    slab.in = reduce.in = static_cast<int>(p.width), slab.dropout = dropout(p);
    static_cast<ReduceParams&>(reduce) = sequence.reduce;
  }
};

}  // namespace

size_t lora_forward_workspace(const LoraCall& p) { return ForwardSequence(p, nullptr).workspace.used; }

int lora_forward(const LoraCall& p) {
  const ForwardSequence sequence(p, p.workspace);
  return with_type(p.activation_type, [&](auto t) {
    FASTADAPT_RETURN_IF_FAILED(launch_if_needed<decltype(t)>(sequence.prologue, p.stream));
    FASTADAPT_RETURN_IF_FAILED(launch_lora_forward<decltype(t)>(sequence.forward, p.stream));
    return launch_if_needed<decltype(t)>(sequence.epilogue, p.stream);
  });
}

size_t lora_backward_workspace(const LoraCall& p) { return BackwardPlan(p, nullptr).workspace.used; }

int lora_backward(const LoraCall& p) {
  const BackwardPlan plan(p, p.workspace);
  return with_type(p.activation_type, [&](auto t) {
    FASTADAPT_RETURN_IF_FAILED(launch_if_needed<decltype(t)>(plan.prologue, p.stream));
    if (plan.sequence.rows_needed) FASTADAPT_RETURN_IF_FAILED(launch_rows<decltype(t)>(plan.rows, 1, p.stream));
    if (plan.sequence.slab_needed) FASTADAPT_RETURN_IF_FAILED(launch_lora_slab<decltype(t)>(plan.slab, p.stream));
    return plan.reduce.problem_count ? launch_lora_reduce<decltype(t)>(plan.reduce, p.stream) : 0;
  });
}

}  // namespace fastadapt::cuda
