#include "lora.cuh"

FASTADAPT_INSTANTIATE(half)
