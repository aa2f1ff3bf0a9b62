// Compacter's bottleneck: y = s (phi(x Hd + bd) Hu + bu) [+ x] [+ residual], H = sum_i A_i (x) (L_i R_i), which is never formed. A row's bytes, each tensor counted once:
//
//   kernel            reads                  writes
//   forward           2 D (+ 2 D residual)   2 D + 2 R
//   rows (backward)   4 D + 2 R              2 D (dx); partials of all factors' gradients a split
//   reduce            the partials           the gradients
//
// Bound by memory: 4 FLOP a byte at n = 4, k = 1, and fp32 FMA gives 10.8 on an A100. So what makes a wide row out of thin numbers (inner products, mixed or not, in fp32) and
// what adds outer products is FMA, exact and without a padding of n k; mma.sync would have to split the thin numbers in two. Products over a row (x L, phi(z) L, dy R, dz R),
// whose operands are in A, are mma.sync: 2 instructions for 16 x 32 numbers, and no sum over lanes.
//
// The tables are as in bottleneck.cuh. F = 2 k (D + R) + 2 n^3 factor numbers, which every block rounds on load; `tiles` of some tokens; `groups` of 8 pairs and `quads` of 4,
// for each of which a row is read, but for the first from L2; `slots` tokens side by side. Resources are those of D = 768 (772: not whole), R = 96, n = 4, k = 1: shared memory
// follows the factors.
#pragma once
#include "../common/tiles.cuh"
#include "../include/phm_bottleneck_cuda.h"

namespace fastadapt::cuda {

// kWhole: the parts of x and y have a multiple of 8 columns, and are read 16 bytes at a time; others number by number.
template <class T_, bool kWhole_>
struct PhmTraits {
  using T = T_;
  static constexpr bool kWhole = kWhole_;
  static constexpr int kThreads = plan::kPhmThreads, kWarps = kThreads / 32, kBlocks = kWhole ? 3 : 2;
  static constexpr int kRows = 2;  // rows of an expansion at a time, for which a factor's vector is unpacked once; 4 spill
};

FASTADAPT_DEVICE int thread() { return static_cast<int>(threadIdx.x); }

// 8 columns of a part of a token of the tile, zero outside: of a tensor in global memory (tokens 0: one that is not given), or of the tile in shared memory.
template <class Tr>
struct GlobalParts {
  using T = typename Tr::T;
  const T* first;
  int64_t stride;
  int tokens, columns;
  FASTADAPT_DEVICE GlobalParts(const void* tensor, int64_t stride, int64_t first_token, int64_t rows, int tile, int columns)
      : first(static_cast<const T*>(tensor) + first_token * stride),
        stride(stride),
        tokens(!tensor ? 0 : rows - first_token < tile ? static_cast<int>(rows - first_token) : tile),
        columns(columns) {}
  FASTADAPT_DEVICE uint4 operator()(int token, int part, int column) const {
    if (token >= tokens || column >= columns) return {0, 0, 0, 0};
    const T* const at = first + token * stride + part * columns + column;
    if constexpr (Tr::kWhole) return ptx::load_global<uint4>(at);
    const auto two = [&](int j) {
      return pack(column + j < columns ? to_float(ptx::load_global<T>(at + j)) : 0.f, column + j + 1 < columns ? to_float(ptx::load_global<T>(at + j + 1)) : 0.f, T{});
    };
    return {two(0), two(2), two(4), two(6)};
  }
};
struct SharedParts {
  const char* tile;
  int division, tokens, columns;
  FASTADAPT_DEVICE uint4 operator()(int token, int part, int column) const {
    if (token >= tokens) return {0, 0, 0, 0};
    return ptx::load_shared<uint4>(tile + 2 * ((token * division + part) * plan::round32(columns) + column));
  }
};

template <class T>
FASTADAPT_DEVICE void unpack8(float (&out)[8], const uint4& v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 two = unpack(words[j], T{});
    out[2 * j] = two.x, out[2 * j + 1] = two.y;
  }
}

// A block's tile, and the steps of both directions over it.
template <class Tr>
struct PhmTile {
  using T = typename Tr::T;
  const PhmParams& p;
  const PhmShape& s;
  const plan::PhmLayout& at;
  const int tokens, rows, pairs, padded;
  char* const arena;
  int64_t first_token = 0;
  bool begins = true;  // the first tile of a split: it stores the partial's numbers instead of adding to them

