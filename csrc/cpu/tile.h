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

#if !defined(CPUBLAS_BRGEMM_F32F32F32)
#error "this torch has no fp32 brgemm"
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
    std::free(block.data);
    block.size = round_up(floats, 1024);
    block.data = static_cast<float*>(std::aligned_alloc(64, block.size * sizeof(float)));
    if (!block.data) throw std::bad_alloc();
  }
  return block.data;
}
#endif

// f over whole vectors of n floats; n is a multiple of 8 and buffers are padded to whole panels, so a vector never leaves its buffer.
template <class F>
inline void vectors(int64_t n, F&& f) {
  for (int64_t i = 0; i < n; i += Vec::size()) f(i);
}

template <class T>
inline void widen(const T* src, float* dst, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(dst, src, n * sizeof(float));
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

template <class T>
inline void narrow(const float* src, T* dst, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    if (src != dst) std::memcpy(dst, src, n * sizeof(float));
  } else {
    constexpr int64_t step = at::vec::Vectorized<T>::size();
    int64_t i = 0;
    for (; i + step <= n; i += step) at::vec::convert_from_float<T>(Vec::loadu(src + i), Vec::loadu(src + i + Vec::size())).store(dst + i);
    for (; i < n; ++i) dst[i] = static_cast<T>(src[i]);
  }
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

inline Vec sigmoid(Vec v) { return Vec(1.f) / (Vec(1.f) + v.neg().exp()); }

struct Logistic {
  Vec s, rest;  // sigma(v) and 1 - sigma(v), which 1 - s would round away near s = 1 (gelu_new's derivative multiplies that by about 35)
  explicit Logistic(Vec v) {
    const Vec e = at::vec::maximum(v, Vec(-80.f)).neg().exp();
    s = Vec(1.f) / (Vec(1.f) + e), rest = e * s;
  }
};

inline Vec activate(Vec z, Activation f) {
  switch (f) {
    case kRelu: return at::vec::maximum(z, Vec(0.f));
    case kGelu: return z * Vec(0.5f) * (Vec(1.f) + (z * Vec(0.70710678118654752f)).erf());
    case kGeluNew: return z * sigmoid(Vec(1.5957691216057308f) * z * (Vec(1.f) + Vec(0.044715f) * z * z));
    case kSilu: return z * sigmoid(z);
    default: return z;
  }
}

inline Vec derivative(Vec z, Activation f) {
  const Vec one(1.f);
  switch (f) {
    case kRelu: return Vec::blendv(Vec(0.f), one, z > Vec(0.f));
    case kGelu: return Vec(0.5f) * (one + (z * Vec(0.70710678118654752f)).erf()) + z * Vec(0.3989422804014327f) * (z * z * Vec(-0.5f)).exp();
    case kGeluNew: {
      const Logistic g(Vec(1.5957691216057308f) * z * (one + Vec(0.044715f) * z * z));
      return g.s + z * g.s * g.rest * Vec(1.5957691216057308f) * (one + Vec(0.134145f) * z * z);
    }
    case kSilu: {
      const Logistic g(z);
      return g.s * (one + z * g.rest);
    }
    default: return one;
  }
}

// dst (cols x rows, leading dimension ld_dst) = src' for a block of fp32; rows and cols are multiples of 8 or the buffers are padded.
inline void transpose(const float* src, int64_t ld_src, float* dst, int64_t ld_dst, int64_t rows, int64_t cols) {
  constexpr int64_t v = Vec::size();
  for (int64_t i = 0; i < rows; i += v)
    for (int64_t j = 0; j < cols; j += v)
      at::vec::transpose_mxn<float>(src + i * ld_src + j, ld_src, dst + j * ld_dst + i, ld_dst, static_cast<int>(std::min(v, rows - i)), static_cast<int>(std::min(v, cols - j)));
}

// ---- Packed GEMM operands: a K x N operand as [N / 32 panels][K][32], padded with zeros.

// Operand W itself, row-major K x N; row k times scale[k] (scale may be null). Panels [begin, end).
template <class P, class A>
inline void pack(const void* w, int64_t k, int64_t n, const float* scale, float* out, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t n0 = p * kPanel, cols = std::min(kPanel, n - n0);
    float* panel = out + n0 * k;
    for (int64_t i = 0; i < k; ++i, panel += kPanel) {
      widen_parameter<P, A>(static_cast<const P*>(w) + i * n + n0, panel, cols);
      std::fill(panel + cols, panel + kPanel, 0.f);
      if (scale) vectors(kPanel, [&](int64_t j) { (Vec::loadu(panel + j) * Vec(scale[i])).store(panel + j); });
    }
  }
}

