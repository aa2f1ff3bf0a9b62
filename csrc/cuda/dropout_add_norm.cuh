// Dropout, sum and norm: v = residual + M (.) x / (1 - p), y = w (.) xhat + b, xhat = (v - mean) rstd. A row's bytes, A of x and V of v the size of a number:
//
//   kernel            reads                        writes
//   forward           A D + V D (residual)         V D (y) + V D (v) + 8 (mean, rstd)
//   rows (backward)   2 V D (dy, v) + V D (dv)     A D (dx) + V D (dresidual); partials of the gradients of w and b a split
//   reduce            the partials                 the gradients
//
// Bound by memory, and by its latency: a row is read once, all of it at a time, and stays in registers, packed as it was read. w and b are read for each row, from L1.
// Numbers of a row belong to threads in units of 16 bytes of V, a philox counter or two each, so the mask costs 20 instructions a number and no traffic.
//
// In the tables N is rows, D columns, A, V and P the bytes of a number of x, of v and of w; `lanes` threads have a row; a split of the rows has a partial of D numbers a gradient.
#pragma once
#include "../common/philox.cuh"
#include "../common/tiles.cuh"
#include "../include/dropout_add_norm_cuda.h"

namespace fastadapt::cuda {

// kLanes threads have a row. kWhole: rows are whole units, and are read as vectors; others number by number. kSums: of several rows a thread adds up the gradients of w and b.
template <class A_, class V_, int kLanes_, bool kWhole_, bool kSums_ = false>
struct NormTraits {
  using A = A_;
  using V = V_;
  static constexpr bool kWhole = kWhole_, kSums = kSums_;
  static constexpr int kLanes = kLanes_, kRows = plan::norm_rows(kLanes, kSums), kThreads = kRows * kLanes;
  static constexpr int kUnit = plan::norm_unit(sizeof(V)), kUnits = plan::kNormValues / kUnit, kShared = plan::norm_shared(kLanes, kSums);
  // Blocks a multiprocessor in the backward, without which the compiler takes half as many registers again: what others load meanwhile hides what one waits for.
  static constexpr int kBlocks = kThreads == 64 ? (sizeof(V) == 2 ? 12 : 10) : kThreads == 256 ? (kSums || sizeof(V) == 4 ? 2 : 3) : 1;
};

// Neighbouring numbers of a row, as they lie in memory.
template <class T, int kCount>
struct Packed {
  static constexpr int kWords = kCount * static_cast<int>(sizeof(T)) / 4;
  uint32_t words[kWords];
};
template <int kCount>
FASTADAPT_DEVICE void spread(float (&out)[kCount], const Packed<float, kCount>& v) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) out[j] = __uint_as_float(v.words[j]);
}
template <class T, int kCount>
FASTADAPT_DEVICE void spread(float (&out)[kCount], const Packed<T, kCount>& v) {
#pragma unroll
  for (int j = 0; j < kCount; j += 2) {
    const float2 two = unpack(v.words[j / 2], T{});
    out[j] = two.x, out[j + 1] = two.y;
  }
}
template <class T, int kCount>
FASTADAPT_DEVICE Packed<T, kCount> packed(const float (&v)[kCount]) {
  Packed<T, kCount> out;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) out.words[j] = __float_as_uint(v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; j += 2) out.words[j / 2] = pack(v[j], v[j + 1], T{});
  }
  return out;
}