  FASTADAPT_DEVICE PhmTile(const PhmParams& p, char* arena)
      : p(p), s(p.shape), at(p.at), tokens(p.tokens), rows(p.tokens * p.shape.division), pairs(p.shape.pairs()), padded(p.shape.padded_pairs()), arena(arena) {
    for (int side = 0; side < 2; ++side) {
      load_factor(arena + at.factors[side][0], p.sides[side].left, side == 0 ? s.wide : s.thin, true);
      load_factor(arena + at.factors[side][1], p.sides[side].right, side == 0 ? s.thin : s.wide, false);
      for (int i = thread(); i < s.division * s.division * s.division; i += Tr::kThreads)
        ptx::store_shared(arena + at.rules[side] + 2 * i, from_float(parameter<T>(p.sides[side].rule, p.float_parameters, i), T{}));
    }
  }

  // A factor with a row a pair, zeros behind its columns and below its pairs.
  FASTADAPT_DEVICE void load_factor(char* to, const void* from, int columns, bool left) const {
    const int pitch = plan::factor_pitch(columns), k = s.factor_rank;
    for (int pair = warp(); pair < padded; pair += Tr::kWarps) {
      const int first = left ? pair / k * columns * k + pair % k : pair * columns, step = left ? k : 1;
      for (int c = lane(); c < pitch; c += 32)
        ptx::store_shared(to + 2 * (pair * pitch + c), from_float(pair < pairs && c < columns ? parameter<T>(from, p.float_parameters, first + c * step) : 0.f, T{}));
    }
  }

  FASTADAPT_DEVICE GlobalParts<Tr> parts(const void* tensor, int64_t stride) const { return {tensor, stride, first_token, p.rows, tokens, s.wide}; }
  FASTADAPT_DEVICE SharedParts activated() const { return {arena + at.activated, s.division, tokens, s.thin}; }
  FASTADAPT_DEVICE char* thin(int i) const { return arena + at.thin[i]; }

  // to[row, pair] = scale from[row, :] . factor[pair, :]. A warp has 16 rows and 8 pairs. Lane l brings 8 columns from 8 (l % 4) on of rows l / 4 and l / 4 + 8 and of pair l /
  // 4: the order of the columns within a product is free, as long as both operands have the same.
  template <class Parts>
  FASTADAPT_DEVICE void contract(char* to, const Parts& from, const char* factor, float scale) const {
    const int groups = static_cast<int>(plan::ceil_div(padded, 8)), pitch = plan::factor_pitch(from.columns);
    for (int item = warp(); item < groups * plan::ceil_div(rows, 16); item += Tr::kWarps) {
      const int pair = item % groups * 8, row = item / groups * 16 + lane() / 4, lower = row + 8;
      const int token = row / s.division, part = row % s.division, lower_token = lower / s.division, lower_part = lower % s.division;
      const bool owns = pair + lane() / 4 < padded;
      const char* const own = factor + 2 * (pair + lane() / 4) * pitch;
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 2
      for (int c0 = 0; c0 < from.columns; c0 += 32) {
        const int c = c0 + 8 * (lane() & 3);
        const uint4 a = from(token, part, c), b = from(lower_token, lower_part, c), w = owns ? ptx::load_shared<uint4>(own + 2 * c) : uint4{0, 0, 0, 0};
        const uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
        ptx::mma(sum, first, w.x, w.y, T{});
        ptx::mma(sum, second, w.z, w.w, T{});
      }
      const int column = pair + 2 * (lane() & 3);
      if (column >= padded) continue;
      if (row < rows) ptx::store_shared(to + 4 * (row * padded + column), float2{scale * sum[0], scale * sum[1]});
      if (lower < rows) ptx::store_shared(to + 4 * (lower * padded + column), float2{scale * sum[2], scale * sum[3]});
    }
  }

