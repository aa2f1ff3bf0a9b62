// Pieces that all CPU kernels share: conversion to and from fp32, packing, tile GEMMs on brgemm, activations, partial sums.
// Each kernel file is compiled once per vector level (CPU_CAPABILITY) into a library of its own, so nothing here may be merged across levels by a linker.
#pragma once
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "../include/bottleneck.h"
#include "../include/plan.h"

#if !defined(CPUBLAS_BRGEMM_F32F32F32) || !defined(CPUBLAS_BRGEMM_BF16BF16F32)
#error "this torch has no fp32 or bf16 brgemm"
#endif

namespace fastadapt::cpu {

using Vec = at::vec::Vectorized<float>;
using at::BFloat16;
using at::Half;
using namespace fastadapt::plan;

#ifdef FASTADAPT_MUTATION
// The build of tests/mutation: one block a thread, anew for each call, full of NaN, with an unreadable page behind the last float.
float* scratch(int64_t floats);
#else
// Per-thread working memory, kept between calls: a fresh 400 KB block per call costs about 100 page faults.
inline float* scratch(int64_t floats) {
  struct Block {
    float* data = nullptr;
    int64_t size = 0;
    ~Block() { std::free(data); }
  };
  static thread_local Block block;
  if (block.size < floats) {
    const int64_t size = round_up(floats, 1024);
    void* const data = std::aligned_alloc(64, size * sizeof(float));
    if (!data) throw std::bad_alloc();
    std::free(block.data);
    block.data = static_cast<float*>(data), block.size = size;
  }
  return block.data;
}
#endif

// f over whole vectors of n floats; n is a multiple of 8 and buffers are padded to whole panels, so a vector never leaves its buffer.
template <class F>
inline void vectors(int64_t n, F&& f) {
  for (int64_t i = 0; i < n; i += Vec::size()) f(i);
}

// n numbers, mostly a panel's 32: a call of memcpy takes longer.
inline void copy(const float* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size()) Vec::loadu(src + i).store(dst + i);
  for (; i < n; ++i) dst[i] = src[i];
}

template <class T>
inline void widen(const T* src, float* dst, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    copy(src, dst, n);
  } else {
    constexpr int64_t step = at::vec::Vectorized<T>::size();
    int64_t i = 0;
    for (; i + step <= n; i += step) {
      auto [a, b] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(src + i));
      a.store(dst + i), b.store(dst + i + Vec::size());
    }
    for (; i < n; ++i) dst[i] = static_cast<float>(src[i]);
  }
}

// Writes n numbers; pad up to `to` with zeros.
template <class T>
inline void widen(const T* src, float* dst, int64_t n, int64_t to) {
  widen(src, dst, n);
  std::fill(dst + n, dst + to, 0.f);
}

#if defined(CPU_CAPABILITY_AVX512)
static const bool kRoundsToBFloat16 = __builtin_cpu_supports("avx512bf16");
#endif

// Two vectors rounded to half precision. The processor's instruction for bf16, where it is there, replaces 16 operations; it takes numbers below 2^-126 as zero.
template <class T>
inline at::vec::Vectorized<T> narrow(Vec low, Vec high) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (kRoundsToBFloat16) {
      __m512i both;
      asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(static_cast<__m512>(high)), "v"(static_cast<__m512>(low)));
      return both;
    }
#endif
  return at::vec::convert_from_float<T>(low, high);
}

template <class T>
inline void narrow(const float* src, T* dst, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    copy(src, dst, n);
  } else {
    constexpr int64_t step = at::vec::Vectorized<T>::size();
    int64_t i = 0;
    for (; i + step <= n; i += step) narrow<T>(Vec::loadu(src + i), Vec::loadu(src + i + Vec::size())).store(dst + i);
    for (; i < n; ++i) dst[i] = static_cast<T>(src[i]);
  }
}

// Asks for n numbers that will be read or written. Rows that are worked on in blocks of columns, a few lines here and a few there, are not foreseen by the processor, and a store that misses
// holds up all behind it: VL-PET-large's epilogue took 2.6 times as long without (bf16, 4096 rows, measured on CPU).
constexpr int64_t kAhead = 8;  // rows
template <int write = 0, class T>
inline void fetch(const T* at, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(at + j, write);
}