// `left` numbers are there: all that are asked for, none, or, of rows that are not whole, some. The others are zero.
template <class T, int kCount, bool kWhole>
FASTADAPT_DEVICE Packed<T, kCount> load_packed(const T* at, int left) {
  Packed<T, kCount> out;
  if constexpr (kWhole) {
#pragma unroll
    for (int i = 0; i < Packed<T, kCount>::kWords; ++i) out.words[i] = 0;
    if (left <= 0) return out;
    if constexpr (Packed<T, kCount>::kWords == 2) {
      const uint2 v = ptx::load_global<uint2>(at);
      out.words[0] = v.x, out.words[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < Packed<T, kCount>::kWords; i += 4) {
        const uint4 v = ptx::load_global<uint4>(at + i * 4 / static_cast<int>(sizeof(T)));
        out.words[i] = v.x, out.words[i + 1] = v.y, out.words[i + 2] = v.z, out.words[i + 3] = v.w;
      }
    }
    return out;
  } else {
    float v[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = j < left ? to_float(ptx::load_global<T>(at + j)) : 0.f;
    return packed<T>(v);
  }
}
template <class T, int kCount, bool kWhole>
FASTADAPT_DEVICE void store_packed(T* at, const Packed<T, kCount>& v, int left) {
  if constexpr (kWhole) {
    if (left <= 0) return;
    if constexpr (Packed<T, kCount>::kWords == 2) {
      ptx::store_global(at, uint2{v.words[0], v.words[1]});
    } else {
#pragma unroll
      for (int i = 0; i < Packed<T, kCount>::kWords; i += 4)
        ptx::store_global(at + i * 4 / static_cast<int>(sizeof(T)), uint4{v.words[i], v.words[i + 1], v.words[i + 2], v.words[i + 3]});
    }
  } else {
    float numbers[kCount];
    spread(numbers, v);
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (j < left) ptx::store_global(at + j, from_float(numbers[j], T{}));
  }
}

// A thread's part of a row.
template <class Tr>
struct NormRow {
  using A = typename Tr::A;
  using V = typename Tr::V;
  const NormParams& p;
  const uint2 key;  // of the dropout
  const int64_t row;
  const int width;  // 0: there is no such row

  FASTADAPT_DEVICE static int lane_of_row() { return static_cast<int>(threadIdx.x) % Tr::kLanes; }
  FASTADAPT_DEVICE static int column(int i) { return (i * Tr::kLanes + lane_of_row()) * Tr::kUnit; }
  FASTADAPT_DEVICE int left(int i) const { return width - column(i); }

  // All units of the row of a tensor, zero where it is not given.
  template <class T>
  FASTADAPT_DEVICE void load(Packed<T, Tr::kUnit> (&out)[Tr::kUnits], const void* tensor, int64_t stride) const {
    const T* const from = static_cast<const T*>(tensor) + row * stride;
#pragma unroll
    for (int i = 0; i < Tr::kUnits; ++i) out[i] = load_packed<T, Tr::kUnit, Tr::kWhole>(from + column(i), tensor ? left(i) : 0);
  }
  template <class T>
  FASTADAPT_DEVICE void store(void* tensor, int i, const Packed<T, Tr::kUnit>& v) const {
    store_packed<T, Tr::kUnit, Tr::kWhole>(static_cast<T*>(tensor) + row * p.width + column(i), v, left(i));
  }
  FASTADAPT_DEVICE void parameters(float (&out)[Tr::kUnit], const void* from, int i, float absent) const {
    if (!from) {
#pragma unroll
      for (int j = 0; j < Tr::kUnit; ++j) out[j] = absent;
    } else if (sizeof(V) == 4 || p.float_parameters) {
      spread(out, load_packed<float, Tr::kUnit, Tr::kWhole>(static_cast<const float*>(from) + column(i), left(i)));
    } else {
      spread(out, load_packed<V, Tr::kUnit, Tr::kWhole>(static_cast<const V*>(from) + column(i), left(i)));
    }
  }

  // What dropout leaves of a unit. An element that is dropped is not multiplied: it may be anything.
  FASTADAPT_DEVICE void drop(float (&v)[Tr::kUnit], int i) const {
    if (!p.dropout.seed) return;
    const uint64_t at = static_cast<uint64_t>(row);
#pragma unroll
    for (int j = 0; j < Tr::kUnit; j += 4) {
      const uint4 r = philox({static_cast<uint32_t>((column(i) + j) / 4), static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32), 0}, key);
      const uint32_t words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) v[j + k] = words[k] >= p.dropout.threshold ? v[j + k] * p.dropout.kept : 0.f;
    }
  }

  // Sums over the row, the same bits in all its threads. All of the block come here; its warps meet in one of two stages, by turns.
  template <int kCount>
  FASTADAPT_DEVICE static void sum(float (&v)[kCount], char* arena, int turn) {
    constexpr int kWarps = Tr::kLanes / 32;
    char* const stage = arena + turn * plan::norm_stage(Tr::kLanes, Tr::kSums) / 2;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      v[k] = sum_of_warp(v[k]);
      if (lane() == 0) ptx::store_shared(stage + 4 * (kCount * warp() + k), v[k]);
    }
    ptx::sync_block();
    const char* const own = stage + 4 * kCount * (warp() / kWarps * kWarps);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      v[k] = ptx::load_shared<float>(own + 4 * k);
