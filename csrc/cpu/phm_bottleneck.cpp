// Fused Compacter bottleneck, forward and backward. A projection y_c = sum_iq (sum_a A_i[a, c] x_a . L_iq) R_iq is three steps: dots of the wide parts x_a with the pairs' left
// vectors, the mix by the rule, and the expansion of n k numbers a part by the right vectors; its gradients are the same steps with left and right exchanged, and outer products.
//
// Rows go in tiles of one vector's lanes. On the wide side (x, dy, y, dx) vectors run along a row, and a block of rows shares each load of a factor. Everything thin (the n n k
// numbers of a projection, z, a and their gradients) stands one row a lane, in L1: any rank and n without tails, and no sum over lanes before the end of a chunk.
// A row takes about 2 n k D multiply-adds forward and 5 n k D backward where R << D: 2 to 7 FLOP a byte at n k = 4. Memory traffic a row of D: forward reads x, writes y; backward
// reads x and dy, writes dx.
#include "phm_bottleneck.h"

#include <array>

#include "tile.h"

namespace fastadapt::cpu {
namespace {

constexpr int64_t kLanes = Vec::size(), kBlock = kLanes / kGroup;
static_assert(kTileRows % kLanes == 0 && kVector % kLanes == 0);

// Pieces of this thread's scratch memory, whole cache lines each.
template <size_t N>
std::array<float*, N> carve(const int64_t (&sizes)[N]) {
  int64_t total = 0;
  for (int64_t size : sizes) total += round_up(size, kVector);
  std::array<float*, N> pieces;
  float* at = scratch(total);
  float** piece = pieces.data();
  for (int64_t size : sizes) *piece++ = at, at += round_up(size, kVector);
  return pieces;
}

struct Sizes {
  int64_t parts, pairs, thin, line, rank;  // pairs: padded; thin: floats of all pairs of all parts of a tile; line: a row that may be read a vector beyond its end
  explicit Sizes(const PhmParams& p)
      : parts(p.division), pairs(round_up(p.division * p.factor_rank, kGroup)), thin(parts * pairs * kLanes), line(round_up(p.width, kVector) + kVector),
        rank(round_up(p.rank, kVector)) {}
};

// out[i] = the sum of the lanes of vector i.
void lane_sums(const float* v, int64_t count, float* out) {
  alignas(64) float turned[kLanes * kLanes];
  for (int64_t i = 0; i < count; i += kLanes) {
    transpose(v + i * kLanes, kLanes, turned, kLanes, kLanes, kLanes);
    Vec sum = Vec::loadu(turned);
    for (int64_t j = 1; j < kLanes; ++j) sum = sum + Vec::loadu(turned + j * kLanes);
    sum.store(out + i);
  }
}

// ---- Wide: kBlock rows of `parts` parts, vectors along a row. w: [pairs][ld]; thin numbers: [part][pair][lane], from the block's first lane.
// The next block is prefetched while one is read or written: so many streams of one part each are too short for the hardware to do it (measured: 3.6 -> 2.3 ms of an fp32 backward
// of 4096 x 768 in L3, 10 % more where x and dy come from memory).

// f(rows, stride) on a block of an input: where it is, or, where its last vectors would reach beyond a part or rows are missing, padded with zeros in fp32.
template <class A, class F>
void block(const void* base, int64_t stride, int64_t row, int64_t count, int64_t part, const Sizes& s, float* buffer, F&& f) {
  const A* src = static_cast<const A*>(base) + row * stride;
  if (count >= kBlock && part % kLanes == 0) return f(src, stride);
  for (int64_t i = 0; i < kBlock; ++i) widen(src + i * stride, buffer + i * s.line, i < count ? s.parts * part : 0, s.line);
  f(static_cast<const float*>(buffer), s.line);
}

// out[a][iq] = x_a . w[iq]
template <class E>
void dots(const E* x, int64_t stride, const float* w, int64_t ld, int64_t part, const Sizes& s, float* out) {
  alignas(64) float lanes[kLanes * kLanes], sums[kLanes];
  for (int64_t a = 0; a < s.parts; ++a)
    for (int64_t g = 0; g < s.pairs; g += kGroup) {
      const E* row = x + a * part;
      const float* factor = w + g * ld;
      Vec sum[kGroup][kBlock];  // a Vec begins as zero
      for (int64_t j = 0; j < part; j += kLanes) {
        Vec in[kBlock];
        for (int64_t r = 0; r < kBlock; ++r) {
          in[r] = load(row + r * stride + j);
          __builtin_prefetch(row + (r + kBlock) * stride + j);
        }
        for (int64_t q = 0; q < kGroup; ++q) {
          const Vec f = Vec::loadu(factor + q * ld + j);
          for (int64_t r = 0; r < kBlock; ++r) sum[q][r] = at::vec::fmadd(f, in[r], sum[q][r]);
        }
      }
      for (int64_t q = 0; q < kGroup; ++q)
        for (int64_t r = 0; r < kBlock; ++r) sum[q][r].store(lanes + (q * kBlock + r) * kLanes);
      lane_sums(lanes, kLanes, sums);
      for (int64_t q = 0; q < kGroup; ++q) std::memcpy(out + (a * s.pairs + g + q) * kLanes, sums + q * kBlock, kBlock * sizeof(float));
    }
}

// Row by row out_c = sum_iq numbers[c][iq] w[iq]. The last vector of a part reaches into the next part, which is written later.
void expand(const float* numbers, const float* w, int64_t ld, int64_t part, const Sizes& s, float* out) {
  for (int64_t c = 0; c < s.parts; ++c)
    for (int64_t g = 0; g < s.pairs; g += kGroup) {
      const float *number = numbers + (c * s.pairs + g) * kLanes, *factor = w + g * ld;
      float* row = out + c * part;
      Vec by[kGroup][kBlock];
      for (int64_t q = 0; q < kGroup; ++q)
        for (int64_t r = 0; r < kBlock; ++r) by[q][r] = Vec(number[q * kLanes + r]);
      for (int64_t j = 0; j < part; j += kLanes) {
        Vec f[kGroup];
        for (int64_t q = 0; q < kGroup; ++q) f[q] = Vec::loadu(factor + q * ld + j);
        for (int64_t r = 0; r < kBlock; ++r) {
          Vec sum = g == 0 ? Vec(0.f) : Vec::loadu(row + r * s.line + j);
          for (int64_t q = 0; q < kGroup; ++q) sum = at::vec::fmadd(by[q][r], f[q], sum);
          sum.store(row + r * s.line + j);
        }
      }
    }
}

template <int64_t kColumns, class E>
void outer_columns(const E* x, int64_t stride, const float* numbers, float* to, int64_t ld, int64_t part, const Sizes& s) {
  Vec sum[kGroup][kColumns];
  for (int64_t a = 0; a < s.parts; ++a)
    for (int64_t r = 0; r < kBlock; ++r) {
      Vec in[kColumns];
      for (int64_t v = 0; v < kColumns; ++v) {
        in[v] = load(x + a * part + r * stride + v * kLanes);
        __builtin_prefetch(x + a * part + (r + kBlock) * stride + v * kLanes);
      }
      for (int64_t q = 0; q < kGroup; ++q) {
        const Vec by(numbers[(a * s.pairs + q) * kLanes + r]);
        for (int64_t v = 0; v < kColumns; ++v) sum[q][v] = at::vec::fmadd(by, in[v], sum[q][v]);
      }
    }
  for (int64_t q = 0; q < kGroup; ++q)
    for (int64_t v = 0; v < kColumns; ++v) (Vec::loadu(to + q * ld + v * kLanes) + sum[q][v]).store(to + q * ld + v * kLanes);
}

// w[iq] += sum over rows and parts of numbers[a][iq] x_a
template <class E>
void outer(const E* x, int64_t stride, const float* numbers, float* w, int64_t ld, int64_t part, const Sizes& s) {
  for (int64_t g = 0; g < s.pairs; g += kGroup) {
    const float* number = numbers + g * kLanes;
    float* to = w + g * ld;
    int64_t j = 0;
    for (; j + kBlock * kLanes <= part; j += kBlock * kLanes) outer_columns<kBlock>(x + j, stride, number, to + j, ld, part, s);
    for (; j < part; j += kLanes) outer_columns<1>(x + j, stride, number, to + j, ld, part, s);
  }
}

template <class E>
void column_sums(const E* x, int64_t stride, int64_t width, float* sums) {
  vectors(width, [&](int64_t j) {
    Vec sum = load(x + j);
    for (int64_t r = 1; r < kBlock; ++r) sum = sum + load(x + r * stride + j);
    (Vec::loadu(sums + j) + sum).store(sums + j);
  });
}

// ---- Thin: one row a lane. v: [part][number][lane].

void thin_dots(const float* v, const float* w, int64_t ld, int64_t part, const Sizes& s, float* out) {
  for (int64_t a = 0; a < s.parts; ++a)
    for (int64_t g = 0; g < s.pairs; g += kGroup) {
      Vec sum[kGroup];
      for (int64_t j = 0; j < part; ++j) {
        const Vec in = Vec::loadu(v + (a * part + j) * kLanes);
        for (int64_t q = 0; q < kGroup; ++q) sum[q] = at::vec::fmadd(Vec(w[(g + q) * ld + j]), in, sum[q]);
      }
      for (int64_t q = 0; q < kGroup; ++q) sum[q].store(out + (a * s.pairs + g + q) * kLanes);
    }
}

void thin_expand(const float* numbers, const float* w, int64_t ld, int64_t part, const Sizes& s, float* out) {
  for (int64_t c = 0; c < s.parts; ++c)
    for (int64_t g = 0; g < s.pairs; g += kGroup) {
      Vec by[kGroup];
      for (int64_t q = 0; q < kGroup; ++q) by[q] = Vec::loadu(numbers + (c * s.pairs + g + q) * kLanes);
      for (int64_t j = 0; j < part; ++j) {
        float* to = out + (c * part + j) * kLanes;
        Vec sum = g == 0 ? Vec(0.f) : Vec::loadu(to);
        for (int64_t q = 0; q < kGroup; ++q) sum = at::vec::fmadd(by[q], Vec(w[(g + q) * ld + j]), sum);
        sum.store(to);
      }
    }
}

// to[iq][j] += sum over parts of numbers[a][iq] v[a][j], lane by lane
void thin_outer(const float* v, const float* numbers, float* to, int64_t ld, int64_t part, const Sizes& s) {
  for (int64_t g = 0; g < s.pairs; g += kGroup)
    for (int64_t j = 0; j < part; ++j) {
      Vec sum[kGroup];
      for (int64_t q = 0; q < kGroup; ++q) sum[q] = Vec::loadu(to + ((g + q) * ld + j) * kLanes);
      for (int64_t a = 0; a < s.parts; ++a) {
        const Vec in = Vec::loadu(v + (a * part + j) * kLanes);
        for (int64_t q = 0; q < kGroup; ++q) sum[q] = at::vec::fmadd(Vec::loadu(numbers + (a * s.pairs + g + q) * kLanes), in, sum[q]);
      }
      for (int64_t q = 0; q < kGroup; ++q) sum[q].store(to + ((g + q) * ld + j) * kLanes);
    }
}

// out[o][iq] = sum_t A_i[t, o] in[t][iq], or with A_i[o, t]: by the rule or its transpose. Padding pairs stay as they are.
void mix(const float* rule, bool transposed, int64_t factor_rank, const float* in, const Sizes& s, float* out) {
  const int64_t n = s.parts, step = transposed ? 1 : n, other = transposed ? n : 1;
  for (int64_t pair = 0; pair < n * factor_rank; ++pair)
    for (int64_t o = 0; o < n; ++o) {
      const float* a = rule + pair / factor_rank * n * n + o * other;
      Vec sum;
      for (int64_t t = 0; t < n; ++t) sum = at::vec::fmadd(Vec(a[t * step]), Vec::loadu(in + (t * s.pairs + pair) * kLanes), sum);
      sum.store(out + (o * s.pairs + pair) * kLanes);
    }
}

// to[i][a][c] += sum_q inner[a][iq] d_mixed[c][iq], lane by lane
void mix_outer(const float* inner, const float* d_mixed, int64_t factor_rank, const Sizes& s, float* to) {
  for (int64_t i = 0; i < s.parts; ++i)
    for (int64_t a = 0; a < s.parts; ++a)
      for (int64_t c = 0; c < s.parts; ++c, to += kLanes) {
        Vec sum = Vec::loadu(to);
        for (int64_t pair = i * factor_rank; pair < (i + 1) * factor_rank; ++pair)
          sum = at::vec::fmadd(Vec::loadu(inner + (a * s.pairs + pair) * kLanes), Vec::loadu(d_mixed + (c * s.pairs + pair) * kLanes), sum);
        sum.store(to);
      }
}

template <class A>
void round_to(float* v, int64_t n) {
  if constexpr (!std::is_same_v<A, float>) {
    A rounded[kPanel];
    for (int64_t i = 0; i < n; i += kPanel) narrow(v + i, rounded, std::min(kPanel, n - i)), widen(rounded, v + i, std::min(kPanel, n - i));
  }
}

// ---- The ranges.

// A (pairs / k, n, k) tensor as [pairs][ld], padded with zeros.
template <class A, class P>
void pack_factor(const void* src, int64_t pairs, int64_t k, int64_t n, int64_t ld, float scale, float* out) {
  float* work = scratch(pairs * n);
  widen_parameter<P, A>(static_cast<const P*>(src), work, pairs * n);
  for (int64_t pair = 0; pair < round_up(pairs, kGroup); ++pair)
    for (int64_t j = 0; j < ld; ++j) out[pair * ld + j] = pair < pairs && j < n ? scale * work[(pair / k * n + j) * k + pair % k] : 0.f;
}

template <class A, class P>
void prepare(const PhmParams& p) {
  const PhmNumbers to(p.packed, p);
  const int64_t n = p.division, pairs = n * p.factor_rank;
  const auto pack = [&](const PhmFactors& f, const PhmPacked& out, float scale) {
    widen_parameter<P, A>(static_cast<const P*>(f.rule), out.rule, n * n * n);
    pack_factor<A, P>(f.left, pairs, p.factor_rank, f.in, out.in, 1.f, out.left);
    pack_factor<A, P>(f.right, pairs, 1, f.out, out.out, scale, out.right);
  };
  pack(p.down, to.down, 1.f), pack(p.up, to.up, p.scale);
  vector_or<P, A>(p.b_down, to.b_down, p.rank, p.rank, 0.f);
  vector_or<P, A>(p.b_up, to.b_up, p.width, round_up(p.width, kVector), 0.f);
  vectors(round_up(p.width, kVector), [&](int64_t i) { (Vec::loadu(to.b_up + i) * Vec(p.scale)).store(to.b_up + i); });
}

template <class A, class P>
void forward(const PhmParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const PhmNumbers w(p.packed, p);
  const auto [x_rows, sums, inner, mixed, z, turned] = carve({kBlock * s.line, kBlock * s.line, s.thin, s.thin, s.rank * kLanes, s.rank * kLanes});
  std::fill(mixed, mixed + s.thin, 0.f);
  for (int64_t row = begin * kTileRows; row < std::min(p.rows, end * kTileRows); row += kLanes) {
    const int64_t m = std::min(kLanes, p.rows - row);
    for (int64_t r = 0; r < kLanes; r += kBlock)
      block<A>(p.x, p.x_stride, row + r, m - r, p.down.in, s, x_rows, [&](const auto* x, int64_t stride) { dots(x, stride, w.down.left, w.down.in, p.down.in, s, inner + r); });
    mix(w.down.rule, false, p.factor_rank, inner, s, mixed);
    thin_expand(mixed, w.down.right, w.down.out, p.down.out, s, z);
    for (int64_t i = 0; i < p.rank; ++i) (Vec::loadu(z + i * kLanes) + Vec(w.b_down[i])).store(z + i * kLanes);
    round_to<A>(z, p.rank * kLanes);
    if (p.z) {
      transpose(z, kLanes, turned, s.rank, p.rank, kLanes);
      for (int64_t i = 0; i < m; ++i) narrow(turned + i * s.rank, static_cast<A*>(p.z) + (row + i) * p.rank, p.rank);
    }
    vectors(p.rank * kLanes, [&](int64_t i) { activate<A>(Vec::loadu(z + i), p.activation).store(z + i); });
    thin_dots(z, w.up.left, w.up.in, p.up.in, s, inner);
    mix(w.up.rule, false, p.factor_rank, inner, s, mixed);
    for (int64_t r = 0; r < m; r += kBlock) {
      expand(mixed + r, w.up.right, w.up.out, p.up.out, s, sums);
      for (int64_t i = r; i < std::min(m, r + kBlock); ++i) {
        A* y = static_cast<A*>(p.y) + (row + i) * p.width;
        fetch<1>(y + kBlock * p.width, p.width);
        finish<A>(sums + (i - r) * s.line, w.b_up, p.add_input ? static_cast<const A*>(p.x) + (row + i) * p.x_stride : nullptr,
                  p.residual ? static_cast<const A*>(p.residual) + (row + i) * p.residual_stride : nullptr, y, p.width);
      }
    }
  }
}

template <class A, class P>
void backward(const PhmParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const PhmNumbers w(p.packed, p);
  const int64_t size = PhmNumbers::size(p), rules = PhmPacked::rule_size(p), down_right = s.pairs * w.down.out, up_left = s.pairs * w.up.in;
  const bool need_inner_gradient = p.dx || p.down.dleft, need_d_mixed = need_inner_gradient || p.down.drule, need_inner = p.down.drule || p.down.dright;
  const bool need_dz = need_d_mixed || p.down.dright || p.db_down, need_up_gradient = need_dz || p.up.dleft;
  const auto [rows, sums, db_up, inner, mixed, d_mixed, d_inner, a, slope, turned, drule_down, dright_down, drule_up, dleft_up, db_down] =
      carve({kBlock * s.line, kBlock * s.line, s.line, s.thin, s.thin, s.thin, s.thin, s.rank * kLanes, s.rank * kLanes, s.rank * kLanes, rules * kLanes, down_right * kLanes,
             rules * kLanes, up_left * kLanes, s.rank * kLanes});
  std::fill(d_inner, d_inner + s.thin, 0.f);  // the padding pairs, which `expand` reads; those of `mixed` give sums that nobody does
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t chunk_begin = chunk * chunk_rows(p.rows), chunk_end = std::min(p.rows, chunk_begin + chunk_rows(p.rows));
    const PhmNumbers d(p.partials + chunk * size, p);
    std::fill(d.down.rule, d.down.rule + size, 0.f);
    std::fill(drule_down, db_down + s.rank * kLanes, 0.f);
    for (int64_t row = chunk_begin; row < chunk_end; row += kLanes) {
      const int64_t m = std::min(kLanes, chunk_end - row);
      for (int64_t i = 0; i < kLanes; ++i) widen(static_cast<const A*>(p.z) + (row + i) * p.rank, turned + i * s.rank, i < m ? p.rank : 0, s.rank);
      transpose(turned, s.rank, a, kLanes, kLanes, p.rank);
      vectors(p.rank * kLanes, [&](int64_t i) {
        const Activated of = activate_both<A>(Vec::loadu(a + i), p.activation);
        of.value.store(a + i), of.slope.store(slope + i);
      });
      // The up-projection.
      if (p.up.drule || p.up.dright) thin_dots(a, w.up.left, w.up.in, p.up.in, s, inner);
      if (p.up.dright) mix(w.up.rule, false, p.factor_rank, inner, s, mixed);
      if (p.db_up) std::fill(db_up, db_up + s.line, 0.f);
      for (int64_t r = 0; r < kLanes; r += kBlock)
        block<A>(p.dy, p.dy_stride, row + r, m - r, p.up.out, s, rows, [&](const auto* dy, int64_t stride) {
          if (need_up_gradient || p.up.drule) dots(dy, stride, w.up.right, w.up.out, p.up.out, s, d_mixed + r);
          if (p.up.dright) outer(dy, stride, mixed + r, d.up.right, d.up.out, p.up.out, s);
          if (p.db_up) column_sums(dy, stride, p.width, db_up);
        });
      if (p.db_up) vectors(p.width, [&](int64_t j) { (Vec::loadu(d.b_up + j) + Vec::loadu(db_up + j)).store(d.b_up + j); });
      if (p.up.drule) mix_outer(inner, d_mixed, p.factor_rank, s, drule_up);
      if (need_up_gradient) mix(w.up.rule, true, p.factor_rank, d_mixed, s, d_inner);
      if (p.up.dleft) thin_outer(a, d_inner, dleft_up, w.up.in, p.up.in, s);
      if (!need_dz) continue;
      float* dz = a;
      thin_expand(d_inner, w.up.left, w.up.in, p.up.in, s, dz);
      vectors(p.rank * kLanes, [&](int64_t i) { (Vec::loadu(dz + i) * Vec::loadu(slope + i)).store(dz + i); });
      if (p.db_down) vectors(p.rank * kLanes, [&](int64_t i) { (Vec::loadu(db_down + i) + Vec::loadu(dz + i)).store(db_down + i); });
      // The down-projection, in one pass over x.
      if (need_d_mixed) thin_dots(dz, w.down.right, w.down.out, p.down.out, s, d_mixed);
      if (need_inner_gradient) mix(w.down.rule, true, p.factor_rank, d_mixed, s, d_inner);
      for (int64_t r = 0; r < kLanes; r += kBlock) {
        if (need_inner || p.down.dleft)
          block<A>(p.x, p.x_stride, row + r, m - r, p.down.in, s, rows, [&](const auto* x, int64_t stride) {
            if (need_inner) dots(x, stride, w.down.left, w.down.in, p.down.in, s, inner + r);
            if (p.down.dleft) outer(x, stride, d_inner + r, d.down.left, d.down.in, p.down.in, s);
          });
        if (!p.dx) continue;
        expand(d_inner + r, w.down.left, w.down.in, p.down.in, s, sums);
        for (int64_t i = r; i < std::min(m, r + kBlock); ++i) {
          A* dx = static_cast<A*>(p.dx) + (row + i) * p.width;
          fetch<1>(dx + kBlock * p.width, p.width);
          finish<A>(sums + (i - r) * s.line, nullptr, p.add_input ? static_cast<const A*>(p.dy) + (row + i) * p.dy_stride : nullptr, nullptr, dx, p.width);
        }
      }
      if (p.down.drule) mix_outer(inner, d_mixed, p.factor_rank, s, drule_down);
      if (p.down.dright) mix(w.down.rule, false, p.factor_rank, inner, s, mixed), thin_outer(dz, mixed, dright_down, w.down.out, p.down.out, s);
    }
    lane_sums(drule_down, rules, d.down.rule), lane_sums(dright_down, down_right, d.down.right);
    lane_sums(drule_up, rules, d.up.rule), lane_sums(dleft_up, up_left, d.up.left), lane_sums(db_down, s.rank, d.b_down);
  }
}

template <class A, class P>
void reduce(const PhmParams& p) {
  const PhmNumbers first(p.partials, p);
  const int64_t n = p.division, pairs = n * p.factor_rank, size = PhmNumbers::size(p), chunks = ceil_div(p.rows, chunk_rows(p.rows));
  float* total = scratch(size);
  const auto vector = [&](const float* partial, int64_t count, float scale, void* out) {
    if (!out) return;
    const float* sum = sum_chunks(partial, size, chunks, round_up(count, kVector), total);
    vectors(round_up(count, kVector), [&](int64_t i) { (Vec::loadu(sum + i) * Vec(scale)).store(total + i); });
    narrow(total, static_cast<P*>(out), count);
  };
  const auto factor = [&](const float* partial, int64_t k, int64_t part, int64_t ld, float scale, void* out) {
    if (!out) return;
    const float* sum = sum_chunks(partial, size, chunks, pairs * ld, total);
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t j = 0; j < part; ++j) static_cast<P*>(out)[(pair / k * part + j) * k + pair % k] = static_cast<P>(scale * sum[pair * ld + j]);
  };
  vector(first.down.rule, n * n * n, 1.f, p.down.drule), vector(first.up.rule, n * n * n, 1.f, p.up.drule);
  factor(first.down.left, p.factor_rank, p.down.in, first.down.in, 1.f, p.down.dleft), factor(first.up.left, p.factor_rank, p.up.in, first.up.in, 1.f, p.up.dleft);
  factor(first.down.right, 1, p.down.out, first.down.out, 1.f, p.down.dright), factor(first.up.right, 1, p.up.out, first.up.out, p.scale, p.up.dright);
  vector(first.b_down, p.rank, 1.f, p.db_down), vector(first.b_up, p.width, p.scale, p.db_up);
}

}  // namespace

void phm_prepare(const PhmParams& p) { FASTADAPT_DISPATCH(p, prepare, p) }
void phm_forward(const PhmParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH(p, forward, p, begin, end) }
void phm_backward(const PhmParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH(p, backward, p, begin, end) }
void phm_reduce(const PhmParams& p) { FASTADAPT_DISPATCH(p, reduce, p) }

}  // namespace fastadapt::cpu
