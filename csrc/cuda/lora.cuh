// LoRA's update of a projection's output: the kernels of bottleneck.cuh, whose x and y may differ in width and whose x may be dropped in part. Its rows kernel is the bottleneck's, over dy.
//
// Dropped elements are zeroed in a product's operand, in registers; no mask is ever in global memory. That of a tile of x is drawn a stage ahead, as the tile is copied, and lies between its
// rows as a bit a number: a call of the generator, 60 instructions or so, is made once for its 4 numbers in the forward and once in the backward, where dx and dWd share the bits.
//
// In the tables above the kernels D is the width of y and I that of x; `slabs` and `x_slabs` are of y's and of x's columns.
#pragma once
#include "../common/philox.cuh"
#include "bottleneck.cuh"

namespace fastadapt::cuda {

// Ones over the lower and the upper of two packed numbers where the last bit of `low` and of `high` is set.
FASTADAPT_DEVICE uint32_t pair_mask(uint32_t low, uint32_t high) { return (low & 1) * 0xffffu | (high & 1) * 0xffff0000u; }

// An x that may be narrower or wider than y.
struct Undropped : Whole {
  int x_width, y_width;

  template <class Params>
  explicit FASTADAPT_DEVICE Undropped(const Params& p) : Whole(p), x_width(p.in), y_width(p.width) {}
  FASTADAPT_DEVICE bool of_x(int column) const { return column < x_width; }
  FASTADAPT_DEVICE bool of_y(int column) const { return column < y_width; }
};

// And some of which is dropped. A tile (kRows, kColumns) has a row's bits behind its numbers, in the 16 bytes that are there against bank conflicts.
template <int kThreads, int kRows, int kColumns>
struct Dropped : Undropped {
  uint2 key;
  uint32_t threshold;
  float kept;

  template <class Params>
  explicit FASTADAPT_DEVICE Dropped(const Params& p) : Undropped(p), threshold(p.dropout.threshold), kept(p.dropout.kept) {
    const uint64_t seed = ptx::load_global<uint64_t>(p.dropout.seed);
    key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  }
  FASTADAPT_DEVICE void draw(char* tile, int64_t first_row, int first_column) const {
    constexpr int kEach = kRows * kColumns / kThreads, kOwn = kEach < 16 ? 16 : kEach;  // 16 or 32 bits a thread, or half of the threads
    const int first = static_cast<int>(threadIdx.x) * kOwn, r = first / kColumns, c = first % kColumns, group = (first_column + c) / 4;
    if (kEach < kOwn && first >= kRows * kColumns) return;
    const uint64_t row = static_cast<uint64_t>(first_row + r);
    uint32_t own = 0;
#pragma unroll 2  // more at once take registers from the products
    for (int k = 0; k < kOwn / 4; ++k) {
      const uint4 v = philox({static_cast<uint32_t>(group + k), static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0}, key);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) own |= (words[j] >= threshold ? 1u : 0u) << (4 * k + j);
    }
    char* const to = tile + bits(r, c);
    if constexpr (kOwn == 32) ptx::store_shared(to, own);
    else ptx::store_shared(to, static_cast<uint16_t>(own));
  }
  FASTADAPT_DEVICE void drop(uint32_t (&a)[4], const char* tile, int row, int column) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t kept = bits_at(tile, row + lane() / 4 + 8 * i, column) >> 2 * (lane() & 3);
      a[i] &= pair_mask(kept, kept >> 1), a[i + 2] &= pair_mask(kept >> 8, kept >> 9);
    }
  }
  FASTADAPT_DEVICE void drop_trans(uint32_t (&a)[4], const char* tile, int row, int column) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pair = column + 8 * i + 2 * (lane() & 3);
      const uint32_t upper = bits_at(tile, pair, row) >> lane() / 4, lower = bits_at(tile, pair + 1, row) >> lane() / 4;
      a[2 * i] &= pair_mask(upper, lower), a[2 * i + 1] &= pair_mask(upper >> 8, lower >> 8);
    }
  }
  template <int kTiles>
  FASTADAPT_DEVICE void scale_kept(Fragments<kTiles>& sum) const {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.v[j][i] *= kept;
  }

 private:
  static FASTADAPT_DEVICE int bits(int row, int column) { return 2 * (row * plan::pitch(kColumns) + kColumns) + column / 8; }
  static FASTADAPT_DEVICE uint32_t bits_at(const char* tile, int row, int column) { return ptx::load_shared<uint16_t>(tile + bits(row, column)); }  // of 16 columns
};

template <class T, int kRank, bool kDrops>
struct LoraRowTraits : RowTraits<T, kRank> {
  using Base = RowTraits<T, kRank>;
  using Share = RowShare<LoraRowTraits, std::conditional_t<kDrops, Dropped<Base::kThreads, Base::kBlockT, Base::kDepth>, Undropped>>;
};

