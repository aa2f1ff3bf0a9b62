// Fused bottleneck, forward and backward, on ranges of row tiles, chunks and column panels; cpu_ops.cpp runs the ranges in parallel.
//
// Forward per tile of 64 rows: z = x Wd' + bd and a = phi(z) stay in L1, the up-projection is finished and stored in blocks of 128 columns.
// Where rows are few (plan.h) and none is dropped in part, both projections take the weights where they lie, each split by columns.
// Backward per tile: da = dy (s g Wu), dz = da phi'(z), dx = dz Wd (+ dy); dWd += dz' x and P += a' dy go to the chunk's partial. With P and S = column sums of dy the gradients of
// w_up, b_up, gate and scale need no up-projection: dWu = s g P, dbu = s g S, dg = s b, ds = sum g b, b = rowsum(Wu P) + bu S.
// A routed call is one call a task, over its rows wherever they lie. LoRA is a call whose x and y may differ in width and whose x may be dropped in part: with mask M and k = 1 / (1 - p)
// z = k (M x) Wd', dz gets the same k, and dx = M (dz Wd).
// Few tiles go by columns (plan.h), their weight gradients from product to place.
// Memory traffic a row of D: forward reads x, writes y; backward reads x and dy, writes dx; weights come from L2/L3.
#include "columns.h"
#include "dropout.h"
#include "kernels.h"
#include "tile.h"

namespace fastadapt::cpu {
namespace {

struct Sizes {
  int64_t width, out, rank;  // padded to whole panels
  explicit Sizes(const BottleneckParams& p) : width(padded(p.width)), out(padded(p.out)), rank(padded(p.rank)) {}
  PartialLayout partial(const BottleneckParams& p) const { return {width, out, p.rank, rank}; }
};

// Room for the mask of a tile, in floats.
int64_t mask_floats(const BottleneckParams& p) { return p.seed ? kTileRows * mask_stride(p.width) / static_cast<int64_t>(sizeof(float)) : 0; }

void mask_tile(const BottleneckParams& p, int64_t row, int64_t m, float* room) {
  if (p.seed) draw_mask(static_cast<uint64_t>(*p.seed), p.threshold, row, m, p.width, reinterpret_cast<int8_t*>(room));
}

// Without a gate the scale multiplies a and da, which are thin, and what is packed are the weights themselves.
float thin_scale(const BottleneckParams& p, const Sizes& s) { return p.gate ? 1.f : p.vectors[s.rank]; }
const float* weight_scale(const BottleneckParams& p, const Sizes& s) { return p.gate ? p.vectors + s.rank : nullptr; }

// Whether a is so multiplied in backward too: P is then dWu.
bool scales_p(const BottleneckParams& p) { return !p.gate && !p.need_scale; }

// vectors: bd [R], s g [D], s g bu [D]
template <class A, class P>
void prepare_vectors(const BottleneckParams& p) {
  const Sizes s(p);
  float *bd = p.vectors, *gs = bd + s.rank, *bias = gs + s.out;
  vector_or<P, A>(p.b_down, bd, p.rank, s.rank, 0.f);
  vector_or<P, A>(p.gate, gs, p.out, s.out, 1.f);
  vector_or<P, A>(p.b_up, bias, p.out, s.out, 0.f);
  float scale = p.scale, tensor;
  if (p.scale_tensor) widen_parameter<P, A>(static_cast<const P*>(p.scale_tensor), &tensor, 1), scale *= tensor;
  vectors(s.out, [&](int64_t i) { (Vec::loadu(gs + i) * Vec(scale)).store(gs + i), (Vec::loadu(bias + i) * Vec::loadu(gs + i)).store(bias + i); });
}

template <class A, class P, class G>
void pack_forward(const BottleneckParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const int64_t down = s.rank / kPanel;
  pack_transposed<P, A>(p.w_down, p.rank, p.width, nullptr, reinterpret_cast<G*>(p.packed_down), std::min(begin, down), std::min(end, down));
  pack_transposed<P, A>(p.w_up, p.out, p.rank, weight_scale(p, s), reinterpret_cast<G*>(p.packed_up), std::max<int64_t>(begin - down, 0), std::max<int64_t>(end - down, 0));
}

template <class A, class P, class G>
void pack_backward(const BottleneckParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const int64_t up = s.rank / kPanel;
  pack<P, A>(p.w_up, p.out, p.rank, weight_scale(p, s), reinterpret_cast<G*>(p.packed_up), std::min(begin, up), std::min(end, up));
  if (p.dx) pack<P, A>(p.w_down, p.rank, p.width, nullptr, reinterpret_cast<G*>(p.packed_down), std::max<int64_t>(begin - up, 0), std::max<int64_t>(end - up, 0));
}

template <class A, class P, class G>
void forward(const BottleneckParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const RowIndex at{p.order};
  float* z_tile = scratch(kTileRows * (s.width + 2 * s.rank + kBlockColumns) + mask_floats(p));
  float *u_tile = z_tile + kTileRows * s.rank, *room = u_tile + kTileRows * kBlockColumns;
  G *x_tile = reinterpret_cast<G*>(room + mask_floats(p)), *a_tile = x_tile + kTileRows * s.width;
  const int8_t* mask = reinterpret_cast<const int8_t*>(room);
  const auto later = [&](int64_t i) { return at(std::min(i, p.rows - 1)); };
  const float *bd = p.vectors, *bias = bd + s.rank + s.out, scale = thin_scale(p, s);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row = tile * kTileRows, m = std::min(kTileRows, p.rows - row), height = tile_height(m);
    Rows<G> x = load_rows<A>(p.x, p.x_stride, at, row, m, height, p.width, x_tile, s.width);
    mask_tile(p, row, m, room);
    if (p.seed) x = drop(x, mask, m, p.width, x_tile, s.width);
    matmul(height, p.width, p.rank, x.data, x.stride, reinterpret_cast<const G*>(p.packed_down), z_tile, s.rank, 0, p.rank);
    if (p.seed) scale_by(p.kept, z_tile, m * s.rank);
    activate_rows<A>(z_tile, m, p.rank, s.rank, bd, p.activation, static_cast<A*>(p.z), p.rank, at, row);
    if (scale != 1.f) scale_by(scale, z_tile, m * s.rank);
    const G* a = operand(z_tile, height * s.rank, a_tile);
    for (int64_t c = 0; c < p.out; c += kBlockColumns) {
      const int64_t n = std::min(kBlockColumns, p.out - c);
      matmul(height, p.rank, p.out, a, s.rank, reinterpret_cast<const G*>(p.packed_up), u_tile, kBlockColumns, c, c + n);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t to = at(row + i);
        const int64_t ahead = later(row + i + kAhead);
        if (c < p.width) fetch(static_cast<const A*>(p.x) + later(row + i + kTileRows) * p.x_stride + c, n);
        if (p.residual) fetch(static_cast<const A*>(p.residual) + ahead * p.residual_stride + c, n);
        fetch<1>(static_cast<A*>(p.y) + ahead * p.out + c, n);
        finish(u_tile + i * kBlockColumns, bias + c, p.add_input ? static_cast<const A*>(p.x) + to * p.x_stride + c : nullptr,
               p.residual ? static_cast<const A*>(p.residual) + to * p.residual_stride + c : nullptr, static_cast<A*>(p.y) + to * p.out + c, n);
      }
    }
  }
  release<G>();
}

