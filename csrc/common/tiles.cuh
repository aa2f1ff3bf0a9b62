// What the kernels of all ops share: tiles in shared memory and the pipeline that fills them, matrix products over them, and rows of global memory in the layout of the products'
// fragments.
//
// A warp's product is 16 rows by 8 columns a fragment. Lane l holds, of rows l / 4 and l / 4 + 8, columns 2 (l % 4) and 2 (l % 4) + 1: a packed pair a row. `Rows<n>` is n fragments side
// by side in that layout, in a 2-byte type.
#pragma once
#include "../include/cuda_kernels.h"
#include "../include/cuda_plan.h"
#include "activations.cuh"
#include "ptx.cuh"

namespace fastadapt::cuda {

FASTADAPT_DEVICE int lane() { return static_cast<int>(threadIdx.x) & 31; }
FASTADAPT_DEVICE int warp() { return static_cast<int>(threadIdx.x) >> 5; }

template <int kTiles>
struct Fragments {
  float v[kTiles][4];
};

// Row kRow (0: the upper, 1: the lower) of fragment j as two packed numbers.
template <int kTiles>
struct Rows {
  uint32_t v[2][kTiles];
};

// Which rows of a tensor a tile takes: those from `first` on. Asked for row r of the tile, of which the thread's it-th chunk is a part.
struct Consecutive {
  int64_t first, rows;
  FASTADAPT_DEVICE bool valid(int, int r) const { return first + r < rows; }
  FASTADAPT_DEVICE int64_t operator()(int, int r) const { return first + r; }
};

// Fills the tile (kRows, kColumns) at `tile` with from[rows(r)][first_column + c], zero outside of the rows and of `columns`.
template <class T, int kThreads, int kRows, int kColumns, class Of>
FASTADAPT_DEVICE void load_tile(char* tile, const void* from, int64_t stride, const Of& rows, int first_column, int columns) {
  constexpr int kChunks = kColumns / 8, kAll = kRows * kChunks;
#pragma unroll
  for (int it = 0; it < (kAll + kThreads - 1) / kThreads; ++it) {  // a constant trip count: an open loop costs spills on two architectures
    const int i = it * kThreads + static_cast<int>(threadIdx.x), r = i / kChunks, c = i % kChunks * 8;
    if (kAll % kThreads != 0 && i >= kAll) break;
    const bool valid = rows.valid(it, r) && first_column + c < columns;
    ptx::cp_async16(tile + 2 * (r * plan::pitch(kColumns) + c), static_cast<const T*>(from) + (valid ? rows(it, r) * stride + first_column + c : 0), valid);
  }
}
template <class T, int kThreads, int kRows, int kColumns>
FASTADAPT_DEVICE void load_tile(char* tile, const void* from, int64_t stride, int64_t first_row, int64_t rows, int first_column, int columns) {
  load_tile<T, kThreads, kRows, kColumns>(tile, from, stride, Consecutive{first_row, rows}, first_column, columns);
}

// kStages - 1 loads ahead of the step that uses them. next(step) returns the step's stage once all of the block sees it; the barrier in it also frees the stage before it.
template <int kStages, int kBytes, class Load>
struct Pipeline {
  char* arena;
  int steps;
  Load load;  // load(stage, step)

  FASTADAPT_DEVICE Pipeline(char* arena, int steps, Load load) : arena(arena), steps(steps), load(load) {
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fill(s);
  }
  FASTADAPT_DEVICE char* next(int step) {
    if constexpr (kStages == 1) {
      ptx::sync_block();
      fill(step);
      ptx::cp_async_wait<0>();
      ptx::sync_block();
    } else {
      ptx::cp_async_wait<kStages - 2>();
      ptx::sync_block();
      fill(step + kStages - 1);
    }
    return arena + step % kStages * kBytes;
  }

