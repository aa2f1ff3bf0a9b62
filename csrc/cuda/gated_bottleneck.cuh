// VL-PET's gated bottleneck: its forward is the bottleneck's with another epilogue, and one kernel turns dy into the gradients of H' and of the gate's logits, from where the backward is that
// of one or two bottlenecks (`large`), launched together. Bytes of a row, each tensor counted once:
//
//   kernel    reads                                          writes                                        weights from L2, a row tile
//   forward   2 D (h), 2 D (x: large, middleX, small; or     2 D + 2 R (+ 2 Rg; + 4: a row's logit)        4 D (R + Rg)
//             its logits), small: h and z again
//   gates     2 D (dy), 2 D (h), 2 D (x: middleX, small,     2 D (dH'), 2 D (large, logits: dlogits;       2 D (R + Rg), middleX twice
//             logits), 2 R + 2 Rg                            middleX, small: dx)
//
// In the tables above the kernels G and H are R and S of the gate's bottleneck, `row` is a gate a row (middleX, small), and `shares` adds, for every 16 rows, the rows of the samples that they
// touch.
//
// Keeping dH' and the logits' gradient costs 8 of about 22 D bytes a row (eager: 97 D counted) and leaves every kernel at most one pair of rank-wide tiles in registers.
#pragma once
#include "bottleneck.cuh"

namespace fastadapt::cuda {

FASTADAPT_DEVICE bool row_gate(Granularity kind) { return kind == kMiddleX || kind == kSmall; }

// Sums over D of from (.) w for the lane's two rows; w starts at parameter w_first.
template <class T>
FASTADAPT_DEVICE void row_dots(float (&dots)[2], const void* from, int64_t stride, Place at, const void* w, int w_first, bool is_float, int width) {
  dots[0] = dots[1] = 0.f;
  for (int c = 8 * (lane() & 3); c < width; c += 32) {
    float2 weights[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) weights[k] = parameters<T>(w, is_float, w_first + c + 2 * k, w_first + width);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!at.valid(i)) continue;
      const uint4 q = ptx::load_global<uint4>(static_cast<const T*>(from) + (at.row + 8 * i) * stride + c);
      const uint32_t v[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 pair = unpack(v[k], T{});
        dots[i] += pair.x * weights[k].x + pair.y * weights[k].y;
      }
    }
  }
  dots[0] = sum_of_row(dots[0]), dots[1] = sum_of_row(dots[1]);
}

// For the lane's two rows the mean of value(row) over the sample that the row belongs to; the whole warp adds each sample of its 16 rows.
template <class Value>
FASTADAPT_DEVICE void sample_means(float (&means)[2], Place at, int64_t length, Value value) {
  const int64_t first = at.row - lane() / 4;
  int64_t sample = -1;
  float mean = 0.f;
  means[0] = means[1] = 0.f;
  for (int r = 0; r < 16 && first + r < at.rows; ++r) {
    if ((first + r) / length != sample) {
      sample = (first + r) / length;
      float sum = 0.f;
      for (int64_t l = lane(); l < length; l += 32) sum += value(sample * length + l);
      mean = sum_of_warp(sum) / static_cast<float>(length);
    }
    if (r == lane() / 4) means[0] = mean;
    if (r == lane() / 4 + 8) means[1] = mean;
  }
}

FASTADAPT_DEVICE void logits_means(float (&means)[2], Place at, const GateParams& g) {
  sample_means(means, at, g.length, [&](int64_t row) { return logistic(ptx::load_global<float>(g.logits + row)).value; });
}

// H' of a pair of columns.
FASTADAPT_DEVICE float2 before_gate(const GateParams& g, float2 h, float u_x, float u_y) {
  return {g.input_scale * h.x + g.adapter_scale * u_x, g.input_scale * h.y + g.adapter_scale * u_y};
}

// y = s (H' (.) G) or s (H' + G).
template <class Tr>
struct GatedEpilogue {
  using T = typename Tr::T;
  using Params = GatedForwardParams;
  static constexpr int kTiles = Tr::kColumns / 8;
  static FASTADAPT_DEVICE bool reads_z(const Params& p) { return p.gating.apply_only; }
  static FASTADAPT_DEVICE bool ends_early(const Params& p) { return p.gating.kind == kSmall && !p.gating.apply_only; }
  static FASTADAPT_DEVICE const Projections& second(const Params& p) { return p.gating.large; }
  static FASTADAPT_DEVICE void* second_z(const Params& p) { return p.gating.zg; }

