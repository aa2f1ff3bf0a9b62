// The CPU kernels of dropout_add_norm; [begin, end) are units of NormParams::unit_rows().
#pragma once
#include "../include/dropout_add_norm.h"

namespace fastadapt::cpu {

void norm_forward(const NormParams& p, int64_t begin, int64_t end);
void norm_backward(const NormParams& p, int64_t begin, int64_t end);
void norm_reduce(const NormParams& p);

}  // namespace fastadapt::cpu