// Rows of a call that has few, or their z, as `products` takes them: zeros behind a row, and rows of zeros up to the height.
int64_t few_stride(int64_t n) { return round_up(n, 2 * Vec::size()); }

template <class T>
void few_rows(const BottleneckParams& p, const void* src, int64_t stride, int64_t n, float* to) {
  const int64_t ld = few_stride(n);
  for (int64_t i = 0; i < p.rows; ++i) widen(static_cast<const T*>(src) + i * stride, to + i * ld, n, ld);
  std::fill(to + p.rows * ld, to + few_height(p.rows) * ld, 0.f);
}

template <class P, class A>
void few_products(int64_t m, const float* rows, int64_t ld, int64_t k, const void* w, int64_t begin, int64_t end, float* out, int64_t ld_out) {
  const auto run = [&](auto product) { product(rows, ld, k, static_cast<const P*>(w), begin, end, out, ld_out); };
  switch (few_height(m)) {
    case 1: return run(products<1, P, A>);
    case 2: return run(products<2, P, A>);
    case 4: return run(products<4, P, A>);
    default: return run(products<8, P, A>);
  }
}

template <class A, class P>
void few_down(const BottleneckParams& p, int64_t begin, int64_t end) {
  const int64_t ld = few_stride(p.width);
  float* x = scratch(kFewRows * ld);
  few_rows<A>(p, p.x, p.x_stride, p.width, x);
  few_products<P, A>(p.rows, x, ld, p.width, p.w_down, begin * kPanel, std::min(p.rank, end * kPanel), p.packed_down, Sizes(p).rank);
}