// One vector of fp32 from any activation dtype.
inline Vec load(const float* from) { return Vec::loadu(from); }
inline Vec load(const BFloat16* from) {
  Vec v;
  at::vec::load_fp32_from_bf16(from, v);
  return v;
}
inline Vec load(const Half* from) {
  Vec v;
  at::vec::load_fp32_from_fp16(from, v);
  return v;
}

// out = sum [+ bias] [+ in] [+ other], a row of n numbers.
template <class A>
inline void finish(const float* sum, const float* bias, const A* in, const A* other, A* out, int64_t n) {
  constexpr int64_t step = at::vec::Vectorized<A>::size(), count = step / Vec::size();
  const auto add = [](const auto* src, Vec(&v)[count]) {
    for (int64_t j = 0; j < count; ++j) v[j] = v[j] + load(src + j * Vec::size());
  };
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    Vec v[count];
    for (int64_t j = 0; j < count; ++j) v[j] = Vec::loadu(sum + i + j * Vec::size());
    if (bias) add(bias + i, v);
    if (in) add(in + i, v);
    if (other) add(other + i, v);
    if constexpr (std::is_same_v<A, float>)
      v[0].store(out + i);
    else
      narrow<A>(v[0], v[1]).store(out + i);
  }
  for (; i < n; ++i) out[i] = static_cast<A>(sum[i] + (bias ? bias[i] : 0.f) + (in ? static_cast<float>(in[i]) : 0.f) + (other ? static_cast<float>(other[i]) : 0.f));
}

// v := factor v, n numbers, a multiple of 8.
inline void scale_by(float factor, float* v, int64_t n) {
  vectors(n, [&](int64_t i) { (Vec::loadu(v + i) * Vec(factor)).store(v + i); });
}

// A parameter as the kernels see it: rounded to the activation dtype A (house rule: kernels round parameters to A on load).
template <class P, class A>
inline void widen_parameter(const P* src, float* dst, int64_t n) {
  widen(src, dst, n);
  if constexpr (!std::is_same_v<P, A>) {
    A rounded[kPanel];
    for (int64_t i = 0; i < n; i += kPanel) narrow(dst + i, rounded, std::min(kPanel, n - i)), widen(rounded, dst + i, std::min(kPanel, n - i));
  }
}

template <class P, class A>
inline void vector_or(const void* src, float* dst, int64_t n, int64_t to, float otherwise) {
  if (src)
    widen_parameter<P, A>(static_cast<const P*>(src), dst, n), std::fill(dst + n, dst + to, 0.f);
  else
    std::fill(dst, dst + to, otherwise);
}

// exp(v) and 1 / v beside activations of type A: of half-precision ones to 2^-20 of the value, which their rounding hides; a sigmoid takes 0.6 of the time (measured on CPU). NaN stays NaN; above 87 v is cut off.
template <class A>
inline Vec exponential(Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (!std::is_same_v<A, float>) {
    const __m512 x = _mm512_max_ps(_mm512_set1_ps(-120.f), _mm512_min_ps(_mm512_set1_ps(87.f), v));  // of a NaN and a number these give their second argument
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147181f), x);
    __m512 sum = _mm512_fmadd_ps(r, _mm512_set1_ps(0.00828929059f), _mm512_set1_ps(0.0418978221f));
    for (const float c : {0.166676521f, 0.499991506f, 0.999999701f, 1.f}) sum = _mm512_fmadd_ps(r, sum, _mm512_set1_ps(c));
    return _mm512_scalef_ps(sum, n);
  }
#endif
  return v.exp();
}
template <class A>
inline Vec inverse(Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (!std::is_same_v<A, float>) {
    const __m512 r = _mm512_rcp14_ps(v);
    return _mm512_mul_ps(r, _mm512_fnmadd_ps(r, v, _mm512_set1_ps(2.f)));
  }
#endif
  return Vec(1.f) / v;
}

// sigma(v), and 1 - sigma(v), which 1 - s would round away near s = 1 (gelu_new's derivative multiplies that by about 35). Below -80 sigma is 0, however large what it multiplies.
template <class A>
struct Logistic {
  Vec s, rest;
  explicit Logistic(Vec v) {
    const Vec e = exponential<A>(at::vec::maximum(v, Vec(-80.f)).neg());
    s = inverse<A>(Vec(1.f) + e), rest = e * s, s = Vec::blendv(s, Vec(0.f), v < Vec(-80.f));
  }
};