// Operand W', W row-major N x K; column n times scale[n] (may be null).
template <class P, class A>
inline void pack_transposed(const void* w, int64_t n, int64_t k, const float* scale, float* out, int64_t begin, int64_t end) {
  alignas(64) float block[kPanel * kPanel];
  for (int64_t p = begin; p < end; ++p) {
    const int64_t n0 = p * kPanel, cols = std::min(kPanel, n - n0);
    const P* src = static_cast<const P*>(w) + n0 * k;
    for (int64_t k0 = 0; k0 < k; k0 += kPanel) {
      const int64_t depth = std::min(kPanel, k - k0);
      float* to = out + n0 * k + k0 * kPanel;
      if constexpr (std::is_same_v<P, float> && std::is_same_v<A, float>)
        if (cols == kPanel && depth == kPanel) {
          transpose(src + k0, k, to, kPanel, kPanel, kPanel);
          continue;
        }
      if (cols < kPanel) std::memset(block, 0, sizeof(block));
      for (int64_t j = 0; j < cols; ++j) widen_parameter<P, A>(src + j * k + k0, block + j * kPanel, depth);
      if (depth == kPanel)
        transpose(block, kPanel, to, kPanel, kPanel, kPanel);
      else
        for (int64_t i = 0; i < depth; ++i)
          for (int64_t j = 0; j < kPanel; ++j) to[i * kPanel + j] = block[j * kPanel + i];
    }
    if (scale)
      for (int64_t i = 0; i < k; ++i)
        vectors(kPanel, [&](int64_t j) { (Vec::loadu(out + n0 * k + i * kPanel + j) * Vec::loadu(scale + n0 + j)).store(out + n0 * k + i * kPanel + j); });
  }
}

// C[:, n0:n1] (m x N, row-major from column n0) = A (m x K) . operand[:, n0:n1]. Long sums are cut: a panel of 192 x 32 floats stays in L1, and sums of sums round less.
inline void matmul(int64_t m, int64_t k, int64_t n, const float* a, int64_t lda, const float* packed, float* c, int64_t ldc, int64_t n0, int64_t n1) {
  for (int64_t j = n0; j < n1; j += kPanel)
    for (int64_t i = 0; i < k; i += kDepth)
      at::native::cpublas::brgemm(m, std::min(kPanel, round_up(n - j, 8)), std::min(kDepth, k - i), lda, kPanel, ldc, i > 0, a + i, packed + j * k + i * kPanel, c + (j - n0), false);
}

// Rows of an input as fp32: in place where they already are, else converted, ragged tiles padded with zero rows.
struct Rows {
  const float* data;
  int64_t stride;
};

// Where the rows of a call lie: one after the other, or, with `order`, a task's rows among those of other tasks.
struct RowIndex {
  const int64_t* order;
  int64_t operator()(int64_t i) const { return order ? order[i] : i; }
  bool consecutive(int64_t i, int64_t m) const { return !order || order[i + m - 1] - order[i] == m - 1; }  // a task's rows are in ascending order
};

