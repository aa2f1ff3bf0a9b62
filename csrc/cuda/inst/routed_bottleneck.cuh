// The launchers of routed_bottleneck.cuh, to be instantiated for one type. Ranks have the buckets of the gated kernels.
#pragma once
#include "../launch.h"
#include "../routed_bottleneck.cuh"

namespace fastadapt::cuda {

inline unsigned routed_tiles(const Routing& routing, int64_t rows) { return static_cast<unsigned>(plan::routed_pieces(rows, routing.tasks, routing.tile_rows)); }

template <class T>
int launch_routed_prologue(const RoutedPrologueParams& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(1 + prologue_blocks(p)));
  return FASTADAPT_LAUNCH(routed_prologue_kernel<T>, grid, dim3(kPrologueThreads), 4 * kPrologueThreads, stream, p);
}

template <class T>
int launch_routed_forward(const RoutedForwardParams& p, void* stream) {
  return with_gated_rank(p.adapter.rank, [&](auto rank) {
    using Tr = RoutedRowTraits<T, decltype(rank)::value>;
    return FASTADAPT_LAUNCH(routed_forward_kernel<Tr>, dim3(routed_tiles(p.routing, p.rows)), dim3(Tr::kThreads), Tr::kForwardShared, stream, p);
  });
}

template <class T>
int launch_routed_rows(const RoutedBackwardParams& p, void* stream) {
  return with_gated_rank(p.problems[0].weights.rank, [&](auto rank) {
    using Tr = RoutedRowTraits<T, decltype(rank)::value>;
    return FASTADAPT_LAUNCH(routed_rows_kernel<Tr>, dim3(routed_tiles(p.routing, p.rows)), dim3(Tr::kThreads), Tr::kRowsShared, stream, p);
  });
}

template <class T>
int launch_routed_slab(const RoutedBackwardParams& p, int64_t splits, void* stream) {
  return with_gated_rank(p.problems[0].weights.rank, [&](auto rank) {
    using Tr = RoutedSlabTraits<T, decltype(rank)::value>;
    const dim3 grid(static_cast<unsigned>(plan::ceil_div(p.width, plan::kSlab)), static_cast<unsigned>(splits));
    return FASTADAPT_LAUNCH(routed_slab_kernel<Tr>, grid, dim3(Tr::kThreads), Tr::kShared, stream, p);
  });
}

template <class T>
int launch_routed_reduce(const RoutedReduceParams& p, void* stream) {
  int64_t blocks = 0;
  for (int n = 0; n < p.problem_count; ++n) {
    const ReduceBlocks of = reduce_blocks(p.problems[n], p.width, p.width);
    blocks += (n ? 1 : p.routing.tasks) * (of.up + of.down);
  }
  for (int n = 0; n < p.sum_count; ++n) blocks += (p.routing.b_down ? p.routing.tasks : 1) * plan::ceil_div(p.sums[n].columns, 32);
  return FASTADAPT_LAUNCH(routed_reduce_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kReduceThreads), 4 * kReduceThreads, stream, p);
}

}  // namespace fastadapt::cuda

#define FASTADAPT_INSTANTIATE(T)                                                            \
  namespace fastadapt::cuda {                                                               \
  template int launch_routed_prologue<T>(const RoutedPrologueParams& p, void* stream);      \
  template int launch_routed_forward<T>(const RoutedForwardParams& p, void* stream);        \
  template int launch_routed_rows<T>(const RoutedBackwardParams& p, void* stream);          \
  template int launch_routed_slab<T>(const RoutedBackwardParams& p, int64_t splits, void* stream); \
  template int launch_routed_reduce<T>(const RoutedReduceParams& p, void* stream);          \
  }
