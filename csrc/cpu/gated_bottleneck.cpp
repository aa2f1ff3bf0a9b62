// VL-PET's gated bottleneck: H' = c h + sa (phi(h Wd' + bd) Wu' + bu), y = s (H' G) or s (H' + G).
//
// Forward is one pass over row tiles; the up-projections of adapter and gate are computed, gated and stored in blocks of 128 columns. middleX needs the whole row of H' for its
// logit and keeps it in the tile. small needs the mean over a sample: a first pass stores H' and the row logits, a second applies the gate.
// Backward with E = s dy: dH' = E G (+ dl w_h), dl = the gate's pre-activation gradient; then through each bottleneck as in bottleneck.cpp. H' and (large) G are read if forward
// saved them, else recomputed. adapter_scale is folded into the packed up-projection (by columns into phi) and its bias. Few tiles go by columns (plan.h).
// Memory traffic a row of D, large, H' and G saved: forward reads h, x, writes y, H', G; backward reads dy, h, x, H', G, writes dh, dx.
#include <cmath>

#include "columns.h"
#include "kernels.h"

namespace fastadapt::cpu {
namespace {

struct Sizes {
  int64_t width, rank, gate_rank;  // padded to whole panels
  explicit Sizes(const GatedParams& p) : width(padded(p.width)), rank(padded(p.rank)), gate_rank(padded(p.gate_rank)) {}
  GatedVectors vectors(const GatedParams& p) const { return {p.vectors, width, rank, gate_rank}; }
  template <class G>
  GatedPacks<G> packs(const GatedParams& p) const {
    return {reinterpret_cast<G*>(p.packed), width, rank, gate_rank};
  }
  // Operands that recompute H' and the gate in backward, behind the others: up and gate up, each where it is needed.
  template <class G>
  std::pair<G*, G*> recompute_packs(const GatedParams& p) const {
    G* up = reinterpret_cast<G*>(p.packed) + GatedPacks<G>::size(width, rank, gate_rank);
    return {up, up + (p.total ? 0 : width * rank)};
  }
  GatedPartial partial(const GatedParams& p) const { return {width, p.rank, rank, p.gate_rank, gate_rank}; }
};

template <class A, class P>
void prepare(const GatedParams& p) {
  const Sizes s(p);
  const GatedVectors v = s.vectors(p);
  vector_or<P, A>(p.b_down, v.b_down, p.rank, s.rank, 0.f);
  vector_or<P, A>(p.b_up, v.b_up, p.width, s.width, 0.f);
  vectors(s.width, [&](int64_t i) { (Vec::loadu(v.b_up + i) * Vec(p.adapter_scale)).store(v.b_up + i); });
  const P* w = static_cast<const P*>(p.gate_weight);
  switch (p.kind) {
    case kLarge:
      vector_or<P, A>(p.gate_bias, v.gate_bias, p.gate_rank, s.gate_rank, 0.f);
      vector_or<P, A>(p.gate_up_bias, v.gate_up_bias, p.width, s.width, 0.f);
      break;
    case kSmall: w += p.width; [[fallthrough]];
    case kMiddleX:
      vector_or<P, A>(p.gate_weight, v.w_x, p.width, s.width, 0.f);
      vector_or<P, A>(w, v.w_h, p.width, s.width, 0.f);
      vector_or<P, A>(p.gate_bias, v.gate_bias, p.gate_bias ? 1 : 0, 1, 0.f);
      break;
    case kMiddleY:
      vector_or<P, A>(w, v.w_h, p.width, s.width, 0.f);
      vectors(s.width, [&](int64_t i) { (Vec::loadu(v.w_h + i) + Vec(1.f)).store(v.w_h + i); });
      break;
    default: break;
  }
}

// Panels of the operands in their order in memory; f(first, last) for the part of [begin, end) that lies in each.
template <class... F>
void split(int64_t begin, int64_t end, const int64_t (&panels)[4], F&&... f) {
  int64_t i = 0, at = 0;
  ((f(std::clamp<int64_t>(begin - at, 0, panels[i]), std::clamp<int64_t>(end - at, 0, panels[i])), at += panels[i++]), ...);
}

template <class A, class P, class G>
void pack_forward(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const GatedPacks<G> to = s.packs<G>(p);
  float* scales = scratch(s.width);
  if (p.adapter_scale == 1.f)
    scales = nullptr;
  else
    std::fill(scales, scales + s.width, p.adapter_scale);
  const int64_t panels[4] = {s.rank / kPanel, s.width / kPanel, s.gate_rank / kPanel, p.gate_rank ? s.width / kPanel : 0};
  split(
      begin, end, panels, [&](int64_t b, int64_t e) { pack_transposed<P, A>(p.w_down, p.rank, p.width, nullptr, to.down, b, e); },
      [&](int64_t b, int64_t e) { pack_transposed<P, A>(p.w_up, p.width, p.rank, scales, to.up, b, e); },
      [&](int64_t b, int64_t e) { pack_transposed<P, A>(p.gate_weight, p.gate_rank, p.width, nullptr, to.gate_down, b, e); },
      [&](int64_t b, int64_t e) { pack_transposed<P, A>(p.gate_up_weight, p.width, p.gate_rank, nullptr, to.gate_up, b, e); });
}

template <class A, class P, class G>
void pack_backward(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const GatedPacks<G> to = s.packs<G>(p);
  float* scales = scratch(s.width);
  if (p.adapter_scale == 1.f)
    scales = nullptr;
  else
    std::fill(scales, scales + s.width, p.adapter_scale);
  const int64_t panels[4] = {s.width / kPanel, s.rank / kPanel, p.gate_rank ? s.width / kPanel : 0, s.gate_rank / kPanel};
  split(
      begin, end, panels, [&](int64_t b, int64_t e) { pack<P, A>(p.w_down, p.rank, p.width, nullptr, to.down, b, e); },
      [&](int64_t b, int64_t e) { pack<P, A>(p.w_up, p.width, p.rank, scales, to.up, b, e); },
      [&](int64_t b, int64_t e) { pack<P, A>(p.gate_weight, p.gate_rank, p.width, nullptr, to.gate_down, b, e); },
      [&](int64_t b, int64_t e) { pack<P, A>(p.gate_up_weight, p.width, p.gate_rank, nullptr, to.gate_up, b, e); });
}

template <class A, class P, class G>
void pack_recompute(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const auto [up, gate_up] = s.recompute_packs<G>(p);
  float* scales = scratch(s.width);
  std::fill(scales, scales + s.width, p.adapter_scale);
  if (!p.total) pack_transposed<P, A>(p.w_up, p.width, p.rank, scales, up, begin, end);
  if (p.kind == kLarge && !p.gate) pack_transposed<P, A>(p.gate_up_weight, p.width, p.gate_rank, nullptr, gate_up, begin, end);
}

// a . b; four accumulators, since the logit's error is the gate's.
template <class E>
inline float dot(const E* a, const float* b, int64_t n) {
  constexpr int64_t v = Vec::size();
  Vec sums[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  int64_t i = 0;
  for (; i + 4 * v <= n; i += 4 * v)
    for (int64_t k = 0; k < 4; ++k) sums[k] = at::vec::fmadd(load(a + i + k * v), Vec::loadu(b + i + k * v), sums[k]);
  float lanes[v];
  ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(lanes);
  double total = 0;
  for (float lane : lanes) total += lane;
  for (; i < n; ++i) total += static_cast<double>(static_cast<float>(a[i])) * b[i];
  return static_cast<float>(total);
}

// total[j] := c h[j] + u[j] + bias[j] for n columns (u in place).
template <class E>
inline void finish_total(float* u, const E* h, const float* bias, float c, int64_t n) {
  vectors(n, [&](int64_t j) { at::vec::fmadd(Vec(c), load(h + j), Vec::loadu(u + j) + Vec::loadu(bias + j)).store(u + j); });
}

inline void combine(const float* total, Vec gate, bool add, float scale, float* y) {
  const Vec t = Vec::loadu(total);
  (Vec(scale) * (add ? t + gate : t * gate)).store(y);
}

// Columns [c, c + n) of a row's y, and of its gate where it is saved, from H' and, of large, the gate's pre-activation without its bias in g. `line` is room.
template <class A, class G>
inline void gate_columns(const GatedParams& p, const GatedVectors& v, int64_t row, int64_t c, int64_t n, const float* total, float* g, const G* logits, float* line) {
  vectors(round_up(n, 8), [&](int64_t j) {
    Vec gate;
    if (p.kind == kLarge) {
      gate = sigmoid<A>(Vec::loadu(g + j) + Vec::loadu(v.gate_up_bias + c + j));
      gate.store(g + j);
    } else {
      gate = p.kind == kLogits ? sigmoid<A>(load(logits + j)) : Vec::loadu(v.w_h + c + j);
    }
    combine(total + j, gate, p.add, p.scale, line + j);
  });
  if (p.gate) narrow(g, static_cast<A*>(p.gate) + row * p.width + c, n);
  narrow(line, static_cast<A*>(p.y) + row * p.width + c, n);
}

// Whether the gradients of the down-projections go from the only chunk, or by columns, to their place, not to a partial.
bool is_direct(const GatedParams& p) { return p.parameter_type == kFloat && (p.between || p.rows <= chunk_rows(p.rows)); }

// One tile's columns of gate and total are finished in buffers of 128 columns; buffers beyond n columns hold no numbers and are not stored.
template <class A, class P, class G>
void forward(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const GatedVectors v = s.vectors(p);
  const GatedPacks<G> w = s.packs<G>(p);
  const bool row_gate = has_row_gate(p.kind);
  // small without saved H': y holds it until gated_apply.
  A* total_out = static_cast<A*>(p.total ? p.total : p.kind == kSmall ? p.y : nullptr);
  const int64_t ld = row_gate ? s.width : kBlockColumns;
  float* z_tile = scratch(kTileRows * (2 * s.width + 2 * s.rank + 2 * s.gate_rank + kBlockColumns + ld) + kBlockColumns);
  float *zg_tile = z_tile + kTileRows * s.rank, *g_tile = zg_tile + kTileRows * s.gate_rank, *u_tile = g_tile + kTileRows * kBlockColumns, *line = u_tile + kTileRows * ld;
  G *a_tile = reinterpret_cast<G*>(line + kBlockColumns), *ag_tile = a_tile + kTileRows * s.rank, *h_tile = ag_tile + kTileRows * s.gate_rank, *x_tile = h_tile + kTileRows * s.width;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row = tile * kTileRows, m = std::min(kTileRows, p.rows - row), height = tile_height(m);
    const Rows<G> h = load_rows<A>(p.h, p.h_stride, row, m, height, p.width, h_tile, s.width);
    Rows<G> x{};
    if (p.kind != kMiddleY) x = load_rows<A>(p.x, p.x_stride, row, m, height, p.width, x_tile, s.width);
    matmul(height, p.width, p.rank, h.data, h.stride, w.down, z_tile, s.rank, 0, p.rank);
    activate_rows<A>(z_tile, m, p.rank, s.rank, v.b_down, p.activation, p.z ? static_cast<A*>(p.z) + row * p.rank : nullptr, p.rank);
    const G *a = operand(z_tile, height * s.rank, a_tile), *ag = nullptr;
    if (p.kind == kLarge) {
      matmul(height, p.width, p.gate_rank, x.data, x.stride, w.gate_down, zg_tile, s.gate_rank, 0, p.gate_rank);
      activate_rows<A>(zg_tile, m, p.gate_rank, s.gate_rank, v.gate_bias, p.activation, p.zg ? static_cast<A*>(p.zg) + row * p.gate_rank : nullptr, p.gate_rank);
      ag = operand(zg_tile, height * s.gate_rank, ag_tile);
    }
    for (int64_t c = 0; c < p.width; c += kBlockColumns) {
      const int64_t n = std::min(kBlockColumns, p.width - c), whole = round_up(n, 8);
      float* u_block = u_tile + (row_gate ? c : 0);
      matmul(height, p.rank, p.width, a, s.rank, w.up, u_block, ld, c, c + n);
      if (p.kind == kLarge) matmul(height, p.gate_rank, p.width, ag, s.gate_rank, w.gate_up, g_tile, kBlockColumns, c, c + n);
      for (int64_t i = 0; i < m; ++i) {
        float *u = u_block + i * ld, *g = g_tile + i * kBlockColumns;
        const int64_t ahead = (row + i + kAhead) * p.width + c;
        fetch(static_cast<const A*>(p.h) + (row + kTileRows + i) * p.h_stride + c, n);
        if (x.data) fetch(static_cast<const A*>(p.x) + (row + kTileRows + i) * p.x_stride + c, n);
        if (!row_gate) fetch<1>(static_cast<A*>(p.y) + ahead, n);
        if (total_out) fetch<1>(total_out + ahead, n);
        if (p.gate) fetch<1>(static_cast<A*>(p.gate) + ahead, n);
        finish_total(u, h.data + i * h.stride + c, v.b_up + c, p.input_scale, whole);
        if (total_out) narrow(u, total_out + (row + i) * p.width + c, n);
        if (row_gate) continue;
        gate_columns<A>(p, v, row + i, c, n, u, g, x.data ? x.data + i * x.stride + c : nullptr, line);
      }
    }
    if (!row_gate) continue;
    for (int64_t i = 0; i < m; ++i) {
      float* u = u_tile + i * ld;
      const float logit = dot(u, v.w_h, p.width) + dot(x.data + i * x.stride, v.w_x, p.width) + v.gate_bias[0];
      p.logits[row + i] = logit;
      if (p.kind == kSmall) continue;
      const Vec gate = sigmoid<A>(Vec(logit));
      vectors(round_up(p.width, 8), [&](int64_t j) { combine(u + j, gate, p.add, p.scale, u + j); });
      narrow(u, static_cast<A*>(p.y) + (row + i) * p.width, p.width);
    }
  }
  release<G>();
}

inline float logistic(float v) { return 1.f / (1.f + std::exp(-v)); }

// sigma'(v) without the cancellation of 1 - sigma(v): a row gate's gradient is one number times whole vectors, so its error is theirs.
inline float logistic_derivative(float v) {
  const float e = std::exp(-std::abs(v));
  return e / ((1.f + e) * (1.f + e));
}

void sample_gates(const GatedParams& p, int64_t begin, int64_t end) {
  const int64_t length = p.rows / p.samples;
  for (int64_t b = begin; b < end; ++b) {
    double sum = 0;
    for (int64_t t = b * length; t < (b + 1) * length; ++t) sum += logistic(p.logits[t]);
    p.sample_gates[b] = static_cast<float>(sum / length);
  }
}

template <class A, class P>
void apply(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  float* line = scratch(s.width);
  const A* total = static_cast<const A*>(p.total ? p.total : p.y);
  const int64_t length = p.rows / p.samples;
  for (int64_t t = begin; t < end; ++t) {
    widen(total + t * p.width, line, p.width);
    const Vec gate(p.sample_gates[t / length]);
    vectors(round_up(p.width, 8), [&](int64_t j) { combine(line + j, gate, p.add, p.scale, line + j); });
    narrow(line, static_cast<A*>(p.y) + t * p.width, p.width);
  }
}

// H' of a tile's columns [c, c + n) in buffer (leading dimension ld): saved, or from a = phi(z).
template <class A, class G>
void load_total(const GatedParams& p, const Sizes& s, int64_t row, int64_t m, int64_t height, Rows<G> h, const G* a, int64_t c, int64_t n, float* buffer, int64_t ld) {
  if (p.total) {
    for (int64_t i = 0; i < m; ++i) {
      const A* from = static_cast<const A*>(p.total) + (row + i) * p.width + c;
      fetch(from + kAhead * p.width, n);
      widen(from, buffer + i * ld, n, round_up(n, kPanel));
    }
    return;
  }
  matmul(height, p.rank, p.width, a, s.rank, static_cast<const G*>(s.recompute_packs<G>(p).first), buffer, ld, c, c + n);
  for (int64_t i = 0; i < m; ++i) finish_total(buffer + i * ld, h.data + i * h.stride + c, s.vectors(p).b_up + c, p.input_scale, round_up(n, 8));
}

// small: the gradient of each row's share of its sample's gate, sum over columns of E H' (or E).
template <class A, class P, class G>
void row_gradients(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  float* a = scratch(kTileRows * (s.width + 2 * s.rank + kBlockColumns) + kBlockColumns);
  float *total = a + kTileRows * s.rank, *line = total + kTileRows * kBlockColumns;
  G *a_tile = reinterpret_cast<G*>(line + kBlockColumns), *h_tile = a_tile + kTileRows * s.rank;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row = tile * kTileRows, m = std::min(kTileRows, p.rows - row), height = tile_height(m);
    Rows<G> h{};
    const G* left = nullptr;
    if (!p.total && !p.add) {
      h = load_rows<A>(p.h, p.h_stride, row, m, height, p.width, h_tile, s.width);
      backprop_rows<A>(static_cast<const A*>(p.z) + row * p.rank, p.rank, nullptr, a, m, height, p.rank, s.rank, p.activation, nullptr);
      left = operand(a, height * s.rank, a_tile);
    }
    std::fill(p.row_gradients + row, p.row_gradients + row + m, 0.f);
    for (int64_t c = 0; c < p.width; c += kBlockColumns) {
      const int64_t n = std::min(kBlockColumns, p.width - c);
      if (!p.add) load_total<A>(p, s, row, m, height, h, left, c, n, total, kBlockColumns);
      for (int64_t i = 0; i < m; ++i) {
        widen(static_cast<const A*>(p.dy) + (row + i) * p.dy_stride + c, line, n);
        double sum = 0;
        for (int64_t j = 0; j < n; ++j) sum += p.add ? line[j] : line[j] * total[i * kBlockColumns + j];
        p.row_gradients[row + i] += static_cast<float>(p.scale * sum);
      }
    }
  }
  release<G>();
}

// row_gradients[t] := d loss / d logit of row t.
void sample_gradients(const GatedParams& p, int64_t begin, int64_t end) {
  const int64_t length = p.rows / p.samples;
  for (int64_t b = begin; b < end; ++b) {
    double sum = 0;
    for (int64_t t = b * length; t < (b + 1) * length; ++t) sum += p.row_gradients[t];
    for (int64_t t = b * length; t < (b + 1) * length; ++t)
      p.row_gradients[t] = static_cast<float>(sum / length) * logistic_derivative(p.logits[t]);
  }
}

// What backward has to compute, and of what.
struct Needs {
  bool dz, total_gradient, dzg, gate, total, x;
  explicit Needs(const GatedParams& p) {
    dz = p.dh || p.dw_down || p.db_down, total_gradient = dz || p.dw_up || p.db_up;
    dzg = p.kind == kLarge && (p.dx || p.dgate_weight || p.dgate_bias), gate = p.dx || p.dgate_weight || p.dgate_bias || p.dgate_up_weight || p.dgate_up_bias;
    // H' is a factor of the gate's gradient (multiply) and of that of the row gates' weights; middleX's gate gradient is a part of dH' itself, small's comes from row_gradients.
    total = p.kind == kMiddleX ? !p.add || p.dgate_weight : p.kind == kSmall ? p.dgate_weight != nullptr : gate && !p.add;
    x = p.kind == kLogits || (p.kind != kMiddleY && p.dgate_weight);
  }
};

// Columns [c, c + n) of a row whose gate has a column for each of its own, from e = dy, H' (where needed) and, of large, the gate (saved) or its pre-activation without its bias in g:
// dt := dH', dl := the gradient of the gate's pre-activation; middleY: dw += that of its gate.
template <class A, class G>
inline void gate_gradients(const GatedParams& p, const GatedVectors& v, const Needs& need, int64_t c, int64_t n, const G* e, const G* logits, const float* total, const float* g, float* dt,
                           float* dl, float* dw) {
  vectors(round_up(n, 8), [&](int64_t j) {
    const Vec grad = Vec(p.scale) * load(e + j), gate_gradient = p.add || !need.total ? grad : grad * Vec::loadu(total + j);
    Vec gate;
    if (p.kind == kMiddleY) {
      gate = Vec::loadu(v.w_h + c + j);
      (Vec::loadu(dw + c + j) + gate_gradient).store(dw + c + j);
    } else {
      gate = p.kind == kLogits ? sigmoid<A>(load(logits + j)) : p.gate ? Vec::loadu(g + j) : sigmoid<A>(Vec::loadu(g + j) + Vec::loadu(v.gate_up_bias + c + j));
      (gate_gradient * gate * (Vec(1.f) - gate)).store(dl + j);
    }
    (p.add ? grad : grad * gate).store(dt + j);
  });
}

// The same of a row with one gate, whose logit has the gradient dl: dt := dH', dw_x and dw_h += those of the weights of the logit. `line` is room, and may be H' itself.
template <class A, class G>
inline void row_gate_gradients(const GatedParams& p, const GatedVectors& v, int64_t row, int64_t c, int64_t n, float gate, float dl, const G* e, const G* in, const float* total, float* line,
                               float* dt, float* dw_x, float* dw_h) {
  const Vec factor(p.add ? p.scale : p.scale * gate), d(dl);
  vectors(round_up(n, 8), [&](int64_t j) {
    (factor * load(e + j) + d * Vec::loadu(v.w_h + c + j)).store(dt + j);
    if (!p.dgate_weight) return;
    at::vec::fmadd(d, load(in + j), Vec::loadu(dw_x + c + j)).store(dw_x + c + j);
    at::vec::fmadd(d, Vec::loadu(total + j), Vec::loadu(dw_h + c + j)).store(dw_h + c + j);
  });
  if (!p.dx) return;
  vectors(round_up(n, 8), [&](int64_t j) { (d * Vec::loadu(v.w_x + c + j)).store(line + j); });
  narrow(line, static_cast<A*>(p.dx) + row * p.width + c, n);
}

template <class A, class P, class G>
void backward(const GatedParams& p, int64_t chunk) {
  const Sizes s(p);
  const GatedVectors v = s.vectors(p);
  const GatedPacks<G> w = s.packs<G>(p);
  const GatedPartial layout = s.partial(p);
  const Needs need(p);
  const bool row_gate = has_row_gate(p.kind), large = p.kind == kLarge, direct = is_direct(p);
  const bool need_h = p.dw_down || (need.total && !p.total);
  const int64_t tile_floats = kTileRows * s.width, block_floats = kTileRows * kBlockColumns;
  const int64_t rank_floats = kTileRows * std::max(s.rank, s.gate_rank);
  float* dt_tile = scratch(6 * tile_floats + 7 * rank_floats + 2 * block_floats + 2 * s.width);
  float *dl_tile = dt_tile + tile_floats, *a = dl_tile + tile_floats, *dz = a + rank_floats, *ag = dz + rank_floats, *dzg = ag + rank_floats, *work = dzg + rank_floats,
        *block = work + rank_floats, *g_block = block + block_floats, *dw_tile = g_block + block_floats;
  G *thin = reinterpret_cast<G*>(dw_tile + 2 * s.width), *thin_g = thin + rank_floats, *dy_tile = thin_g + rank_floats, *h_tile = dy_tile + tile_floats, *x_tile = h_tile + tile_floats,
    *panels = x_tile + tile_floats;
  const auto [pack_up, pack_gate_up] = s.recompute_packs<G>(p);
  const int64_t chunk_begin = chunk * chunk_rows(p.rows), chunk_end = std::min(p.rows, chunk_begin + chunk_rows(p.rows));
  float *partial = p.partials, *dwd = partial, *pt = dwd + layout.adapter.p, *sums = dwd + layout.adapter.sums, *dbd = dwd + layout.adapter.db_down;
  float *dwg = partial + layout.gate_at, *ptg = dwg + layout.gate.p, *sums_g = dwg + layout.gate.sums, *dbg = dwg + layout.gate.db_down;
  float *dw_x = partial + layout.w_x, *bias = partial + layout.bias;  // and behind dw_x dw_h
  std::fill(sums, dbd + s.rank, 0.f);
  std::fill(sums_g, bias + 16, 0.f);
  for (int64_t row = chunk_begin; row < chunk_end; row += kTileRows) {
    const int64_t m = std::min(kTileRows, chunk_end - row), height = tile_height(m);
    const bool add = row != chunk_begin;
    if (!large) std::fill(dw_tile, dw_tile + 2 * s.width, 0.f);
    const Rows<G> dy = load_rows<A>(p.dy, p.dy_stride, row, m, height, p.width, dy_tile, s.width);
    Rows<G> h{}, x{};
    if (need_h) h = load_rows<A>(p.h, p.h_stride, row, m, height, p.width, h_tile, s.width);
    if (need.x) x = load_rows<A>(p.x, p.x_stride, row, m, height, p.width, x_tile, s.width);
    const A *z = static_cast<const A*>(p.z) + row * p.rank, *zg = large ? static_cast<const A*>(p.zg) + row * p.gate_rank : nullptr;
    const G *again = nullptr, *gate_again = nullptr;
    if (need.total && !p.total) backprop_rows<A>(z, p.rank, nullptr, a, m, height, p.rank, s.rank, p.activation, nullptr), again = operand(a, height * s.rank, thin);
    if (large && !p.gate)
      backprop_rows<A>(zg, p.gate_rank, nullptr, ag, m, height, p.gate_rank, s.gate_rank, p.activation, nullptr), gate_again = operand(ag, height * s.gate_rank, thin_g);

    // dt := dH' without the row gates' share, dl := gradient of the gate's pre-activation (large, logits) or H' itself (row gates).
    const int64_t ld = s.width;
    for (int64_t c = 0; c < p.width; c += kBlockColumns) {
      const int64_t n = std::min(kBlockColumns, p.width - c), whole = round_up(n, 8);
      float* total = row_gate ? dl_tile + c : block;
      const int64_t total_ld = row_gate ? ld : kBlockColumns;
      if (need.total) load_total<A>(p, s, row, m, height, h, again, c, n, total, total_ld);
      if (large && !p.gate) matmul(height, p.gate_rank, p.width, gate_again, s.gate_rank, static_cast<const G*>(pack_gate_up), g_block, kBlockColumns, c, c + n);
      if (row_gate) continue;
      for (int64_t i = 0; i < m; ++i) {
        const G *e = dy.data + i * dy.stride + c, *logits = x.data ? x.data + i * x.stride + c : nullptr;
        fetch(e + kAhead * dy.stride, n);
        float* g = g_block + i * kBlockColumns;
        if (large && p.gate) {
          const A* from = static_cast<const A*>(p.gate) + (row + i) * p.width + c;
          fetch(from + kAhead * p.width, n);
          widen(from, g, n, whole);
        }
        gate_gradients<A>(p, v, need, c, n, e, logits, total + i * total_ld, g, dt_tile + i * ld + c, dl_tile + i * ld + c, dw_tile);
      }
    }
    double bias_gradient = 0;
    if (row_gate)
      for (int64_t i = 0; i < m; ++i) {
        const G *e = dy.data + i * dy.stride, *in = x.data ? x.data + i * x.stride : nullptr;
        const float* t = dl_tile + i * ld;
        float gate, dl;
        if (p.kind == kSmall) {
          gate = p.sample_gates[(row + i) / (p.rows / p.samples)], dl = p.row_gradients[row + i];
        } else {
          gate = logistic(p.logits[row + i]);
          double sum = 0;
          for (int64_t j = 0; j < p.width; ++j) sum += static_cast<float>(e[j]) * (p.add ? 1.f : t[j]);
          dl = static_cast<float>(p.scale * sum) * logistic_derivative(p.logits[row + i]);
        }
        bias_gradient += dl;
        row_gate_gradients<A>(p, v, row + i, 0, p.width, gate, dl, e, in, t, dl_tile + i * ld, dt_tile + i * ld, dw_tile, dw_tile + s.width);
      }
    if (!large) vectors(2 * s.width, [&](int64_t j) { (Vec::loadu(dw_x + j) + Vec::loadu(dw_tile + j)).store(dw_x + j); });  // a chunk's rows one by one would round 512 times
    bias[0] += static_cast<float>(bias_gradient);
    if (p.kind == kLogits && p.dx)
      for (int64_t i = 0; i < m; ++i) narrow(dl_tile + i * ld, static_cast<A*>(p.dx) + (row + i) * p.width, p.width);
    for (float* tile : {dt_tile, dl_tile}) std::fill(tile + m * ld, tile + height * ld, 0.f);

    G* wide = dy_tile;  // dy is not needed any more
    if (need.total_gradient) {
      const Rows<G> dt{operand(dt_tile, height * ld, wide), ld};
      if (need.dz) matmul(height, p.width, p.rank, dt.data, ld, w.up, dz, s.rank, 0, p.rank);
      backprop_rows<A>(z, p.rank, need.dz ? dz : nullptr, a, m, height, p.rank, s.rank, p.activation, dbd);
      if (p.dh) {
        const G* left = operand(dz, height * s.rank, thin);
        for (int64_t c = 0; c < p.width; c += kBlockColumns) {
          const int64_t n = std::min(kBlockColumns, p.width - c), whole = round_up(n, 8);
          matmul(height, p.rank, p.width, left, s.rank, w.down, block, kBlockColumns, c, c + n);
          for (int64_t i = 0; i < m; ++i) {
            float* u = block + i * kBlockColumns;
            fetch<1>(static_cast<A*>(p.dh) + (row + i + kAhead) * p.width + c, n);
            if (p.dw_down) fetch(h.data + i * h.stride + c, n);
            vectors(whole, [&](int64_t j) { at::vec::fmadd(Vec(p.input_scale), Vec::loadu(dt_tile + i * ld + c + j), Vec::loadu(u + j)).store(u + j); });
            narrow(u, static_cast<A*>(p.dh) + (row + i) * p.width + c, n);
          }
        }
      }
      if (p.dw_up || p.db_up) to_panels(dt, m, height, p.width, panels, p.db_up ? sums : nullptr);
      if (p.dw_up) accumulate_outer(a, s.rank, panels, height, p.rank, p.width, add, in_partial(pt, p.rank), work, thin);
      if (p.dw_down) {
        to_panels(h, m, height, p.width, panels, nullptr);
        accumulate_outer(dz, s.rank, panels, height, p.rank, p.width, add, direct ? in_gradient(p.dw_down, p.width) : in_partial(dwd, p.rank), work, thin);
      }
    }
    if (!large || !need.gate) continue;
    const Rows<G> dl{operand(dl_tile, height * ld, wide), ld};
    if (need.dzg) matmul(height, p.width, p.gate_rank, dl.data, ld, w.gate_up, dzg, s.gate_rank, 0, p.gate_rank);
    backprop_rows<A>(zg, p.gate_rank, need.dzg ? dzg : nullptr, ag, m, height, p.gate_rank, s.gate_rank, p.activation, dbg);
    if (p.dx) {
      const G* left = operand(dzg, height * s.gate_rank, thin_g);
      for (int64_t c = 0; c < p.width; c += kBlockColumns) {
        const int64_t n = std::min(kBlockColumns, p.width - c);
        matmul(height, p.gate_rank, p.width, left, s.gate_rank, w.gate_down, block, kBlockColumns, c, c + n);
        for (int64_t i = 0; i < m; ++i) {
          A* out = static_cast<A*>(p.dx) + (row + i) * p.width + c;
          fetch<1>(out + kAhead * p.width, n);
          if (p.dgate_weight) fetch(x.data + i * x.stride + c, n);
          narrow(block + i * kBlockColumns, out, n);
        }
      }
    }
    if (p.dgate_up_weight || p.dgate_up_bias) to_panels(dl, m, height, p.width, panels, p.dgate_up_bias ? sums_g : nullptr);
    if (p.dgate_up_weight) accumulate_outer(ag, s.gate_rank, panels, height, p.gate_rank, p.width, add, in_partial(ptg, p.gate_rank), work, thin);
    if (p.dgate_weight) {
      to_panels(x, m, height, p.width, panels, nullptr);
      accumulate_outer(dzg, s.gate_rank, panels, height, p.gate_rank, p.width, add, direct ? in_gradient(p.dgate_weight, p.width) : in_partial(dwg, p.gate_rank), work, thin);
    }
  }
  release<G>();
}

template <class A, class P>
void reduce(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const GatedPartial layout = s.partial(p);
  const bool direct = is_direct(p);
  float* line = scratch(s.width);
  const float* gate = p.partials + layout.gate_at;
  for (int64_t q = begin; q < end; ++q) {
    std::fill(line, line + s.width, p.adapter_scale);
    reduce_pair<P>(p.partials, layout.adapter, layout.total, 1, q, p.width, p.width, p.rank, line, p.adapter_scale == 1.f, direct ? nullptr : p.dw_down, p.dw_up, p.db_up, false, false, nullptr, nullptr);
    if (p.kind != kLarge) continue;
    std::fill(line, line + s.width, 1.f);
    reduce_pair<P>(gate, layout.gate, layout.total, 1, q, p.width, p.width, p.gate_rank, line, true, direct ? nullptr : p.dgate_weight, p.dgate_up_weight, p.dgate_up_bias, false, false, nullptr, nullptr);
  }
  if (begin != 0) return;
  reduce_vector<P>(p.partials + layout.adapter.db_down, layout.total, 1, p.rank, p.db_down, nullptr);
  if (p.kind == kLarge) reduce_vector<P>(gate + layout.gate.db_down, layout.total, 1, p.gate_rank, p.dgate_bias, nullptr);
  if (has_row_gate(p.kind)) reduce_vector<P>(p.partials + layout.bias, layout.total, 1, 1, p.dgate_bias, nullptr);
  if (p.kind == kLarge || !p.dgate_weight) return;
  P* dw = static_cast<P*>(p.dgate_weight);
  const float *dw_x = p.partials + layout.w_x, *dw_h = p.partials + layout.w_h;
  if (p.kind == kMiddleX) {
    vectors(s.width, [&](int64_t j) { (Vec::loadu(dw_x + j) + Vec::loadu(dw_h + j)).store(line + j); });
    dw_x = line;
  }
  narrow(dw_x, dw, p.width);
  if (p.kind == kSmall) narrow(dw_h, dw + p.width, p.width);
}

// ---- A call by columns (plan.h). Forward: the columns of both ranks, then those of H' and y, where a row's gate waits for the whole row. Backward, of saved H' and gate: the gradients of
// row gates, the columns of dH' and of the gate's gradient, those of the ranks, and those of dh, dx and the weights.

// What is handed on from phase to phase.
template <class A, class G>
struct Between {
  Operand<A, G> h, x, dt, dl;  // forward: inputs of the ranks (x of large alone); backward: dH' and, of large, the gradient of the gate's pre-activation
  Thin<G> thin, thin_g;
  float* total;  // forward, with a row gate: H'; backward: dH' in fp32
  int64_t floats;
  explicit Between(const GatedParams& p) {
    const Sizes s(p);
    const int64_t tall = round_up(p.rows, kTileRows), wide = tall * s.width;
    const bool backward = p.dy;
    Room room{p.between};
    total = room.take<float>(backward || has_row_gate(p.kind) ? wide : 0);
    const auto operand = [&](const void* base, int64_t stride, G* copy) { return Operand<A, G>{base, stride, p.width, s.width, copy, backward}; };
    if (backward)
      dt = operand(nullptr, 0, std::is_same_v<G, float> ? reinterpret_cast<G*>(total) : room.take<G>(wide)), dl = operand(nullptr, 0, room.take<G>(p.kind == kLarge ? wide : 0));
    else
      h = operand(p.h, p.h_stride, room.take<G>(wide)), x = operand(p.x, p.x_stride, room.take<G>(p.kind == kLarge ? wide : 0));
    thin = {room, tall * s.rank, backward}, thin_g = {room, tall * s.gate_rank, backward};
    floats = room.from(p.between);
  }
};

template <class A, class P, class G>
int64_t between_floats(const GatedParams& p) {
  return Between<A, G>(p).floats;
}

template <class A, class P, class G>
bool needs_load(const GatedParams& p) {
  return Between<A, G>(p).h.needs_load(p.rows);
}

template <class A, class P, class G>
void load_tiles(const GatedParams& p, int64_t begin, int64_t end) {
  const Between<A, G> b(p);
  for (int64_t row = begin * kTileRows; row < std::min(p.rows, end * kTileRows); row += kTileRows) {
    const int64_t m = std::min(kTileRows, p.rows - row);
    b.h.load(row, m);
    if (p.kind == kLarge) b.x.load(row, m);
  }
}

// f(q) for panels of the adapter's rank, g(q) for those of the gate's, in a range of both.
template <class F, class H>
void over_ranks(const Sizes& s, int64_t begin, int64_t end, F&& f, H&& g) {
  const int64_t panels = s.rank / kPanel;
  for (int64_t q = begin; q < end; ++q)
    if (q < panels)
      f(q);
    else
      g(q - panels);
}

template <class A, class P, class G>
void forward_thin(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const GatedVectors v = s.vectors(p);
  const GatedPacks<G> w = s.packs<G>(p);
  const Between<A, G> b(p);
  over_ranks(
      s, begin, end, [&](int64_t q) { forward_panel<A, P>(p.rows, b.h, p.w_down, p.rank, q, w.down, 1.f, v.b_down, p.activation, p.adapter_scale, p.z, b.thin); },
      [&](int64_t q) { forward_panel<A, P>(p.rows, b.x, p.gate_weight, p.gate_rank, q, w.gate_down, 1.f, v.gate_bias, p.activation, 1.f, p.zg, b.thin_g); });
  release<G>();
}

template <class A, class P, class G>
void forward_wide(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const GatedVectors v = s.vectors(p);
  const GatedPacks<G> w = s.packs<G>(p);
  const Between<A, G> b(p);
  const bool row_gate = has_row_gate(p.kind);
  const int64_t ld = row_gate ? s.width : kBlockColumns, block = kTileRows * kBlockColumns;
  float* u_block = scratch(4 * block + kBlockColumns);
  float *g_block = u_block + block, *line = g_block + block;
  G *h_block = reinterpret_cast<G*>(line + kBlockColumns), *x_block = h_block + block;
  for (int64_t q = begin; q < end; q += kBlockPanels) {
    const int64_t last = std::min(end, q + kBlockPanels), c = q * kPanel, n = std::min(p.width, last * kPanel) - c;
    pack_transposed<P, A>(p.w_up, p.width, p.rank, nullptr, w.up, q, last);
    if (p.kind == kLarge) pack_transposed<P, A>(p.gate_up_weight, p.width, p.gate_rank, nullptr, w.gate_up, q, last);
    over_tiles(p.rows, [&](int64_t row, int64_t m, int64_t height) {
      const Rows<G> h = load_rows<A>(static_cast<const A*>(p.h) + c, p.h_stride, row, m, m, n, h_block, kBlockColumns);
      Rows<G> x{};
      if (p.kind == kLogits) x = load_rows<A>(static_cast<const A*>(p.x) + c, p.x_stride, row, m, m, n, x_block, kBlockColumns);
      float* u = row_gate ? b.total + row * s.width + c : u_block;
      matmul(height, p.rank, p.width, b.thin.rows + row * s.rank, s.rank, w.up, u, ld, c, c + n);
      if (p.kind == kLarge) matmul(height, p.gate_rank, p.width, b.thin_g.rows + row * s.gate_rank, s.gate_rank, w.gate_up, g_block, kBlockColumns, c, c + n);
      for (int64_t i = 0; i < m; ++i) {
        finish_total(u + i * ld, h.data + i * h.stride, v.b_up + c, p.input_scale, round_up(n, 8));
        if (p.total) narrow(u + i * ld, static_cast<A*>(p.total) + (row + i) * p.width + c, n);
        if (!row_gate) gate_columns<A>(p, v, row + i, c, n, u + i * ld, g_block + i * kBlockColumns, x.data + i * x.stride, line);
      }
    });
  }
  release<G>();
}

template <class A, class P, class G>
void row_logits(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const GatedVectors v = s.vectors(p);
  const Between<A, G> b(p);
  for (int64_t t = begin; t < end; ++t)
    p.logits[t] = dot(b.total + t * s.width, v.w_h, p.width) + dot(static_cast<const A*>(p.x) + t * p.x_stride, v.w_x, p.width) + v.gate_bias[0];
}

template <class A, class P, class G>
void apply_row_gates(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const Between<A, G> b(p);
  for (int64_t t = begin; t < end; ++t) {
    float* total = b.total + t * s.width;
    const Vec gate = p.kind == kMiddleX ? sigmoid<A>(Vec(p.logits[t])) : Vec(p.sample_gates[t / (p.rows / p.samples)]);
    vectors(round_up(p.width, 8), [&](int64_t j) { combine(total + j, gate, p.add, p.scale, total + j); });
    narrow(total, static_cast<A*>(p.y) + t * p.width, p.width);
  }
}

// row_gradients[t] := of middleX d loss / d logit of row t, of small that of its share of its sample's gate.
template <class A, class P>
void backward_rows(const GatedParams& p, int64_t begin, int64_t end) {
  float* factor = scratch(Sizes(p).width);
  std::fill(factor, factor + p.width, 1.f);
  for (int64_t t = begin; t < end; ++t) {
    if (!p.add) widen(static_cast<const A*>(p.total) + t * p.width, factor, p.width);
    const float sum = p.scale * dot(static_cast<const A*>(p.dy) + t * p.dy_stride, factor, p.width);
    p.row_gradients[t] = p.kind == kMiddleX ? sum * logistic_derivative(p.logits[t]) : sum;
  }
}

template <class A, class P, class G>
void backward_gate(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const GatedVectors v = s.vectors(p);
  const GatedPartial layout = s.partial(p);
  const Between<A, G> b(p);
  const Needs need(p);
  const bool need_x = p.kind == kLogits || (has_row_gate(p.kind) && p.dgate_weight);
  const int64_t block = kTileRows * kBlockColumns;
  float *total = scratch(3 * kBlockColumns + 2 * block), *gate = total + kBlockColumns, *dl = gate + kBlockColumns;
  G *dy_block = reinterpret_cast<G*>(dl + kBlockColumns), *x_block = dy_block + block;
  float *dw_x = p.partials + layout.w_x, *dw_h = p.partials + layout.w_h;
  for (int64_t q = begin; q < end; q += kBlockPanels) {
    const int64_t last = std::min(end, q + kBlockPanels), c = q * kPanel, n = std::min(p.width, last * kPanel) - c, whole = round_up(n, 8);
    for (float* dw : {dw_x, dw_h}) std::fill(dw + c, dw + last * kPanel, 0.f);
    over_tiles(p.rows, [&](int64_t row, int64_t m, int64_t height) {
      const Rows<G> dy = load_rows<A>(static_cast<const A*>(p.dy) + c, p.dy_stride, row, m, m, n, dy_block, kBlockColumns);
      Rows<G> x{};
      if (need_x) x = load_rows<A>(static_cast<const A*>(p.x) + c, p.x_stride, row, m, m, n, x_block, kBlockColumns);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t t = row + i, at = t * s.width + c;
        const G *e = dy.data + i * dy.stride, *in = x.data + i * x.stride;
        float* dt = b.total + at;
        if (need.total) widen(static_cast<const A*>(p.total) + t * p.width + c, total, n, whole);
        if (has_row_gate(p.kind)) {
          const float row_gate = p.kind == kSmall ? p.sample_gates[t / (p.rows / p.samples)] : logistic(p.logits[t]);
          row_gate_gradients<A>(p, v, t, c, n, row_gate, p.row_gradients[t], e, in, total, dl, dt, dw_x, dw_h);
        } else {
          if (p.gate) widen(static_cast<const A*>(p.gate) + t * p.width + c, gate, n, whole);
          gate_gradients<A>(p, v, need, c, n, e, in, total, gate, dt, dl, dw_x);
          if (p.kind == kLogits && p.dx) narrow(dl, static_cast<A*>(p.dx) + t * p.width + c, n);
          if (p.kind == kLarge) narrow(dl, b.dl.copy + at, whole);
        }
        if constexpr (!std::is_same_v<G, float>) narrow(dt, b.dt.copy + at, whole);
      }
      for (int64_t at = (row + m) * s.width + c; at < (row + height) * s.width; at += s.width) {
        std::fill(b.dt.copy + at, b.dt.copy + at + whole, G(0.f));
        if (p.kind == kLarge) std::fill(b.dl.copy + at, b.dl.copy + at + whole, G(0.f));
      }
    });
  }
  if (begin != 0) return;
  double bias = 0;
  for (int64_t t = 0; has_row_gate(p.kind) && t < p.rows; ++t) bias += p.row_gradients[t];
  p.partials[layout.bias] = static_cast<float>(bias);
}

