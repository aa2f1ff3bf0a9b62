#include "dropout_add_norm.cuh"

FASTADAPT_INSTANTIATE(half, half)
FASTADAPT_INSTANTIATE(half, float)
FASTADAPT_INSTANTIATE_REDUCE(half)