template <class A, class P>
void few_up(const BottleneckParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const int64_t ld = few_stride(p.rank), first = begin * kPanel, n = std::min(p.out, end * kPanel) - first;
  float *a = scratch(kFewRows * (ld + s.out)), *u = a + kFewRows * ld;
  const float *bd = p.vectors, *gs = bd + s.rank, *bias = gs + s.out;
  few_rows<float>(p, p.packed_down, s.rank, p.rank, a);
  activate_rows<A>(a, p.rows, p.rank, ld, bd, p.activation, begin == 0 ? static_cast<A*>(p.z) : nullptr, p.rank);
  few_products<P, A>(p.rows, a, ld, p.rank, p.w_up, first, first + n, u, s.out);
  for (int64_t i = 0; i < p.rows; ++i) {
    float* row = u + i * s.out + first;
    vectors(round_up(n, 8), [&](int64_t j) { (Vec::loadu(row + j) * Vec::loadu(gs + first + j)).store(row + j); });
    finish(row, bias + first, p.add_input ? static_cast<const A*>(p.x) + i * p.x_stride + first : nullptr,
           p.residual ? static_cast<const A*>(p.residual) + i * p.residual_stride + first : nullptr, static_cast<A*>(p.y) + i * p.out + first, n);
  }
}

template <class A, class P, class G>
void backward(const BottleneckParams& p, int64_t chunk) {
  const Sizes s(p);
  const PartialLayout layout = s.partial(p);
  const RowIndex at{p.order};
  const bool need_dz = p.dx || p.dw_down || p.db_down, need_p = p.dw_up || p.dgate || p.need_scale;
  const int64_t x_floats = kTileRows * s.width, dy_floats = kTileRows * s.out, rank_floats = kTileRows * s.rank;
  float* dz = scratch(dy_floats + x_floats + std::max(x_floats, dy_floats) + 5 * rank_floats + kTileRows * kBlockColumns + mask_floats(p));
  float *a = dz + rank_floats, *work = a + rank_floats, *u_tile = work + rank_floats, *room = u_tile + kTileRows * kBlockColumns;
  G *dz_tile = reinterpret_cast<G*>(room + mask_floats(p)), *turned = dz_tile + rank_floats, *dy_tile = turned + rank_floats, *x_tile = dy_tile + dy_floats, *panels = x_tile + x_floats;
  const int8_t* mask = reinterpret_cast<const int8_t*>(room);
  const auto later = [&](int64_t i) { return at(std::min(i, p.rows - 1)); };
  const float scale = thin_scale(p, s) * (p.seed ? p.kept : 1.f);
  const int64_t chunk_begin = chunk * chunk_rows(p.rows), chunk_end = std::min(p.rows, chunk_begin + chunk_rows(p.rows));
  float *dwd = p.partials, *pt = dwd + layout.p, *sums = dwd + layout.sums, *dbd = dwd + layout.db_down;
  std::fill(sums, dbd + s.rank, 0.f);
  for (int64_t row = chunk_begin; row < chunk_end; row += kTileRows) {
    const int64_t m = std::min(kTileRows, chunk_end - row), height = tile_height(m);
    const bool add = row != chunk_begin;
    const Rows<G> dy = load_rows<A>(p.dy, p.dy_stride, at, row, m, height, p.out, dy_tile, s.out);
    if (need_dz) mask_tile(p, row, m, room), matmul(height, p.out, p.rank, dy.data, dy.stride, reinterpret_cast<const G*>(p.packed_up), dz, s.rank, 0, p.rank);
    if (need_dz && scale != 1.f) scale_by(scale, dz, m * s.rank);
    backprop_rows<A>(static_cast<const A*>(p.z), p.rank, need_dz ? dz : nullptr, a, m, height, p.rank, s.rank, p.activation, dbd, at, row);
    if (p.dx) {
      const G* left = operand(dz, height * s.rank, dz_tile);
      for (int64_t c = 0; c < p.width; c += kBlockColumns) {
        const int64_t n = std::min(kBlockColumns, p.width - c);
        matmul(height, p.rank, p.width, left, s.rank, reinterpret_cast<const G*>(p.packed_down), u_tile, kBlockColumns, c, c + n);
        for (int64_t i = 0; i < m; ++i) {
          float* u = u_tile + i * kBlockColumns;
          const int64_t to = at(row + i);
          if (c < p.out) fetch(static_cast<const A*>(p.dy) + later(row + i + kTileRows) * p.dy_stride + c, n);
          if (p.dw_down) fetch(static_cast<const A*>(p.x) + to * p.x_stride + c, n);
          fetch<1>(static_cast<A*>(p.dx) + later(row + i + kAhead) * p.width + c, n);
          if (p.seed) drop(u, mask + i * mask_stride(p.width) + c, u, n);
          finish<A>(u, nullptr, p.add_input ? static_cast<const A*>(p.dy) + to * p.dy_stride + c : nullptr, nullptr, static_cast<A*>(p.dx) + to * p.width + c, n);
        }
      }
    }
    if (need_p && scales_p(p)) scale_by(thin_scale(p, s), a, m * s.rank);
    if (need_p || p.db_up) to_panels(dy, m, height, p.out, panels, p.db_up || p.dgate || p.need_scale ? sums : nullptr);
    if (need_p) accumulate_outer(a, s.rank, panels, height, p.rank, p.out, add, in_partial(pt, p.rank), work, turned);
    if (p.dw_down) {
      Rows<G> x = load_rows<A>(p.x, p.x_stride, at, row, m, height, p.width, x_tile, s.width);
      if (p.seed) x = drop(x, mask, m, p.width, x_tile, s.width);
      to_panels(x, m, height, p.width, panels, nullptr);
      accumulate_outer(dz, s.rank, panels, height, p.rank, p.width, add, in_partial(dwd, p.rank), work, turned);
    }
  }
  release<G>();
}