template <class A, class P, class G>
void backward_thin(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const GatedPacks<G> w = s.packs<G>(p);
  const GatedPartial layout = s.partial(p);
  const Between<A, G> b(p);
  const Needs need(p);
  over_ranks(
      s, begin, end,
      [&](int64_t q) {
        if (need.total_gradient)
          backward_panel<A, P>(p.rows, b.dt, p.w_up, p.rank, q, w.up, nullptr, p.adapter_scale, 1.f, p.z, p.activation, p.partials + layout.adapter.db_down,
                               {need.dz, p.dh != nullptr, p.dw_up != nullptr, p.dw_down != nullptr}, b.thin);
      },
      [&](int64_t q) {
        if (need.gate)
          backward_panel<A, P>(p.rows, b.dl, p.gate_up_weight, p.gate_rank, q, w.gate_up, nullptr, 1.f, 1.f, p.zg, p.activation, p.partials + layout.gate_at + layout.gate.db_down,
                               {need.dzg, p.dx != nullptr, p.dgate_up_weight != nullptr, p.dgate_weight != nullptr}, b.thin_g);
      });
  release<G>();
}

template <class A, class P, class G>
void backward_wide(const GatedParams& p, int64_t begin, int64_t end) {
  const Sizes s(p);
  const GatedPacks<G> w = s.packs<G>(p);
  const GatedPartial layout = s.partial(p);
  const Between<A, G> b(p);
  const bool direct = is_direct(p);
  for (int64_t q = begin; q < end; q += kBlockPanels) {
    const int64_t last = std::min(end, q + kBlockPanels), c = q * kPanel, n = std::min(p.width, last * kPanel) - c;
    float* u = scratch(2 * kTileRows * kBlockColumns);
    G *panels = reinterpret_cast<G*>(u + kTileRows * kBlockColumns), *tile = reinterpret_cast<G*>(u);
    // One down/up pair: in and its gradient, its own of dt in fp32 to be added, the gradient of what it gave, its weight and gradients.
    const auto pair = [&](const void* in, int64_t stride, void* d_in, const float* beside, const Operand<A, G>& d_out, const Thin<G>& thin, int64_t rank, const void* w_down, G* packed,
                          void* dw_down, bool need_up, bool need_sums, float* partial, const PartialLayout& of) {
      float* sums = partial + of.sums + c;
      std::fill(sums, sums + (last - q) * kPanel, 0.f);
      if (d_in) pack<P, A>(w_down, rank, p.width, nullptr, packed, q, last);
      over_tiles(p.rows, [&](int64_t row, int64_t m, int64_t height) {
        const int64_t thin_row = row * padded(rank);
        if (d_in) {
          matmul(height, rank, p.width, thin.rows + thin_row, padded(rank), packed, u, kBlockColumns, c, c + n);
          for (int64_t i = 0; i < m; ++i) {
            float* line = u + i * kBlockColumns;
            if (beside) vectors(round_up(n, 8), [&](int64_t j) { at::vec::fmadd(Vec(p.input_scale), Vec::loadu(beside + (row + i) * s.width + c + j), Vec::loadu(line + j)).store(line + j); });
            narrow(line, static_cast<A*>(d_in) + (row + i) * p.width + c, n);
          }
        }
        if (need_up || need_sums) {
          const Rows<G> d = d_out(row, m, height);
          to_panels(Rows<G>{d.data + c, d.stride}, m, height, n, panels, need_sums ? sums : nullptr);
          if (need_up) multiply(thin.a + thin_row, panels, height, rank, n, row > 0, in_partial(partial + of.p + c * rank, rank));
        }
        if (dw_down) {
          to_panels(load_rows<A>(static_cast<const A*>(in) + c, stride, row, m, height, n, tile, kBlockColumns), m, height, n, panels, nullptr);
          multiply(thin.dz + thin_row, panels, height, rank, n, row > 0, direct ? in_gradient(static_cast<float*>(dw_down) + c, p.width) : in_partial(partial + c * rank, rank));
        }
      });
    };
    pair(p.h, p.h_stride, p.dh, b.total, b.dt, b.thin, p.rank, p.w_down, w.down, p.dw_down, p.dw_up, p.db_up, p.partials, layout.adapter);
    if (p.kind == kLarge)
      pair(p.x, p.x_stride, p.dx, nullptr, b.dl, b.thin_g, p.gate_rank, p.gate_weight, w.gate_down, p.dgate_weight, p.dgate_up_weight, p.dgate_up_bias, p.partials + layout.gate_at,
           layout.gate);
    reduce<A, P>(p, q, last);
  }
  release<G>();
}

}  // namespace

