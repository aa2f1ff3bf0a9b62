// The kernels of a bottleneck, forward and backward; the other ops launch them too, or make kernels of their loops. Here the bytes of a row, each tensor counted once: second readings of a row hit L2.
//
//   kernel            reads                  writes                      weights from L2, a row tile or slab
//   forward           2 D (+ 2 D residual)   2 D + 2 R                   4 D R
//   rows (backward)   2 D + 2 R              4 R'  (a, dz)               2 D R
//   slab (backward)   4 D + 4 R' a slab      2 D   (dx)                  2 R 64; partials 8 D R' a split
//   reduce            the partials           the gradients
// R' is R rounded up to a multiple of 8.
//
// The tables "bytes" above the kernels have everything that a launch asks of global memory, second readings and all; tests/cuda/test_traffic.py holds the emulator's counters to them. A line
// counts where all that it names is given or asked for. N rows, D columns, rank R, S = R', P bytes a parameter; `tiles` row tiles of `threads` threads, of which every 4 read each vector.
//
// The tables "resources" are the compiler's numbers for sm_80 / 90 / 100 / 120: registers a thread, and with them and the shared memory blocks a multiprocessor. Tiles by rank are in
// csrc/include/cuda_plan.h. Kernels over rows are bound to one block at least: without a bound the compiler spills a few bytes on some architecture to make room for one block more.
#pragma once
#include "../common/tiles.cuh"

namespace fastadapt::cuda {

// An x as wide as y, of which nothing is dropped. (lora.cuh has others.)
struct Whole {
  template <class Params>
  explicit FASTADAPT_DEVICE Whole(const Params&) {}
  FASTADAPT_DEVICE bool of_x(int) const { return true; }  // of a slab that begins at this column
  FASTADAPT_DEVICE bool of_y(int) const { return true; }
  FASTADAPT_DEVICE void draw(char*, int64_t, int) const {}                     // a tile's mask, where the tile begins at (row, column) of x
  FASTADAPT_DEVICE void drop(uint32_t (&)[4], const char*, int, int) const {}  // by a tile's mask, from what has the place of the operand at (row, column)
  FASTADAPT_DEVICE void drop_trans(uint32_t (&)[4], const char*, int, int) const {}
  template <int kTiles>
  FASTADAPT_DEVICE void scale_kept(Fragments<kTiles>&) const {}  // sums of a product with what was kept
};

// A block's share of the work, of row kernels: one tile of all rows, which one adapter takes. (routed_bottleneck.cuh has those of several adapters.)
template <class Tr, class Input = Whole>
struct RowShare : Input {
  using At = Place;
  int64_t rows;

  template <class Params>
  explicit FASTADAPT_DEVICE RowShare(const Params& p) : Input(p), rows(p.rows) {}
  FASTADAPT_DEVICE bool empty() const { return false; }
  FASTADAPT_DEVICE bool adapts() const { return true; }  // the rows have an adapter
  FASTADAPT_DEVICE Consecutive tile() const { return {Tr::first_row(), rows}; }
  FASTADAPT_DEVICE Place place() const { return Tr::place(rows); }
  FASTADAPT_DEVICE Place position() const { return place(); }  // of the rows in tensors that the launches of one direction keep for each other
  FASTADAPT_DEVICE const Projections& weights(const Projections& w) const { return w; }
};

template <class T_, int kRank_, bool kDual_ = false>
struct RowTraits {
  using T = T_;
  static constexpr int kRank = kRank_, kTiles = kRank / 8;
  static constexpr bool kDual = kDual_;
  static constexpr int kPart = plan::down_part(kRank, kDual);
  static constexpr plan::RowTile kTile = plan::row_tile(kRank, kDual);
  static constexpr int kThreads = kTile.threads(), kBlockT = kTile.rows(), kDepth = kTile.depth, kColumns = kTile.columns, kStages = kTile.stages;
  static constexpr int kForwardShared = plan::forward_shared(kRank, kDual), kRowsShared = plan::rows_shared(kRank), kGatesShared = plan::gates_shared(kRank, kDual);

  static FASTADAPT_DEVICE int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * kBlockT; }
  static FASTADAPT_DEVICE Place place(int64_t rows) { return {first_row() + warp() * 16 + lane() / 4, rows}; }
  using Share = RowShare<RowTraits>;
};