  const Params& p;
  const GateParams& g;
  Place at;
  float gates[2];  // of a gate a row
  Rows<kTiles> h, logits;

  FASTADAPT_DEVICE GatedEpilogue(const Params& p, Place at, const Rows<Tr::kTiles>& a) : p(p), g(p.gating), at(at) {
    if (g.apply_only) logits_means(gates, at, g);
    if (g.apply_only || !row_gate(g.kind)) return;
    // The logit (x + H') w + b, or [x; H'] w + b, without u: H' w_h = c h w_h + sa (a (Wu' w_h) + bu w_h).
    float of_x[2], of_h[2], of_a[2] = {0.f, 0.f};
    row_dots<T>(of_x, p.other, p.other_stride, at, g.weight, 0, p.float_parameters, p.width);
    row_dots<T>(of_h, p.x, p.x_stride, at, g.weight, g.kind == kSmall ? p.width : 0, p.float_parameters, p.width);
#pragma unroll
    for (int j = 0; j < Tr::kTiles; ++j)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int r = 8 * j + 2 * (lane() & 3) + k;
        if (r >= p.adapter.rank) continue;
        const float fold = ptx::load_global<float>(g.fold + r);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 v = unpack(a.v[i][j], T{});
          of_a[i] += (k ? v.y : v.x) * fold;
        }
      }
    const float constant = g.adapter_scale * ptx::load_global<float>(g.fold + p.adapter.rank) + (g.bias ? parameter<T>(g.bias, p.float_parameters, 0) : 0.f);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float logit = of_x[i] + g.input_scale * of_h[i] + g.adapter_scale * sum_of_row(of_a[i]) + constant;
      if (g.logits && (lane() & 3) == 0 && at.valid(i)) ptx::store_global(g.logits + at.row + 8 * i, logit);
      gates[i] = logistic(logit).value;
    }
  }
  FASTADAPT_DEVICE void load(int column) {
    h = load_rows<T, kTiles>(p.x, p.x_stride, at, column, p.width);
    if (!Tr::kDual && g.kind == kLogits) logits = load_rows<T, kTiles>(p.other, p.other_stride, at, column, p.width);
  }
  FASTADAPT_DEVICE void finish(int column, const Fragments<kTiles>& u, const Fragments<kTiles>& of_gate) {
    Rows<kTiles> y, total, gate;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int c = column + 8 * j + 2 * (lane() & 3);
      float2 own{0.f, 0.f};
      if (!Tr::kDual && g.kind == kMiddleY) own = parameters<T>(g.weight, p.float_parameters, c, p.width);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 before = before_gate(g, unpack(h.v[i][j], T{}), u.v[j][2 * i], u.v[j][2 * i + 1]);
        float2 factor{gates[i], gates[i]};
        if (Tr::kDual) factor = {logistic(of_gate.v[j][2 * i]).value, logistic(of_gate.v[j][2 * i + 1]).value};
        else if (g.kind == kMiddleY) factor = {1.f + own.x, 1.f + own.y};
        else if (g.kind == kLogits) {
          const float2 l = unpack(logits.v[i][j], T{});
          factor = {logistic(l.x).value, logistic(l.y).value};
        }
        const float2 v = g.add ? float2{before.x + factor.x, before.y + factor.y} : float2{before.x * factor.x, before.y * factor.y};
        y.v[i][j] = pack(p.scale * v.x, p.scale * v.y, T{});
        total.v[i][j] = pack(before.x, before.y, T{}), gate.v[i][j] = pack(factor.x, factor.y, T{});
      }
    }
    store_rows<T>(p.y, p.width, at, column, p.width, y);
    if (g.total) store_rows<T>(g.total, p.width, at, column, p.width, total);
    if (Tr::kDual && g.gate) store_rows<T>(g.gate, p.width, at, column, p.width, gate);
  }
};

