// The launchers of phm_bottleneck.cuh, to be instantiated for one type.
#pragma once
#include "../phm_bottleneck.cuh"

namespace fastadapt::cuda {

template <class T, class F>
int with_phm_traits(const PhmShape& shape, F f) {
  return shape.whole() ? f(PhmTraits<T, true>{}) : f(PhmTraits<T, false>{});
}

template <class T>
int launch_phm_forward(const PhmParams& p, void* stream) {
  return with_phm_traits<T>(p.shape, [&](auto tr) {
    using Tr = decltype(tr);
    return FASTADAPT_LAUNCH(phm_forward_kernel<Tr>, dim3(static_cast<unsigned>(plan::ceil_div(p.rows, p.tokens))), dim3(Tr::kThreads), p.at.bytes, stream, p);
  });
}

template <class T>
int launch_phm_rows(const PhmParams& p, void* stream) {
  return with_phm_traits<T>(p.shape, [&](auto tr) {
    using Tr = decltype(tr);
    return FASTADAPT_LAUNCH(phm_rows_kernel<Tr>, dim3(static_cast<unsigned>(plan::phm_splits(p.rows, p.tokens))), dim3(Tr::kThreads), p.at.bytes, stream, p);
  });
}

template <class T>
int launch_phm_reduce(const PhmReduceParams& p, void* stream) {
  int64_t blocks = 0;
  for (int i = 0; i < p.count; ++i) blocks += plan::ceil_div(p.sums[i].columns, 32);
  return FASTADAPT_LAUNCH(phm_reduce_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(plan::kPhmThreads), 4 * plan::kPhmThreads, stream, p);
}

}  // namespace fastadapt::cuda

#define FASTADAPT_INSTANTIATE(T)                                          \
  namespace fastadapt::cuda {                                             \
  template int launch_phm_forward<T>(const PhmParams& p, void* stream);   \
  template int launch_phm_rows<T>(const PhmParams& p, void* stream);      \
  template int launch_phm_reduce<T>(const PhmReduceParams& p, void* stream); \
  }