// Tiles of x, with their masks, and, beside each, of part of Wd's rows.
template <class Tr, class Of>
struct DownLoad {
  const typename Tr::Share& share;
  const void* x;
  int64_t stride;
  const Of& rows;
  const Projections& w;
  int width, part;
  static constexpr int kX = plan::tile_bytes(Tr::kBlockT, Tr::kDepth), kBytes = kX + plan::tile_bytes(Tr::kPart, Tr::kDepth);
  FASTADAPT_DEVICE void operator()(char* stage, int step) const {
    load_tile<typename Tr::T, Tr::kThreads, Tr::kBlockT, Tr::kDepth>(stage, x, stride, rows, step * Tr::kDepth, width);
    const void* const from = static_cast<const typename Tr::T*>(w.w_down) + static_cast<int64_t>(part) * Tr::kPart * width;
    load_tile<typename Tr::T, Tr::kThreads, Tr::kPart, Tr::kDepth>(stage + kX, from, width, 0, w.rank - part * Tr::kPart, step * Tr::kDepth, width);
    share.draw(stage, Tr::first_row(), step * Tr::kDepth);
  }
};
// The pre-activations x Wd' + bd of one tile of rows. Where registers are short, in two parts of the rank, and x is read again.
template <class Tr, class Of>
FASTADAPT_DEVICE Rows<Tr::kTiles> project(const typename Tr::Share& share, char* arena, const void* x, int64_t stride, const Of& rows, const Projections& w, int width, bool float_parameters,
                                          bool adapts) {
  using T = typename Tr::T;
  using Load = DownLoad<Tr, Of>;
  const int steps = adapts ? static_cast<int>(plan::ceil_div(width, Tr::kDepth)) : 0;
  Rows<Tr::kTiles> z;
#pragma unroll
  for (int part = 0; part < Tr::kRank / Tr::kPart; ++part) {
    auto tiles = pipeline<Tr::kStages, Load::kBytes>(arena, steps, Load{share, x, stride, rows, w, width, part});
    auto sum = biases<T, Tr::kPart / 8>(w.b_down, float_parameters, part * Tr::kPart, w.rank);
    for (int step = 0; step < steps; ++step) {
      const char* stage = tiles.next(step);
#pragma unroll
      for (int k = 0; k < Tr::kDepth; k += 16) {
        uint32_t a[4];
        load_a<Tr::kDepth>(a, stage, 16 * warp(), k);
        share.drop(a, stage, 16 * warp(), k);
        multiply<T, Tr::kDepth, false>(sum, a, stage + Load::kX, k);
      }
    }
    share.scale_kept(sum);
    const auto own = rounded<T>(sum);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Tr::kPart / 8; ++j) z.v[i][part * Tr::kPart / 8 + j] = own.v[i][j];
    ptx::sync_block();  // the arena is free
  }
  return z;
}

// Rows of Wu, and of the second bottleneck's behind them.
template <class Tr>
struct UpLoad {
  const Projections &w, &second;
  int width;
  bool loads, loads_second;
  static constexpr int kTile = plan::tile_bytes(Tr::kColumns, Tr::kRank), kBytes = (Tr::kDual ? 2 : 1) * kTile;
  FASTADAPT_DEVICE void operator()(char* stage, int step) const {
    const int64_t first = static_cast<int64_t>(step) * Tr::kColumns;
    if (loads) load_tile<typename Tr::T, Tr::kThreads, Tr::kColumns, Tr::kRank>(stage, w.w_up, w.up_stride, first, width, 0, w.up_stride);
    if (Tr::kDual && loads_second) load_tile<typename Tr::T, Tr::kThreads, Tr::kColumns, Tr::kRank>(stage + kTile, second.w_up, second.up_stride, first, width, 0, second.up_stride);
  }
};
// a Wu' + bu for a step's columns.
template <class Tr>
FASTADAPT_DEVICE Fragments<Tr::kColumns / 8> up(const Rows<Tr::kTiles>& a, const char* tile, const Projections& w, bool float_parameters, int column, int width) {
  auto u = biases<typename Tr::T, Tr::kColumns / 8>(w.b_up, float_parameters, column, width);
  expand<typename Tr::T, Tr::kRank>(u, a, tile);
  return u;
}