#pragma unroll
      for (int w = 1; w < kWarps; ++w) v[k] += ptx::load_shared<float>(own + 4 * (kCount * w + k));
    }
  }
};
template <class Tr>
FASTADAPT_DEVICE int row_of_block() {
  return static_cast<int>(threadIdx.x) / Tr::kLanes;
}
FASTADAPT_DEVICE uint2 norm_key(const NormParams& p) {
  if (!p.dropout.seed) return {0, 0};
  const uint64_t seed = ptx::load_global<uint64_t>(p.dropout.seed);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

// norm_forward_kernel's bytes:
//   reads    -                      A*N*D
//   reads    residual               V*N*D
//   reads    weight                 P*N*D
//   reads    bias                   P*N*D
//   reads    drops                  8*N*lanes
//   writes   y                      V*N*D
//   writes   v                      V*N*D
//   writes   mean                   4*N
//   writes   rstd                   4*N
//
// norm_forward_kernel's resources:
//   x, v, threads of a row  threads   shared   registers             blocks
//   bf16, bf16, 64               64       32   40 / 47 / 47 / 47     24 / 20 / 20 / 20
//   bf16, bf16, 64, whole        64       32   40 / 44 / 44 / 48     24 / 20 / 20 / 20
//   bf16, bf16, 256             256      128   40 / 48 / 48 / 45     6 / 5 / 5 / 5
//   bf16, bf16, 256, whole      256      128   46 / 48 / 48 / 40     5 / 5 / 5 / 6
//   bf16, bf16, 512             512      256   40 / 51 / 51 / 50     3 / 2 / 2 / 2
//   bf16, bf16, 512, whole      512      256   46 / 48 / 48 / 48     2 / 2 / 2 / 2
//   bf16, fp32, 64               64       32   56 / 51 / 51 / 52     18 / 18 / 18 / 18
//   bf16, fp32, 64, whole        64       32   52 / 48 / 48 / 52     18 / 20 / 20 / 18
//   bf16, fp32, 256             256      128   58 / 56 / 56 / 48     4 / 4 / 4 / 5
//   bf16, fp32, 256, whole      256      128   52 / 48 / 48 / 53     4 / 5 / 5 / 4
//   bf16, fp32, 512             512      256   61 / 59 / 59 / 59     2 / 2 / 2 / 2
//   bf16, fp32, 512, whole      512      256   54 / 54 / 54 / 52     2 / 2 / 2 / 2
//   fp32, fp32, 64               64       32   60 / 55 / 55 / 54     16 / 18 / 18 / 18
//   fp32, fp32, 64, whole        64       32   60 / 56 / 56 / 56     16 / 18 / 18 / 18
//   fp32, fp32, 256             256      128   64 / 56 / 56 / 60     4 / 4 / 4 / 4
//   fp32, fp32, 256, whole      256      128   58 / 52 / 52 / 52     4 / 4 / 4 / 4
//   fp32, fp32, 512             512      256   62 / 62 / 62 / 60     2 / 2 / 2 / 2
//   fp32, fp32, 512, whole      512      256   58 / 60 / 60 / 60     2 / 2 / 2 / 2
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads) norm_forward_kernel(const __grid_constant__ NormParams p) {
  using A = typename Tr::A;
  using V = typename Tr::V;
  FASTADAPT_SHARED(arena);
  const NormRow<Tr> row{p, norm_key(p), static_cast<int64_t>(blockIdx.x), p.width};
  Packed<A, Tr::kUnit> x[Tr::kUnits];
  Packed<V, Tr::kUnit> v[Tr::kUnits];
  row.load(x, p.x, p.x_stride);
  row.load(v, p.residual, p.residual_stride);
  float mean[1] = {0.f}, square[1] = {0.f};
#pragma unroll
  for (int i = 0; i < Tr::kUnits; ++i) {
    if (row.left(i) <= 0) break;
    float dropped[Tr::kUnit], sum[Tr::kUnit];
    spread(dropped, x[i]), spread(sum, v[i]);
    row.drop(dropped, i);
#pragma unroll
    for (int j = 0; j < Tr::kUnit; ++j) sum[j] += dropped[j];
    v[i] = packed<V>(sum);
    spread(sum, v[i]);  // rounded: what the backward sees
#pragma unroll
    for (int j = 0; j < Tr::kUnit; ++j) mean[0] += sum[j];
  }
  if (p.v) {
#pragma unroll
    for (int i = 0; i < Tr::kUnits; ++i) row.store(p.v, i, v[i]);
  }
  if (p.norm == kNoNorm) return;
  const float count = static_cast<float>(p.width);
  if (p.norm == kLayerNorm) row.sum(mean, arena, 0);
  mean[0] = p.norm == kLayerNorm ? mean[0] / count : 0.f;
#pragma unroll
  for (int i = 0; i < Tr::kUnits; ++i) {
    if (row.left(i) <= 0) break;
    float of_v[Tr::kUnit];
    spread(of_v, v[i]);
#pragma unroll
    for (int j = 0; j < Tr::kUnit; ++j) {
      const float centred = Tr::kWhole || j < row.left(i) ? of_v[j] - mean[0] : 0.f;
      square[0] += centred * centred;
    }
  }
  row.sum(square, arena, 1);
  const float rstd = 1.f / sqrtf(square[0] / count + p.eps);
  if (threadIdx.x == 0) {
    if (p.mean) ptx::store_global(p.mean + row.row, mean[0]);
    if (p.rstd) ptx::store_global(p.rstd + row.row, rstd);
  }
#pragma unroll
  for (int i = 0; i < Tr::kUnits; ++i) {
    if (row.left(i) <= 0) break;
    float y[Tr::kUnit], weight[Tr::kUnit], bias[Tr::kUnit];
    spread(y, v[i]);
    row.parameters(weight, p.weight, i, 1.f), row.parameters(bias, p.bias, i, 0.f);
#pragma unroll
    for (int j = 0; j < Tr::kUnit; ++j) y[j] = (y[j] - mean[0]) * rstd * weight[j] + bias[j];
    v[i] = packed<V>(y);  // stored when all parameters are on their way: a load may not pass a store
  }
#pragma unroll
  for (int i = 0; i < Tr::kUnits; ++i) row.store(p.y, i, v[i]);
}

