// The bottleneck over a batch that mixes tasks: the kernels of bottleneck.cuh, of which each block has the rows and the weights of one task. No id is read on the host: grids have as many
// blocks as any ids could need, and a block without a share ends.
//
// A task's rows are cut as the bottleneck of these rows alone cuts them, so every task's numbers have the very bits of its own call. Rows of no task are one more segment without an adapter.
//
// In the tables above the kernels `tiles` and `splits` are those of all tasks and of no task; O of the rows have a task, in `own` of the pieces. `begins` counts the numbers that the blocks read
// to find their shares. A position's row takes 4 bytes; each chunk of a tile's row and each lane of a fragment's asks for it. `downs`, `ups`, `b_ups` and `b_downs` are G, or 1 where shared.
#pragma once
#include "bottleneck.cuh"

namespace fastadapt::cuda {

FASTADAPT_DEVICE int load_int(const int* p) { return ptx::load_global<int>(p); }

FASTADAPT_DEVICE int row_at(const Routing& routing, int position) {
  const unsigned each = static_cast<unsigned>(routing.each), at = static_cast<unsigned>(position), id = at / each;
  return load_int(routing.order + id) * routing.each + static_cast<int>(at - id * each);
}

// The task of a piece (tile, split) of the batch, tasks for no task, or tasks + 1 behind the last piece.
FASTADAPT_DEVICE int task_of(const Routing& routing, const int* begins, int piece) {
  int task = 0;
  while (task <= routing.tasks && piece >= load_int(begins + task + 1)) ++task;
  return task;
}

FASTADAPT_DEVICE const void* advance(const void* p, int64_t bytes) { return p ? static_cast<const char*>(p) + bytes : nullptr; }

// One task's of the weights; of no task, no biases, and weights that are not read.
template <class T>
FASTADAPT_DEVICE Projections weights_of(const Routing& routing, int task, const Projections& w, bool float_parameters) {
  const int64_t wide = task * static_cast<int64_t>(sizeof(T)), own = task * static_cast<int64_t>(float_parameters ? 4 : 2);
  const bool any = task < routing.tasks;
  return {advance(w.w_down, wide * routing.down), any ? advance(w.b_down, own * routing.b_down) : nullptr, advance(w.w_up, wide * routing.up),
          any ? advance(w.b_up, own * routing.b_up) : nullptr, w.rank, w.up_stride};
}

// The rows at positions first .. end - 1 that the thread loads of a tile, whatever the columns.
template <int kThreads, int kRows, int kColumns>
struct Gathered {
  static constexpr int kChunks = kColumns / 8, kOwn = kRows * kChunks / kThreads;
  static_assert(kRows * kChunks % kThreads == 0);
  int row[kOwn];

  FASTADAPT_DEVICE Gathered(const Routing& routing, int first, int end) {
#pragma unroll
    for (int it = 0; it < kOwn; ++it) {
      const int position = first + (it * kThreads + static_cast<int>(threadIdx.x)) / kChunks;
      row[it] = position < end ? row_at(routing, position) : -1;
    }
  }
  FASTADAPT_DEVICE bool valid(int it, int) const { return row[it] >= 0; }
  FASTADAPT_DEVICE int64_t operator()(int it, int) const { return row[it]; }
};

// A `Place` at positions.
struct GatheredPlace {
  int row[2];

  FASTADAPT_DEVICE GatheredPlace(const Routing& routing, int first, int end) {
#pragma unroll
    for (int i = 0; i < 2; ++i) row[i] = first + 8 * i < end ? row_at(routing, first + 8 * i) : -1;
  }
  FASTADAPT_DEVICE bool valid(int i) const { return row[i] >= 0; }
  FASTADAPT_DEVICE int64_t operator()(int i) const { return row[i]; }
};

// A tile of one task's rows.
template <class Tr>
struct RoutedRowShare : Whole {
  using At = GatheredPlace;
  const Routing& routing;
  bool float_parameters;
  int task, first, end;

  template <class Params>
  explicit FASTADAPT_DEVICE RoutedRowShare(const Params& p) : Whole(p), routing(p.routing), float_parameters(p.float_parameters), first(0), end(0) {
    const int tile = static_cast<int>(blockIdx.x);
    task = task_of(routing, routing.tiles, tile);
    if (empty()) return;
    first = load_int(routing.rows + task) + (tile - load_int(routing.tiles + task)) * Tr::kBlockT, end = load_int(routing.rows + task + 1);
  }
  FASTADAPT_DEVICE bool empty() const { return task > routing.tasks; }
  FASTADAPT_DEVICE bool adapts() const { return task < routing.tasks; }
  FASTADAPT_DEVICE auto tile() const { return Gathered<Tr::kThreads, Tr::kBlockT, Tr::kDepth>(routing, first, end); }
  FASTADAPT_DEVICE int own() const { return first + warp() * 16 + lane() / 4; }
  FASTADAPT_DEVICE At place() const { return {routing, own(), end}; }
  FASTADAPT_DEVICE Place position() const { return {own(), end}; }
  FASTADAPT_DEVICE Projections weights(const Projections& w) const { return weights_of<typename Tr::T>(routing, task, w, float_parameters); }
};

template <class T, int kRank>
struct RoutedRowTraits : RowTraits<T, kRank> {
  using Share = RoutedRowShare<RoutedRowTraits>;
};

// A split of one task's rows.
template <class Tr>
struct RoutedSlabShare : Whole {
  const Routing& routing;
  int task;
  int64_t first, last;

