// Dropout, the sum with the residual stream and a layer or RMS norm: v = r + M (.) x / (1 - p), y = w (.) (v - mean) rstd + b.
//
// Memory decides the time: x and the residual are read once, v and y written once, and backward reads dy, v and dv once. Between that a row stays in fp32 in L1. Behind its end a
// block holds zeros in place of what is loaded.
#include "dropout_add_norm.h"

#include <cmath>
#include <tuple>

#include "dropout.h"

namespace fastadapt::cpu {
namespace {

// A weight or bias in fp32, as it is: torch's norms do not round theirs to the activations' dtype either.
void load_vector(Type type, const void* src, int64_t n, float otherwise, float* dst) {
  if (!src)
    std::fill(dst, dst + n, otherwise);
  else if (type == kFloat)
    widen(static_cast<const float*>(src), dst, n);
  else if (type == kBFloat16)
    widen(static_cast<const BFloat16*>(src), dst, n);
  else
    widen(static_cast<const Half*>(src), dst, n);
}

// A row is worked on in blocks of two vectors, which is what one vector of a half-precision type becomes.
constexpr int64_t kBlock = 2 * Vec::size();
struct Block {
  Vec a, b;
  Block(Vec a, Vec b) : a(a), b(b) {}
  explicit Block(float v) : a(v), b(v) {}
  explicit Block(const float* src) : a(Vec::loadu(src)), b(Vec::loadu(src + Vec::size())) {}
  explicit Block(const BFloat16* src) : Block(src, 0) {}
  explicit Block(const Half* src) : Block(src, 0) {}
  void store(float* dst) const { a.store(dst), b.store(dst + Vec::size()); }
  template <class T>
  void store(T* dst) const { narrow<T>(a, b).store(dst); }
  friend Block operator+(Block x, Block y) { return {x.a + y.a, x.b + y.b}; }
  friend Block operator-(Block x, Block y) { return {x.a - y.a, x.b - y.b}; }
  friend Block operator*(Block x, Block y) { return {x.a * y.a, x.b * y.b}; }

  // The first n numbers, then zeros.
  Block first(int64_t n) const {
    constexpr int64_t v = Vec::size();
    return {n < v ? Vec::set(Vec(0.f), a, n) : a, n < v ? Vec(0.f) : Vec::set(Vec(0.f), b, n - v)};
  }
  float total() const {
    return at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, a + b);
  }

 private:
  template <class T>
  Block(const T* src, int) {
    std::tie(a, b) = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(src));
  }
};

// The block at i of a row of n numbers, zeros behind it.
template <class T>
inline Block load(const T* src, int64_t i, int64_t n) {
  if (i + kBlock <= n) return Block(src + i);
  T tail[kBlock] = {};
  std::copy(src + i, src + n, tail);
  return Block(tail);
}

template <class T>
inline void store(Block v, T* dst, int64_t i, int64_t n) {
  if (i + kBlock <= n) return v.store(dst + i);
  T tail[kBlock];
  v.store(tail);
  std::copy(tail, tail + n - i, dst + i);
}

// A block as it is once stored and read again.
template <class T>
inline Block rounded(Block v) {
  if constexpr (std::is_same_v<T, float>) return v;
  else {
    const auto [a, b] = at::vec::convert_to_float<T>(narrow<T>(v.a, v.b));
    return {a, b};
  }
}

inline Block dropped(Block v, const int8_t* mask) { return {masked(v.a, mask), masked(v.b, mask + Vec::size())}; }

// Masks of the rows of one tile.
struct Masks {
  const NormParams& p;
  int8_t* bytes;
  void draw(int64_t row) const { draw_mask(static_cast<uint64_t>(*p.seed), p.threshold, row, std::min(kNormRows, p.rows - row), p.width, bytes); }
  const int8_t* of(int64_t row) const { return bytes + row % kNormRows * mask_stride(p.width); }
  static int64_t floats(const NormParams& p) { return p.seed ? kNormRows * mask_stride(p.width) / int64_t{sizeof(float)} : 0; }
};