// y = epilogue(a, a Wu' + bu) with a = phi(x Wd' + bd), for one tile of rows; two such bottlenecks where kDual, the second over `other`.
//
// Epilogue has reads_z(p) (z is there: no down-projection), ends_early(p) (no up-projection), second(p) (the other bottleneck's projections and z), a constructor that sees a, load(column) for
// what it needs of the rows, and finish(column, u, second u).
template <class Tr, template <class> class Epilogue, class Params>
FASTADAPT_DEVICE void forward(const Params& p) {
  using T = typename Tr::T;
  FASTADAPT_SHARED(arena);
  const typename Tr::Share share(p);
  if (share.empty()) return;
  const auto at = share.place();
  const auto tile = share.tile();
  const Projections& adapter = share.weights(p.adapter);
  const auto& second = Epilogue<Tr>::second(p);
  const int ups = Epilogue<Tr>::ends_early(p) ? 0 : static_cast<int>(plan::ceil_div(p.width, Tr::kColumns));

  Rows<Tr::kTiles> a, a_second;
  if (Epilogue<Tr>::reads_z(p)) {
    a = load_activated<T, Tr::kTiles>(p.z, p.adapter.up_stride, at, p.activation);
  } else {
    a = project<Tr>(share, arena, p.x, p.x_stride, tile, adapter, p.x_width(), p.float_parameters, share.adapts());
    store_and_activate<T>(a, p.z, p.adapter.up_stride, at, p.activation);
  }
  if constexpr (Tr::kDual) {
    a_second = project<Tr>(share, arena, p.other, p.other_stride, tile, second, p.width, p.float_parameters, true);
    store_and_activate<T>(a_second, Epilogue<Tr>::second_z(p), second.up_stride, at, p.activation);
  }

  auto tiles = pipeline<Tr::kStages, UpLoad<Tr>::kBytes>(arena, ups, UpLoad<Tr>{adapter, second, p.width, share.adapts(), true});
  Epilogue<Tr> epilogue(p, at, a);
  for (int step = 0; step < ups; ++step) {
    const char* stage = tiles.next(step);
    const int column = step * Tr::kColumns;
    epilogue.load(column);
    const auto u = share.adapts() ? up<Tr>(a, stage, adapter, p.float_parameters, column, p.width) : zeros<Tr::kColumns / 8>();
    if constexpr (Tr::kDual) epilogue.finish(column, u, up<Tr>(a_second, stage + UpLoad<Tr>::kTile, second, p.float_parameters, column, p.width));
    else epilogue.finish(column, u, u);
  }
}

// y = s g (.) u [+ x] [+ other]; u has its bias.
template <class Tr>
struct PlainEpilogue {
  using T = typename Tr::T;
  using Params = ForwardParams;
  static constexpr int kTiles = Tr::kColumns / 8;
  static FASTADAPT_DEVICE bool reads_z(const Params&) { return false; }
  static FASTADAPT_DEVICE bool ends_early(const Params&) { return false; }
  static FASTADAPT_DEVICE const Projections& second(const Params& p) { return p.adapter; }

  const Params& p;
  typename Tr::Share::At at;
  float scale;
  Rows<kTiles> x, other;

  FASTADAPT_DEVICE PlainEpilogue(const Params& p, typename Tr::Share::At at, const Rows<Tr::kTiles>&) : p(p), at(at), scale(p.scale) {
    if (p.scale_tensor) scale *= parameter<T>(p.scale_tensor, p.float_parameters, 0);
  }
  FASTADAPT_DEVICE void load(int column) {
    if (p.add_input) x = load_rows<T, kTiles>(p.x, p.x_stride, at, column, p.width);
    if (p.other) other = load_rows<T, kTiles>(p.other, p.other_stride, at, column, p.width);
  }
  FASTADAPT_DEVICE void finish(int column, const Fragments<kTiles>& u, const Fragments<kTiles>&) {
    Rows<kTiles> y;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int c = column + 8 * j + 2 * (lane() & 3);
      float2 factor{scale, scale};
      if (p.gate) {
        const float2 g = parameters<T>(p.gate, p.float_parameters, c, p.width);
        factor = {scale * g.x, scale * g.y};
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float2 v{factor.x * u.v[j][2 * i], factor.y * u.v[j][2 * i + 1]};
        if (p.add_input) {
          const float2 add = unpack(x.v[i][j], T{});
          v = {v.x + add.x, v.y + add.y};
        }
        if (p.other) {
          const float2 add = unpack(other.v[i][j], T{});
          v = {v.x + add.x, v.y + add.y};
        }
        y.v[i][j] = pack(v.x, v.y, T{});
      }
    }
    store_rows<T>(p.y, p.width, at, column, p.width, y);
  }
};

// forward_kernel's bytes:
//   reads    -                      2*N*D + tiles*2*D*(R + S)
//   reads    b_down                 tiles*threads//4*P*R
//   reads    b_up                   tiles*threads//4*P*D
//   reads    gate                   tiles*threads//4*P*D
//   reads    scale                  tiles*threads*P
//   reads    added                  2*N*D
//   reads    other                  2*N*D
//   writes   -                      2*N*D
//   writes   z                      2*N*S
//
// forward_kernel's resources:
//   rank        threads   shared   registers             blocks
//   32              128    27648   93 / 93 / 99 / 89     5 / 5 / 4 / 3
//   64              128    36864   119 / 119 / 125 / 106 4 / 4 / 4 / 2
//   96              128    46080   152 / 155 / 163 / 135 3 / 3 / 3 / 2
//   128             256    73728   146 / 150 / 154 / 134 1 / 1 / 1 / 1
//   192             256    51200   190 / 194 / 190 / 178 1 / 1 / 1 / 1
//   256             256    61440   222 / 228 / 224 / 212 1 / 1 / 1 / 1
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads, 1) forward_kernel(const __grid_constant__ ForwardParams p) {
  forward<Tr, PlainEpilogue>(p);
}