// gated_forward_kernel's bytes. `projects`: not in the second launch of small, which is `again`. `expands`: not in its first.
//   reads    projects               passes*2*N*D + tiles*2*D*R
//   reads    projects b_down        tiles*threads//4*P*R
//   reads    dual                   passes*2*N*D + tiles*2*D*(G + H)
//   reads    dual gate_b_down       tiles*threads//4*P*G
//   reads    dual gate_b_up         tiles*threads//4*P*D
//   reads    row projects           4*N*D + tiles*(threads//4*(2*D*P + 4*R) + 4*threads)
//   reads    row projects gate_b    tiles*threads*P
//   reads    again                  2*N*S + 4*shares
//   reads    expands                2*N*D + tiles*2*D*S
//   reads    expands b_up           tiles*threads//4*P*D
//   reads    logits                 2*N*D
//   reads    middleY                tiles*threads//4*P*D
//   writes   projects z             2*N*S
//   writes   dual zg                2*N*H
//   writes   row projects kept      4*N
//   writes   expands                2*N*D
//   writes   expands total          2*N*D
//   writes   dual total             2*N*D
//
// gated_forward_kernel's resources:
//   rank        threads   shared   registers             blocks
//   32              128    27648   89 / 94 / 94 / 91     5 / 5 / 5 / 3
//   32, dual        128    27648   100 / 100 / 100 / 102 4 / 4 / 4 / 3
//   96              128    46080   166 / 168 / 178 / 154 3 / 3 / 2 / 2
//   96, dual        128    46080   190 / 190 / 194 / 179 2 / 2 / 2 / 2
//   192             256    51200   193 / 197 / 194 / 182 1 / 1 / 1 / 1
//   192, dual       256    51200   228 / 227 / 231 / 215 1 / 1 / 1 / 1
//   256             256    61440   228 / 234 / 228 / 216 1 / 1 / 1 / 1
//   256, dual       256    40960   240 / 241 / 240 / 228 1 / 1 / 1 / 1
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads, 1) gated_forward_kernel(const __grid_constant__ GatedForwardParams p) {
  forward<Tr, GatedEpilogue>(p);
}