template <class A, class P>
void reduce(const BottleneckParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const PartialLayout layout = s.partial(p);
  float* panel = scratch(p.rank * kPanel + s.rank + 3 * kPanel);
  float *wu = panel + p.rank * kPanel, *sums = wu + s.rank, *bu = sums + kPanel, *gate = bu + kPanel;
  float scale = p.scale, tensor;
  if (p.scale_tensor) widen_parameter<P, A>(static_cast<const P*>(p.scale_tensor), &tensor, 1), scale *= tensor;
  for (int64_t q = begin; q < end; ++q) {
    const int64_t j0 = q * kPanel, n = std::min(kPanel, p.out - j0);
    const bool bracket_needed = p.dgate || p.need_scale;
    const PairSums of = reduce_pair<P>(p.partials, layout, layout.total, p.chunks, q, p.width, p.out, p.rank, p.vectors + s.rank, scales_p(p), p.direct ? nullptr : p.dw_down, p.dw_up,
                                      p.db_up, bracket_needed, bracket_needed, panel, sums);
    if (!bracket_needed) continue;
    vector_or<P, A>(p.b_up ? static_cast<const P*>(p.b_up) + j0 : nullptr, bu, n, kPanel, 0.f);
    vector_or<P, A>(p.gate ? static_cast<const P*>(p.gate) + j0 : nullptr, gate, n, kPanel, 1.f);
    double total = 0;
    for (int64_t j = 0; j < n; ++j) {
      widen_parameter<P, A>(static_cast<const P*>(p.w_up) + (j0 + j) * p.rank, wu, p.rank);
      double bracket = static_cast<double>(bu[j]) * of.s[j];
      for (int64_t r = 0; r < p.rank; ++r) bracket += static_cast<double>(wu[r]) * of.p[r * kPanel + j];
      if (p.dgate) static_cast<P*>(p.dgate)[j0 + j] = static_cast<P>(static_cast<float>(scale * bracket));
      total += gate[j] * bracket;
    }
    if (p.need_scale) p.dscale_panels[q] = static_cast<float>(p.scale * total);
  }
  if (begin == 0) reduce_vector<P>(p.partials + layout.db_down, layout.total, p.chunks, p.rank, p.db_down, wu);
}

// ---- A call by columns (plan.h): first those of the rank, then those of x and y, for all tiles of rows.

template <class A, class G>
struct Between {
  Operand<A, G> input;  // x in forward, dy in backward
  Thin<G> thin;
  int8_t* mask;
  int64_t floats;
  explicit Between(const BottleneckParams& p) {
    const int64_t tall = round_up(p.rows, kTileRows), columns = p.dy ? p.out : p.width;
    Room room{p.between};
    input = {p.dy ? p.dy : p.x, p.dy ? p.dy_stride : p.x_stride, columns, padded(columns), room.take<G>(tall * padded(columns)), p.seed && !p.dy};
    thin = {room, tall * padded(p.rank), p.dy != nullptr};
    mask = room.take<int8_t>(p.seed ? tall * mask_stride(p.width) : 0);
    floats = room.from(p.between);
  }
};