template <class A>
inline Vec sigmoid(Vec v) {
  const Vec s = inverse<A>(Vec(1.f) + exponential<A>(v.neg()));
  return std::is_same_v<A, float> ? s : Vec::blendv(s, Vec(0.f), v < Vec(-80.f));  // where exp overflows fp32's is 0
}

inline Vec of_gelu_new(Vec z) { return Vec(1.5957691216057308f) * z * (Vec(1.f) + Vec(0.044715f) * z * z); }

template <class A>
inline Vec activate(Vec z, Activation f) {
  switch (f) {
    case kRelu: return at::vec::maximum(z, Vec(0.f));
    case kGelu: return z * Vec(0.5f) * (Vec(1.f) + (z * Vec(0.70710678118654752f)).erf());
    case kGeluNew: return z * sigmoid<A>(of_gelu_new(z));
    case kSilu: return z * sigmoid<A>(z);
    default: return z;
  }
}

struct Activated {
  Vec value, slope;
};
// phi(z) and its derivative, with one exponential for both.
template <class A>
inline Activated activate_both(Vec z, Activation f) {
  const Vec one(1.f);
  switch (f) {
    case kRelu: return {at::vec::maximum(z, Vec(0.f)), Vec::blendv(Vec(0.f), one, z > Vec(0.f))};
    case kGelu: {
      const Vec cdf = Vec(0.5f) * (one + (z * Vec(0.70710678118654752f)).erf());
      return {z * cdf, cdf + z * Vec(0.3989422804014327f) * exponential<A>(z * z * Vec(-0.5f))};
    }
    case kGeluNew: {
      const Logistic<A> g(of_gelu_new(z));
      return {z * g.s, g.s + z * g.s * g.rest * Vec(1.5957691216057308f) * (one + Vec(0.134145f) * z * z)};
    }
    case kSilu: {
      const Logistic<A> g(z);
      return {z * g.s, g.s * (one + z * g.rest)};
    }
    default: return {z, one};
  }
}

// A whole block of vectors. Inlined with its constants it stays in registers.
[[gnu::flatten]] inline void transpose_block(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  at::vec::transpose_mxn<float>(src, ld_src, dst, ld_dst, static_cast<int>(Vec::size()), static_cast<int>(Vec::size()));
}

// dst (cols x rows, leading dimension ld_dst) = src' for a block of 32-bit words; rows and cols are multiples of 8 or the buffers are padded.
inline void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst, int64_t rows, int64_t cols) {
  constexpr int64_t v = Vec::size();
  for (int64_t i = 0; i < rows; i += v)
    for (int64_t j = 0; j < cols; j += v)
      if (i + v <= rows && j + v <= cols)
        transpose_block(src + i * ld_src + j, ld_src, dst + j * ld_dst + i, ld_dst);
      else
        at::vec::transpose_mxn<float>(src + i * ld_src + j, ld_src, dst + j * ld_dst + i, ld_dst, static_cast<int>(std::min(v, rows - i)), static_cast<int>(std::min(v, cols - j)));
}

// ---- GEMM operands, of numbers G: fp32, or bf16 where activations are bf16 and the processor multiplies it (twice as fast on AVX512-BF16, and x and dy need no conversion).
// A K x N operand is packed as [N / 32 panels][K][32], of bf16 as [N / 32][K / 2][32][2], padded with zeros.

template <class G>
constexpr int64_t kPair = sizeof(float) / sizeof(G);  // numbers of consecutive rows that make a 32-bit word
template <class G>
constexpr int64_t depth_of(int64_t k) {
  return round_up(k, kPair<G>);
}

// n <= 64 numbers of a parameter, rounded to A, times scale; zeros up to `to`, a multiple of 8.
template <class P, class A, class G>
inline void load_parameter(const P* src, int64_t n, int64_t to, float scale, G* dst) {
  if constexpr (std::is_same_v<G, float>) {
    widen_parameter<P, A>(src, dst, n);
    if (scale != 1.f) scale_by(scale, dst, to);
  } else if (scale != 1.f) {
    float line[2 * kPanel];
    widen_parameter<P, A>(src, line, n), scale_by(scale, line, to), narrow(line, dst, n);
  } else if constexpr (std::is_same_v<P, G>) {
    std::memcpy(dst, src, n * sizeof(G));
  } else {
    narrow(src, dst, n);
  }
  std::fill(dst + n, dst + to, G(0.f));
}