  template <class Params>
  explicit FASTADAPT_DEVICE RoutedSlabShare(const Params& p) : Whole(p), routing(p.routing), first(0), last(0) {
    const int split = static_cast<int>(blockIdx.y);
    task = task_of(routing, routing.splits, split);
    if (empty()) return;
    const int begin = load_int(routing.rows + task), end = load_int(routing.rows + task + 1);
    const int64_t each = plan::splits(end - begin, p.width).rows;
    first = begin + (split - load_int(routing.splits + task)) * each, last = first + each < end ? first + each : end;
  }
  FASTADAPT_DEVICE bool empty() const { return task > routing.tasks; }
  FASTADAPT_DEVICE bool adapts() const { return task < routing.tasks; }
  FASTADAPT_DEVICE auto tile(int64_t from) const { return Gathered<Tr::kThreads, Tr::kBlockT, Tr::kSlab>(routing, static_cast<int>(from), static_cast<int>(last)); }
  FASTADAPT_DEVICE GatheredPlace place(int64_t position) const { return {routing, static_cast<int>(position), static_cast<int>(last)}; }
  FASTADAPT_DEVICE Projections weights(const Projections& w) const { return weights_of<typename Tr::T>(routing, task, w, false); }
};

template <class T, int kRank>
struct RoutedSlabTraits : SlabTraits<T, kRank> {
  using Share = RoutedSlabShare<RoutedSlabTraits>;
};

// routed_forward_kernel's bytes:
//   reads    -                      4*threads*begins + 4*N*depth//8 + 16*N
//   reads    -                      2*O*D + own*2*D*(R + S)
//   reads    b_down                 own*threads//4*P*R
//   reads    b_up                   own*threads//4*P*D
//   reads    added                  2*N*D
//   reads    other                  2*N*D
//   writes   -                      2*N*D
//   writes   z                      2*N*S
//
// routed_forward_kernel's resources:
//   rank        threads   shared   registers             blocks
//   32              128    27648   96 / 96 / 105 / 94    5 / 5 / 4 / 3
//   96              128    46080   162 / 165 / 174 / 145 3 / 3 / 2 / 2
//   192             256    51200   200 / 204 / 200 / 188 1 / 1 / 1 / 1
//   256             256    61440   238 / 238 / 238 / 226 1 / 1 / 1 / 1
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads, 1) routed_forward_kernel(const __grid_constant__ RoutedForwardParams p) {
  forward<Tr, PlainEpilogue>(p);
}

// routed_rows_kernel's bytes:
//   reads    -                      4*threads*begins + 4*N*depth//8 + 16*N
//   reads    -                      2*N*S
//   reads    d_z                    2*O*D + own*2*D*S
//   writes   a                      2*N*S
//   writes   dz                     2*N*S
//   writes   d_b_down               tiles*4*R
//
// routed_rows_kernel's resources:
//   rank        threads   shared   registers             blocks
//   32              128    28672   109 / 110 / 110 / 112 4 / 4 / 4 / 3
//   96              128    45056   156 / 162 / 160 / 156 3 / 3 / 3 / 2
//   192             256    46080   207 / 211 / 211 / 216 1 / 1 / 1 / 1
//   256             256    54272   241 / 245 / 242 / 242 1 / 1 / 1 / 1
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads, 1) routed_rows_kernel(const __grid_constant__ RoutedBackwardParams p) {
  rows<Tr>(p);
}

// routed_slab_kernel's bytes:
//   reads    -                      slabs*(4*256*begins + 32*N)
//   reads    dy                     2*N*D
//   reads    q                      2*N*D
//   reads    p                      slabs*2*N*S
//   reads    dz                     slabs*2*N*S
//   reads    dx                     own*2*D*R + slabs*16*N*128//block
//   writes   dx                     2*N*D
//   writes   p                      splits*4*D*S
//   writes   q                      splits*4*D*R
//   writes   s                      splits*4*D
//
// routed_slab_kernel's resources:
//   rank        threads   shared   registers             blocks
//   32              256    61952   80 / 79 / 79 / 72     2 / 3 / 3 / 1
//   96              256    58880   120 / 121 / 124 / 122 2 / 2 / 2 / 1
//   192             256    97280   168 / 168 / 168 / 172 1 / 1 / 1 / 1
//   256             256    79872   242 / 243 / 243 / 239 1 / 1 / 1 / 1
template <class Tr>
FASTADAPT_KERNEL(Tr::kThreads) routed_slab_kernel(const __grid_constant__ RoutedBackwardParams p) {
  slab<Tr>(p);
}