 private:
  FASTADAPT_DEVICE void fill(int step) {
    if (step < steps) load(arena + step % kStages * kBytes, step);
    ptx::cp_async_commit();
  }
};
template <int kStages, int kBytes, class Load>
FASTADAPT_DEVICE Pipeline<kStages, kBytes, Load> pipeline(char* arena, int steps, Load load) {
  return {arena, steps, load};
}

// The 16 x 16 operand a at (row, column) of a tile, or of the tile's transpose.
template <int kColumns>
FASTADAPT_DEVICE void load_a(uint32_t (&a)[4], const char* tile, int row, int column) {
  ptx::ldmatrix_x4(a, tile + 2 * ((row + (lane() & 15)) * plan::pitch(kColumns) + column + (lane() >> 4) * 8));
}
template <int kColumns>
FASTADAPT_DEVICE void load_a_trans(uint32_t (&a)[4], const char* tile, int row, int column) {
  ptx::ldmatrix_x4_trans(a, tile + 2 * ((column + (lane() & 7) + (lane() >> 4) * 8) * plan::pitch(kColumns) + row + (lane() >> 3 & 1) * 8));
}
// Two neighbouring 16 x 8 operands b of x w' for a tile w, columns of b at rows `column` and up of w; or of x w.
template <int kColumns>
FASTADAPT_DEVICE void load_b(uint32_t (&b)[4], const char* tile, int depth, int column) {
  ptx::ldmatrix_x4(b, tile + 2 * ((column + (lane() & 7) + (lane() >> 4) * 8) * plan::pitch(kColumns) + depth + (lane() >> 3 & 1) * 8));
}
template <int kColumns>
FASTADAPT_DEVICE void load_b_trans(uint32_t (&b)[4], const char* tile, int depth, int column) {
  ptx::ldmatrix_x4_trans(b, tile + 2 * ((depth + (lane() & 15)) * plan::pitch(kColumns) + column + (lane() >> 4) * 8));
}

// sum += a b over a tile w of kDepth columns (kTrans: rows): one 16-deep step.
template <class T, int kColumns, bool kTrans, int kTiles>
FASTADAPT_DEVICE void multiply(Fragments<kTiles>& sum, const uint32_t (&a)[4], const char* w, int depth, int column = 0) {
  static_assert(kTiles % 2 == 0);
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    uint32_t b[4];
    if constexpr (kTrans) load_b_trans<kColumns>(b, w, depth, column + 8 * j);
    else load_b<kColumns>(b, w, depth, column + 8 * j);
    ptx::mma(sum.v[j], a, b[0], b[1], T{});
    ptx::mma(sum.v[j + 1], a, b[2], b[3], T{});
  }
}

// Fragments as the operand a of the next product: fragments 2 k and 2 k + 1 are its 16-deep step k.
template <int kTiles>
FASTADAPT_DEVICE void operand(uint32_t (&a)[4], const Rows<kTiles>& rows, int k) {
  a[0] = rows.v[0][2 * k], a[1] = rows.v[1][2 * k], a[2] = rows.v[0][2 * k + 1], a[3] = rows.v[1][2 * k + 1];
}

FASTADAPT_DEVICE void exchange(uint32_t& lower, uint32_t& upper, int mask) {
  const bool odd = (lane() & mask) != 0;
  const uint32_t got = ptx::shuffle_xor(odd ? lower : upper, mask);
  (odd ? lower : upper) = got;
}
// The 4 x 4 transpose among 4 neighbouring lanes: from a pair of each of 4 fragments to 8 columns of one fragment, 16 bytes of a row, and back.
FASTADAPT_DEVICE void transpose(uint32_t (&v)[4]) {
  exchange(v[0], v[1], 1), exchange(v[2], v[3], 1);
  exchange(v[0], v[2], 2), exchange(v[1], v[3], 2);
}

// Where a warp's fragments lie among a tensor's rows.
struct Place {
  int64_t row;   // of this lane's upper row; the lower is 8 below
  int64_t rows;  // of the tensor
  FASTADAPT_DEVICE bool valid(int i) const { return row + 8 * i < rows; }
  FASTADAPT_DEVICE int64_t operator()(int i) const { return row + 8 * i; }
};