// dz = s ((dy (.) g) Wu) (.) phi'(z) and a = phi(z) for one tile of rows of one problem, and the tile's column sums of dz before rounding.
//
// a is stored because each of the D / 64 blocks of the slab kernel would have to evaluate it again.
template <class Tr, class Params>
FASTADAPT_DEVICE void rows(const Params& p) {
  using T = typename Tr::T;
  const BackwardProblem& problem = p.problems[blockIdx.y];
  const int rank = problem.weights.rank, stride = problem.weights.up_stride;
  FASTADAPT_SHARED(arena);
  const typename Tr::Share share(p);
  if (share.empty()) return;
  const auto tile = share.tile();
  const Projections& weights = share.weights(problem.weights);
  const int steps = problem.needs_dz && share.adapts() ? static_cast<int>(plan::ceil_div(p.width, Tr::kDepth)) : 0;
  const auto load = [&](char* stage, int step) {
    load_tile<T, Tr::kThreads, Tr::kBlockT, Tr::kDepth>(stage, problem.dy, problem.dy_stride, tile, step * Tr::kDepth, p.width);
    load_tile<T, Tr::kThreads, Tr::kDepth, Tr::kRank>(stage + plan::tile_bytes(Tr::kBlockT, Tr::kDepth), weights.w_up, stride, static_cast<int64_t>(step) * Tr::kDepth, p.width, 0, stride);
  };
  auto tiles = pipeline<Tr::kStages, Tr::kRowsShared / Tr::kStages>(arena, steps, load);
  auto da = zeros<Tr::kTiles>();
  for (int step = 0; step < steps; ++step) {
    const char* stage = tiles.next(step);
#pragma unroll
    for (int k = 0; k < Tr::kDepth; k += 16) {
      uint32_t a[4];
      load_a<Tr::kDepth>(a, stage, 16 * warp(), k);
      if (problem.gate) {
        const int c = step * Tr::kDepth + k + 2 * (lane() & 3);
        const float2 g[2] = {parameters<T>(problem.gate, p.float_parameters, c, p.width), parameters<T>(problem.gate, p.float_parameters, c + 8, p.width)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 v = unpack(a[i], T{});
          a[i] = pack(v.x * g[i / 2].x, v.y * g[i / 2].y, T{});
        }
      }
      multiply<T, Tr::kRank, true>(da, a, stage + plan::tile_bytes(Tr::kBlockT, Tr::kDepth), k);
    }
  }
  const auto at = share.place();
  const Place position = share.position();
  float scale = problem.scale;
  if (p.scale_tensor) scale *= parameter<T>(p.scale_tensor, p.float_parameters, 0);
  constexpr int kGroup = Tr::kTiles < 4 ? Tr::kTiles : 4;  // 32 columns at a time: all of z beside da does not fit the registers at rank 256
#pragma unroll
  for (int j0 = 0; j0 < Tr::kTiles; j0 += kGroup) {
    const auto z = load_rows<T, kGroup>(problem.z, stride, at, 8 * j0, stride);
    Rows<kGroup> a, dz;
    with_activation(p.activation, [&](auto phi) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 v = unpack(z.v[i][j], T{});
          float* const d = &da.v[j0 + j][2 * i];
          a.v[i][j] = pack(phi(v.x), phi(v.y), T{});
          d[0] *= scale * phi.slope(v.x), d[1] *= scale * phi.slope(v.y);
          dz.v[i][j] = pack(d[0], d[1], T{});
        }
    });
    if (problem.a) store_rows<T>(problem.a, stride, position, 8 * j0, stride, a);
    if (problem.dz) store_rows<T>(problem.dz, stride, position, 8 * j0, stride, dz);
  }
  if (problem.bias_sums) {  // rows behind the last one were read as zero, so their dz is zero
    ptx::sync_block();      // the arena is free
#pragma unroll
    for (int j = 0; j < Tr::kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = sum_of_column(da.v[j][i] + da.v[j][i + 2]);
        if (lane() < 4) ptx::store_shared(arena + 4 * (warp() * Tr::kRank + 8 * j + 2 * lane() + i), sum);
      }
    ptx::sync_block();
    for (int r = static_cast<int>(threadIdx.x); r < rank; r += Tr::kThreads) {
      float sum = 0.f;
      for (int w = 0; w < Tr::kThreads / 32; ++w) sum += ptx::load_shared<float>(arena + 4 * (w * Tr::kRank + r));
      ptx::store_global(problem.bias_sums + static_cast<int64_t>(blockIdx.x) * rank + r, sum);
    }
  }
}