template <class A>
inline Rows load_rows(const void* base, int64_t stride, RowIndex at, int64_t row, int64_t m, int64_t height, int64_t width, float* buffer, int64_t padded_width) {
  const A* src = static_cast<const A*>(base);
  if constexpr (std::is_same_v<A, float>)
    if (m == height && width % Vec::size() == 0 && at.consecutive(row, m)) return {src + at(row) * stride, stride};
  for (int64_t i = 0; i < m; ++i) widen(src + at(row + i) * stride, buffer + i * padded_width, width, padded_width);
  std::fill(buffer + m * padded_width, buffer + height * padded_width, 0.f);
  return {buffer, padded_width};
}

template <class A>
inline Rows load_rows(const void* base, int64_t stride, int64_t row, int64_t m, int64_t height, int64_t width, float* buffer, int64_t padded_width) {
  return load_rows<A>(base, stride, RowIndex{nullptr}, row, m, height, width, buffer, padded_width);
}

// v := factor v, n numbers, a multiple of 8.
inline void scale_by(float factor, float* v, int64_t n) {
  vectors(n, [&](int64_t i) { (Vec::loadu(v + i) * Vec(factor)).store(v + i); });
}

// z := rounded(z + bias), stored unpadded if asked for; then z := phi(z). Row i goes to row at(first + i) of `out`.
template <class A>
inline void activate_rows(float* z, int64_t m, int64_t rank, int64_t ld, const float* bias, Activation f, A* out, RowIndex at = {nullptr}, int64_t first = 0) {
  A rounded[kPanel];
  for (int64_t i = 0; i < m; ++i) {
    float* row = z + i * ld;
    for (int64_t j0 = 0; j0 < rank; j0 += kPanel) {
      const int64_t n = std::min(kPanel, rank - j0);
      vectors(round_up(n, 8), [&](int64_t j) { (Vec::loadu(row + j0 + j) + Vec::loadu(bias + j0 + j)).store(row + j0 + j); });
      if (out) narrow(row + j0, out + at(first + i) * rank + j0, n);
      if constexpr (!std::is_same_v<A, float>) narrow(row + j0, rounded, n), widen(rounded, row + j0, n);
      vectors(round_up(n, 8), [&](int64_t j) { activate(Vec::loadu(row + j0 + j), f).store(row + j0 + j); });
    }
  }
}

