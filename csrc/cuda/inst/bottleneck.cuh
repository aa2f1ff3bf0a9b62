// The launchers of bottleneck.cuh, to be instantiated for one type.
#pragma once
#include "../bottleneck.cuh"
#include "../launch.h"

namespace fastadapt::cuda {

template <class T>
int launch_prologue(const PrologueParams& p, void* stream) {
  return FASTADAPT_LAUNCH(prologue_kernel<T>, dim3(static_cast<unsigned>(prologue_blocks(p))), dim3(kPrologueThreads), 4 * kPrologueThreads, stream, p);
}

template <class T>
int launch_forward(const ForwardParams& p, void* stream) {
  return with_rank(p.adapter.rank, [&](auto rank) {
    using Tr = RowTraits<T, decltype(rank)::value>;
    return FASTADAPT_LAUNCH(forward_kernel<Tr>, dim3(static_cast<unsigned>(plan::ceil_div(p.rows, Tr::kBlockT))), dim3(Tr::kThreads), Tr::kForwardShared, stream, p);
  });
}

template <class T>
int launch_rows(const BackwardParams& p, int problems, void* stream) {
  return with_rank(p.bucket, [&](auto rank) {
    using Tr = RowTraits<T, decltype(rank)::value>;
    const dim3 grid(static_cast<unsigned>(plan::ceil_div(p.rows, Tr::kBlockT)), problems);
    return FASTADAPT_LAUNCH(rows_kernel<Tr>, grid, dim3(Tr::kThreads), Tr::kRowsShared, stream, p);
  });
}

template <class T>
int launch_slab(const BackwardParams& p, int problems, void* stream) {
  return with_rank(p.bucket, [&](auto rank) {
    using Tr = SlabTraits<T, decltype(rank)::value>;
    const dim3 grid(static_cast<unsigned>(plan::ceil_div(p.width, plan::kSlab)), static_cast<unsigned>(plan::ceil_div(p.rows, p.rows_per_split)), problems);
    return FASTADAPT_LAUNCH(slab_kernel<Tr>, grid, dim3(Tr::kThreads), Tr::kShared, stream, p);
  });
}

template <class T>
int launch_reduce(const ReduceParams& p, void* stream) {
  return FASTADAPT_LAUNCH(reduce_kernel<T>, dim3(static_cast<unsigned>(reduce_blocks(p))), dim3(kReduceThreads), 4 * kReduceThreads, stream, p);
}

}  // namespace fastadapt::cuda

#define FASTADAPT_INSTANTIATE(T)                                                  \
  namespace fastadapt::cuda {                                                     \
  template int launch_prologue<T>(const PrologueParams& p, void* stream);         \
  template int launch_forward<T>(const ForwardParams& p, void* stream);           \
  template int launch_rows<T>(const BackwardParams& p, int problems, void* stream); \
  template int launch_slab<T>(const BackwardParams& p, int problems, void* stream); \
  template int launch_reduce<T>(const ReduceParams& p, void* stream);             \
  }