// rows_kernel's bytes, of a problem (d_z: where dx, dWd or dbd is asked for):
//   reads    -                      2*N*S
//   reads    scale                  tiles*threads*P
//   reads    d_z                    2*N*D + tiles*2*D*S
//   reads    d_z gate               tiles*threads//4*P*D
//   writes   a                      2*N*S
//   writes   dz                     2*N*S
//   writes   d_b_down               tiles*4*R
//
// rows_kernel's resources:
//   rank        threads   shared   registers             blocks
//   32              128    28672   110 / 111 / 111 / 113 4 / 4 / 4 / 3
//   64              128    36864   123 / 128 / 126 / 128 4 / 4 / 4 / 2
//   96              128    45056   162 / 168 / 166 / 154 3 / 3 / 3 / 2
//   128             256    71680   163 / 167 / 168 / 168 1 / 1 / 1 / 1
//   192             256    46080   204 / 210 / 210 / 216 1 / 1 / 1 / 1
//   256             256    54272   240 / 244 / 242 / 245 1 / 1 / 1 / 1
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads, 1) rows_kernel(const __grid_constant__ BackwardParams p) {
  rows<Tr>(p);
}

// A block's share of the slab kernel: a split of all rows.
template <class Input = Whole>
struct SlabShare : Input {
  int64_t first, last;

  template <class Params>
  explicit FASTADAPT_DEVICE SlabShare(const Params& p)
      : Input(p), first(static_cast<int64_t>(blockIdx.y) * p.rows_per_split), last(first + p.rows_per_split < p.rows ? first + p.rows_per_split : p.rows) {}
  FASTADAPT_DEVICE bool empty() const { return false; }
  FASTADAPT_DEVICE bool adapts() const { return true; }
  FASTADAPT_DEVICE Consecutive tile(int64_t from) const { return {from, last}; }
  FASTADAPT_DEVICE Place place(int64_t row) const { return {row, last}; }
  FASTADAPT_DEVICE const Projections& weights(const Projections& w) const { return w; }
};

template <class T_, int kRank_>
struct SlabTraits {
  using T = T_;
  static constexpr int kRank = kRank_, kTiles = kRank / 8, kThreads = plan::kSlabThreads, kSlab = plan::kSlab;
  static constexpr plan::SlabTile kTile = plan::slab_tile(kRank);
  static constexpr int kBlockT = kTile.rows, kStages = kTile.stages, kShared = plan::slab_shared(kRank);
  static constexpr int kRowTile = plan::tile_bytes(kBlockT, kSlab), kRankTile = plan::tile_bytes(kBlockT, kRank);
  using Share = SlabShare<>;
};

// Rows of a product, two fragments at a time as an operand, without what was dropped of them.
template <class Share, int kTiles>
FASTADAPT_DEVICE void drop_rows(const Share& share, Rows<kTiles>& rows, const char* tile, int row, int column) {
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
    uint32_t a[4];
    operand(a, rows, k);
    share.drop(a, tile, row, column + 16 * k);
    rows.v[0][2 * k] = a[0], rows.v[1][2 * k] = a[1], rows.v[0][2 * k + 1] = a[2], rows.v[1][2 * k + 1] = a[3];
  }
}