// Rows 2 i and 2 i + 1 of a panel as row i of words.
inline void interleave(const BFloat16* first, const BFloat16* second, BFloat16* out) {
  typedef uint32_t Words __attribute__((vector_size(sizeof(Vec))));
  for (int64_t j = 0; j < kPanel; j += 2 * Vec::size()) {
    Words a, b;
    std::memcpy(&a, first + j, sizeof(a)), std::memcpy(&b, second + j, sizeof(b));
    const Words even = (a & 0xffff) | (b << 16), odd = (a >> 16) | (b & 0xffff0000);
    const auto [low, high] = at::vec::interleave2<float>(Vec::loadu(&even), Vec::loadu(&odd));
    low.store(out + 2 * j), high.store(out + 2 * j + 2 * Vec::size());
  }
}

// Operand W itself, row-major K x N; row k times scale[k] (scale may be null). Panels [begin, end).
template <class P, class A, class G>
inline void pack(const void* w, int64_t k, int64_t n, const float* scale, G* out, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t n0 = p * kPanel, cols = std::min(kPanel, n - n0);
    const P* src = static_cast<const P*>(w) + n0;
    G* panel = out + n0 * depth_of<G>(k);
    for (int64_t i = 0; i < k; i += kPair<G>, panel += kPair<G> * kPanel) {
      if constexpr (std::is_same_v<G, float>) {
        load_parameter<P, A>(src + i * n, cols, kPanel, scale ? scale[i] : 1.f, panel);
      } else {
        BFloat16 lines[2 * kPanel]{};
        for (int64_t j = 0; j < std::min<int64_t>(2, k - i); ++j) load_parameter<P, A>(src + (i + j) * n, cols, kPanel, scale ? scale[i + j] : 1.f, lines + j * kPanel);
        interleave(lines, lines + kPanel, panel);
      }
    }
  }
}

// Operand W', W row-major N x K; column n times scale[n] (may be null). A word of W is a word of the operand.
template <class P, class A, class G>
inline void pack_transposed(const void* w, int64_t n, int64_t k, const float* scale, G* out, int64_t begin, int64_t end) {
  constexpr int64_t step = kPanel * kPair<G>;
  alignas(64) G block[kPanel * step];
  for (int64_t p = begin; p < end; ++p) {
    const int64_t n0 = p * kPanel, cols = std::min(kPanel, n - n0), whole = round_up(cols, 8);
    const P* src = static_cast<const P*>(w) + n0 * k;
    G* panel = out + n0 * depth_of<G>(k);
    if constexpr (std::is_same_v<P, float> && std::is_same_v<A, float>) {
      for (int64_t k0 = 0; k0 < k; k0 += kPanel) transpose(src + k0, k, panel + k0 * kPanel, kPanel, cols, std::min(kPanel, k - k0));
      if (scale || cols < whole)
        for (int64_t i = 0; i < k; ++i, panel += kPanel) {
          std::fill(panel + cols, panel + whole, 0.f);
          if (scale) vectors(whole, [&](int64_t j) { (Vec::loadu(panel + j) * Vec::loadu(scale + n0 + j)).store(panel + j); });
        }
      continue;
    }
    if (cols < whole) std::memset(block, 0, sizeof(block));
    for (int64_t k0 = 0; k0 < k; k0 += step) {
      const int64_t depth = std::min(step, k - k0);
      for (int64_t j = 0; j < cols; ++j) load_parameter<P, A>(src + j * k + k0, depth, round_up(depth, 8), scale ? scale[n0 + j] : 1.f, block + j * step);
      transpose(reinterpret_cast<const float*>(block), kPanel, reinterpret_cast<float*>(panel + k0 * kPanel), kPanel, whole, ceil_div(depth, kPair<G>));
    }
  }
}

// Two vectors of a weight.
template <class P, class A>
inline std::pair<Vec, Vec> weights(const P* src) {
  if constexpr (std::is_same_v<P, A>)
    return {load(src), load(src + Vec::size())};
  else {
    A rounded[2 * Vec::size()];
    narrow<A>(load(src), load(src + Vec::size())).store(rounded);
    return {load(rounded), load(rounded + Vec::size())};
  }
}