  // to[t, c, (i, q)] = sum_a A[i, a, c] from[t, a, (i, q)]; backwards with A[i, c, a].
  template <bool kBackwards>
  FASTADAPT_DEVICE void mix(char* to, const char* from, const char* rule) const {
    const int n = s.division;
    for (int e = thread(); e < rows * padded; e += Tr::kThreads) {
      const int row = e / padded, pair = e % padded, c = row % n, first = row - c, i = pair / s.factor_rank;
      float sum = 0.f;
      for (int a = 0; pair < pairs && a < n; ++a) {
        const float weight = to_float(ptx::load_shared<T>(rule + 2 * ((i * n + (kBackwards ? c : a)) * n + (kBackwards ? a : c))));
        sum += weight * ptx::load_shared<float>(from + 4 * ((first + a) * padded + pair));
      }
      ptx::store_shared(to + 4 * e, sum);
    }
  }

  // One number of values[row, :] factor[:, column].
  FASTADAPT_DEVICE float expanded(const char* values, const char* factor, int row, int column) const {
    const int pitch = plan::factor_pitch(s.thin);
    float sum = 0.f;
    for (int pair = 0; pair < pairs; pair += 4) {
      const float4 v = ptx::load_shared<float4>(values + 4 * (row * padded + pair));
      const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += four[j] * to_float(ptx::load_shared<T>(factor + 2 * ((pair + j) * pitch + column)));
    }
    return sum;
  }

  // For the tile of z: f(row of the tile, column of the part, index in z) gives what is stored in `activated`, zero behind the part's columns and the tensor's rows.
  template <class F>
  FASTADAPT_DEVICE void thin_rows(F f) const {
    const int columns = s.thin, pitch = plan::round32(columns);
    for (int e = thread(); e < rows * pitch; e += Tr::kThreads) {
      const int row = e / pitch, column = e % pitch;
      const bool valid = column < columns && first_token + row / s.division < p.rows;
      ptx::store_shared(arena + at.activated + 2 * e, from_float(valid ? f(row, column, first_token * s.rank() + row * columns + column) : 0.f, T{}));
    }
  }