// The block's task, and its number among the task's blocks; behind the last task's, among what comes next.
FASTADAPT_DEVICE Part part_of(const Routing& routing, const int* begins, bool shared, int64_t& block, int64_t blocks) {
  if (shared) return {0, 0, load_int(begins + routing.tasks)};
  const int64_t task = blocks && block / blocks < routing.tasks ? block / blocks : routing.tasks - 1;
  block -= task * blocks;
  return {task, load_int(begins + task), load_int(begins + task + 1)};
}
FASTADAPT_DEVICE Part part_of(const RoutedReduceParams& p, int n, int64_t& block, int64_t blocks) { return part_of(p.routing, p.routing.splits, n > 0, block, blocks); }
FASTADAPT_DEVICE Part part_of(const RoutedReduceParams& p, const ColumnSums& sums, int64_t& block, int64_t blocks) {
  return part_of(p.routing, p.routing.tiles, p.routing.b_down == 0, block, blocks);
}

// routed_reduce_kernel's bytes:
//   reads    -                      4*256*begins
//   reads    p                      own*4*D*R
//   reads    s                      own*4*D
//   reads    q                      own*4*D*R
//   reads    sums                   own_tiles*4*R
//   writes   d_w_down               downs*D*R*P
//   writes   d_w_up                 ups*D*R*P
//   writes   d_b_up                 b_ups*D*P
//   writes   sums                   b_downs*R*P
//
// routed_reduce_kernel's resources:
//   rank        threads   shared   registers             blocks
//   any             256     1024   48 / 48 / 48 / 48     5 / 5 / 5 / 5
template <class T>
FASTADAPT_KERNEL(kReduceThreads) routed_reduce_kernel(const __grid_constant__ RoutedReduceParams p) {
  reduce<T>(p);
}

// The ids' places by task, by one block: each thread has a run of ids, of which it counts each task's, and adds those of the threads before it. Then where each task's rows, tiles and splits
// begin.
template <int kThreads>
FASTADAPT_DEVICE void route(const Routing& routing, int width) {
  FASTADAPT_SHARED(arena);
  const int each = static_cast<int>(plan::ceil_div(routing.count, kThreads)), first = each * static_cast<int>(threadIdx.x),
            last = first + each < routing.count ? first + each : routing.count;
  int placed = 0, tiles = 0, splits = 0;
  const auto store_begins = [&](int task) {
    if (threadIdx.x != 0) return;
    ptx::store_global(routing.rows + task, placed * routing.each), ptx::store_global(routing.tiles + task, tiles), ptx::store_global(routing.splits + task, splits);
  };
  for (int task = 0; task <= routing.tasks; ++task) {
    const auto is_own = [&](int i) {
      const int64_t id = ptx::load_global<int64_t>(routing.ids + i);
      return (id >= 0 && id < routing.tasks ? id : routing.tasks) == task;
    };
    uint32_t sum = 0, before = 0, all = 0;
    for (int i = first; i < last; ++i) sum += is_own(i);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      const uint32_t other = ptx::shuffle_xor(sum, mask);
      before += (lane() & mask) != 0 ? other : 0;
      sum += other;
    }
    if (lane() == 0) ptx::store_shared(arena + 4 * warp(), sum);
    ptx::sync_block();
    for (int w = 0; w < kThreads / 32; ++w) {
      const uint32_t of_warp = ptx::load_shared<uint32_t>(arena + 4 * w);
      before += w < warp() ? of_warp : 0;
      all += of_warp;
    }
    ptx::sync_block();
    int to = placed + static_cast<int>(before);
    for (int i = first; i < last; ++i)
      if (is_own(i)) ptx::store_global(routing.order + to++, i);
    store_begins(task);
    const int64_t rows = static_cast<int64_t>(all) * routing.each;
    placed += static_cast<int>(all), tiles += static_cast<int>(plan::ceil_div(rows, routing.tile_rows)), splits += static_cast<int>(plan::splits(rows, width).count);
  }
  store_begins(routing.tasks + 1);
}

// The routing by the first block, and what the bottleneck's prologue does by the others.
//
// routed_prologue_kernel's bytes, of the routing of I ids and of a copy:
//   reads    routing                2*(G + 1)*8*I
//   writes   routing                4*I + 12*(G + 2)
//   reads    copy                   B*rows*columns
//   writes   copy                   2*rows*to_stride
//
// routed_prologue_kernel's resources:
//   rank        threads   shared   registers             blocks
//   any             256     1024   40 / 39 / 39 / 39     6 / 6 / 6 / 6
template <class T>
FASTADAPT_KERNEL(kPrologueThreads) routed_prologue_kernel(const __grid_constant__ RoutedPrologueParams p) {
  if (blockIdx.x == 0) return route<kPrologueThreads>(p.routing, p.width);
  prologue<T>(p, static_cast<int64_t>(blockIdx.x) - 1);
}

}  // namespace fastadapt::cuda
