// Tile and chunk sizes of the CPU kernels. Plain C++; no torch.
#pragma once
#include <cstdint>

namespace fastadapt::plan {

// A row tile of 64 x 768 floats is 196 KB: with the slab of weights it meets it stays in a 512 KB L2.
constexpr int64_t kTileRows = 64;
// GEMM operands are packed in panels of 32 columns: a row-major operand of 768 floats a row maps onto 4 of 64 L1 sets (measured on AVX2: 25 against 55 GFLOP/s).
constexpr int64_t kPanel = 32;
constexpr int64_t kDepth = 192;
// Columns of the up-projection that are computed, finished and stored while they are in L1.
constexpr int64_t kBlockColumns = 128, kBlockPanels = kBlockColumns / kPanel;
// Weight gradients are summed per chunk of rows, then over chunks in order, so the bits depend on the number of rows alone and not on the threads. A chunk is also the unit of
// parallel work in backward, whose partial, as large as the weights, must be added: about 8 chunks, of 64 to 512 rows, and never more than 32.
constexpr int64_t kChunks = 8, kMaxChunkRows = 512, kMaxChunks = 32;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t padded(int64_t n) { return round_up(n, kPanel); }

constexpr int64_t chunk_rows(int64_t rows) {
  const int64_t least = rows <= 2 * kTileRows ? kTileRows : 2 * kTileRows;
  const int64_t even = round_up(ceil_div(rows, kChunks), kTileRows), bounded = even < least ? least : even > kMaxChunkRows ? kMaxChunkRows : even;
  const int64_t few = round_up(ceil_div(rows, kMaxChunks), kTileRows);
  return bounded > few ? bounded : few;
}

// Each distinct row count is a JIT compilation of brgemm per thread (0.1-0.2 ms), so a ragged tile is padded with zero rows to one of seven heights.
constexpr int64_t tile_height(int64_t rows) { return rows > 48 ? kTileRows : rows > 32 ? 48 : rows > 24 ? 32 : rows > 16 ? 24 : rows > 8 ? 16 : rows > 4 ? 8 : 4; }

// Few rows meet the weights where they lie: packing these takes longer than the products. Each row's sum for each column is spread over the lanes of a vector, and adding these up is worth
// it from ranks of about 16 times the rows on: width 768, rank 96, one row 9 us in place of 22, 4 rows 13 and 23; rank 16, 4 rows, 10 and 7 (fp32, measured on CPU).
constexpr int64_t kFewRows = 8;
constexpr int64_t few_height(int64_t rows) { return rows > 4 ? 8 : rows > 2 ? 4 : rows; }
constexpr bool are_few(int64_t rows, int64_t rank) { return rows <= kFewRows && 16 * few_height(rows) <= rank; }

// A call of few tiles goes by columns: threads share the columns of the rank, then those of x and y, for all rows. One tile alone is worked on by all threads then, and a weight is packed by
// the thread that multiplies by it, while it is in its caches; its gradient is nowhere added up. fp32, width 768, rank 512, 2 threads, forward + backward, one run: 40 rows 0.74 ms in place
// of 1.92 (eager 1.40), 256 rows 3.6 in place of 4.3 (7.2; measured on CPU). A rank of one panel would leave the first half of the work to one thread. VL-PET hands on
// more, in more phases: two tiles took about the same time both ways, four of fp32, rank 96, from 0.9 to 1.2 times, as fast as the machine was in that hour.
constexpr int64_t kTilesByColumns = 4, kGatedTilesByColumns = 2;
constexpr bool go_by_columns(int64_t rows, int64_t tiles, int64_t panels) { return rows <= kTileRows || (rows <= tiles * kTileRows && panels > 1); }

}  // namespace fastadapt::plan