template <class A, class P, class G>
int64_t between_floats(const BottleneckParams& p) {
  return Between<A, G>(p).floats;
}

template <class A, class P, class G>
bool needs_load(const BottleneckParams& p) {
  return p.seed || Between<A, G>(p).input.needs_load(p.rows);
}

template <class A, class P, class G>
void load_tiles(const BottleneckParams& p, int64_t begin, int64_t end) {
  const Between<A, G> b(p);
  for (int64_t row = begin * kTileRows; row < std::min(p.rows, end * kTileRows); row += kTileRows) {
    const int64_t m = std::min(kTileRows, p.rows - row), ld = b.input.ld;
    const Rows<G> from = b.input.load(row, m);
    int8_t* mask = b.mask + row * mask_stride(p.width);
    if (p.seed) draw_mask(static_cast<uint64_t>(*p.seed), p.threshold, row, m, p.width, mask);
    if (b.input.changed) drop(from, mask, m, p.width, b.input.copy + row * ld, ld);
  }
}

template <class A, class P, class G>
void forward_thin(const BottleneckParams& p, int64_t begin, int64_t end) {
  const Between<A, G> b(p);
  for (int64_t q = begin; q < end; ++q)
    forward_panel<A, P>(p.rows, b.input, p.w_down, p.rank, q, reinterpret_cast<G*>(p.packed_down), p.seed ? p.kept : 1.f, p.vectors, p.activation, thin_scale(p, Sizes(p)), p.z, b.thin);
  release<G>();
}

template <class A, class P, class G>
void forward_wide(const BottleneckParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const Between<A, G> b(p);
  G* packed = reinterpret_cast<G*>(p.packed_up);
  float* u = scratch(kTileRows * kBlockColumns);
  const float* bias = p.vectors + s.rank + s.out;
  for (int64_t q = begin; q < end; q += kBlockPanels) {
    const int64_t last = std::min(end, q + kBlockPanels), c = q * kPanel, n = std::min(p.out, last * kPanel) - c;
    pack_transposed<P, A>(p.w_up, p.out, p.rank, weight_scale(p, s), packed, q, last);
    over_tiles(p.rows, [&](int64_t row, int64_t m, int64_t height) {
      matmul(height, p.rank, p.out, b.thin.rows + row * s.rank, s.rank, packed, u, kBlockColumns, c, c + n);
      for (int64_t i = 0; i < m; ++i)
        finish(u + i * kBlockColumns, bias + c, p.add_input ? static_cast<const A*>(p.x) + (row + i) * p.x_stride + c : nullptr,
               p.residual ? static_cast<const A*>(p.residual) + (row + i) * p.residual_stride + c : nullptr, static_cast<A*>(p.y) + (row + i) * p.out + c, n);
    });
  }
  release<G>();
}

template <class A, class P, class G>
void backward_thin(const BottleneckParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const Between<A, G> b(p);
  const bool need_dz = p.dx || p.dw_down || p.db_down, need_p = p.dw_up || p.dgate || p.need_scale;
  const float thin = thin_scale(p, s);
  for (int64_t q = begin; q < end; ++q)
    backward_panel<A, P>(p.rows, b.input, p.w_up, p.rank, q, reinterpret_cast<G*>(p.packed_up), weight_scale(p, s), thin * (p.seed ? p.kept : 1.f), scales_p(p) ? thin : 1.f, p.z, p.activation,
                         p.partials + s.partial(p).db_down, {need_dz, p.dx != nullptr, need_p, p.dw_down != nullptr}, b.thin);
  release<G>();
}