  // to = scale (values factor + bias) + first + second, for the tile's wide rows. A thread owns 8 columns of every `slots`th token, kRows of them at a time.
  FASTADAPT_DEVICE void expand(void* to, const char* values, const char* factor, const void* bias, float scale, const GlobalParts<Tr>& first, const GlobalParts<Tr>& second) const {
    const plan::PhmOwners& own = at.of_wide;
    const int pitch = plan::factor_pitch(s.wide), slot = thread() / own.each;
    for (int u = thread() % own.each; slot < own.slots && u < own.all; u += own.each) {
      const int part = u / own.vectors, column = u % own.vectors * 8, d = part * s.wide + column;
      float offset[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) offset[j] = bias && (Tr::kWhole || column + j < s.wide) ? parameter<T>(bias, p.float_parameters, d + j) : 0.f;
      for (int t0 = slot; t0 < tokens; t0 += Tr::kRows * own.slots) {
        uint4 add[Tr::kRows][2];
        float sum[Tr::kRows][8];
#pragma unroll
        for (int r = 0; r < Tr::kRows; ++r) {
          add[r][0] = first(t0 + r * own.slots, part, column), add[r][1] = second(t0 + r * own.slots, part, column);
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[r][j] = 0.f;
        }
        for (int pair = 0; pair < pairs; pair += 4) {
          float value[Tr::kRows][4];
#pragma unroll
          for (int r = 0; r < Tr::kRows; ++r) {
            const int t = min(t0 + r * own.slots, tokens - 1);
            const float4 v = ptx::load_shared<float4>(values + 4 * ((t * s.division + part) * padded + pair));
            value[r][0] = v.x, value[r][1] = v.y, value[r][2] = v.z, value[r][3] = v.w;
          }
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            float w[8];
            unpack8<T>(w, ptx::load_shared<uint4>(factor + 2 * ((pair + q) * pitch + column)));
#pragma unroll
            for (int r = 0; r < Tr::kRows; ++r)
#pragma unroll
              for (int j = 0; j < 8; ++j) sum[r][j] += value[r][q] * w[j];
          }
        }
#pragma unroll
        for (int r = 0; r < Tr::kRows; ++r) {
          const int64_t t = t0 + r * own.slots;
          if (t >= tokens || first_token + t >= p.rows) break;
          float one[8], other[8];
          unpack8<T>(one, add[r][0]), unpack8<T>(other, add[r][1]);
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[r][j] = scale * (sum[r][j] + offset[j]) + one[j] + other[j];
          T* const out = static_cast<T*>(to) + (first_token + t) * s.width() + d;
          if constexpr (Tr::kWhole) {
            ptx::store_global(out, uint4{pack(sum[r][0], sum[r][1], T{}), pack(sum[r][2], sum[r][3], T{}), pack(sum[r][4], sum[r][5], T{}), pack(sum[r][6], sum[r][7], T{})});
          } else {
#pragma unroll
            for (int j = 0; j < 8; ++j)
              if (column + j < s.wide) ptx::store_global(out + j, from_float(sum[r][j], T{}));
          }
        }
      }
    }
  }

  // ---- Gradients of a projection's parameters: the tile's share is added to the split's partial, whose numbers belong to one thread each.

  FASTADAPT_DEVICE void accumulate(float* to, float v, bool fresh) const { ptx::store_global(to, fresh ? v : ptx::load_global<float>(to) + v); }

  FASTADAPT_DEVICE float* of_split(float* partial) const { return partial + blockIdx.x * p.partial; }

  // dA[i, a, c] = sum over tokens and q of inner[a, (i, q)] d_mixed[c, (i, q)].
  FASTADAPT_DEVICE void rule_gradient(float* out, const char* inner, const char* d_mixed) const {
    const int n = s.division, k = s.factor_rank;
    for (int e = thread(); e < n * n * n; e += Tr::kThreads) {
      const int i = e / (n * n), a = e / n % n, c = e % n;
      float sum = 0.f;
      for (int t = 0; t < rows; t += n)
        for (int pair = i * k; pair < i * k + k; ++pair)
          sum += ptx::load_shared<float>(inner + 4 * ((t + a) * padded + pair)) * ptx::load_shared<float>(d_mixed + 4 * ((t + c) * padded + pair));
      accumulate(of_split(out) + e, sum, begins);
    }
  }

  // out[pair, column] = scale sum over rows of from[row, column] values[row, pair], as a left factor's gradient (n, columns, k) or a right one's (n, k, columns); and, for a bias,
  // sums[part, column] = scale sum over tokens of from. Threads own columns as in `expand`; their sums meet in shared memory, 2 pairs at a time.
  template <bool kLeft, class Parts>
  FASTADAPT_DEVICE void outer(float* out, float* sums, const Parts& from, const plan::PhmOwners& own, const char* values, float scale) const {
    const int columns = from.columns, k = s.factor_rank;
    const int slot = thread() / own.each;
    char *const stage = arena + at.stage, *const own_stage = stage + 4 * thread() * plan::kPhmStage;
    for (int base = 0; base < own.all; base += own.each) {
      const int u = base + thread() % own.each, part = u / own.vectors, column = u % own.vectors * 8;
      const bool active = slot < own.slots && u < own.all;
      for (int pair = 0; pair < (out ? pairs : 1); pair += 4) {
        float sum[4][8], total[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[0][j] = sum[1][j] = sum[2][j] = sum[3][j] = total[j] = 0.f;
#pragma unroll 4
        for (int t = slot; active && t < tokens; t += own.slots) {
          float x[8];
          unpack8<T>(x, from(t, part, column));
          const float4 v = out ? ptx::load_shared<float4>(values + 4 * ((t * s.division + part) * padded + pair)) : float4{0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[0][j] += v.x * x[j], sum[1][j] += v.y * x[j], sum[2][j] += v.z * x[j], sum[3][j] += v.w * x[j], total[j] += x[j];
        }
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
          if (!out || pair + half >= pairs) break;
          if (active) store8(own_stage, sum[half]), store8(own_stage + 32, sum[half + 1]);
          ptx::sync_block();
          for (int e = thread(); e < 2 * columns; e += Tr::kThreads) {
            const int q = e / columns, c = e % columns, at_pair = pair + half + q;
            if (at_pair >= pairs) break;
            float all = 0.f;
            for (int owner = 0; owner < own.slots; ++owner)
              for (int v = c / 8; v < own.all; v += own.vectors)  // the parts
                if (v >= base && v < base + own.each) all += ptx::load_shared<float>(stage + 4 * ((owner * own.each + v - base) * plan::kPhmStage + 8 * q + c % 8));
            const int index = kLeft ? (at_pair / k * columns + c) * k + at_pair % k : at_pair * columns + c;
            accumulate(of_split(out) + index, scale * all, begins && base == 0);
          }
          ptx::sync_block();
        }
        if (sums && pair == 0) {
          if (active) store8(own_stage, total);
          ptx::sync_block();
          for (int e = thread(); e < s.division * columns; e += Tr::kThreads) {
            const int v = e / columns * own.vectors + e % columns / 8;
            if (v < base || v >= base + own.each) continue;
            float all = 0.f;
            for (int owner = 0; owner < own.slots; ++owner) all += ptx::load_shared<float>(stage + 4 * ((owner * own.each + v - base) * plan::kPhmStage + e % columns % 8));
            accumulate(of_split(sums) + e, scale * all, begins);
          }
          ptx::sync_block();
        }
      }
    }
  }
  FASTADAPT_DEVICE void store8(char* to, const float (&v)[8]) const {
    ptx::store_shared(to, float4{v[0], v[1], v[2], v[3]});
    ptx::store_shared(to + 16, float4{v[4], v[5], v[6], v[7]});
  }

  // All of a projection's parameters, from its input and `scale` d_out; leaves d_inner in thin(3) where d_in or a left factor asks for it.
  template <class In, class Out>
  FASTADAPT_DEVICE void backward(int side, const In& in, const Out& d_out, float scale, bool d_in) const {
    const PhmSide& of = p.sides[side];
    const bool back = of.d_left || d_in;
    if (of.d_rule || of.d_right) contract(thin(0), in, arena + at.factors[side][0], 1.f);
    if (of.d_rule || back) contract(thin(1), d_out, arena + at.factors[side][1], scale);
    ptx::sync_block();
    if (of.d_rule) rule_gradient(of.d_rule, thin(0), thin(1));
    if (of.d_right) mix<false>(thin(2), thin(0), arena + at.rules[side]);
    if (back) mix<true>(thin(3), thin(1), arena + at.rules[side]);
    ptx::sync_block();
    if (of.d_right || of.d_bias) outer<false>(of.d_right, of.d_bias, d_out, side == 0 ? at.of_thin : at.of_wide, thin(2), scale);
    if (of.d_left) outer<true>(of.d_left, nullptr, in, side == 0 ? at.of_wide : at.of_thin, thin(3), 1.f);
  }
};