// From e = s dy: dH' = e (.) G, or e where the gate is added, and dG = e (.) H', or e; then
//   large, logits: d_logits = dG (.) G (1 - G);
//   middleY: sums, the tile's column sums of dG;
//   middleX, small: dl = rowsum(dG) G (1 - G) a row (small: the mean of the sample's row sums), dH' += dl w_h, dx = dl w_x, and sums of dl (x + H'), or dl x and dl H', and of dl.
// H' is read where it was saved, else computed again from z; so is the gate of `large`.
//
// gates_kernel's bytes. `expands`: H' is needed and was not saved; `total`: it was. `first` and `second`: the launches of small. middleX has two sweeps.
//   reads    -                      sweeps*2*N*D
//   reads    expands                sweeps*(2*N*D + tiles*2*D*S) + 2*N*S
//   reads    expands b_up           sweeps*tiles*threads//4*P*D
//   reads    total                  sweeps*2*N*D
//   reads    dual unsaved           2*N*H + tiles*2*D*H
//   reads    dual unsaved gate_b_up tiles*threads//4*P*D
//   reads    dual saved             2*N*D
//   reads    logits                 2*N*D
//   reads    row                    16*N + sweeps*tiles*threads//4*P*D
//   reads    row sums               2*N*D
//   reads    small                  tiles*threads//4*P*D
//   reads    second                 8*shares
//   reads    middleY                tiles*threads//4*P*D
//   writes   first                  4*N
//   writes   d_total                2*N*D
//   writes   d_logits               2*N*D
//   writes   dx                     2*N*D
//   writes   sums                   tiles*4*columns
//
// gates_kernel's resources:
//   rank        threads   shared   registers             blocks
//   32              128     7168   150 / 154 / 154 / 145 3 / 3 / 3 / 3
//   32, dual        128    12288   140 / 146 / 145 / 137 3 / 3 / 3 / 3
//   96              128    15360   177 / 178 / 177 / 168 2 / 2 / 2 / 3
//   96, dual        128    28672   183 / 183 / 197 / 181 2 / 2 / 2 / 2
//   192             256    29696   189 / 192 / 191 / 196 1 / 1 / 1 / 1
//   192, dual       256    55296   230 / 230 / 233 / 228 1 / 1 / 1 / 1
//   256             256    37888   207 / 207 / 206 / 212 1 / 1 / 1 / 1
//   256, dual       256    35840   210 / 210 / 210 / 216 1 / 1 / 1 / 1
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads, 1) gates_kernel(const __grid_constant__ GatesParams p) {
  using T = typename Tr::T;
  constexpr int kTiles = Tr::kColumns / 8, kWarps = Tr::kThreads / 32;
  const GateParams& g = p.gating;
  const bool by_row = !Tr::kDual && row_gate(g.kind), small = !Tr::kDual && g.kind == kSmall, by_column = !Tr::kDual && g.kind == kMiddleY, given = !Tr::kDual && g.kind == kLogits;
  const bool sweeps_twice = by_row && !small;
  // What of H' is needed: for the row sums and the logits' gradient unless the gate is added, for the gradient of a row gate's weight always.
  const bool needs_total = (p.sums && (by_row || !g.add)) || (p.d_logits && !g.add) || (by_row && !g.add && (sweeps_twice || p.row_sums_only));
  const bool expands = needs_total && !g.total, expands_gate = Tr::kDual && !g.gate;
  FASTADAPT_SHARED(arena);
  char* const sums_arena = arena + Tr::kStages * UpLoad<Tr>::kBytes;
  const int ups = static_cast<int>(plan::ceil_div(p.width, Tr::kColumns)), steps = sweeps_twice ? 2 * ups : ups;
  const UpLoad<Tr> load{p.adapter, g.large, p.width, expands, expands_gate};
  auto tiles = pipeline<Tr::kStages, UpLoad<Tr>::kBytes>(arena, steps, [&](char* stage, int step) { load(stage, step < ups ? step : step - ups); });
  const Place at = Tr::place(p.rows);
  Rows<Tr::kTiles> a, a_gate;
  if (expands) a = load_activated<T, Tr::kTiles>(p.z, p.adapter.up_stride, at, p.activation);
  if constexpr (Tr::kDual)
    if (expands_gate) a_gate = load_activated<T, Tr::kTiles>(g.zg, g.large.up_stride, at, p.activation);

  float slopes[2] = {0.f, 0.f}, gates[2] = {0.f, 0.f}, d_logit[2] = {0.f, 0.f}, row_sums[2] = {0.f, 0.f};
  if (by_row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!at.valid(i)) continue;
      const Logistic own = logistic(ptx::load_global<float>(g.logits + at.row + 8 * i));
      gates[i] = own.value, slopes[i] = own.value * own.rest;
    }
    if (small && !p.row_sums_only) {
      logits_means(gates, at, g);
      sample_means(row_sums, at, g.length, [&](int64_t row) { return ptx::load_global<float>(p.row_sums + row); });
    }
  }

  const auto flush = [&](int step) {  // the block's column sums of a step, written by its warps before the barrier that has just passed
    float* const to = p.sums + static_cast<int64_t>(blockIdx.x) * p.sums_width;
    for (int i = static_cast<int>(threadIdx.x); i < (small ? 2 : 1) * Tr::kColumns; i += Tr::kThreads) {
      const int c = step * Tr::kColumns + i % Tr::kColumns;
      float sum = 0.f;
      for (int w = 0; w < kWarps; ++w) sum += ptx::load_shared<float>(sums_arena + 4 * (((step & 1) * kWarps + w) * 2 * Tr::kColumns + i));
      if (c < p.width) ptx::store_global(to + i / Tr::kColumns * p.width + c, sum);
    }
  };

  for (int step = 0; step < steps; ++step) {
    const char* stage = tiles.next(step);
    const bool summing = p.row_sums_only || (sweeps_twice && step < ups);
    const int own_step = step < ups ? step : step - ups, column = own_step * Tr::kColumns;
    if (p.sums && !summing && own_step > 0) flush(own_step - 1);
    if (step == (sweeps_twice ? ups : 0) && by_row && !p.row_sums_only) {
      if (sweeps_twice) row_sums[0] = sum_of_row(row_sums[0]), row_sums[1] = sum_of_row(row_sums[1]);
      d_logit[0] = row_sums[0] * slopes[0], d_logit[1] = row_sums[1] * slopes[1];
    }
    const Rows<kTiles> dy = load_rows<T, kTiles>(p.dy, p.dy_stride, at, column, p.width);
    Rows<kTiles> h, x;
    if (expands) h = load_rows<T, kTiles>(p.h, p.h_stride, at, column, p.width);
    else if (needs_total) h = load_rows<T, kTiles>(g.total, p.width, at, column, p.width);
    if (given || (by_row && p.sums && !summing)) x = load_rows<T, kTiles>(p.x, p.x_stride, at, column, p.width);
    Fragments<kTiles> u, of_gate;
    if (expands) u = up<Tr>(a, stage, p.adapter, p.float_parameters, column, p.width);
    if constexpr (Tr::kDual) {
      if (expands_gate) of_gate = up<Tr>(a_gate, stage + UpLoad<Tr>::kTile, g.large, p.float_parameters, column, p.width);
      else x = load_rows<T, kTiles>(g.gate, p.width, at, column, p.width);
    }
    Rows<kTiles> d_total, d_logits, dx;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int c = column + 8 * j + 2 * (lane() & 3);
      float2 of_x{0.f, 0.f}, of_h{0.f, 0.f};
      if (by_row || by_column) of_x = parameters<T>(g.weight, p.float_parameters, c, p.width);
      if (by_row) of_h = small ? parameters<T>(g.weight, p.float_parameters, p.width + c, 2 * p.width) : of_x;
      float2 first_sums{0.f, 0.f}, second_sums{0.f, 0.f};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 dy_pair = unpack(dy.v[i][j], T{}), e{p.scale * dy_pair.x, p.scale * dy_pair.y};
        float2 total{0.f, 0.f}, x_pair{0.f, 0.f};
        if (expands) total = before_gate(g, unpack(h.v[i][j], T{}), u.v[j][2 * i], u.v[j][2 * i + 1]);
        else if (needs_total) total = unpack(h.v[i][j], T{});
        const float2 d_gate = g.add ? e : float2{e.x * total.x, e.y * total.y};
        if (summing) {
          row_sums[i] += d_gate.x + d_gate.y;
          continue;
        }
        Logistic gate_x{gates[i], 0.f}, gate_y{gates[i], 0.f};
        if (Tr::kDual || given) {
          if (expands_gate) gate_x = logistic(of_gate.v[j][2 * i]), gate_y = logistic(of_gate.v[j][2 * i + 1]);
          else {
            x_pair = unpack(x.v[i][j], T{});
            if (Tr::kDual) gate_x = {x_pair.x, 1.f - x_pair.x}, gate_y = {x_pair.y, 1.f - x_pair.y};
            else gate_x = logistic(x_pair.x), gate_y = logistic(x_pair.y);
          }
          d_logits.v[i][j] = pack(d_gate.x * gate_x.value * gate_x.rest, d_gate.y * gate_y.value * gate_y.rest, T{});
        } else if (by_column) {
          gate_x.value = 1.f + of_x.x, gate_y.value = 1.f + of_x.y;
          first_sums = {first_sums.x + d_gate.x, first_sums.y + d_gate.y};
        }
        float2 d = g.add ? e : float2{e.x * gate_x.value, e.y * gate_y.value};
        if (by_row) {
          const float dl = d_logit[i];
          d = {d.x + dl * of_h.x, d.y + dl * of_h.y};
          dx.v[i][j] = pack(dl * of_x.x, dl * of_x.y, T{});
          if (p.sums) {
            x_pair = unpack(x.v[i][j], T{});
            const float2 of_total{dl * total.x, dl * total.y};
            first_sums = {first_sums.x + dl * x_pair.x, first_sums.y + dl * x_pair.y};
            if (small) second_sums = {second_sums.x + of_total.x, second_sums.y + of_total.y};
            else first_sums = {first_sums.x + of_total.x, first_sums.y + of_total.y};
          }
        }
        d_total.v[i][j] = pack(d.x, d.y, T{});
      }
      if (p.sums && !summing) {
        const float sums[4] = {sum_of_column(first_sums.x), sum_of_column(first_sums.y), small ? sum_of_column(second_sums.x) : 0.f, small ? sum_of_column(second_sums.y) : 0.f};
        if (lane() < 4)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            if (k < 2 || small) ptx::store_shared(sums_arena + 4 * (((own_step & 1) * kWarps + warp()) * 2 * Tr::kColumns + k / 2 * Tr::kColumns + 8 * j + 2 * lane() + k % 2), sums[k]);
      }
    }
    if (summing) continue;
    if (p.d_total) store_rows<T>(p.d_total, p.width, at, column, p.width, d_total);
    if (p.d_logits) store_rows<T>(p.d_logits, p.width, at, column, p.width, d_logits);
    if (p.dx) store_rows<T>(p.dx, p.width, at, column, p.width, dx);
  }

  if (p.row_sums_only) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = sum_of_row(row_sums[i]);
      if ((lane() & 3) == 0 && at.valid(i)) ptx::store_global(p.row_sums + at.row + 8 * i, sum);
    }
  } else if (p.sums) {
    const float sum = sum_of_column(d_logit[0] + d_logit[1]);  // each lane of a row has the same
    ptx::sync_block();
    flush(ups - 1);
    if (!by_row) return;
    ptx::sync_block();
    if (lane() == 0) ptx::store_shared(arena + 4 * warp(), sum);
    ptx::sync_block();
    if (threadIdx.x != 0) return;
    float all = 0.f;
    for (int w = 0; w < kWarps; ++w) all += ptx::load_shared<float>(arena + 4 * w);
    ptx::store_global(p.sums + static_cast<int64_t>(blockIdx.x) * p.sums_width + (small ? 2 : 1) * p.width, all);
  }
}

}  // namespace fastadapt::cuda
