// The CPU kernels of phm_bottleneck; [begin, end) as in kernels.h.
#pragma once
#include "../include/phm_bottleneck.h"

namespace fastadapt::cpu {

void phm_prepare(const PhmParams& p);
void phm_forward(const PhmParams& p, int64_t begin, int64_t end);
void phm_backward(const PhmParams& p, int64_t begin, int64_t end);
void phm_reduce(const PhmParams& p);

}  // namespace fastadapt::cpu