// phm_forward_kernel's bytes:
//   reads    -                      2*groups*N*D + tiles*P*F
//   reads    b_down                 P*N*R
//   reads    b_up                   tiles*slots*P*D
//   reads    added                  2*N*D
//   reads    other                  2*N*D
//   writes   -                      2*N*D
//   writes   z                      2*N*R
//
// phm_forward_kernel's resources:
//   rank        threads   shared   registers             blocks
//   not whole       256    16640   91 / 95 / 95 / 96     2 / 2 / 2 / 2
//   whole           256    16640   80 / 79 / 79 / 80     3 / 3 / 3 / 3
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads, Tr::kBlocks) phm_forward_kernel(const __grid_constant__ PhmParams p) {
  using T = typename Tr::T;
  FASTADAPT_SHARED(arena);
  PhmTile<Tr> tile(p, arena);
  const PhmShape& s = p.shape;
  tile.first_token = static_cast<int64_t>(blockIdx.x) * p.tokens;
  ptx::sync_block();
  tile.contract(tile.thin(0), tile.parts(p.x, p.x_stride), arena + tile.at.factors[0][0], 1.f);
  ptx::sync_block();
  tile.template mix<false>(tile.thin(1), tile.thin(0), arena + tile.at.rules[0]);
  ptx::sync_block();
  with_activation(p.activation, [&](auto phi) {
    tile.thin_rows([&](int row, int column, int64_t index) {
      float v = tile.expanded(tile.thin(1), arena + tile.at.factors[0][1], row, column);
      if (p.sides[0].bias) v += parameter<T>(p.sides[0].bias, p.float_parameters, row % s.division * s.thin + column);
      const T z = from_float(v, T{});
      if (p.z) ptx::store_global(static_cast<T*>(p.z) + index, z);
      return phi(to_float(z));
    });
  });
  ptx::sync_block();
  tile.contract(tile.thin(0), tile.activated(), arena + tile.at.factors[1][0], 1.f);
  ptx::sync_block();
  tile.template mix<false>(tile.thin(1), tile.thin(0), arena + tile.at.rules[1]);
  ptx::sync_block();
  const auto added = tile.parts(p.add_input ? p.x : nullptr, p.x_stride), other = tile.parts(p.residual, p.residual_stride);
  tile.expand(p.y, tile.thin(1), arena + tile.at.factors[1][1], p.sides[1].bias, p.scale, added, other);
}

