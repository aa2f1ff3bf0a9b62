// The launchers of lora.cuh, to be instantiated for one type.
#pragma once
#include "../launch.h"
#include "../lora.cuh"

namespace fastadapt::cuda {

template <class T>
int launch_lora_forward(const LoraForwardParams& p, void* stream) {
  return with_rank(p.adapter.rank, [&](auto rank) {
    const auto run = [&](auto tr) {
      using Tr = decltype(tr);
      return FASTADAPT_LAUNCH(lora_forward_kernel<Tr>, dim3(static_cast<unsigned>(plan::ceil_div(p.rows, Tr::kBlockT))), dim3(Tr::kThreads), Tr::kForwardShared, stream, p);
    };
    return p.dropout.seed ? run(LoraRowTraits<T, decltype(rank)::value, true>{}) : run(LoraRowTraits<T, decltype(rank)::value, false>{});
  });
}

template <class T>
int launch_lora_slab(const LoraBackwardParams& p, void* stream) {
  return with_rank(p.problems[0].weights.rank, [&](auto rank) {
    const auto run = [&](auto tr) {
      using Tr = decltype(tr);
      const dim3 grid(static_cast<unsigned>(plan::ceil_div(plan::larger(p.in, p.width), plan::kSlab)), static_cast<unsigned>(plan::ceil_div(p.rows, p.rows_per_split)));
      return FASTADAPT_LAUNCH(lora_slab_kernel<Tr>, grid, dim3(Tr::kThreads), Tr::kShared, stream, p);
    };
    return p.dropout.seed ? run(LoraSlabTraits<T, decltype(rank)::value, true>{}) : run(LoraSlabTraits<T, decltype(rank)::value, false>{});
  });
}

template <class T>
int launch_lora_reduce(const LoraReduceParams& p, void* stream) {
  return FASTADAPT_LAUNCH(lora_reduce_kernel<T>, dim3(static_cast<unsigned>(reduce_blocks(p))), dim3(kReduceThreads), 4 * kReduceThreads, stream, p);
}

}  // namespace fastadapt::cuda

#define FASTADAPT_INSTANTIATE(T)                                                    \
  namespace fastadapt::cuda {                                                       \
  template int launch_lora_forward<T>(const LoraForwardParams& p, void* stream);    \
  template int launch_lora_slab<T>(const LoraBackwardParams& p, void* stream);      \
  template int launch_lora_reduce<T>(const LoraReduceParams& p, void* stream);      \
  }
