// One function a kernel: chooses the instance for the rank, launches it on the stream, returns its status. Instantiated for bf16 and half in inst/.
#pragma once
#include "../common/platform.cuh"
#include "../include/cuda_kernels.h"
#include "../include/cuda_plan.h"

namespace fastadapt::cuda {

template <class T>
int launch_prologue(const PrologueParams& p, void* stream);
template <class T>
int launch_forward(const ForwardParams& p, void* stream);
template <class T>
int launch_rows(const BackwardParams& p, int problems, void* stream);
template <class T>
int launch_slab(const BackwardParams& p, int problems, void* stream);
template <class T>
int launch_reduce(const ReduceParams& p, void* stream);
template <class T>
int launch_gated_forward(const GatedForwardParams& p, void* stream);
template <class T>
int launch_gates(const GatesParams& p, void* stream);
template <class T>
int launch_routed_prologue(const RoutedPrologueParams& p, void* stream);
template <class T>
int launch_routed_forward(const RoutedForwardParams& p, void* stream);
template <class T>
int launch_routed_rows(const RoutedBackwardParams& p, void* stream);
template <class T>
int launch_routed_slab(const RoutedBackwardParams& p, int64_t splits, void* stream);
template <class T>
int launch_routed_reduce(const RoutedReduceParams& p, void* stream);
template <class T>
int launch_lora_forward(const LoraForwardParams& p, void* stream);
template <class T>
int launch_lora_slab(const LoraBackwardParams& p, void* stream);
template <class T>
int launch_lora_reduce(const LoraReduceParams& p, void* stream);

template <int kRank>
struct RankConstant {
  static constexpr int value = kRank;
};
// f(bucket as a constant), for the kernels of the plain bottleneck and of LoRA or, of which there are fewer, the gated and routed ones. Mutants are compiled for few ranks: of four and of eight warps, of one and of
// two parts of a down-projection, of one and of two stages, of four and of two fragments a step of an up-projection, of tiles that the threads
// divide and do not.
template <class F>
int with_gated_rank(int rank, F f) {
  switch (plan::gated_bucket(rank)) {
    case 32: return f(RankConstant<32>{});
    case 192: return f(RankConstant<192>{});
    case 256: return f(RankConstant<256>{});
#ifndef FASTADAPT_MUTATION
    case 96: return f(RankConstant<96>{});
#endif
    default: return -1;
  }
}
template <class F>
int with_rank(int rank, F f) {
  switch (plan::bucket(rank)) {
    case 32: return f(RankConstant<32>{});
    case 192: return f(RankConstant<192>{});
    case 256: return f(RankConstant<256>{});
#ifndef FASTADAPT_MUTATION
    case 64: return f(RankConstant<64>{});
    case 96: return f(RankConstant<96>{});
    case 128: return f(RankConstant<128>{});
#endif
    default: return -1;
  }
}

}  // namespace fastadapt::cuda