// For one slab of 64 columns of D, of x's and of y's, and one split of the rows: dx = dz Wd + add dy, and the split's partials of dy' a, dz' x and the column sums of dy.
//
// Warps 0 to 3 own 16 columns each of dy' a, warps 4 to 7 of x' dz, in registers from the first row to the last: x and dy are read once for everything, and nothing is added atomically.
template <class Tr, class Params>
FASTADAPT_DEVICE void slab(const Params& p) {
  using T = typename Tr::T;
  const BackwardProblem& problem = p.problems[blockIdx.z];
  const int rank = problem.weights.rank, stride = problem.weights.up_stride, first_column = static_cast<int>(blockIdx.x) * Tr::kSlab;
  const typename Tr::Share share(p);
  if (share.empty()) return;
  const int64_t first = share.first, last = share.last;
  const bool of_x = share.of_x(first_column), of_y = share.of_y(first_column);
  const bool needs_dy = (of_y && (problem.p || problem.s)) || (problem.dx && problem.add != 0.f), needs_dz = of_x && (problem.q || problem.dx);
  FASTADAPT_SHARED(arena);
  char* const w_down = arena + Tr::kStages * 2 * (Tr::kRowTile + Tr::kRankTile);
  if (of_x && problem.dx)  // joins the first stage's group
    load_tile<T, Tr::kThreads, Tr::kRank, Tr::kSlab>(w_down, share.weights(problem.weights).w_down, p.x_width(), 0, share.adapts() ? rank : 0, first_column, p.x_width());
  const auto load = [&](char* stage, int step) {
    const int64_t row = first + static_cast<int64_t>(step) * Tr::kBlockT;
    const auto rows = share.tile(row);
    if (needs_dy) load_tile<T, Tr::kThreads, Tr::kBlockT, Tr::kSlab>(stage, problem.dy, problem.dy_stride, rows, first_column, p.width);
    if (of_x && problem.q) load_tile<T, Tr::kThreads, Tr::kBlockT, Tr::kSlab>(stage + Tr::kRowTile, problem.x, problem.x_stride, rows, first_column, p.x_width());
    if (of_y && problem.p) load_tile<T, Tr::kThreads, Tr::kBlockT, Tr::kRank>(stage + 2 * Tr::kRowTile, problem.a, stride, row, last, 0, stride);
    if (needs_dz) load_tile<T, Tr::kThreads, Tr::kBlockT, Tr::kRank>(stage + 2 * Tr::kRowTile + Tr::kRankTile, problem.dz, stride, row, last, 0, stride);
    if (needs_dz) share.draw(stage + Tr::kRowTile, row, first_column);
  };
  const int steps = first < last ? static_cast<int>(plan::ceil_div(last - first, Tr::kBlockT)) : 0;
  auto tiles = pipeline<Tr::kStages, 2 * (Tr::kRowTile + Tr::kRankTile)>(arena, steps, load);

  constexpr int kRowGroups = Tr::kBlockT / 16, kColumnGroups = 8 / kRowGroups, kOutTiles = 8 / kColumnGroups;
  const int row_group = warp() % kRowGroups, column_group = warp() / kRowGroups, own_columns = (warp() & 3) * 16;
  const bool owns_p = warp() < 4;
  const uint32_t one = pack(1.f, 1.f, T{});
  auto sum = zeros<Tr::kTiles>();
  auto sums = zeros<1>();
  for (int step = 0; step < steps; ++step) {
    const char* stage = tiles.next(step);
    const char *dy = stage, *x = stage + Tr::kRowTile, *a = stage + 2 * Tr::kRowTile, *dz = a + Tr::kRankTile;
    if (of_x && problem.dx) {
      auto out = zeros<kOutTiles>();
#pragma unroll
      for (int k = 0; k < Tr::kRank; k += 16) {
        uint32_t f[4];
        load_a<Tr::kRank>(f, dz, 16 * row_group, k);
        multiply<T, Tr::kSlab, true>(out, f, w_down, k, column_group * kOutTiles * 8);
      }
      const int column = column_group * kOutTiles * 8;
      Rows<kOutTiles> dx;
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float2 v{out.v[j][2 * i], out.v[j][2 * i + 1]};
          if (problem.add != 0.f) {
            const int r = 16 * row_group + lane() / 4 + 8 * i, c = column + 8 * j + 2 * (lane() & 3);
            const float2 e = unpack(ptx::load_shared<uint32_t>(dy + 2 * (r * plan::pitch(Tr::kSlab) + c)), T{});
            v = {v.x + problem.add * e.x, v.y + problem.add * e.y};
          }
          dx.v[i][j] = pack(v.x, v.y, T{});
        }
      drop_rows(share, dx, x, 16 * row_group, column);
      store_rows<T>(problem.dx, p.x_width(), share.place(first + static_cast<int64_t>(step) * Tr::kBlockT + 16 * row_group + lane() / 4), first_column + column, p.x_width(), dx);
    }
    if (owns_p ? of_y && (problem.p || problem.s) : of_x && problem.q != nullptr) {
#pragma unroll
      for (int k = 0; k < Tr::kBlockT; k += 16) {
        uint32_t f[4];
        load_a_trans<Tr::kSlab>(f, owns_p ? dy : x, own_columns, k);
        if (!owns_p) share.drop_trans(f, x, own_columns, k);
        if (owns_p ? problem.p : problem.q) multiply<T, Tr::kRank, true>(sum, f, owns_p ? a : dz, k);
        if (owns_p && problem.s) ptx::mma(sums.v[0], f, one, one, T{});
      }
    }
  }

  const int64_t split = blockIdx.y;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int d = first_column + own_columns + lane() / 4 + 8 * i;
    if (d >= (owns_p ? p.width : p.x_width())) continue;
    if (owns_p && problem.s && (lane() & 3) == 0) ptx::store_global(problem.s + split * p.width + d, sums.v[0][2 * i]);
#pragma unroll
    for (int j = 0; j < Tr::kTiles; ++j) {
      const int r = 8 * j + 2 * (lane() & 3);
      if (owns_p && problem.p && r < stride) ptx::store_global(problem.p + (split * p.width + d) * stride + r, float2{sum.v[j][2 * i], sum.v[j][2 * i + 1]});
      if (!owns_p && problem.q) {
        float* const q = problem.q + (split * rank + r) * p.x_width() + d;
        if (r < rank) ptx::store_global(q, sum.v[j][2 * i]);
        if (r + 1 < rank) ptx::store_global(q + p.x_width(), sum.v[j][2 * i + 1]);
      }
    }
  }
}