// Sums of the block's rows, added in their order: a column has the same lane of each.
template <class Tr>
FASTADAPT_DEVICE void store_sums(float* to, const float (&own)[Tr::kUnits][Tr::kUnit], char* stage, const NormParams& p) {
  const NormRow<Tr> split{p, {0, 0}, 0, p.width};
#pragma unroll 1
  for (int r = 0; r < Tr::kRows; ++r) {
    if (row_of_block<Tr>() == r) {
#pragma unroll
      for (int i = 0; i < Tr::kUnits; ++i) {
        float sum[Tr::kUnit];
#pragma unroll
        for (int j = 0; j < Tr::kUnit; j += 4) {
          char* const at = stage + 16 * ((i * Tr::kUnit + j) / 4 * Tr::kLanes + split.lane_of_row());
          float4 before{0.f, 0.f, 0.f, 0.f};
          if (r > 0) before = ptx::load_shared<float4>(at);
          sum[j] = before.x + own[i][j], sum[j + 1] = before.y + own[i][j + 1], sum[j + 2] = before.z + own[i][j + 2], sum[j + 3] = before.w + own[i][j + 3];
          if (r + 1 < Tr::kRows) ptx::store_shared(at, float4{sum[j], sum[j + 1], sum[j + 2], sum[j + 3]});
        }
        if (r + 1 == Tr::kRows) store_packed<float, Tr::kUnit, Tr::kWhole>(to + blockIdx.x * p.partial + split.column(i), packed<float>(sum), split.left(i));
      }
    }
    if (r + 1 < Tr::kRows) ptx::sync_block();
  }
}

