#include "lora.cuh"

FASTADAPT_INSTANTIATE(bf16)