// out[i][n] = rows[i] . W[n] for M rows and n in [begin, end): weights where they lie, W row-major N x K. Rows are zero from K to a multiple of two vectors.
template <int M, class P, class A>
inline void products(const float* rows, int64_t ld, int64_t k, const P* w, int64_t begin, int64_t end, float* out, int64_t ld_out) {
  constexpr int64_t v = Vec::size(), group = v / M;
  for (int64_t n = begin; n < end; n += group) {
    Vec sums[v];
    std::fill(sums, sums + v, Vec(0.f));
    const P* of[group];
    for (int64_t g = 0; g < group; ++g) of[g] = w + std::min(n + g, end - 1) * k;
    for (int64_t j = 0; j < k; j += 2 * v) {
      P last[group][2 * v];
      if (j + 2 * v > k)
        for (int64_t g = 0; g < group; ++g) std::fill(std::copy(of[g], of[g] + k - j, last[g]), last[g] + 2 * v, P(0.f)), of[g] = last[g];
#pragma GCC unroll 16
      for (int64_t g = 0; g < group; ++g) {
        const auto [low, high] = weights<P, A>(of[g]);
        of[g] += 2 * v;
#pragma GCC unroll 16
        for (int64_t i = 0; i < M; ++i) sums[g * M + i] = at::vec::fmadd(high, Vec::loadu(rows + i * ld + j + v), at::vec::fmadd(low, Vec::loadu(rows + i * ld + j), sums[g * M + i]));
      }
    }
    float block[v * v], turned[v * v];
    for (int64_t i = 0; i < v; ++i) sums[i].store(block + i * v);
    transpose_block(block, v, turned, v);
    Vec total = Vec::loadu(turned);
    for (int64_t i = 1; i < v; ++i) total = total + Vec::loadu(turned + i * v);
    total.store(block);
    for (int64_t g = 0; g < std::min(group, end - n); ++g)
      for (int64_t i = 0; i < M; ++i) out[i * ld_out + n + g] = block[g * M + i];
  }
}

// C[:, n0:n1] (m x N, row-major from column n0) = A (m x K) . operand[:, n0:n1]. Long sums are cut: a panel of 192 x 32 floats stays in L1, and sums of sums round less.
template <class G>
inline void matmul(int64_t m, int64_t k, int64_t n, const G* a, int64_t lda, const G* packed, float* c, int64_t ldc, int64_t n0, int64_t n1) {
  constexpr int64_t depth = kDepth * kPair<G>;
  const int64_t whole = depth_of<G>(k);
  for (int64_t j = n0; j < n1; j += kPanel)
    for (int64_t i = 0; i < k; i += depth)
      at::native::cpublas::brgemm(m, std::min(kPanel, round_up(n - j, 8)), std::min(depth, whole - i), lda, kPanel, ldc, i > 0, a + i, packed + j * whole + i * kPanel, c + (j - n0),
                                  kPair<G> > 1);
}

// Behind the last GEMM of a range: gives back the matrix unit, which a processor that has one holds configured.
template <class G>
inline void release() {
  if constexpr (std::is_same_v<G, BFloat16>) at::native::cpublas::brgemm_release();
}

// Numbers of a tile as an operand: where they are, or converted to `buffer`.
template <class G>
inline const G* operand(const float* src, int64_t n, G* buffer) {
  if constexpr (std::is_same_v<G, float>) return src;
  narrow(src, buffer, n);
  return buffer;
}

// Rows of an input as operand: in place where they already are, else converted, ragged tiles padded with zero rows.
template <class G>
struct Rows {
  const G* data;
  int64_t stride;
};

// Where the rows of a call lie: one after the other, or, with `order`, a task's rows among those of other tasks.
struct RowIndex {
  const int64_t* order;
  int64_t operator()(int64_t i) const { return order ? order[i] : i; }
  bool consecutive(int64_t i, int64_t m) const { return !order || order[i + m - 1] - order[i] == m - 1; }  // a task's rows are in ascending order
};

// Whether m rows of a tile are an operand where they lie. Each stride is a JIT compilation of brgemm per thread, and a tile's bytes are an int there: rows far apart, such as the first
// tokens of sequences, whose stride is their length, are copied.
constexpr int64_t kMaxStride = 1 << 14;
template <class A, class G>
constexpr bool is_operand(int64_t m, int64_t height, int64_t width, int64_t stride) {
  constexpr int64_t whole = kPair<G> > 1 ? kPanel : Vec::size();  // what is read of a row at a time: bf16 by panels
  return std::is_same_v<A, G> && m == height && width % whole == 0 && stride <= kMaxStride;
}