// slab_kernel's bytes, of a problem:
//   reads    dy                     2*N*D
//   reads    q                      2*N*D
//   reads    p                      slabs*2*N*S
//   reads    dz                     slabs*2*N*S
//   reads    dx                     splits*2*D*R
//   writes   dx                     2*N*D
//   writes   p                      splits*4*D*S
//   writes   q                      splits*4*D*R
//   writes   s                      splits*4*D
//
// slab_kernel's resources:
//   rank        threads   shared   registers             blocks
//   32              256    61952   73 / 72 / 75 / 76     2 / 3 / 3 / 1
//   64              256    82944   119 / 100 / 98 / 114  2 / 2 / 2 / 1
//   96              256    58880   125 / 125 / 122 / 125 2 / 2 / 2 / 1
//   128             256    71680   126 / 126 / 127 / 126 2 / 2 / 2 / 1
//   192             256    97280   170 / 168 / 168 / 170 1 / 1 / 1 / 1
//   256             256    79872   242 / 244 / 240 / 241 1 / 1 / 1 / 1
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads) slab_kernel(const __grid_constant__ BackwardParams p) {
  slab<Tr>(p);
}

// Whose gradient a block of the reduce kernel adds up, and of which partials. (In routed_bottleneck.cuh a block is one of several tasks'.)
struct Part {
  int64_t task, first, last;
};
FASTADAPT_DEVICE Part part_of(const ReduceParams& p, int, int64_t&, int64_t) { return {0, 0, p.splits}; }
FASTADAPT_DEVICE Part part_of(const ReduceParams&, const ColumnSums& sums, int64_t&, int64_t) { return {0, 0, sums.count}; }

// Adds the partials of the splits in order. With P = dy' a, S the column sums of dy and b = rowsum(Wu (.) P) + bu (.) S: dWu = s g (.) P, dbu = s g (.) S, dg = s b, and g b a column, whose
// sum is the gradient of the scale: gates and scales need no up-projection.
template <class T, class Params>
FASTADAPT_DEVICE void reduce(const Params& p) {
  FASTADAPT_SHARED(arena);
  int64_t block = blockIdx.x;
  for (int n = 0; n < p.problem_count; ++n) {
    const ReduceProblem& problem = p.problems[n];
    const ReduceBlocks blocks = reduce_blocks(problem, p.width, p.x_width());
    const Part part = part_of(p, n, block, blocks.up + blocks.down);
    if (block < blocks.up) {
      const int d = static_cast<int>(block) * 8 + warp();
      if (d >= p.width) return;
      const float full = problem.scale * (p.scale_tensor ? parameter<T>(p.scale_tensor, p.float_parameters, 0) : 1.f);
      const float gate = problem.gate ? parameter<T>(problem.gate, p.float_parameters, d) : 1.f;
      const int64_t row = part.task * p.width + d;
      float bracket = 0.f;
      if (problem.p)
        for (int r = lane(); r < problem.rank; r += 32) {
          float sum = 0.f;
          for (int64_t s = part.first; s < part.last; ++s) sum += ptx::load_global<float>(problem.p + (s * p.width + d) * problem.up_stride + r);
          if (problem.dw_up) store_parameter(problem.dw_up, p.float_parameters, row * problem.rank + r, full * gate * sum, T{});
          if (Params::kGates) bracket += to_float(ptx::load_global<T>(static_cast<const T*>(problem.w_up) + static_cast<int64_t>(d) * problem.up_stride + r)) * sum;
        }
      bracket = sum_of_warp(bracket);
      if (lane() != 0) return;
      if (problem.s) {
        float sum = 0.f;
        for (int64_t s = part.first; s < part.last; ++s) sum += ptx::load_global<float>(problem.s + s * p.width + d);
        if (problem.db_up) store_parameter(problem.db_up, p.float_parameters, row, full * gate * sum, T{});
        if (Params::kGates && problem.b_up) bracket += parameter<T>(problem.b_up, p.float_parameters, d) * sum;
      }
      if (problem.dgate) store_parameter(problem.dgate, p.float_parameters, d, full * bracket, T{});
      if (problem.dscale) ptx::store_global(problem.dscale + d, problem.scale * gate * bracket);
      return;
    }
    block -= blocks.up;
    if (block < blocks.down) {
      const int64_t all = static_cast<int64_t>(problem.rank) * p.x_width(), i = (block * kReduceThreads + threadIdx.x) * 4;  // all is a multiple of 4: the width is one of 8
      if (i >= all) return;
      float4 sum{0.f, 0.f, 0.f, 0.f};
      for (int64_t s = part.first; s < part.last; ++s) {
        const float4 v = ptx::load_global<float4>(problem.q + s * all + i);
        sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
      }
      const int64_t to = part.task * all + i;
      if (p.float_parameters) return ptx::store_global(static_cast<float*>(problem.dw_down) + to, sum);
      return ptx::store_global(static_cast<T*>(problem.dw_down) + to, uint2{pack(sum.x, sum.y, T{}), pack(sum.z, sum.w, T{})});
    }
    block -= blocks.down;
  }
  for (int n = 0; n < p.sum_count; ++n) {
    const ColumnSums& sums = p.sums[n];
    const int columns = sums.columns + (sums.rest ? 1 : 0), blocks = static_cast<int>(plan::ceil_div(columns, 32));
    const Part part = part_of(p, sums, block, blocks);
    if (block < blocks) {
      const int first = static_cast<int>(block) * 32;
      const float sum = column_sum(arena, part.last - part.first, [&](int64_t row, int column) {
        return first + column < columns ? ptx::load_global<float>(sums.parts + (part.first + row) * sums.stride + first + column) : 0.f;
      });
      const int c = first + static_cast<int>(threadIdx.x);
      if (threadIdx.x >= 32 || c >= columns) return;
      if (c < sums.columns) {
        if (sums.out) store_parameter(sums.out, p.float_parameters, part.task * columns + c, sum, T{});
      } else {
        store_parameter(sums.rest, p.float_parameters, 0, sum, T{});
      }
      return;
    }
    block -= blocks;
  }
}

