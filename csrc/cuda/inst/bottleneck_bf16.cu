#include "bottleneck.cuh"

FASTADAPT_INSTANTIATE(bf16)