template <class A, class G>
inline Rows<G> load_rows(const void* base, int64_t stride, RowIndex at, int64_t row, int64_t m, int64_t height, int64_t width, G* buffer, int64_t padded_width) {
  const A* src = static_cast<const A*>(base);
  if constexpr (std::is_same_v<A, G>)
    if (is_operand<A, G>(m, height, width, stride) && at.consecutive(row, m)) return {src + at(row) * stride, stride};
  for (int64_t i = 0; i < m; ++i) {
    const A* from = src + at(row + i) * stride;
    G* to = buffer + i * padded_width;
    if constexpr (std::is_same_v<A, G>)
      std::memcpy(to, from, width * sizeof(G));
    else
      widen(from, to, width);
    std::fill(to + width, to + padded_width, G(0.f));
  }
  std::fill(buffer + m * padded_width, buffer + height * padded_width, G(0.f));
  return {buffer, padded_width};
}

template <class A, class G>
inline Rows<G> load_rows(const void* base, int64_t stride, int64_t row, int64_t m, int64_t height, int64_t width, G* buffer, int64_t padded_width) {
  return load_rows<A>(base, stride, RowIndex{nullptr}, row, m, height, width, buffer, padded_width);
}

// z := rounded(z + bias), stored unpadded if asked for; then z := phi(z). Row i goes to row at(first + i) of `out`.
template <class A>
inline void activate_rows(float* z, int64_t m, int64_t rank, int64_t ld, const float* bias, Activation f, A* out, int64_t stride, RowIndex at = {nullptr}, int64_t first = 0) {
  A rounded[kPanel];
  for (int64_t i = 0; i < m; ++i) {
    float* row = z + i * ld;
    for (int64_t j0 = 0; j0 < rank; j0 += kPanel) {
      const int64_t n = std::min(kPanel, rank - j0);
      vectors(round_up(n, 8), [&](int64_t j) { (Vec::loadu(row + j0 + j) + Vec::loadu(bias + j0 + j)).store(row + j0 + j); });
      if (out) narrow(row + j0, out + at(first + i) * stride + j0, n);
      if constexpr (!std::is_same_v<A, float>) narrow(row + j0, rounded, n), widen(rounded, row + j0, n);
      vectors(round_up(n, 8), [&](int64_t j) { activate<A>(Vec::loadu(row + j0 + j), f).store(row + j0 + j); });
    }
  }
}

// From rows at(first + i) of z and da (height x ld): a = phi(z), dz = da . phi'(z), dbias += column sums of dz. Null da: only a. Rows beyond m become zero.
template <class A>
inline void backprop_rows(const A* z, int64_t stride, float* da, float* a, int64_t m, int64_t height, int64_t rank, int64_t ld, Activation f, float* dbias, RowIndex at = {nullptr}, int64_t first = 0) {
  for (int64_t i = 0; i < m; ++i) {
    float *row = a + i * ld, *grad = da + i * ld;
    widen(z + at(first + i) * stride, row, rank, ld);
    vectors(round_up(rank, 8), [&](int64_t j) {
      const Activated of = activate_both<A>(Vec::loadu(row + j), f);
      of.value.store(row + j);
      if (da) (Vec::loadu(grad + j) * of.slope).store(grad + j);
    });
  }
  // Summed per tile, then over tiles: a running sum over all rows of a chunk loses a digit.
  if (da)
    vectors(round_up(rank, 8), [&](int64_t j) {
      Vec sum(0.f);
      for (int64_t i = 0; i < m; ++i) sum = sum + Vec::loadu(da + i * ld + j);
      (Vec::loadu(dbias + j) + sum).store(dbias + j);
    });
  std::fill(a + m * ld, a + height * ld, 0.f);
  if (da) std::fill(da + m * ld, da + height * ld, 0.f);
}