// reduce_kernel's bytes, of a problem (up: where anything but dWd is asked for), and of one of the column sums:
//   reads    up scale               32*D*P
//   reads    up gate                32*D*P
//   reads    up p                   splits*4*D*R + 2*D*R
//   reads    up s                   splits*4*D
//   reads    up s b_up              D*P
//   reads    q                      splits*4*D*R
//   writes   d_w_down               D*R*P
//   writes   d_w_up                 D*R*P
//   writes   d_b_up                 D*P
//   writes   d_gate                 D*P
//   writes   d_scale                4*D
//   reads    sums                   4*count*columns
//   writes   sums                   stored*P
//
// reduce_kernel's resources:
//   rank        threads   shared   registers             blocks
//   any             256     1024   40 / 36 / 32 / 48     6 / 6 / 8 / 5
template <class T>
FASTADAPT_KERNEL(kReduceThreads) reduce_kernel(const __grid_constant__ ReduceParams p) {
  reduce<T>(p);
}

// Copies matrices, rounded to T, to rows of another length, zero behind the columns: every block of the other kernels streams the weights from L2, so rounding there would read twice the bytes
// once a row tile. And the fold.
template <class T>
FASTADAPT_DEVICE void prologue(const PrologueParams& p, int64_t block) {
  FASTADAPT_SHARED(arena);
  for (int n = 0; n < p.count; ++n) {
    const MatrixCopy& copy = p.copies[n];
    const int64_t blocks = copy_blocks(copy);
    if (block < blocks) {
      const int64_t all = copy.rows * copy.to_stride, first = (block * kPrologueThreads + threadIdx.x) * 8;
      const auto value = [&](int64_t i) {
        const int64_t row = i / copy.to_stride, column = i - row * copy.to_stride, from = row * copy.from_stride + column;
        if (i >= all || column >= copy.columns) return 0.f;
        return copy.from_float ? ptx::load_global<float>(static_cast<const float*>(copy.from) + from) : to_float(ptx::load_global<T>(static_cast<const T*>(copy.from) + from));
      };
      if (first >= all) return;
      uint32_t packed[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) packed[k] = pack(value(first + 2 * k), value(first + 2 * k + 1), T{});
      if (copy.to_stride % 8 == 0) return ptx::store_global(static_cast<T*>(copy.to) + first, uint4{packed[0], packed[1], packed[2], packed[3]});
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (first + k < all) ptx::store_global(static_cast<T*>(copy.to) + first + k, static_cast<uint16_t>(packed[k / 2] >> 16 * (k % 2)));
      return;
    }
    block -= blocks;
  }
  const int first = static_cast<int>(block) * 32;  // the fold: Wu' w, and bu w behind it
  const float sum = column_sum(arena, p.fold_width, [&](int64_t d, int column) {
    const int r = first + column;
    if (r > p.fold_rank || (r == p.fold_rank && !p.fold_bias)) return 0.f;
    const float w = parameter<T>(p.fold_weight, p.float_parameters, static_cast<int>(d));
    return w * (r < p.fold_rank ? parameter<T>(p.fold_up, p.float_parameters, static_cast<int>(d * p.fold_rank + r)) : parameter<T>(p.fold_bias, p.float_parameters, static_cast<int>(d)));
  });
  if (threadIdx.x < 32 && first + static_cast<int>(threadIdx.x) <= p.fold_rank) ptx::store_global(p.fold + first + threadIdx.x, sum);
}

// prologue_kernel's bytes, of a copy (B bytes a number that is read) and of the fold:
//   reads    copy                   B*rows*columns
//   writes   copy                   2*rows*to_stride
//   reads    fold                   2*D*R*P
//   reads    fold b_up              2*D*P
//   writes   fold                   4*(R + 1)
//
// prologue_kernel's resources:
//   rank        threads   shared   registers             blocks
//   any             256     1024   38 / 38 / 38 / 40     6 / 6 / 6 / 6
template <class T>
FASTADAPT_KERNEL(kPrologueThreads) prologue_kernel(const __grid_constant__ PrologueParams p) {
  prologue<T>(p, blockIdx.x);
}

}  // namespace fastadapt::cuda
