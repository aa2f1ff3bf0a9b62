#include "routed_bottleneck.cuh"

FASTADAPT_INSTANTIATE(half)
