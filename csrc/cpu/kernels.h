// The CPU kernels, as functions of ranges: [begin, end) are panels for pack and reduce, row tiles for forward. Backward is of one chunk of rows.
#pragma once
#include "../include/bottleneck.h"
#include "../include/gated_bottleneck.h"

namespace fastadapt::cpu {

void bottleneck_prepare(const BottleneckParams& p);
void bottleneck_pack_forward(const BottleneckParams& p, int64_t begin, int64_t end);
void bottleneck_pack_backward(const BottleneckParams& p, int64_t begin, int64_t end);
void bottleneck_forward(const BottleneckParams& p, int64_t begin, int64_t end);
void bottleneck_few_down(const BottleneckParams& p, int64_t begin, int64_t end);  // z, in packed_down: panels of the rank
void bottleneck_few_up(const BottleneckParams& p, int64_t begin, int64_t end);    // panels of the output
int64_t bottleneck_between(const BottleneckParams& p);  // a call by columns: floats between its phases
bool bottleneck_needs_load(const BottleneckParams& p);
void bottleneck_load(const BottleneckParams& p, int64_t begin, int64_t end);           // row tiles
void bottleneck_forward_thin(const BottleneckParams& p, int64_t begin, int64_t end);   // panels of the rank
void bottleneck_forward_wide(const BottleneckParams& p, int64_t begin, int64_t end);   // panels of the output
void bottleneck_backward_thin(const BottleneckParams& p, int64_t begin, int64_t end);
void bottleneck_backward_wide(const BottleneckParams& p, int64_t begin, int64_t end);  // with the reduction: panels of x and of the output
void bottleneck_backward(const BottleneckParams& p, int64_t chunk);
void bottleneck_reduce(const BottleneckParams& p, int64_t begin, int64_t end);
void add_partial(float* to, const float* from, int64_t n);  // n: a multiple of 8

void gated_prepare(const GatedParams& p);
void gated_pack_forward(const GatedParams& p, int64_t begin, int64_t end);
void gated_pack_backward(const GatedParams& p, int64_t begin, int64_t end);
void gated_pack_recompute(const GatedParams& p, int64_t begin, int64_t end);
void gated_forward(const GatedParams& p, int64_t begin, int64_t end);
void gated_sample_gates(const GatedParams& p, int64_t begin, int64_t end);   // small: samples
void gated_apply(const GatedParams& p, int64_t begin, int64_t end);          // small: rows
void gated_row_gradients(const GatedParams& p, int64_t begin, int64_t end);  // small: row tiles
void gated_sample_gradients(const GatedParams& p, int64_t begin, int64_t end);
int64_t gated_between(const GatedParams& p);  // a call by columns: floats between its phases
bool gated_needs_load(const GatedParams& p);
void gated_load(const GatedParams& p, int64_t begin, int64_t end);             // row tiles
void gated_forward_thin(const GatedParams& p, int64_t begin, int64_t end);     // panels of the rank, then of the gate's
void gated_forward_wide(const GatedParams& p, int64_t begin, int64_t end);     // panels
void gated_row_logits(const GatedParams& p, int64_t begin, int64_t end);       // middleX and small: rows
void gated_apply_row_gates(const GatedParams& p, int64_t begin, int64_t end);  // rows
void gated_backward_rows(const GatedParams& p, int64_t begin, int64_t end);    // middleX and small: rows
void gated_backward_gate(const GatedParams& p, int64_t begin, int64_t end);    // panels
void gated_backward_thin(const GatedParams& p, int64_t begin, int64_t end);    // panels of the rank, then of the gate's
void gated_backward_wide(const GatedParams& p, int64_t begin, int64_t end);    // with the reduction: panels
void gated_backward(const GatedParams& p, int64_t chunk);
void gated_reduce(const GatedParams& p, int64_t begin, int64_t end);

}  // namespace fastadapt::cpu