// dx, and a split's partial of every parameter's gradient, tile by tile: everything thin stays on chip, dy and x come from memory once and from L2 again.
//
// phm_rows_kernel's bytes; of a gradient, `turns` over a tile where a row has more vectors than the block threads:
//   reads    -                      2*N*R + splits*P*F
//   reads    down                   2*N*R
//   reads    dy                     2*groups*N*D
//   reads    d_right_up             2*quads*N*D
//   reads    d_b_up alone           2*N*D
//   reads    x                      2*groups*N*D
//   reads    d_left_down            2*quads*N*D
//   reads    dx added               2*N*D
//   reads    gradient               4*(tiles*turns - splits)*numbers
//   writes   dx                     2*N*D
//   writes   gradient               4*tiles*turns*numbers
//
// phm_rows_kernel's resources:
//   rank        threads   shared   registers             blocks
//   not whole       256    40896   111 / 110 / 110 / 116 2 / 2 / 2 / 2
//   whole           256    40896   78 / 80 / 80 / 80     3 / 3 / 3 / 2
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads, Tr::kBlocks) phm_rows_kernel(const __grid_constant__ PhmParams p) {
  using T = typename Tr::T;
  FASTADAPT_SHARED(arena);
  PhmTile<Tr> tile(p, arena);
  const PhmSide& down = p.sides[0];
  const bool goes_down = p.dx || down.d_rule || down.d_left || down.d_right || down.d_bias;
  const auto z = [&](int64_t index) { return to_float(ptx::load_global<T>(static_cast<const T*>(p.z) + index)); };
  for (int i = 0; i < p.tiles_per_split; ++i) {
    tile.first_token = (static_cast<int64_t>(blockIdx.x) * p.tiles_per_split + i) * p.tokens;
    if (tile.first_token >= p.rows) break;
    tile.begins = i == 0;
    with_activation(p.activation, [&](auto phi) { tile.thin_rows([&](int, int, int64_t index) { return phi(z(index)); }); });
    ptx::sync_block();
    tile.backward(1, tile.activated(), tile.parts(p.dy, p.dy_stride), p.scale, goes_down);
    if (!goes_down) continue;
    with_activation(p.activation, [&](auto phi) {
      tile.thin_rows([&](int row, int column, int64_t index) { return tile.expanded(tile.thin(3), arena + tile.at.factors[1][0], row, column) * phi.slope(z(index)); });
    });
    ptx::sync_block();
    tile.backward(0, tile.parts(p.x, p.x_stride), tile.activated(), 1.f, p.dx != nullptr);
    if (p.dx) tile.expand(p.dx, tile.thin(3), arena + tile.at.factors[0][0], nullptr, 1.f, tile.parts(p.add_input ? p.dy : nullptr, p.dy_stride), tile.parts(nullptr, 0));
  }
}

// The gradients: sums of the splits' partials, in order.
//
// phm_reduce_kernel's bytes:
//   reads    gradient               4*splits*numbers
//   writes   gradient               P*numbers
//
// phm_reduce_kernel's resources:
//   rank        threads   shared   registers             blocks
//   any             256     1024   32 / 32 / 32 / 44     8 / 8 / 8 / 5
template <class T>
FASTADAPT_KERNEL(plan::kPhmThreads) phm_reduce_kernel(const __grid_constant__ PhmReduceParams p) {
  FASTADAPT_SHARED(arena);
  int block = static_cast<int>(blockIdx.x);
  for (int i = 0; i < p.count; ++i) {
    const PhmSum& of = p.sums[i];
    const int blocks = static_cast<int>(plan::ceil_div(of.columns, 32)), first = 32 * block;
    if (block < blocks) {
      const float sum = column_sum(arena, p.splits, [&](int64_t split, int column) {
        return first + column < of.columns ? ptx::load_global<float>(of.parts + split * p.partial + first + column) : 0.f;
      });
      if (thread() < 32 && first + thread() < of.columns) store_parameter(of.out, p.float_parameters, first + thread(), sum, T{});
      return;
    }
    block -= blocks;
  }
}

}  // namespace fastadapt::cuda