// From rows at(first + i) of z and da (height x ld): a = phi(z), dz = da . phi'(z), dbias += column sums of dz. Null da: only a. Rows beyond m become zero.
template <class A>
inline void backprop_rows(const A* z, float* da, float* a, int64_t m, int64_t height, int64_t rank, int64_t ld, Activation f, float* dbias, RowIndex at = {nullptr}, int64_t first = 0) {
  for (int64_t i = 0; i < m; ++i) {
    float *row = a + i * ld, *grad = da + i * ld;
    widen(z + at(first + i) * rank, row, rank, ld);
    vectors(round_up(rank, 8), [&](int64_t j) {
      const Vec v = Vec::loadu(row + j);
      activate(v, f).store(row + j);
      if (da) (Vec::loadu(grad + j) * derivative(v, f)).store(grad + j);
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

// Rows (height x width) as the K x N operand of a weight gradient: [panels][height][32]; sums (may be null) += column sums.
inline void to_panels(Rows src, int64_t m, int64_t height, int64_t width, float* out, float* sums) {
  for (int64_t j0 = 0; j0 < width; j0 += kPanel) {
    const int64_t n = std::min(kPanel, round_up(width - j0, 8));
    float* panel = out + j0 * height;
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
  }
}

// partial [panels][R][32] (+)= left' . right, left (height x ld) with R columns, right in panels of `height` rows. `work` holds left transposed.
inline void accumulate_outer(const float* left, int64_t ld, const float* right, int64_t height, int64_t rank, int64_t width, bool add, float* partial, float* work) {
  transpose(left, ld, work, height, height, round_up(rank, 8));
  for (int64_t j = 0; j < width; j += kPanel)
    at::native::cpublas::brgemm(rank, std::min(kPanel, round_up(width - j, 8)), height, height, kPanel, kPanel, add, work, right + j * height, partial + j * rank, false);
}

// Sum of one panel (n numbers) over the chunks, in order.
inline void sum_chunks(const float* partial, int64_t chunk_stride, int64_t chunks, int64_t n, float* out) {
  std::memcpy(out, partial, n * sizeof(float));
  for (int64_t c = 1; c < chunks; ++c) {
    partial += chunk_stride;
    vectors(n, [&](int64_t i) { (Vec::loadu(out + i) + Vec::loadu(partial + i)).store(out + i); });
  }
}

// The gradients of a down/up pair in panel q of the columns of x and of dy: dW_down and, with P = dy' a and S the column sums of dy, dW_up = scale P and db_up = scale S.
// Leaves P in `panel` and S in `sums` where asked for.
template <class P>
inline void reduce_pair(const float* partials, PartialLayout layout, int64_t chunk_stride, int64_t chunks, int64_t q, int64_t width, int64_t out, int64_t rank, const float* scale,
                         void* dw_down, void* dw_up, void* db_up, bool need_p, bool need_s, float* panel, float* sums) {
  const int64_t j0 = q * kPanel, n = std::min(kPanel, out - j0);
  if (dw_down && j0 < width) {
    sum_chunks(partials + j0 * rank, chunk_stride, chunks, rank * kPanel, panel);
    for (int64_t r = 0; r < rank; ++r) narrow(panel + r * kPanel, static_cast<P*>(dw_down) + r * width + j0, std::min(kPanel, width - j0));
  }
  if (n <= 0) return;
  if (db_up || need_s) sum_chunks(partials + layout.sums + j0, chunk_stride, chunks, kPanel, sums);
  if (db_up)
    for (int64_t j = 0; j < n; ++j) static_cast<P*>(db_up)[j0 + j] = static_cast<P>(scale[j0 + j] * sums[j]);
  if (!(dw_up || need_p)) return;
  sum_chunks(partials + layout.p + j0 * rank, chunk_stride, chunks, rank * kPanel, panel);
  if (!dw_up) return;
  alignas(64) float block[kPanel * kPanel];
  for (int64_t r0 = 0; r0 < rank; r0 += kPanel) {
    const int64_t depth = std::min(kPanel, rank - r0);
    for (int64_t r = 0; r < depth; ++r)
      for (int64_t j = 0; j < n; ++j) block[j * kPanel + r] = panel[(r0 + r) * kPanel + j] * scale[j0 + j];
    for (int64_t j = 0; j < n; ++j) narrow(block + j * kPanel, static_cast<P*>(dw_up) + (j0 + j) * rank + r0, depth);
  }
}

// A gradient that is one sum over chunks of n numbers.
template <class P>
inline void reduce_vector(const float* partial, int64_t chunk_stride, int64_t chunks, int64_t n, void* out, float* work) {
  if (!out) return;
  sum_chunks(partial, chunk_stride, chunks, round_up(n, 8), work);
  narrow(work, static_cast<P*>(out), n);
}

#ifdef FASTADAPT_MUTATION
#define FASTADAPT_DISPATCH(PARAMS, FUNCTION, ...) \
  return (PARAMS).activation_type == kFloat ? FUNCTION<float, float>(__VA_ARGS__) : FUNCTION<BFloat16, float>(__VA_ARGS__);
#else
#define FASTADAPT_DISPATCH(PARAMS, FUNCTION, ...)                                                                         \
  switch ((PARAMS).activation_type) {                                                                                      \
    case kFloat: return FUNCTION<float, float>(__VA_ARGS__);                                                               \
    case kBFloat16:                                                                                                        \
      return (PARAMS).parameter_type == kFloat ? FUNCTION<BFloat16, float>(__VA_ARGS__) : FUNCTION<BFloat16, BFloat16>(__VA_ARGS__); \
    default: return (PARAMS).parameter_type == kFloat ? FUNCTION<Half, float>(__VA_ARGS__) : FUNCTION<Half, Half>(__VA_ARGS__);      \
  }
#endif

}  // namespace fastadapt::cpu
