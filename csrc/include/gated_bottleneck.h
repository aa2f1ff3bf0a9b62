// Parameters of the CPU kernels of VL-PET's gated bottleneck. Conventions as in bottleneck.h.
#pragma once
#include "bottleneck.h"

namespace fastadapt {

enum Granularity : int { kLarge, kLogits, kMiddleX, kMiddleY, kSmall };
// A gate a row, or a sample: its logit takes the whole row of H'.
constexpr bool has_row_gate(Granularity kind) { return kind == kMiddleX || kind == kSmall; }

struct GatedParams {
  Type activation_type, parameter_type;
  bool native;
  int64_t rows, width, rank, gate_rank, samples;
  const void *h, *x, *dy;
  int64_t h_stride, x_stride, dy_stride;
  const void *w_down, *b_down, *w_up, *b_up, *gate_weight, *gate_bias, *gate_up_weight, *gate_up_bias;
  float input_scale, adapter_scale, scale;
  Activation activation;
  Granularity kind;
  bool add;
  void *y, *z, *zg, *total, *gate;  // z, zg, total, gate: written by forward if not null, read by backward (total, gate: recomputed if null)
  float *logits, *sample_gates;     // middleX and small: one logit a row; small: one gate a sample
  void *dh, *dx, *dw_down, *db_down, *dw_up, *db_up, *dgate_weight, *dgate_bias, *dgate_up_weight, *dgate_up_bias;
  float *packed, *vectors, *partials, *row_gradients;  // partials: in backward that of its chunk of rows, in the reduction the sum of all
  float* between;                                      // by columns: what one phase hands to the next; else null
};

// Vectors of one call in fp32, padded to whole panels.
struct GatedVectors {
  float *b_down, *b_up, *gate_bias, *gate_up_bias, *w_x, *w_h;
  constexpr GatedVectors(float* base, int64_t width, int64_t rank, int64_t gate_rank)
      : b_down(base), b_up(b_down + rank), gate_bias(b_up + width), gate_up_bias(gate_bias + gate_rank), w_x(gate_up_bias + width), w_h(w_x + width) {}
  static constexpr int64_t size(int64_t width, int64_t rank, int64_t gate_rank) { return rank + gate_rank + 4 * width; }
};

// Packed weights of one call: forward [down | up | gate down | gate up], backward the four operands of the gradients through them.
template <class G>
struct GatedPacks {
  G *down, *up, *gate_down, *gate_up;
  constexpr GatedPacks(G* base, int64_t width, int64_t rank, int64_t gate_rank)
      : down(base), up(down + width * rank), gate_down(up + width * rank), gate_up(gate_down + width * gate_rank) {}
  static constexpr int64_t size(int64_t width, int64_t rank, int64_t gate_rank) { return 2 * width * (rank + gate_rank); }
};

// A chunk's partial: the adapter's, the gate bottleneck's, the gate vectors' (w_x, w_h) and the gate bias's.
struct GatedPartial {
  PartialLayout adapter, gate;
  int64_t gate_at, w_x, w_h, bias, total;
  constexpr GatedPartial(int64_t padded_width, int64_t rank, int64_t padded_rank, int64_t gate_rank, int64_t padded_gate_rank)
      : adapter(padded_width, padded_width, rank, padded_rank),
        gate(padded_width, padded_width, gate_rank, padded_gate_rank),
        gate_at(adapter.total),
        w_x(gate_at + gate.total),
        w_h(w_x + padded_width),
        bias(w_h + padded_width),
        total(bias + 16) {}
};

}  // namespace fastadapt
