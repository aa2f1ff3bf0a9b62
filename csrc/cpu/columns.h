// A call by columns (plan.h): what its phases share. A phase works on panels or blocks of columns, for all tiles of rows, and leaves what the next one multiplies in memory between them.
#pragma once
#include "tile.h"

namespace fastadapt::cpu {

template <class F>
void over_tiles(int64_t rows, F&& f) {
  for (int64_t row = 0; row < rows; row += kTileRows) f(row, std::min(kTileRows, rows - row), tile_height(std::min(kTileRows, rows - row)));
}

// Pieces of one block of memory, one behind the other; from null: how much they take.
struct Room {
  float* at;
  template <class T>
  T* take(int64_t n) {
    T* const piece = reinterpret_cast<T*>(at);
    at = reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(at) + round_up(n * static_cast<int64_t>(sizeof(T)), 64));
    return piece;
  }
  int64_t from(const float* base) const { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(base)) / static_cast<int64_t>(sizeof(float)); }
};

// Rows of a call as the left side of its products: where they lie, or, where they are none there or are changed first, in `copy`.
template <class A, class G>
struct Operand {
  const void* base;
  int64_t stride, columns, ld;
  G* copy;
  bool changed;
  bool in_place(int64_t m, int64_t height) const { return is_operand<A, G>(m, height, columns, stride) && !changed; }
  bool needs_load(int64_t rows) const {
    const int64_t m = (rows - 1) % kTileRows + 1;  // the last tile's
    return !in_place(m, tile_height(m));
  }
  Rows<G> load(int64_t row, int64_t m) const { return load_rows<A>(base, stride, row, m, tile_height(m), columns, copy + row * ld, ld); }
  Rows<G> operator()(int64_t row, int64_t m, int64_t height) const {
    if constexpr (std::is_same_v<A, G>)
      if (in_place(m, height)) return {static_cast<const A*>(base) + row * stride, stride};
    return {copy + row * ld, ld};
  }
};

// The rank's side of a down/up pair. A tile's numbers begin at its first row times a row's.
template <class G>
struct Thin {
  G *rows, *a, *dz;  // phi(z), in backward dz; transposed, phi(z) and dz
  Thin() = default;
  Thin(Room& room, int64_t numbers, bool backward)
      : rows(room.take<G>(numbers)), a(backward ? room.take<G>(numbers) : nullptr), dz(backward ? room.take<G>(numbers) : nullptr) {}
};

// Columns of panel q of the rank: z = rounded(before X W' + bias), phi(z) times `after`.
template <class A, class P, class G>
void forward_panel(int64_t rows, const Operand<A, G>& x, const void* w, int64_t rank, int64_t q, G* packed, float before, const float* bias, Activation f, float after, void* z,
                   const Thin<G>& to) {
  const int64_t c = q * kPanel, n = std::min(kPanel, rank - c), ld = padded(rank);
  float* tile = scratch(kTileRows * kPanel);
  pack_transposed<P, A>(w, rank, x.columns, nullptr, packed, q, q + 1);
  over_tiles(rows, [&](int64_t row, int64_t m, int64_t height) {
    const Rows<G> in = x(row, m, height);
    matmul(height, x.columns, rank, in.data, in.stride, packed, tile, kPanel, c, c + n);
    if (before != 1.f) scale_by(before, tile, m * kPanel);
    activate_rows<A>(tile, m, n, kPanel, bias + c, f, z ? static_cast<A*>(z) + row * rank + c : nullptr, rank);
    if (after != 1.f) scale_by(after, tile, m * kPanel);
    for (int64_t i = 0; i < height; ++i) narrow(tile + i * kPanel, to.rows + (row + i) * ld + c, kPanel);
  });
}

// What a panel's backward is asked for: dz at all, dz by rows, a and dz transposed.
struct ThinNeeds {
  bool dz, rows, a, turned;
};

// Columns of panel q of the rank, backward: dz = scale (D S W) . phi'(z), S the diagonal of `scales` (null: ones); phi(z) times a_scale; dbias = column sums of dz.
template <class A, class P, class G>
void backward_panel(int64_t rows, const Operand<A, G>& d, const void* w, int64_t rank, int64_t q, G* packed, const float* scales, float scale, float a_scale, const void* z, Activation f,
                    float* dbias, ThinNeeds need, const Thin<G>& to) {
  const int64_t c = q * kPanel, n = std::min(kPanel, rank - c), ld = padded(rank);
  float* dz = scratch(3 * kTileRows * kPanel);
  float *a = dz + kTileRows * kPanel, *work = a + kTileRows * kPanel;
  std::fill(dbias + c, dbias + c + kPanel, 0.f);
  if (need.dz) pack<P, A>(w, d.columns, rank, scales, packed, q, q + 1);
  over_tiles(rows, [&](int64_t row, int64_t m, int64_t height) {
    const Rows<G> in = d(row, m, height);
    if (need.dz) matmul(height, d.columns, rank, in.data, in.stride, packed, dz, kPanel, c, c + n);
    if (need.dz && scale != 1.f) scale_by(scale, dz, m * kPanel);
    backprop_rows<A>(static_cast<const A*>(z) + row * rank + c, rank, need.dz ? dz : nullptr, a, m, height, n, kPanel, f, dbias + c);
    if (a_scale != 1.f) scale_by(a_scale, a, m * kPanel);
    if (need.rows)
      for (int64_t i = 0; i < height; ++i) narrow(dz + i * kPanel, to.rows + (row + i) * ld + c, kPanel);
    const auto turn = [&](const float* from, G* at) {
      transpose(from, kPanel, work, height, height, round_up(n, 8));
      narrow(work, at + row * ld + c * height, n * height);
    };
    if (need.a) turn(a, to.a);
    if (need.turned) turn(dz, to.dz);
  });
}

}  // namespace fastadapt::cpu