// Columns first and up of the place's rows, zero outside; 16 bytes a lane and access. Strides and `columns` are multiples of 8.
template <class T, int kTiles, class At>
FASTADAPT_DEVICE Rows<kTiles> load_rows(const void* from, int64_t stride, At at, int first, int columns) {
  Rows<kTiles> out;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
      const int own = j + (lane() & 3), c = first + 8 * own;
      uint4 q{0, 0, 0, 0};
      if (own < kTiles && at.valid(i) && c < columns) q = ptx::load_global<uint4>(static_cast<const T*>(from) + at(i) * stride + c);
      uint32_t v[4] = {q.x, q.y, q.z, q.w};
      transpose(v);
#pragma unroll
      for (int k = 0; k < 4 && j + k < kTiles; ++k) out.v[i][j + k] = v[k];
    }
  return out;
}
template <class T, int kTiles, class At>
FASTADAPT_DEVICE void store_rows(void* to, int64_t stride, At at, int first, int columns, const Rows<kTiles>& rows) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
      uint32_t v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) v[k] = j + k < kTiles ? rows.v[i][j + k < kTiles ? j + k : 0] : 0;
      transpose(v);
      const int own = j + (lane() & 3), c = first + 8 * own;
      if (own < kTiles && at.valid(i) && c < columns) ptx::store_global(static_cast<T*>(to) + at(i) * stride + c, uint4{v[0], v[1], v[2], v[3]});
    }
}

// Parameters at c and c + 1, rounded to T; zero from `count` on. c is even and, but for a rank, so is count.
template <class T>
FASTADAPT_DEVICE float rounded(float v) {
  return to_float(from_float(v, T{}));
}
template <class T>
FASTADAPT_DEVICE float parameter(const void* p, bool is_float, int c) {
  return is_float ? rounded<T>(ptx::load_global<float>(static_cast<const float*>(p) + c)) : to_float(ptx::load_global<T>(static_cast<const T*>(p) + c));
}
template <class T>
FASTADAPT_DEVICE float2 parameters(const void* p, bool is_float, int c, int count) {
  if (c + 1 >= count) return {c < count ? parameter<T>(p, is_float, c) : 0.f, 0.f};
  if (!is_float) return unpack(ptx::load_global<uint32_t>(static_cast<const T*>(p) + c), T{});
  const float2 v = ptx::load_global<float2>(static_cast<const float*>(p) + c);
  return unpack(pack(v.x, v.y, T{}), T{});
}
// Where a product's sums start: zero, or a bias (columns first and up of `count`).
template <int kTiles>
FASTADAPT_DEVICE Fragments<kTiles> zeros() {
  Fragments<kTiles> sum;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) sum.v[j][0] = sum.v[j][1] = sum.v[j][2] = sum.v[j][3] = 0.f;
  return sum;
}
template <class T, int kTiles>
FASTADAPT_DEVICE Fragments<kTiles> biases(const void* bias, bool is_float, int first, int count) {
  Fragments<kTiles> sum = zeros<kTiles>();
  if (bias) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float2 b = parameters<T>(bias, is_float, first + 8 * j + 2 * (lane() & 3), count);
      sum.v[j][0] = sum.v[j][2] = b.x, sum.v[j][1] = sum.v[j][3] = b.y;
    }
  }
  return sum;
}
FASTADAPT_DEVICE void store_parameter(void* p, bool is_float, int64_t i, float v, bf16) {
  if (is_float) ptx::store_global(static_cast<float*>(p) + i, v);
  else ptx::store_global(static_cast<bf16*>(p) + i, from_float(v, bf16{}));
}
FASTADAPT_DEVICE void store_parameter(void* p, bool is_float, int64_t i, float v, half) {
  if (is_float) ptx::store_global(static_cast<float*>(p) + i, v);
  else ptx::store_global(static_cast<half*>(p) + i, from_float(v, half{}));
}

