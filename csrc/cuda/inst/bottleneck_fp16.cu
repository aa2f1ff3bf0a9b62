#include "bottleneck.cuh"

FASTADAPT_INSTANTIATE(half)