template <class T>
auto row_of(T* base, int64_t stride, int64_t row) {
  return base ? base + row * stride : nullptr;
}

template <class A, class V>
void forward(const NormParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.width, padded = p.padded();
  float *u = scratch(3 * padded + Masks::floats(p)), *weight = u + padded, *bias = weight + padded;
  const Masks masks{p, reinterpret_cast<int8_t*>(bias + padded)};
  load_vector(p.parameter_type, p.weight, n, 1.f, weight), load_vector(p.parameter_type, p.bias, n, 0.f, bias);
  const Block kept(p.kept);
  for (int64_t row = begin * kNormRows; row < std::min(p.rows, end * kNormRows); ++row) {
    const A* x = static_cast<const A*>(p.x) + row * p.x_stride;
    const V* residual = row_of(static_cast<const V*>(p.residual), p.residual_stride, row);
    V *v = row_of(static_cast<V*>(p.v), n, row), *y = static_cast<V*>(p.y) + row * n;
    if (p.seed && row % kNormRows == 0) masks.draw(row);
    const int8_t* mask = p.seed ? masks.of(row) : nullptr;
    Block sum(0.f), squares(0.f);
    for (int64_t i = 0; i < n; i += kBlock) {
      Block s = load(x, i, n);
      if (mask) s = dropped(s, mask + i) * kept;
      if (residual) s = s + load(residual, i, n);
      if (v) store(s, v, i, n);
      s = rounded<V>(s);
      sum = sum + s, squares = squares + s * s;
      s.store(u + i);
    }
    if (p.norm == kNoNorm) continue;
    const float size = static_cast<float>(n);
    float mean = 0.f, off = 0.f;  // off: what a long sum's rounding took from the mean, beside which the deviations may be small
    if (p.norm == kLayerNorm) {
      mean = sum.total() / size, sum = squares = Block(0.f);
      for (int64_t i = 0; i < n; i += kBlock) {
        Block centred = Block(u + i) - Block(mean);
        if (i + kBlock > n) centred = centred.first(n - i);
        sum = sum + centred, squares = squares + centred * centred;
      }
      off = sum.total() / size, mean += off;
    }
    const float rstd = 1.f / std::sqrt(std::max(squares.total() / size - off * off, 0.f) + p.eps);
    if (p.mean) p.mean[row] = mean;
    if (p.rstd) p.rstd[row] = rstd;
    for (int64_t i = 0; i < n; i += kBlock) store((Block(u + i) - Block(mean)) * Block(rstd) * Block(weight + i) + Block(bias + i), y, i, n);
  }
}

