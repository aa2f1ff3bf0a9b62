// The launchers of gated_bottleneck.cuh, to be instantiated for one type.
#pragma once
#include "../gated_bottleneck.cuh"
#include "../launch.h"

namespace fastadapt::cuda {

template <class T>
int launch_gated_forward(const GatedForwardParams& p, void* stream) {
  const bool dual = p.gating.kind == kLarge;
  return with_gated_rank(dual ? plan::larger(p.adapter.rank, p.gating.large.rank) : p.adapter.rank, [&](auto rank) {
    const auto run = [&](auto tr) {
      using Tr = decltype(tr);
      return FASTADAPT_LAUNCH(gated_forward_kernel<Tr>, dim3(static_cast<unsigned>(plan::ceil_div(p.rows, Tr::kBlockT))), dim3(Tr::kThreads), Tr::kForwardShared, stream, p);
    };
    return dual ? run(RowTraits<T, decltype(rank)::value, true>{}) : run(RowTraits<T, decltype(rank)::value, false>{});
  });
}

template <class T>
int launch_gates(const GatesParams& p, void* stream) {
  const bool dual = p.gating.kind == kLarge;
  return with_gated_rank(dual ? plan::larger(p.adapter.rank, p.gating.large.rank) : p.adapter.rank, [&](auto rank) {
    const auto run = [&](auto tr) {
      using Tr = decltype(tr);
      return FASTADAPT_LAUNCH(gates_kernel<Tr>, dim3(static_cast<unsigned>(plan::ceil_div(p.rows, Tr::kBlockT))), dim3(Tr::kThreads), Tr::kGatesShared, stream, p);
    };
    return dual ? run(RowTraits<T, decltype(rank)::value, true>{}) : run(RowTraits<T, decltype(rank)::value, false>{});
  });
}

}  // namespace fastadapt::cuda

#define FASTADAPT_INSTANTIATE(T)                                                  \
  namespace fastadapt::cuda {                                                     \
  template int launch_gated_forward<T>(const GatedForwardParams& p, void* stream); \
  template int launch_gates<T>(const GatesParams& p, void* stream);               \
  }
