#include "gated_bottleneck.cuh"

FASTADAPT_INSTANTIATE(half)