template <class A, class V>
void backward(const NormParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.width, padded = p.padded();
  float *c = scratch(5 * padded + Masks::floats(p)), *xhat = c + padded, *weight = xhat + padded, *dweight = weight + padded, *dbias = dweight + padded;
  const Masks masks{p, reinterpret_cast<int8_t*>(dbias + padded)};
  load_vector(p.parameter_type, p.weight, n, 1.f, weight), std::fill(weight + n, weight + padded, 0.f);
  const Block kept(p.kept);
  const bool need_weight = p.dweight, need_bias = p.dbias;
  for (int64_t unit = begin; unit < end; ++unit) {
    float* partial = p.partials ? p.partials + unit * 2 * padded : nullptr;
    if (partial) std::fill(partial, partial + 2 * padded, 0.f);
    const int64_t first = unit * p.unit_rows(), last = std::min(p.rows, first + p.unit_rows());
    for (int64_t tile = first; tile < last; tile += kNormRows) {
      if (p.seed && p.dx) masks.draw(tile);
      if (partial) std::fill(dweight, dweight + 2 * padded, 0.f);
      for (int64_t row = tile; row < std::min(last, tile + kNormRows); ++row) {
        const V *dy = row_of(static_cast<const V*>(p.dy), p.dy_stride, row), *dv = row_of(static_cast<const V*>(p.dv), p.dv_stride, row);
        const V* v = row_of(static_cast<const V*>(p.saved), p.saved_stride, row);
        V* dresidual = row_of(static_cast<V*>(p.dresidual), n, row);
        A* dx = row_of(static_cast<A*>(p.dx), n, row);
        const int8_t* mask = p.seed && dx ? masks.of(row) : nullptr;
        const float mean = p.mean ? p.mean[row] : 0.f, rstd = p.norm ? p.rstd[row] : 1.f;
        Block sum(0.f), products(0.f);
        if (p.norm)
          for (int64_t i = 0; i < n; i += kBlock) {
            const Block d = load(dy, i, n), h = (load(v, i, n) - Block(mean)) * Block(rstd), e = d * Block(weight + i);
            if (need_weight) (Block(dweight + i) + d * h).store(dweight + i);
            if (need_bias) (Block(dbias + i) + d).store(dbias + i);
            sum = sum + e, products = products + e * h;
            e.store(c + i), h.store(xhat + i);
          }
        if (!dx && !dresidual) continue;
        const Block of_mean(p.norm == kLayerNorm ? sum.total() / static_cast<float>(n) : 0.f), of_deviation(products.total() / static_cast<float>(n));
        for (int64_t i = 0; i < n; i += kBlock) {
          Block g(0.f);
          if (p.norm) g = (Block(c + i) - of_mean - Block(xhat + i) * of_deviation) * Block(rstd);
          if (dv) g = g + load(dv, i, n);
          if (dresidual) store(g, dresidual, i, n);
          if (mask) g = dropped(g, mask + i) * kept;
          if (dx) store(g, dx, i, n);
        }
      }
      if (partial) vectors(2 * padded, [&](int64_t i) { (Vec::loadu(partial + i) + Vec::loadu(dweight + i)).store(partial + i); });
    }
  }
}

template <class P>
void reduce(const NormParams& p) {
  const int64_t padded = p.padded(), chunks = ceil_div(p.rows, p.unit_rows());
  float* work = scratch(padded);
  reduce_vector<P>(p.partials, 2 * padded, chunks, p.width, p.dweight, work), reduce_vector<P>(p.partials + padded, 2 * padded, chunks, p.width, p.dbias, work);
}

#ifdef FASTADAPT_MUTATION
#define FASTADAPT_NORM_DISPATCH(FUNCTION)                                    \
  if (p.x_type == kFloat) return FUNCTION<float, float>(p, begin, end);     \
  return p.sum_type == kFloat ? FUNCTION<BFloat16, float>(p, begin, end) : FUNCTION<BFloat16, BFloat16>(p, begin, end);
#else
#define FASTADAPT_NORM_DISPATCH(FUNCTION)                                                                                     \
  switch (p.x_type) {                                                                                                         \
    case kFloat: return FUNCTION<float, float>(p, begin, end);                                                                \
    case kBFloat16: return p.sum_type == kFloat ? FUNCTION<BFloat16, float>(p, begin, end) : FUNCTION<BFloat16, BFloat16>(p, begin, end); \
    default: return p.sum_type == kFloat ? FUNCTION<Half, float>(p, begin, end) : FUNCTION<Half, Half>(p, begin, end);        \
  }
#endif

}  // namespace

void norm_forward(const NormParams& p, int64_t begin, int64_t end) { FASTADAPT_NORM_DISPATCH(forward) }
void norm_backward(const NormParams& p, int64_t begin, int64_t end) { FASTADAPT_NORM_DISPATCH(backward) }
void norm_reduce(const NormParams& p) { p.parameter_type == kFloat ? reduce<float>(p) : p.parameter_type == kBFloat16 ? reduce<BFloat16>(p) : reduce<Half>(p); }

}  // namespace fastadapt::cpu
