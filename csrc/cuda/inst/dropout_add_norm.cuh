// The launchers of dropout_add_norm.cuh, to be instantiated for one type of x and one of the sum.
#pragma once
#include "../dropout_add_norm.cuh"

namespace fastadapt::cuda {

template <class A, class V, bool kSums, class F>
int with_norm_traits(int width, F f) {
  const auto by_lanes = [&](auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    switch (plan::norm_lanes(width)) {
      case plan::kNormNarrow: return f(NormTraits<A, V, plan::kNormNarrow, kWhole, kSums>{});
      case plan::kNormMiddle: return f(NormTraits<A, V, plan::kNormMiddle, kWhole, kSums>{});
      default: return f(NormTraits<A, V, plan::kNormWide, kWhole, kSums>{});
    }
  };
  return width % plan::norm_unit(sizeof(V)) == 0 ? by_lanes(std::true_type{}) : by_lanes(std::false_type{});
}

template <class A, class V>
int launch_norm_forward(const NormParams& p, void* stream) {
  return with_norm_traits<A, V, false>(p.width, [&](auto tr) {
    using Tr = decltype(tr);
    return FASTADAPT_LAUNCH(norm_forward_kernel<Tr>, dim3(static_cast<unsigned>(p.rows)), dim3(Tr::kThreads), Tr::kShared, stream, p);
  });
}

template <class A, class V>
int launch_norm_rows(const NormParams& p, void* stream) {
  const auto launch = [&](auto tr) {
    using Tr = decltype(tr);
    return FASTADAPT_LAUNCH(norm_rows_kernel<Tr>, dim3(static_cast<unsigned>(plan::ceil_div(p.rows, p.rows_per_block))), dim3(Tr::kThreads), Tr::kShared, stream, p);
  };
  return p.d_weight || p.d_bias ? with_norm_traits<A, V, true>(p.width, launch) : with_norm_traits<A, V, false>(p.width, launch);
}

template <class A>
int launch_norm_reduce(const NormReduceParams& p, int count, void* stream) {
  const unsigned blocks = static_cast<unsigned>(count * plan::ceil_div(p.width, 32));
  return FASTADAPT_LAUNCH(norm_reduce_kernel<A>, dim3(blocks), dim3(plan::kNormReduceThreads), 4 * plan::kNormReduceThreads, stream, p);
}

}  // namespace fastadapt::cuda

#define FASTADAPT_INSTANTIATE(A, V)                                          \
  namespace fastadapt::cuda {                                                \
  template int launch_norm_forward<A, V>(const NormParams& p, void* stream); \
  template int launch_norm_rows<A, V>(const NormParams& p, void* stream);    \
  }
#define FASTADAPT_INSTANTIATE_REDUCE(A)                                                   \
  namespace fastadapt::cuda {                                                             \
  template int launch_norm_reduce<A>(const NormReduceParams& p, int count, void* stream); \
  }
