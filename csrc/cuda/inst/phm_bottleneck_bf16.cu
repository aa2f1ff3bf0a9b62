#include "phm_bottleneck.cuh"

FASTADAPT_INSTANTIATE(bf16)
