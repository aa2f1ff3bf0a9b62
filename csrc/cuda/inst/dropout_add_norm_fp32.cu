#include "dropout_add_norm.cuh"

FASTADAPT_INSTANTIATE(float, float)
FASTADAPT_INSTANTIATE_REDUCE(float)
