// Tiles, splits and shared memory of the CUDA kernels, as functions of the shape alone. Plain constexpr C++: host, device, emulator and tests read the same numbers.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastadapt::cuda::plan {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int round8(int64_t n) { return static_cast<int>(ceil_div(n, 8) * 8); }

// A kernel is compiled for each of these ranks; a rank between two of them runs in the next one, its missing rows and columns zero.
constexpr int kRanks[] = {32, 64, 96, 128, 192, 256};
constexpr int kMaxRank = 256;
constexpr int bucket(int64_t rank) {
  for (int r : kRanks)
    if (rank <= r) return r;
  return 0;
}
// The gated kernels, of which each rank has two, for fewer: up to rank 120 or so they are bound by memory, and the padding is free.
constexpr int kGatedRanks[] = {32, 96, 192, 256};
constexpr int gated_bucket(int64_t rank) {
  for (int r : kGatedRanks)
    if (rank <= r) return r;
  return 0;
}

// Shared tiles have rows of `columns` 2-byte elements and 16 bytes more: an odd number of 16-byte chunks, so the 8 rows of an ldmatrix fall into different banks.
constexpr int pitch(int columns) { return columns + 8; }
constexpr int tile_bytes(int rows, int columns) { return 2 * rows * pitch(columns); }

constexpr int64_t kMostBlocks = 0x7fffffff, kMostSplits = 65535;  // of a grid along x, and along y
constexpr int kLargestShared = 99 * 1024;  // sm_86, sm_89 and sm_120; sm_80 has 163 KB, sm_90 and sm_100 227 KB

// Kernels over tiles of rows (forward, gates, rows): each warp owns 16 rows and all of the rank. Every tile streams the weights from L2, 4 D R bytes: 64 rows keep that below the
// row's own traffic up to rank 96 or so, wider ranks take 128 rows.
struct RowTile {
  int warps, depth, columns, stages;  // depth: columns of D a step of a down-projection takes; columns: those of an up-projection
  constexpr int rows() const { return 16 * warps; }
  constexpr int threads() const { return 32 * warps; }
};
constexpr RowTile row_tile(int rank, bool dual = false) {
  return rank <= 96 ? RowTile{4, 64, 32, 2} : rank <= 128 ? RowTile{8, 64, 32, 2} : RowTile{8, 32, dual && rank == 256 ? 16 : 32, 2};
}

// Rank of a down-projection that a pass over x computes: two bottlenecks of rank 192 and more do not fit the registers with all of one's sums.
constexpr int down_part(int rank, bool dual) { return dual && rank >= 192 ? rank / 2 : rank; }

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int forward_shared(int rank, bool dual) {
  const RowTile t = row_tile(rank, dual);
  return t.stages * larger(tile_bytes(t.rows(), t.depth) + tile_bytes(down_part(rank, dual), t.depth), (dual ? 2 : 1) * tile_bytes(t.columns, rank));
}
constexpr int rows_shared(int rank) {
  const RowTile t = row_tile(rank);
  return t.stages * (tile_bytes(t.rows(), t.depth) + tile_bytes(t.depth, rank));
}
// Beside the weights: column sums of two gate gradients a warp, twice, so that one barrier a step is enough.
constexpr int gates_shared(int rank, bool dual) {
  const RowTile t = row_tile(rank, dual);
  return t.stages * (dual ? 2 : 1) * tile_bytes(t.columns, rank) + 2 * t.warps * 2 * t.columns * 4;
}

// The kernel over a slab of 64 columns of D and one split of the rows: dx, and the partial weight gradients in registers.
constexpr int kSlab = 64, kSlabThreads = 256;
struct SlabTile {
  int rows, stages;
};
constexpr SlabTile slab_tile(int rank) { return rank <= 64 ? SlabTile{64, 2} : rank <= 192 ? SlabTile{32, 2} : SlabTile{32, 1}; }
constexpr int slab_shared(int rank) {
  const SlabTile t = slab_tile(rank);
  return t.stages * 2 * (tile_bytes(t.rows, kSlab) + tile_bytes(t.rows, rank)) + tile_bytes(rank, kSlab);
}

// About 192 blocks of the slab kernel, no split of fewer than 256 rows: a nominal number, not the device's, so that all devices add in the same order.
struct Splits {
  int64_t count, rows;
};
constexpr Splits splits(int64_t rows, int64_t width) {
  const int64_t wanted = ceil_div(192, ceil_div(width, kSlab)), possible = ceil_div(rows, 256), most = wanted < possible ? wanted : possible;
  const int64_t each = ceil_div(ceil_div(rows, most < 1 ? 1 : most), 64) * 64;
  return {ceil_div(rows, each < 64 ? 64 : each), each < 64 ? 64 : each};
}

// The most pieces of `each` rows, and the most splits, that the rows of `tasks` tasks and of no task can make.
constexpr int64_t routed_pieces(int64_t rows, int64_t tasks, int64_t each) { return rows / each + (rows < tasks + 1 ? rows : tasks + 1); }
constexpr int64_t routed_splits(int64_t rows, int64_t width, int64_t tasks) {
  const int64_t pieces = routed_pieces(rows, tasks, 256), most = (tasks + 1) * ceil_div(192, ceil_div(width, kSlab));
  return pieces < most ? pieces : most;
}

constexpr bool fit() {
  for (int r : kRanks)
    if (forward_shared(r, false) > kLargestShared || forward_shared(r, true) > kLargestShared || rows_shared(r) > kLargestShared || gates_shared(r, true) > kLargestShared ||
        slab_shared(r) > kLargestShared)
      return false;
  return true;
}
static_assert(fit(), "a tile does not fit the smallest shared memory");

}  // namespace fastadapt::cuda::plan