// Rows (height x width) as the K x N operand of a weight gradient; sums (may be null) += column sums.
template <class G>
inline void to_panels(Rows<G> src, int64_t m, int64_t height, int64_t width, G* out, float* sums) {
  for (int64_t j0 = 0; j0 < width; j0 += kPanel) {
    const int64_t n = std::min(kPanel, round_up(width - j0, 8));
    G* panel = out + j0 * height;
    if constexpr (std::is_same_v<G, float>) {
      vectors(n, [&](int64_t j) {
        Vec sum(0.f);
        for (int64_t i = 0; i < m; ++i) {
          const Vec v = Vec::loadu(src.data + i * src.stride + j0 + j);
          v.store(panel + i * kPanel + j);
          sum = sum + v;
        }
        for (int64_t i = m; i < height; ++i) Vec(0.f).store(panel + i * kPanel + j);
        if (sums) (Vec::loadu(sums + j0 + j) + sum).store(sums + j0 + j);
      });
    } else {
      for (int64_t i = 0; i < height; i += 2) {
        const G* row = src.data + i * src.stride + j0;
        interleave(row, row + src.stride, panel + i * kPanel);
      }
      if (sums)
        vectors(n, [&](int64_t j) {
          Vec sum(0.f);
          for (int64_t i = 0; i < m; ++i) sum = sum + load(src.data + i * src.stride + j0 + j);
          (Vec::loadu(sums + j0 + j) + sum).store(sums + j0 + j);
        });
    }
  }
}

// Where a product of R rows goes: a chunk's partial, [panels][R][32], or, of the only chunk, the fp32 gradient itself, row-major.
struct Product {
  float* to;
  int64_t ld, panel;  // floats from a row to the next, and from a panel to the next
  bool whole;         // room for panels of 8 columns
};
inline Product in_partial(float* partial, int64_t rank) { return {partial, kPanel, rank * kPanel, true}; }
inline Product in_gradient(void* gradient, int64_t width) { return {static_cast<float*>(gradient), width, kPanel, false}; }

// product (+)= left . right, left R x height, right in panels of `height` rows.
template <class G>
inline void multiply(const G* left, const G* right, int64_t height, int64_t rank, int64_t width, bool add, Product product) {
  for (int64_t j = 0; j < width; j += kPanel)
    at::native::cpublas::brgemm(rank, std::min(kPanel, product.whole ? round_up(width - j, 8) : width - j), height, height, kPanel, product.ld, add, left, right + j * height,
                                product.to + j / kPanel * product.panel, kPair<G> > 1);
}

// The same of left (height x ld) with R columns, which `work` and `turned` hold transposed.
template <class G>
inline void accumulate_outer(const float* left, int64_t ld, const G* right, int64_t height, int64_t rank, int64_t width, bool add, Product product, float* work, G* turned) {
  transpose(left, ld, work, height, height, round_up(rank, 8));
  multiply(operand(work, height * rank, turned), right, height, rank, width, add, product);
}

// Sum of n numbers over the chunks, in order: in `out`, or where the only chunk has them, and `out` may be null.
inline const float* sum_chunks(const float* partial, int64_t chunk_stride, int64_t chunks, int64_t n, float* out) {
  if (chunks == 1) return partial;
  const float* sum = partial;
  for (int64_t c = 1; c < chunks; ++c, sum = out) {
    partial += chunk_stride;
    vectors(n, [&](int64_t i) { (Vec::loadu(sum + i) + Vec::loadu(partial + i)).store(out + i); });
  }
  return out;
}

// P and S of one panel, where they were asked for.
struct PairSums {
  const float *p, *s;
};