template <class A, class P, class G>
void backward_wide(const BottleneckParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const Between<A, G> b(p);
  const PartialLayout layout = s.partial(p);
  const bool need_p = p.dw_up || p.dgate || p.need_scale, need_sums = p.db_up || p.dgate || p.need_scale;
  G* packed = reinterpret_cast<G*>(p.packed_down);
  for (int64_t q = begin; q < end; q += kBlockPanels) {
    const int64_t last = std::min(end, q + kBlockPanels), c = q * kPanel, c_end = last * kPanel;
    const int64_t of_x = std::max<int64_t>(0, std::min(p.width, c_end) - c), of_dy = std::max<int64_t>(0, std::min(p.out, c_end) - c);
    float *u = scratch(2 * kTileRows * kBlockColumns), *sums = p.partials + layout.sums + c;
    G *panels = reinterpret_cast<G*>(u + kTileRows * kBlockColumns), *x_tile = reinterpret_cast<G*>(u);
    if (p.dx) pack<P, A>(p.w_down, p.rank, p.width, nullptr, packed, q, std::min(last, s.width / kPanel));
    std::fill(sums, sums + padded(of_dy), 0.f);
    over_tiles(p.rows, [&](int64_t row, int64_t m, int64_t height) {
      const int8_t* mask = b.mask + row * mask_stride(p.width) + c;
      if (p.dx) {
        matmul(height, p.rank, p.width, b.thin.rows + row * s.rank, s.rank, packed, u, kBlockColumns, c, c + of_x);
        for (int64_t i = 0; i < m; ++i) {
          float* line = u + i * kBlockColumns;
          if (p.seed) drop(line, mask + i * mask_stride(p.width), line, of_x);
          finish<A>(line, nullptr, p.add_input ? static_cast<const A*>(p.dy) + (row + i) * p.dy_stride + c : nullptr, nullptr, static_cast<A*>(p.dx) + (row + i) * p.width + c, of_x);
        }
      }
      if (need_p || need_sums) {
        const Rows<G> dy = b.input(row, m, height);
        to_panels(Rows<G>{dy.data + c, dy.stride}, m, height, of_dy, panels, need_sums ? sums : nullptr);
        if (need_p) multiply(b.thin.a + row * s.rank, panels, height, p.rank, of_dy, row > 0, in_partial(p.partials + layout.p + c * p.rank, p.rank));
      }
      if (p.dw_down) {
        Rows<G> x = load_rows<A>(static_cast<const A*>(p.x) + c, p.x_stride, row, m, height, of_x, x_tile, kBlockColumns);
        if (p.seed) {
          for (int64_t i = 0; i < m; ++i) drop(x.data + i * x.stride, mask + i * mask_stride(p.width), x_tile + i * kBlockColumns, of_x);
          x = {x_tile, kBlockColumns};
        }
        to_panels(x, m, height, of_x, panels, nullptr);
        multiply(b.thin.dz + row * s.rank, panels, height, p.rank, of_x, row > 0,
                 p.direct ? in_gradient(static_cast<float*>(p.dw_down) + c, p.width) : in_partial(p.partials + c * p.rank, p.rank));
      }
    });
    reduce<A, P>(p, q, last);
  }
  release<G>();
}

}  // namespace

void bottleneck_prepare(const BottleneckParams& p) { FASTADAPT_DISPATCH(p, prepare_vectors, p) }
void bottleneck_pack_forward(const BottleneckParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, pack_forward, p, begin, end) }
void bottleneck_pack_backward(const BottleneckParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, pack_backward, p, begin, end) }
void bottleneck_forward(const BottleneckParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, forward, p, begin, end) }
void bottleneck_few_down(const BottleneckParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH(p, few_down, p, begin, end) }
void bottleneck_few_up(const BottleneckParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH(p, few_up, p, begin, end) }
int64_t bottleneck_between(const BottleneckParams& p) { FASTADAPT_DISPATCH_GEMM(p, between_floats, p) }
bool bottleneck_needs_load(const BottleneckParams& p) { FASTADAPT_DISPATCH_GEMM(p, needs_load, p) }
void bottleneck_load(const BottleneckParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, load_tiles, p, begin, end) }
void bottleneck_forward_thin(const BottleneckParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, forward_thin, p, begin, end) }
void bottleneck_forward_wide(const BottleneckParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, forward_wide, p, begin, end) }
void bottleneck_backward_thin(const BottleneckParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, backward_thin, p, begin, end) }
void bottleneck_backward_wide(const BottleneckParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, backward_wide, p, begin, end) }
void bottleneck_backward(const BottleneckParams& p, int64_t chunk) { FASTADAPT_DISPATCH_GEMM(p, backward, p, chunk) }
void bottleneck_reduce(const BottleneckParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH(p, reduce, p, begin, end) }
void add_partial(float* to, const float* from, int64_t n) { vectors(n, [&](int64_t i) { (Vec::loadu(to + i) + Vec::loadu(from + i)).store(to + i); }); }

}  // namespace fastadapt::cpu
