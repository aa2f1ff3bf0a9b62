#include "gated_bottleneck.cuh"

FASTADAPT_INSTANTIATE(bf16)