// Sums over the 4 lanes of a row, over the 8 lanes of a column, over a warp.
FASTADAPT_DEVICE float sum_of_row(float v) {
  v += ptx::shuffle_xor(v, 1);
  return v + ptx::shuffle_xor(v, 2);
}
FASTADAPT_DEVICE float sum_of_column(float v) {
  v += ptx::shuffle_xor(v, 4);
  v += ptx::shuffle_xor(v, 8);
  return v + ptx::shuffle_xor(v, 16);
}
FASTADAPT_DEVICE float sum_of_warp(float v) { return sum_of_column(sum_of_row(v)); }

template <class T, int kTiles>
FASTADAPT_DEVICE Rows<kTiles> rounded(const Fragments<kTiles>& sum) {
  Rows<kTiles> rows;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) rows.v[i][j] = pack(sum.v[j][2 * i], sum.v[j][2 * i + 1], T{});
  return rows;
}
template <class T, int kTiles>
FASTADAPT_DEVICE void activate_rows(Rows<kTiles>& z, Activation activation) {
  with_activation(activation, [&](auto phi) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float2 v = unpack(z.v[i][j], T{});
        z.v[i][j] = pack(phi(v.x), phi(v.y), T{});
      }
  });
}

// Rank-wide rows, 32 columns at a time: f(group of fragments, first column). All at once would not fit the registers at rank 256.
template <int kTiles, class F>
FASTADAPT_DEVICE void in_groups(Rows<kTiles>& rows, F f) {
  constexpr int kGroup = kTiles < 4 ? kTiles : 4;
#pragma unroll
  for (int j0 = 0; j0 < kTiles; j0 += kGroup) {
    Rows<kGroup> group;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kGroup; ++j) group.v[i][j] = rows.v[i][j0 + j];
    f(group, 8 * j0);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kGroup; ++j) rows.v[i][j0 + j] = group.v[i][j];
  }
}
// phi of the pre-activations z, which are stored first where they are asked for.
template <class T, int kTiles, class At>
FASTADAPT_DEVICE void store_and_activate(Rows<kTiles>& z, void* to, int stride, At at, Activation activation) {
  in_groups(z, [&](auto& group, int first) {
    if (to) store_rows<T>(to, stride, at, first, stride, group);
    activate_rows<T>(group, activation);
  });
}
template <class T, int kTiles, class At>
FASTADAPT_DEVICE Rows<kTiles> load_activated(const void* z, int stride, At at, Activation activation) {
  Rows<kTiles> a;
  in_groups(a, [&](auto& group, int first) {
    group = load_rows<T, sizeof(group) / 8>(z, stride, at, first, stride);
    activate_rows<T>(group, activation);
  });
  return a;
}

// u + a Wu' over a tile of Wu (8 kTiles rows of it, kRank columns).
template <class T, int kRank, int kTiles>
FASTADAPT_DEVICE void expand(Fragments<kTiles>& u, const Rows<kRank / 8>& a, const char* w_up) {
#pragma unroll
  for (int k = 0; k < kRank / 16; ++k) {
    uint32_t step[4];
    operand(step, a, k);
    multiply<T, kRank, false>(u, step, w_up, 16 * k);
  }
}

// Column sums of `count` rows, added in 8 interleaved runs and then the runs in order: value(row, column) for 32 columns of a block of 256 threads. Only threads below 32 get the sum.
template <class Value>
FASTADAPT_DEVICE float column_sum(char* arena, int64_t count, Value value) {
  const int column = static_cast<int>(threadIdx.x) % 32, run = static_cast<int>(threadIdx.x) / 32;
  float sum = 0.f;
  for (int64_t r = run; r < count; r += 8) sum += value(r, column);
  ptx::store_shared(arena + 4 * threadIdx.x, sum);
  ptx::sync_block();
  if (run == 0)
    for (int i = 1; i < 8; ++i) sum += ptx::load_shared<float>(arena + 4 * (32 * i + column));
  return sum;
}

}  // namespace fastadapt::cuda