// dresidual = g = rstd (c - mean(c) - xhat mean(c (.) xhat)) + dv with c = dy (.) w, of an RMS norm without mean(c), and dx = M (.) g / (1 - p).
//
// norm_rows_kernel's bytes:
//   reads    dy                     V*N*D
//   reads    dv                     V*N*D
//   reads    saved                  V*N*D
//   reads    mean                   4*N*lanes
//   reads    rstd                   4*N*lanes
//   reads    weight                 2*P*N*D
//   reads    drops dx               8*blocks*threads
//   writes   dx                     A*N*D
//   writes   dresidual              V*N*D
//   writes   d_weight               4*splits*D
//   writes   d_bias                 4*splits*D
//
// norm_rows_kernel's resources:
//   x, v, threads of a row        threads   shared   registers             blocks
//   bf16, bf16, 64                     64       32   76 / 78 / 79 / 76     12 / 12 / 12 / 12
//   bf16, bf16, 64, sums              256     8320   104 / 109 / 107 / 104 2 / 2 / 2 / 2
//   bf16, bf16, 64, whole              64       32   72 / 71 / 71 / 72     14 / 14 / 14 / 14
//   bf16, bf16, 64, whole, sums       256     8320   117 / 114 / 120 / 119 2 / 2 / 2 / 2
//   bf16, bf16, 256                   256      128   76 / 78 / 80 / 78     3 / 3 / 3 / 3
//   bf16, bf16, 256, sums             256      128   105 / 105 / 103 / 104 2 / 2 / 2 / 2
//   bf16, bf16, 256, whole            256      128   72 / 71 / 71 / 72     3 / 3 / 3 / 3
//   bf16, bf16, 256, whole, sums      256      128   111 / 105 / 103 / 108 2 / 2 / 2 / 2
//   bf16, bf16, 512                   512      256   104 / 106 / 106 / 106 1 / 1 / 1 / 1
//   bf16, bf16, 512, sums             512      256   113 / 110 / 108 / 109 1 / 1 / 1 / 1
//   bf16, bf16, 512, whole            512      256   108 / 114 / 114 / 114 1 / 1 / 1 / 1
//   bf16, bf16, 512, whole, sums      512      256   115 / 114 / 112 / 116 1 / 1 / 1 / 1
//   bf16, fp32, 64                     64       32   96 / 91 / 96 / 93     10 / 10 / 10 / 10
//   bf16, fp32, 64, sums              256     8320   128 / 127 / 128 / 128 2 / 2 / 2 / 2
//   bf16, fp32, 64, whole              64       32   89 / 88 / 88 / 94     10 / 10 / 10 / 10
//   bf16, fp32, 64, whole, sums       256     8320   119 / 120 / 117 / 116 2 / 2 / 2 / 2
//   bf16, fp32, 256                   256      128   96 / 111 / 128 / 108  2 / 2 / 2 / 2
//   bf16, fp32, 256, sums             256      128   128 / 128 / 128 / 128 2 / 2 / 2 / 2
//   bf16, fp32, 256, whole            256      128   96 / 103 / 108 / 104  2 / 2 / 2 / 2
//   bf16, fp32, 256, whole, sums      256      128   118 / 116 / 117 / 118 2 / 2 / 2 / 2
//   bf16, fp32, 512                   512      256   111 / 117 / 115 / 113 1 / 1 / 1 / 1
//   bf16, fp32, 512, sums             512      256   128 / 128 / 128 / 128 1 / 1 / 1 / 1
//   bf16, fp32, 512, whole            512      256   109 / 112 / 114 / 113 1 / 1 / 1 / 1
//   bf16, fp32, 512, whole, sums      512      256   123 / 120 / 122 / 123 1 / 1 / 1 / 1
//   fp32, fp32, 64                     64       32   94 / 95 / 95 / 96     10 / 10 / 10 / 10
//   fp32, fp32, 64, sums              256     8320   128 / 127 / 128 / 128 2 / 2 / 2 / 2
//   fp32, fp32, 64, whole              64       32   91 / 93 / 93 / 96     10 / 10 / 10 / 10
//   fp32, fp32, 64, whole, sums       256     8320   121 / 120 / 117 / 118 2 / 2 / 2 / 2
//   fp32, fp32, 256                   256      128   102 / 111 / 111 / 106 2 / 2 / 2 / 2
//   fp32, fp32, 256, sums             256      128   128 / 128 / 127 / 127 2 / 2 / 2 / 2
//   fp32, fp32, 256, whole            256      128   102 / 107 / 109 / 106 2 / 2 / 2 / 2
//   fp32, fp32, 256, whole, sums      256      128   118 / 117 / 119 / 118 2 / 2 / 2 / 2
//   fp32, fp32, 512                   512      256   113 / 115 / 115 / 115 1 / 1 / 1 / 1
//   fp32, fp32, 512, sums             512      256   128 / 128 / 128 / 127 1 / 1 / 1 / 1
//   fp32, fp32, 512, whole            512      256   111 / 116 / 116 / 115 1 / 1 / 1 / 1
//   fp32, fp32, 512, whole, sums      512      256   123 / 120 / 122 / 123 1 / 1 / 1 / 1
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads, Tr::kBlocks) norm_rows_kernel(const __grid_constant__ NormParams p) {
  using A = typename Tr::A;
  using V = typename Tr::V;
  FASTADAPT_SHARED(arena);
  float d_weight[Tr::kUnits][Tr::kUnit], d_bias[Tr::kUnits][Tr::kUnit];
  if constexpr (Tr::kSums) {
#pragma unroll
    for (int i = 0; i < Tr::kUnits; ++i)
#pragma unroll
      for (int j = 0; j < Tr::kUnit; ++j) d_weight[i][j] = d_bias[i][j] = 0.f;
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.rows_per_block, end = first + p.rows_per_block < p.rows ? first + p.rows_per_block : p.rows;
  const bool of_row = p.dx || p.dresidual, reads_saved = p.norm != kNoNorm && (of_row || p.d_weight);
  const uint2 key = p.dx ? norm_key(p) : uint2{0, 0};
  int turn = 0;
  for (int64_t at = first; at < end; at += Tr::kRows, turn ^= 1) {
    const int64_t own = at + row_of_block<Tr>();
    const NormRow<Tr> row{p, key, own, own < end ? p.width : 0};
    Packed<V, Tr::kUnit> dy[Tr::kUnits], dv[Tr::kUnits], v[Tr::kUnits];
    row.load(dy, p.dy, p.dy_stride);
    row.load(v, reads_saved ? p.saved : nullptr, p.saved_stride);
    if constexpr (!Tr::kSums) row.load(dv, p.dv, p.dv_stride);
    const bool normed = reads_saved && own < end;
    const float mean = normed && p.norm == kLayerNorm ? ptx::load_global<float>(p.mean + own) : 0.f, rstd = normed ? ptx::load_global<float>(p.rstd + own) : 0.f;
    float sums[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < Tr::kUnits; ++i) {
      if (row.left(i) <= 0) break;
      float of_dy[Tr::kUnit], of_v[Tr::kUnit], weight[Tr::kUnit];
      spread(of_dy, dy[i]), spread(of_v, v[i]);
      row.parameters(weight, of_row ? p.weight : nullptr, i, 1.f);
#pragma unroll
      for (int j = 0; j < Tr::kUnit; ++j) {
        const float xhat = (of_v[j] - mean) * rstd, c = of_dy[j] * weight[j];
        if constexpr (Tr::kSums) d_weight[i][j] += of_dy[j] * xhat, d_bias[i][j] += of_dy[j];
        sums[0] += c, sums[1] += c * xhat;
      }
    }
    if (!of_row) continue;
    if (p.norm != kNoNorm) row.sum(sums, arena, turn);
    if constexpr (Tr::kSums) row.load(dv, p.dv, p.dv_stride);  // not before: the sums have the registers
    const float of_c = p.norm == kLayerNorm ? sums[0] / static_cast<float>(p.width) : 0.f, of_xhat = sums[1] / static_cast<float>(p.width);
#pragma unroll
    for (int i = 0; i < Tr::kUnits; ++i) {
      if (row.left(i) <= 0) break;
      float of_dy[Tr::kUnit], of_v[Tr::kUnit], weight[Tr::kUnit], g[Tr::kUnit];
      spread(of_dy, dy[i]), spread(of_v, v[i]), spread(g, dv[i]);
      row.parameters(weight, p.weight, i, 1.f);
#pragma unroll
      for (int j = 0; j < Tr::kUnit; ++j) g[j] += rstd * (of_dy[j] * weight[j] - of_c - (of_v[j] - mean) * rstd * of_xhat);
      if (p.dresidual) row.store(p.dresidual, i, packed<V>(g));
      if (!p.dx) continue;
      row.drop(g, i);
      row.store(p.dx, i, packed<A>(g));
    }
  }
  if constexpr (Tr::kSums) {
    char* const stage = arena + plan::norm_stage(Tr::kLanes, true);
    if (p.d_weight) store_sums<Tr>(p.d_weight, d_weight, stage, p);
    if (p.d_bias) store_sums<Tr>(p.d_bias, d_bias, stage + 4 * Tr::kLanes * plan::kNormValues, p);
  }
}

FASTADAPT_DEVICE void store_parameter(void* p, bool, int64_t i, float v, float) { ptx::store_global(static_cast<float*>(p) + i, v); }

// The gradients of w and b: sums of the splits' partials, in order.
//
// norm_reduce_kernel's bytes:
//   reads    d_weight               4*splits*D
//   reads    d_bias                 4*splits*D
//   writes   d_weight               P*D
//   writes   d_bias                 P*D
//
// norm_reduce_kernel's resources:
//   rank        threads   shared   registers             blocks
//   any             256     1024   32 / 32 / 32 / 40     8 / 8 / 8 / 6
template <class A>
FASTADAPT_KERNEL(plan::kNormReduceThreads) norm_reduce_kernel(const __grid_constant__ NormReduceParams p) {
  FASTADAPT_SHARED(arena);
  const int blocks = static_cast<int>(plan::ceil_div(p.width, 32)), block = static_cast<int>(blockIdx.x), first = block % blocks * 32;
  const NormSum& of = p.sums[block / blocks];
  const float sum = column_sum(arena, p.splits, [&](int64_t split, int column) {
    return first + column < p.width ? ptx::load_global<float>(of.parts + split * p.partial + first + column) : 0.f;
  });
  const int column = first + static_cast<int>(threadIdx.x);
  if (threadIdx.x < 32 && column < p.width) store_parameter(of.out, p.float_parameters, column, sum, A{});
}

}  // namespace fastadapt::cuda
