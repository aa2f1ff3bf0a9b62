// Philox4x32-10 (Salmon et al. 2011), the generator behind dropout, the same on every backend (fastadapt/ops/philox.py).
#pragma once
#include "platform.cuh"

namespace fastadapt::cuda {

// The four output words of a counter under a key.
FASTADAPT_DEVICE uint4 philox(uint4 c, uint2 key) {
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    const uint64_t a = static_cast<uint64_t>(c.x) * 0xD2511F53u, b = static_cast<uint64_t>(c.z) * 0xCD9E8D57u;
    c = {static_cast<uint32_t>(b >> 32) ^ c.y ^ key.x, static_cast<uint32_t>(b), static_cast<uint32_t>(a >> 32) ^ c.w ^ key.y, static_cast<uint32_t>(a)};
    key.x += 0x9E3779B9u, key.y += 0xBB67AE85u;
  }
  return c;
}

}  // namespace fastadapt::cuda