template <class T, int kRank, bool kDrops>
struct LoraSlabTraits : SlabTraits<T, kRank> {
  using Base = SlabTraits<T, kRank>;
  using Share = SlabShare<std::conditional_t<kDrops, Dropped<Base::kThreads, Base::kBlockT, Base::kSlab>, Undropped>>;
};

// lora_forward_kernel's bytes:
//   reads    -                      2*N*I + tiles*2*I*R + 2*N*D + tiles*2*D*S
//   reads    b_up                   tiles*threads//4*P*D
//   reads    drops                  tiles*threads*8
//   writes   -                      2*N*D
//   writes   z                      2*N*S
//
// lora_forward_kernel's resources:
//   rank        threads   shared   registers             blocks
//   32              128    27648   93 / 93 / 99 / 89     5 / 5 / 4 / 3
//   32, drops       128    27648   104 / 104 / 102 / 107 4 / 4 / 4 / 3
//   64              128    36864   119 / 119 / 125 / 106 4 / 4 / 4 / 2
//   64, drops       128    36864   122 / 127 / 121 / 126 4 / 4 / 4 / 2
//   96              128    46080   152 / 155 / 163 / 135 3 / 3 / 3 / 2
//   96, drops       128    46080   143 / 148 / 142 / 142 3 / 3 / 3 / 2
//   128             256    73728   146 / 150 / 154 / 134 1 / 1 / 1 / 1
//   128, drops      256    73728   150 / 155 / 148 / 152 1 / 1 / 1 / 1
//   192             256    51200   190 / 194 / 190 / 178 1 / 1 / 1 / 1
//   192, drops      256    51200   192 / 194 / 191 / 190 1 / 1 / 1 / 1
//   256             256    61440   222 / 228 / 222 / 210 1 / 1 / 1 / 1
//   256, drops      256    61440   235 / 239 / 234 / 220 1 / 1 / 1 / 1
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads, 1) lora_forward_kernel(const __grid_constant__ LoraForwardParams p) {
  forward<Tr, PlainEpilogue>(p);
}

// lora_slab_kernel's bytes:
//   reads    dy                     2*N*D
//   reads    q                      2*N*I
//   reads    p                      slabs*2*N*S
//   reads    dz                     x_slabs*2*N*S
//   reads    dx                     splits*2*I*R
//   reads    drops                  larger*splits*256*8
//   writes   dx                     2*N*I
//   writes   p                      splits*4*D*S
//   writes   q                      splits*4*I*R
//   writes   s                      splits*4*D
//
// lora_slab_kernel's resources:
//   rank        threads   shared   registers             blocks
//   32              256    61952   80 / 72 / 72 / 76     2 / 3 / 3 / 1
//   32, drops       256    61952   92 / 92 / 122 / 95    2 / 2 / 2 / 1
//   64              256    82944   119 / 100 / 98 / 114  2 / 2 / 2 / 1
//   64, drops       256    82944   125 / 124 / 122 / 122 2 / 2 / 2 / 1
//   96              256    58880   125 / 125 / 122 / 125 2 / 2 / 2 / 1
//   96, drops       256    58880   125 / 122 / 122 / 125 2 / 2 / 2 / 1
//   128             256    71680   128 / 128 / 128 / 128 2 / 2 / 2 / 1
//   128, drops      256    71680   128 / 128 / 128 / 152 2 / 2 / 2 / 1
//   192             256    97280   168 / 168 / 168 / 170 1 / 1 / 1 / 1
//   192, drops      256    97280   216 / 214 / 170 / 213 1 / 1 / 1 / 1
//   256             256    79872   243 / 242 / 242 / 241 1 / 1 / 1 / 1
//   256, drops      256    79872   247 / 245 / 242 / 243 1 / 1 / 1 / 1
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads) lora_slab_kernel(const __grid_constant__ LoraBackwardParams p) {
  slab<Tr>(p);
}

// lora_reduce_kernel's bytes:
//   reads    p                      splits*4*D*R
//   reads    s                      splits*4*D
//   reads    q                      splits*4*I*R
//   writes   d_w_down               I*R*P
//   writes   d_w_up                 D*R*P
//   writes   d_b_up                 D*P
//
// lora_reduce_kernel's resources:
//   rank        threads   shared   registers             blocks
//   any             256     1024   40 / 40 / 40 / 48     6 / 6 / 6 / 5
template <class T>
FASTADAPT_KERNEL(kReduceThreads) lora_reduce_kernel(const __grid_constant__ LoraReduceParams p) {
  reduce<T>(p);
}

}  // namespace fastadapt::cuda