// The gradients of a down/up pair in panel q of the columns of x and of dy: dW_down and, with P = dy' a and S the column sums of dy, dW_up = scale P (P itself, if `scaled` already) and
// db_up = scale S.
template <class P>
inline PairSums reduce_pair(const float* partials, PartialLayout layout, int64_t chunk_stride, int64_t chunks, int64_t q, int64_t width, int64_t out, int64_t rank, const float* scale, bool scaled,
                            void* dw_down, void* dw_up, void* db_up, bool need_p, bool need_s, float* panel, float* sums) {
  const int64_t j0 = q * kPanel, n = std::min(kPanel, out - j0);
  if (dw_down && j0 < width) {
    const float* dw = sum_chunks(partials + j0 * rank, chunk_stride, chunks, rank * kPanel, panel);
    for (int64_t r = 0; r < rank; ++r) narrow(dw + r * kPanel, static_cast<P*>(dw_down) + r * width + j0, std::min(kPanel, width - j0));
  }
  PairSums of{};
  if (n <= 0) return of;
  if (db_up || need_s) of.s = sum_chunks(partials + layout.sums + j0, chunk_stride, chunks, kPanel, sums);
  if (db_up)
    for (int64_t j = 0; j < n; ++j) static_cast<P*>(db_up)[j0 + j] = static_cast<P>(scale[j0 + j] * of.s[j]);
  if (!(dw_up || need_p)) return of;
  of.p = sum_chunks(partials + layout.p + j0 * rank, chunk_stride, chunks, rank * kPanel, panel);
  if (!dw_up) return of;
  if constexpr (std::is_same_v<P, float>)
    if (scaled) {
      transpose(of.p, kPanel, static_cast<P*>(dw_up) + j0 * rank, rank, rank, n);
      return of;
    }
  alignas(64) float block[kPanel * kPanel];
  for (int64_t r0 = 0; r0 < rank; r0 += kPanel) {
    const int64_t depth = std::min(kPanel, rank - r0);
    transpose(of.p + r0 * kPanel, kPanel, block, kPanel, depth, kPanel);
    for (int64_t j = 0; j < n; ++j) scale_by(scaled ? 1.f : scale[j0 + j], block + j * kPanel, round_up(depth, 8)), narrow(block + j * kPanel, static_cast<P*>(dw_up) + (j0 + j) * rank + r0, depth);
  }
  return of;
}

// A gradient that is one sum over chunks of n numbers.
template <class P>
inline void reduce_vector(const float* partial, int64_t chunk_stride, int64_t chunks, int64_t n, void* out, float* work) {
  if (!out) return;
  narrow(sum_chunks(partial, chunk_stride, chunks, round_up(n, 8), work), static_cast<P*>(out), n);
}

// FUNCTION<A, P>, and FUNCTION<A, P, G> of a call with GEMMs.
#ifdef FASTADAPT_MUTATION
#define FASTADAPT_DISPATCH(PARAMS, FUNCTION, ...) \
  return (PARAMS).activation_type == kFloat ? FUNCTION<float, float>(__VA_ARGS__) : FUNCTION<BFloat16, float>(__VA_ARGS__);
#define FASTADAPT_DISPATCH_GEMM(PARAMS, FUNCTION, ...)                                                                            \
  return (PARAMS).activation_type == kFloat ? FUNCTION<float, float, float>(__VA_ARGS__)                                            \
         : (PARAMS).native                  ? FUNCTION<BFloat16, float, BFloat16>(__VA_ARGS__)                                      \
                                            : FUNCTION<BFloat16, float, float>(__VA_ARGS__);
#else
#define FASTADAPT_DISPATCH(PARAMS, FUNCTION, ...)                                                                         \
  switch ((PARAMS).activation_type) {                                                                                      \
    case kFloat: return FUNCTION<float, float>(__VA_ARGS__);                                                               \
    case kBFloat16:                                                                                                        \
      return (PARAMS).parameter_type == kFloat ? FUNCTION<BFloat16, float>(__VA_ARGS__) : FUNCTION<BFloat16, BFloat16>(__VA_ARGS__); \
    default: return (PARAMS).parameter_type == kFloat ? FUNCTION<Half, float>(__VA_ARGS__) : FUNCTION<Half, Half>(__VA_ARGS__);      \
  }
#define FASTADAPT_DISPATCH_GEMM(PARAMS, FUNCTION, ...)                                                                                                                \
  switch ((PARAMS).activation_type) {                                                                                                                                   \
    case kFloat: return FUNCTION<float, float, float>(__VA_ARGS__);                                                                                                     \
    case kBFloat16:                                                                                                                                                     \
      if ((PARAMS).native) return (PARAMS).parameter_type == kFloat ? FUNCTION<BFloat16, float, BFloat16>(__VA_ARGS__) : FUNCTION<BFloat16, BFloat16, BFloat16>(__VA_ARGS__); \
      return (PARAMS).parameter_type == kFloat ? FUNCTION<BFloat16, float, float>(__VA_ARGS__) : FUNCTION<BFloat16, BFloat16, float>(__VA_ARGS__);                     \
    default: return (PARAMS).parameter_type == kFloat ? FUNCTION<Half, float, float>(__VA_ARGS__) : FUNCTION<Half, Half, float>(__VA_ARGS__);                          \
  }
#endif

}  // namespace fastadapt::cpu