void gated_prepare(const GatedParams& p) { FASTADAPT_DISPATCH(p, prepare, p) }
void gated_pack_forward(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, pack_forward, p, begin, end) }
void gated_pack_backward(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, pack_backward, p, begin, end) }
void gated_pack_recompute(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, pack_recompute, p, begin, end) }
void gated_forward(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, forward, p, begin, end) }
void gated_sample_gates(const GatedParams& p, int64_t begin, int64_t end) { sample_gates(p, begin, end); }
void gated_apply(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH(p, apply, p, begin, end) }
void gated_row_gradients(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, row_gradients, p, begin, end) }
void gated_sample_gradients(const GatedParams& p, int64_t begin, int64_t end) { sample_gradients(p, begin, end); }
int64_t gated_between(const GatedParams& p) { FASTADAPT_DISPATCH_GEMM(p, between_floats, p) }
bool gated_needs_load(const GatedParams& p) { FASTADAPT_DISPATCH_GEMM(p, needs_load, p) }
void gated_load(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, load_tiles, p, begin, end) }
void gated_forward_thin(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, forward_thin, p, begin, end) }
void gated_forward_wide(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, forward_wide, p, begin, end) }
void gated_row_logits(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, row_logits, p, begin, end) }
void gated_apply_row_gates(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, apply_row_gates, p, begin, end) }
void gated_backward_rows(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH(p, backward_rows, p, begin, end) }
void gated_backward_gate(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, backward_gate, p, begin, end) }
void gated_backward_thin(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, backward_thin, p, begin, end) }
void gated_backward_wide(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH_GEMM(p, backward_wide, p, begin, end) }
void gated_backward(const GatedParams& p, int64_t chunk) { FASTADAPT_DISPATCH_GEMM(p, backward, p, chunk) }
void gated_reduce(const GatedParams& p, int64_t begin, int64_t end) { FASTADAPT_DISPATCH(p, reduce, p, begin, end) }

}  // namespace fastadapt::cpu
