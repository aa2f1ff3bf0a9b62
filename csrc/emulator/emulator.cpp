#include "emulator.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cfloat>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <unordered_map>
#include <vector>

namespace fastadapt::emulator {

Block* current = nullptr;

// ---- Fibers

#if !defined(__x86_64__)
#error "the emulator switches fibers with x86-64 instructions; another machine needs its own switch_stack"
#endif
// Saves what a call must preserve, leaves the stack pointer in *save and goes on where `load` was saved. About 2 ns; ucontext makes a system call for the
// signal mask.
extern "C" void fastadapt_switch_stack(void** save, void* load);
asm(R"(
.text
.globl fastadapt_switch_stack
.hidden fastadapt_switch_stack
.type fastadapt_switch_stack,@function
fastadapt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastadapt_switch_stack,.-fastadapt_switch_stack
)");

namespace {

constexpr size_t kStack = 128 * 1024, kPage = 4096;
constexpr unsigned kMaxThreads = 1024, kLanes = 32;
constexpr uint32_t kAll = 0xffffffffu;
constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;  // as cudaError_t

// Named in errors.
enum Operation : uint8_t { kSyncBlock, kSyncWarp, kShuffle, kLdmatrix, kLdmatrixTrans, kMma };
constexpr const char* kOperations[] = {"sync_block", "sync_warp", "shuffle_xor", "ldmatrix_x4", "ldmatrix_x4_trans", "mma"};

struct Copy {
  char* to;
  const char* from;  // null: zeros
  Site site;
};

// A thread's asynchronous copies in order of issue: those before `retired` have arrived, `groups` holds the ends of the groups in flight, what follows is not
// committed. Kept between blocks, so that nothing is allocated per copy.
struct Copies {
  std::vector<Copy> all;
  std::vector<uint32_t> groups;
  size_t retired = 0;
  bool none() const { return retired == all.size(); }
  void clear() { all.clear(), groups.clear(), retired = 0; }
};

struct Fiber : Thread {
  void* stack_pointer = nullptr;
  unsigned number = 0, lane = 0, warp = 0;
  Operation waits_for = kSyncBlock;
  Site waits_at{};
  Copies copies;
};

// Bytes that the lanes of a warp touched at one line, for bank conflicts and sectors.
enum Space : uint8_t { kShared, kGlobal };
struct Group {
  Site site;
  Space space;
  uint8_t bytes;
  uint32_t lanes;
  uintptr_t addresses[kLanes];
};

struct Warp {
  uint32_t ready, at_barrier, exited, arrived;
  uint32_t epoch;  // sync_warp calls, counted on for ever: never the same in two blocks
  Operation operation;
  Site site;
  void* arguments[kLanes];
  std::vector<Group> groups;
};

// What the race detector knows of two bytes of shared memory. Epochs count barriers and are never reused, so a block need not clear what the last one left: a
// write before the block's first epoch is no write.
struct Cell {
  uint32_t written, written_warp_epoch;  // block and warp epoch of the last write
  uint32_t read, read_warp_epoch;        // block epoch of the reads since then, warp epoch of the last
  uint32_t read_warps, read_lanes;       // warps that read in this block epoch; lanes of the last such warp that read in its warp epoch
  uint16_t writer, write_site, read_site;
  uint8_t in_flight;
};
static_assert(sizeof(Cell) == 32);

// Which block touched each byte of a page of global memory; launches number their blocks on, so nothing is cleared in between.
struct PageCells {
  uint32_t writer[kPage], reader[kPage];
};
constexpr uint32_t kManyReaders = 0x80000000u;

struct Range {
  uintptr_t begin, end;
  bool writable;
};

struct Machine : Block {
  Options options;
  std::string error;
  std::map<std::string, Counters> statistics;
  std::map<const void*, size_t> allowed_shared;
  std::map<const void*, std::string> names;
  std::vector<Range> ranges;
  size_t last_range = 0;
  uint64_t launches = 0;  // since configure: each launch has a schedule of its own
  std::mutex busy;

  // The launch that runs.
  void (*run)(void*) = nullptr;
  void* call = nullptr;
  const char* kernel = nullptr;
  Counters counters{};
  bool failed = false;
  uint64_t random_state = 0;
  unsigned threads = 0, warps = 0;
  size_t shared_bytes = 0;
  uint64_t blocks = 0, first = 0, step = 1;  // the order of blocks: `first`, and every step-th from there around
  void* main_stack = nullptr;

  // The block that runs.
  std::vector<Fiber> fibers;
  char* stacks = nullptr;
  Warp warp[kMaxThreads / kLanes];
  uint8_t priority[kMaxThreads / kLanes];
  uint32_t ready_warps = 0;
  unsigned exited = 0, at_barrier = 0;
  Site barrier_site{};
  uint32_t epoch = 0, first_epoch = 0;
  std::vector<Cell> cells;
  std::vector<Site> sites;  // those that cells name
  uint16_t site_cache[256] = {};
  uint32_t block_number = 1, first_block_number = 1;  // within global_races, over all launches
  std::unordered_map<uintptr_t, std::unique_ptr<PageCells>> pages;
  uintptr_t last_page = 0;
  PageCells* last_cells = nullptr;

  uint32_t random() {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(random_state >> 33);
  }
  Fiber& fiber() { return *static_cast<Fiber*>(thread); }
};

Machine& machine() {
  static Machine& m = *new Machine;  // never destroyed: Python may still launch while the process ends
  return m;
}
// The machine, from inside a kernel.
inline Machine& here_runs() { return *static_cast<Machine*>(current); }

std::string text_of(dim3 d) { return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")"; }

std::string at(Site site) { return " at " + site.text(); }

[[noreturn]] void leave() {
  void* dropped;
  fastadapt_switch_stack(&dropped, here_runs().main_stack);
  __builtin_unreachable();
}

[[noreturn]] __attribute__((noinline, cold)) void fail(const std::string& what) {
  Machine& m = here_runs();
  const Fiber& f = m.fiber();
  m.failed = true;
  m.error = std::string(m.kernel) + ": " + what + " [block " + text_of({m.block_index.x, m.block_index.y, m.block_index.z}) + ", thread " +
            std::to_string(f.number) + "]";
  leave();
}

// ---- Schedule

// The one of `mask`'s bits that comes first from a random position.
inline unsigned any_bit(uint32_t mask, uint32_t random) {
  const unsigned shift = random & 31;
  return (__builtin_ctz(mask >> shift | mask << (-shift & 31)) + shift) & 31;
}

Fiber* next(Machine& m) {
  if (!m.ready_warps) return nullptr;
  unsigned w = 0;
  if (m.options.policy == kRandom) {
    w = any_bit(m.ready_warps, m.random());
  } else {
    for (const uint8_t* p = m.priority;; ++p)
      if (m.ready_warps >> (w = *p) & 1) break;
  }
  const uint32_t ready = m.warp[w].ready;
  const unsigned lane = m.options.policy == kInOrder ? __builtin_ctz(ready) : any_bit(ready, m.random());
  return &m.fibers[w * kLanes + lane];
}

inline void go_to(Machine& m, Fiber& from, Fiber& to) {
  if (&from == &to) return;
  m.thread = &to;
  fastadapt_switch_stack(&from.stack_pointer, to.stack_pointer);
}

inline void set_ready(Machine& m, unsigned warp, uint32_t lanes) {
  m.warp[warp].ready |= lanes;
  m.ready_warps |= 1u << warp;
}

inline void set_waiting(Machine& m, const Fiber& f) {
  Warp& w = m.warp[f.warp];
  w.ready &= ~(1u << f.lane);
  if (!w.ready) m.ready_warps &= ~(1u << f.warp);
}

[[noreturn]] __attribute__((noinline, cold)) void deadlock(Machine& m) {
  std::map<std::string, int> waiting;
  for (unsigned i = 0; i < m.threads; ++i) {
    const Fiber& f = m.fibers[i];
    const bool exited = m.warp[f.warp].exited >> f.lane & 1;
    ++waiting[exited ? "the end" : kOperations[f.waits_for] + at(f.waits_at)];
  }
  std::string text = "deadlock:";
  for (const auto& [where, count] : waiting) text += (text.back() == ':' ? " " : ", ") + std::to_string(count) + " threads in " + where;
  fail(text);
}

void wait(Machine& m, Fiber& f, Operation operation, Site site) {
  f.waits_for = operation, f.waits_at = site;
  set_waiting(m, f);
  Fiber* other = next(m);
  if (!other) deadlock(m);
  go_to(m, f, *other);
}

void count_patterns(Machine& m, Warp& w);

void open_barrier(Machine& m) {
  ++m.epoch, ++m.counters.block_barriers, m.at_barrier = 0;
  for (unsigned i = 0; i < m.warps; ++i) {
    Warp& w = m.warp[i];
    set_ready(m, i, w.at_barrier), w.at_barrier = 0;
    if (m.options.patterns) count_patterns(m, w);
  }
}

// All lanes of a warp meet here at one line; the last one runs complete(arguments of the lanes). Lanes that meet at different lines, or miss lanes that have
// ended, are errors: the instructions demand that the warp has converged.
template <class F>
inline void meet(Operation operation, Site site, void* argument, F&& complete) {
  Machine& m = here_runs();
  Fiber& f = m.fiber();
  Warp& w = m.warp[f.warp];
  if (!w.arrived) {
    if (w.exited)
      fail(std::string("divergence: ") + kOperations[operation] + at(site) + " needs the whole warp, but " + std::to_string(__builtin_popcount(w.exited)) +
           " lanes of 32 do not run");
    w.operation = operation, w.site = site;
  } else if (w.operation != operation || w.site.packed != site.packed) {
    fail(std::string("divergence: ") + kOperations[operation] + at(site) + " while other lanes of the warp are in " + kOperations[w.operation] + at(w.site));
  }
  w.arguments[f.lane] = argument;
  w.arrived |= 1u << f.lane;
  if (w.arrived != kAll) return wait(m, f, operation, site);
  complete(m, w.arguments);
  w.arrived = 0;
  set_ready(m, f.warp, kAll);
  if (m.options.patterns) count_patterns(m, w);
  if (m.options.policy != kInOrder) go_to(m, f, *next(m));
}

// ---- Shared memory

uint16_t site_number(Machine& m, Site site) {
  const unsigned slot = (site.packed ^ site.packed >> 48) & 255;
  uint16_t& cached = m.site_cache[slot];
  if (cached && m.sites[cached].packed == site.packed) return cached;
  size_t i = 1;
  while (i < m.sites.size() && m.sites[i].packed != site.packed) ++i;
  if (i == m.sites.size()) m.sites.push_back(site);
  return cached = static_cast<uint16_t>(i);
}

[[noreturn]] __attribute__((noinline, cold)) void race(Machine& m, const char* what, Site site, const Cell* cell, bool with_reader) {
  const size_t byte = (cell - m.cells.data()) * 2;
  std::string other;
  if (with_reader)
    other = ", read" + at(m.sites[cell->read_site]);
  else if (cell->written >= m.first_epoch)
    other = ", written by thread " + std::to_string(cell->writer) + at(m.sites[cell->write_site]);
  fail(what + at(site) + ", byte " + std::to_string(byte) + " of shared memory" + other);
}

enum Access { kRead, kWarpRead, kWrite, kAsyncWrite };

// Happens-before: a thread's own accesses, those of its warp before a sync_warp, those of the block before a sync_block.
template <Access access>
inline void watch(Machine& m, const Fiber& f, size_t offset, unsigned bytes, Site site) {
  const uint32_t warp_epoch = m.warp[f.warp].epoch;
  const uint16_t number = site_number(m, site);
  constexpr bool reads = access == kRead || access == kWarpRead;
  for (Cell *c = &m.cells[offset / 2], *end = c + bytes / 2; c != end; ++c) {
    const bool is_written = c->written >= m.first_epoch;
    if (is_written) {
      if (c->in_flight) race(m, reads ? "race: read of an asynchronous copy in flight" : "race: write over an asynchronous copy in flight", site, c, false);
      if (c->written == m.epoch && c->writer != f.number && (c->writer / kLanes != f.warp || c->written_warp_epoch == warp_epoch))
        race(m, reads ? "race: read after write without a barrier" : "race: write after write without a barrier", site, c, false);
    }
    if constexpr (reads) {
      if (!is_written) race(m, "read of uninitialised shared memory", site, c, false);
      const uint32_t warp_bit = 1u << f.warp, lane_bits = access == kWarpRead ? kAll : 1u << f.lane;
      if (c->read != m.epoch)
        c->read = m.epoch, c->read_warps = warp_bit, c->read_lanes = lane_bits;
      else if (c->read_warps == warp_bit && c->read_warp_epoch == warp_epoch)
        c->read_lanes |= lane_bits;
      else
        c->read_warps |= warp_bit, c->read_lanes = lane_bits;
      c->read_warp_epoch = warp_epoch, c->read_site = number;
    } else {
      if (c->read == m.epoch && ((c->read_warps & ~(1u << f.warp)) || (c->read_warp_epoch == warp_epoch && (c->read_lanes & ~(1u << f.lane)))))
        race(m, "race: write after read without a barrier", site, c, true);
      c->written = m.epoch, c->written_warp_epoch = warp_epoch, c->writer = static_cast<uint16_t>(f.number), c->write_site = number;
      c->in_flight = access == kAsyncWrite, c->read = 0;
    }
  }
}

__attribute__((noinline, cold)) void fail_address(const char* what, Site site, size_t offset, unsigned bytes) {
  Machine& m = here_runs();
  if (offset + bytes > m.shared_bytes || offset > m.shared_bytes)
    fail("shared memory out of bounds" + at(site) + ": " + what + " of " + std::to_string(bytes) + " bytes at offset " +
         std::to_string(static_cast<long long>(offset)) + " of " + std::to_string(m.shared_bytes));
  fail("misaligned shared address" + at(site) + ": " + what + " of " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset));
}

inline size_t shared_offset(Machine& m, const void* p, unsigned bytes, const char* what, Site site) {
  const size_t offset = static_cast<size_t>(static_cast<const char*>(p) - m.shared);
  if (offset > m.shared_bytes || offset + bytes > m.shared_bytes || offset % bytes) fail_address(what, site, offset, bytes);
  return offset;
}

// ---- Access patterns

void note(Machine& m, const Fiber& f, Space space, uintptr_t address, unsigned bytes, Site site) {
  Warp& w = m.warp[f.warp];
  const uint32_t lane = 1u << f.lane;
  for (Group& g : w.groups)
    if (g.site.packed == site.packed && g.space == space && !(g.lanes & lane)) {
      g.lanes |= lane, g.addresses[f.lane] = address;
      return;
    }
  w.groups.push_back({site, space, static_cast<uint8_t>(bytes), lane, {}});
  w.groups.back().addresses[f.lane] = address;
}

// A warp's access is served in phases of 128 bytes; in one, 4-byte words in the same bank but not the same word take turns.
unsigned bank_conflicts(const uintptr_t* addresses, uint32_t lanes, unsigned bytes) {
  const unsigned per_phase = bytes <= 4 ? 32 : 128 / bytes;
  unsigned extra = 0;
  for (unsigned begin = 0; begin < kLanes; begin += per_phase) {
    uintptr_t words[kLanes * 4];
    unsigned count = 0;
    for (unsigned l = begin; l < begin + per_phase; ++l)
      if (lanes >> l & 1)
        for (uintptr_t word = addresses[l] / 4; word <= (addresses[l] + bytes - 1) / 4; ++word) words[count++] = word;
    std::sort(words, words + count);
    unsigned per_bank[32] = {}, most = 0;
    for (unsigned i = 0; i < count; ++i)
      if (i == 0 || words[i] != words[i - 1]) most = std::max(most, ++per_bank[words[i] % 32]);
    extra += most > 1 ? most - 1 : 0;
  }
  return extra;
}

unsigned sectors(const Group& g) {
  uintptr_t touched[kLanes];
  unsigned count = 0;
  for (unsigned l = 0; l < kLanes; ++l)
    if (g.lanes >> l & 1) touched[count++] = g.addresses[l] / 32;
  std::sort(touched, touched + count);
  return static_cast<unsigned>(std::unique(touched, touched + count) - touched);
}

void count_patterns(Machine& m, Warp& w) {
  for (const Group& g : w.groups) {
    if (g.space == kShared)
      m.counters.shared_conflicts += bank_conflicts(g.addresses, g.lanes, g.bytes);
    else
      m.counters.global_sectors += sectors(g), ++m.counters.global_groups;
  }
  w.groups.clear();
}

// ---- Global memory

__attribute__((noinline)) bool in_a_range(Machine& m, uintptr_t p, unsigned bytes, bool write) {
  const auto after = std::upper_bound(m.ranges.begin(), m.ranges.end(), p, [](uintptr_t address, const Range& r) { return address < r.begin; });
  // Usually the last range that begins at p or before; views of one tensor may overlap.
  for (size_t i = after - m.ranges.begin(); i-- > 0;)
    if (p + bytes <= m.ranges[i].end && (!write || m.ranges[i].writable)) return m.last_range = i, true;
  return false;
}

[[noreturn]] __attribute__((noinline, cold)) void fail_global(Machine& m, uintptr_t p, unsigned bytes, const char* what, Site site) {
  std::string where = ": address " + std::to_string(p);
  // The nearest range tells which tensor was left, and by how much.
  const Range* nearest = nullptr;
  uintptr_t least = ~uintptr_t{0};
  for (const Range& r : m.ranges) {
    const uintptr_t distance = p < r.begin ? r.begin - p : p + bytes > r.end ? p + bytes - r.end : 0;
    if (distance < least) least = distance, nearest = &r;
  }
  if (nearest && least == 0)
    fail("store to read-only global memory" + at(site) + ": byte " + std::to_string(p - nearest->begin) + " of an input of " +
         std::to_string(nearest->end - nearest->begin) + " bytes");
  if (nearest)
    where =
        ": byte " + std::to_string(static_cast<long long>(p - nearest->begin)) + " of a tensor of " + std::to_string(nearest->end - nearest->begin) + " bytes";
  fail("global memory out of bounds" + at(site) + ": " + what + " of " + std::to_string(bytes) + " bytes" + where);
}

PageCells& page_cells(Machine& m, uintptr_t page) {
  if (page == m.last_page) return *m.last_cells;
  auto& cells = m.pages[page];
  if (!cells) cells = std::make_unique<PageCells>();
  m.last_page = page, m.last_cells = cells.get();
  return *cells;
}

uint3 place_of(const Machine& m, uint64_t i) {
  const uint64_t b = (m.first + i * m.step) % m.blocks;
  return {static_cast<unsigned>(b % m.grid_size.x), static_cast<unsigned>(b / m.grid_size.x % m.grid_size.y),
          static_cast<unsigned>(b / m.grid_size.x / m.grid_size.y)};
}

dim3 block_of(const Machine& m, uint32_t number) {
  const uint3 place = place_of(m, number - m.first_block_number);
  return {place.x, place.y, place.z};
}

void watch_global(Machine& m, uintptr_t p, unsigned bytes, bool write, Site site) {
  PageCells& cells = page_cells(m, p / kPage);  // naturally aligned, so within one page
  const unsigned begin = p % kPage;
  for (unsigned i = begin; i < begin + bytes; ++i) {
    uint32_t &writer = cells.writer[i], &reader = cells.reader[i];
    if (writer >= m.first_block_number && writer != m.block_number)
      fail(std::string("race between blocks: ") + (write ? "store to what block " : "load of what block ") + text_of(block_of(m, writer)) +
           " stored in the same launch" + at(site));
    if (write) {
      const uint32_t one = reader & ~kManyReaders;
      if (one >= m.first_block_number && reader != m.block_number)
        fail("race between blocks: store to what block " + text_of(block_of(m, one)) + (reader & kManyReaders ? " and others" : "") +
             " loaded in the same launch" + at(site));
      writer = m.block_number;
    } else if (reader != m.block_number) {
      reader = (reader & ~kManyReaders) >= m.first_block_number ? (reader | kManyReaders) : m.block_number;
    }
  }
}

inline void check_global(Machine& m, const void* pointer, unsigned bytes, bool write, const char* what, Site site) {
  const uintptr_t p = reinterpret_cast<uintptr_t>(pointer);
  if (__builtin_expect(!m.ranges.empty(), 1)) {
    const Range& r = m.ranges[m.last_range];
    if (!(p >= r.begin && p + bytes <= r.end && (!write || r.writable)) && !in_a_range(m, p, bytes, write)) fail_global(m, p, bytes, what, site);
  } else if (!p) {
    fail(std::string("global memory out of bounds") + at(site) + ": " + what + " through a null pointer");
  }
  if (p % bytes) fail("misaligned global address" + at(site) + ": " + what + " of " + std::to_string(bytes) + " bytes at address " + std::to_string(p));
  if (m.options.global_races) watch_global(m, p, bytes, write, site);
  if (m.options.patterns) note(m, m.fiber(), kGlobal, p, bytes, site);
}

// A copy of a size that is known where it matters: memcpy of a variable size is a call.
inline void move(void* to, const void* from, unsigned bytes) {
  switch (bytes) {
    case 2: std::memcpy(to, from, 2); break;
    case 4: std::memcpy(to, from, 4); break;
    case 8: std::memcpy(to, from, 8); break;
    default: std::memcpy(to, from, 16);
  }
}

void retire(Machine& m, const Fiber& f, const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
  if (!m.options.races) return;
  for (Cell *c = &m.cells[(copy.to - m.shared) / 2], *end = c + 8; c != end; ++c)
    c->in_flight = 0, c->written = m.epoch, c->written_warp_epoch = m.warp[f.warp].epoch;
}

// ---- Blocks

void end_of_thread() {
  Machine& m = here_runs();
  Fiber& f = m.fiber();
  if (!f.copies.none()) fail("the thread ends with an asynchronous copy in flight, issued" + at(f.copies.all[f.copies.retired].site));
  Warp& w = m.warp[f.warp];
  if (w.arrived) fail(std::string("divergence: the thread ends while other lanes of its warp are in ") + kOperations[w.operation] + at(w.site));
  if (m.at_barrier) fail("divergence: the thread ends while others of its block are in sync_block" + at(m.barrier_site));
  set_waiting(m, f);
  w.exited |= 1u << f.lane;
  if (++m.exited == m.threads) leave();
  Fiber* other = next(m);
  if (!other) deadlock(m);
  m.thread = other;
  void* dropped;
  fastadapt_switch_stack(&dropped, other->stack_pointer);
  __builtin_unreachable();
}

void thread_main() {
  Machine& m = here_runs();
  m.run(m.call);
  end_of_thread();
  __builtin_unreachable();
}

void arm(Machine& m, Fiber& f) {
  // Tops of stacks a power of two apart would share a few cache sets: 128 threads and an 8-way cache miss on every switch.
  const size_t colour = f.number * 37 % 64 * 64;
  void** top = reinterpret_cast<void**>(m.stacks + (f.number + 1) * (kStack + kPage) - kPage - colour);
  *--top = nullptr;  // where a return address would lie: the stack is 8 off a multiple of 16 when a function begins
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
}

void make_stacks(Machine& m) {
  constexpr size_t bytes = kMaxThreads * (kStack + kPage);
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  m.stacks = static_cast<char*>(p);
  for (unsigned i = 0; i < kMaxThreads; ++i)
    mprotect(m.stacks + i * (kStack + kPage), kPage, PROT_NONE);  // below each stack: overflow ends the process instead of the neighbour's data
}

void run_block(Machine& m, uint3 index) {
  std::memset(m.shared, 0xff, m.shared_bytes);  // NaN in every type
  m.block_index = index;
  m.exited = m.at_barrier = 0, m.ready_warps = 0;
  m.first_epoch = ++m.epoch;
  ++m.block_number, ++m.counters.blocks;
  for (unsigned i = 0; i < m.warps; ++i) {
    Warp& w = m.warp[i];
    const unsigned lanes = std::min(kLanes, m.threads - i * kLanes);
    w.exited = lanes == kLanes ? 0 : kAll << lanes;  // the lanes that a last warp lacks
    w.ready = w.at_barrier = w.arrived = 0, ++w.epoch, w.groups.clear();
    set_ready(m, i, ~w.exited);
    m.priority[i] = static_cast<uint8_t>(i);
  }
  if (m.options.policy != kInOrder)
    for (unsigned i = m.warps; i > 1; --i) std::swap(m.priority[i - 1], m.priority[m.random() % i]);
  for (unsigned i = 0; i < m.threads; ++i) {
    Fiber& f = m.fibers[i];
    f.copies.clear();
    arm(m, f);
  }
  m.thread = next(m);
  fastadapt_switch_stack(&m.main_stack, m.fiber().stack_pointer);
  if (m.options.patterns && !m.failed)
    for (unsigned i = 0; i < m.warps; ++i) count_patterns(m, m.warp[i]);
}

size_t shared_limit_of(int arch) {
  switch (arch) {
    case 80: return 163 * 1024;
    case 90:
    case 100: return 227 * 1024;
    default: return 99 * 1024;  // 86, 89, 120
  }
}

// The kernel's own name: what was launched may have been a pointer in a variable.
std::string name_of(const char* text, const void* kernel) {
  std::string name = text;
  Dl_info info;
  if (dladdr(kernel, &info) && info.dli_saddr == kernel && info.dli_sname) {
    int status = 0;
    if (char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status)) name = demangled;
  }
  name = name.substr(0, name.find_first_of(name[0] == '(' ? "<" : "<("));
  if (const size_t space = name.find_last_of(" :(&"); space != std::string::npos) name = name.substr(space + 1);
  return name.substr(0, name.find(')'));
}

int refuse(Machine& m, int status, const std::string& name, const std::string& why) {
  m.error = name + ": " + why;
  return status;
}

}  // namespace

std::string Site::text() const {
  const std::string name = file();
  return name.substr(name.rfind('/') + 1) + ":" + std::to_string(line());
}

// ---- Control

void configure(const Options& options) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.busy);
  m.options = options, m.error.clear(), m.launches = 0, m.allowed_shared.clear();
  m.pages.clear(), m.last_page = 0;
}

const std::string& last_error() { return machine().error; }

std::map<std::string, Counters>& statistics() { return machine().statistics; }

void register_range(const void* begin, size_t bytes, bool writable) {
  Machine& m = machine();
  const uintptr_t p = reinterpret_cast<uintptr_t>(begin);
  const auto at = std::lower_bound(m.ranges.begin(), m.ranges.end(), p, [](const Range& r, uintptr_t address) { return r.begin < address; });
  if (at != m.ranges.end() && at->begin == p)
    *at = {p, std::max(at->end, p + bytes), at->writable || writable};  // two views of one tensor
  else
    m.ranges.insert(at, {p, p + bytes, writable});
  m.last_range = 0;
}

void clear_ranges() { machine().ranges.clear(), machine().last_range = 0; }

size_t shared_limit() { return shared_limit_of(machine().options.arch); }

int allow_shared(const void* kernel, size_t bytes) {
  Machine& m = machine();
  if (bytes > shared_limit())
    return refuse(m, kInvalidValue, name_of("a kernel", kernel),
                  std::to_string(bytes) + " bytes of shared memory; sm_" + std::to_string(m.options.arch) + " gives a block " + std::to_string(shared_limit()));
  m.allowed_shared[kernel] = bytes;
  return kSuccess;
}

int launch(const char* text, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*run)(void*), void* call) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.busy);
  std::string& name = m.names[kernel];
  if (name.empty()) name = name_of(text, kernel);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return refuse(m, kInvalidConfiguration, name, "a grid of " + text_of(grid) + "; must be between (1, 1, 1) and (2147483647, 65535, 65535)");
  if (!threads || threads > kMaxThreads || block.z > 64)
    return refuse(m, kInvalidConfiguration, name, "a block of " + text_of(block) + " threads; must be 1 to 1024, and at most 64 along z");
  const auto allowed = m.allowed_shared.find(kernel);
  const size_t limit = std::min(shared_limit(), std::max<size_t>(allowed == m.allowed_shared.end() ? 0 : allowed->second, 48 * 1024));
  if (shared_bytes > limit)
    return refuse(
        m, kInvalidValue, name,
        std::to_string(shared_bytes) + " bytes of shared memory; the kernel may have " + std::to_string(limit) + " on sm_" + std::to_string(m.options.arch));

  if (!m.stacks) make_stacks(m), m.fibers.resize(kMaxThreads);
  m.run = run, m.call = call, m.kernel = name.c_str(), m.failed = false, m.counters = {};
  m.threads = static_cast<unsigned>(threads), m.warps = (m.threads + kLanes - 1) / kLanes;
  m.grid_size = grid, m.block_size = block;
  m.random_state = (m.options.seed * 0x9e3779b97f4a7c15ull) ^ (++m.launches * 0xbf58476d1ce4e5b9ull);
  for (int i = 0; i < 4; ++i) m.random();
  m.sites.assign(1, {}), std::fill(std::begin(m.site_cache), std::end(m.site_cache), uint16_t{0});
  for (unsigned i = 0; i < m.threads; ++i) {
    Fiber& f = m.fibers[i];
    f.number = i, f.lane = i % kLanes, f.warp = i / kLanes;
    f.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  // Of exactly the size asked for, so that AddressSanitizer sees its end too.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1))) throw std::bad_alloc();
  const std::unique_ptr<char, void (*)(void*)> arena(static_cast<char*>(memory), std::free);
  m.shared = arena.get(), m.shared_bytes = shared_bytes;
  if (m.options.races && m.cells.size() < shared_bytes / 2 + 8) m.cells.resize(shared_bytes / 2 + 8);
  if (m.epoch > 0x80000000u) m.epoch = 0, std::fill(m.cells.begin(), m.cells.end(), Cell{});
  m.blocks = uint64_t{grid.x} * grid.y * grid.z, m.first = 0, m.step = 1;
  if (m.block_number + m.blocks >= kManyReaders) m.block_number = 1, m.pages.clear(), m.last_page = 0;
  m.first_block_number = m.block_number + 1;
  // A step prime to the number of blocks visits all of them: another order for every seed without a table of the grid.
  if (m.options.policy != kInOrder && m.blocks > 1) {
    m.first = m.random() % m.blocks, m.step = 1 + m.random() % m.blocks;
    while (std::gcd(m.step, m.blocks) != 1) ++m.step;
  }

  current = &m;
  for (uint64_t i = 0; i < m.blocks && !m.failed; ++i) run_block(m, place_of(m, i));
  current = nullptr;

  Counters& sum = m.statistics[name];
  m.counters.launches = 1;
  static_assert(sizeof(Counters) % sizeof(uint64_t) == 0);
  for (size_t i = 0; i < sizeof(Counters) / sizeof(uint64_t); ++i) reinterpret_cast<uint64_t*>(&sum)[i] += reinterpret_cast<const uint64_t*>(&m.counters)[i];
  return m.failed ? kLaunchFailure : kSuccess;
}

// ---- Instructions

void load_shared(void* to, const void* from, unsigned bytes, Site site) {
  Machine& m = here_runs();
  const size_t offset = shared_offset(m, from, bytes, "load", site);
  if (m.options.races) watch<kRead>(m, m.fiber(), offset, bytes, site);
  if (m.options.patterns) note(m, m.fiber(), kShared, offset, bytes, site);
  m.counters.shared_load_bytes += bytes;
  move(to, from, bytes);
}

void store_shared(void* to, const void* from, unsigned bytes, Site site) {
  Machine& m = here_runs();
  const size_t offset = shared_offset(m, to, bytes, "store", site);
  if (m.options.races) watch<kWrite>(m, m.fiber(), offset, bytes, site);
  if (m.options.patterns) note(m, m.fiber(), kShared, offset, bytes, site);
  m.counters.shared_store_bytes += bytes;
  move(to, from, bytes);
}

void load_global(void* to, const void* from, unsigned bytes, Site site) {
  Machine& m = here_runs();
  check_global(m, from, bytes, false, "load", site);
  m.counters.global_load_bytes += bytes;
  move(to, from, bytes);
}

void store_global(void* to, const void* from, unsigned bytes, Site site) {
  Machine& m = here_runs();
  check_global(m, to, bytes, true, "store", site);
  m.counters.global_store_bytes += bytes;
  move(to, from, bytes);
}

void cp_async16(void* shared, const void* global, bool valid, Site site) {
  Machine& m = here_runs();
  Fiber& f = m.fiber();
  const size_t offset = shared_offset(m, shared, 16, "cp_async16", site);
  if (valid)
    check_global(m, global, 16, false, "cp_async16", site), m.counters.cp_async_bytes += 16;
  else if (reinterpret_cast<uintptr_t>(global) % 16)  // the address must be aligned even where nothing is read
    fail("misaligned global address" + at(site) + ": cp_async16 that is not valid");
  if (m.options.races) watch<kAsyncWrite>(m, f, offset, 16, site);
  if (m.options.patterns) note(m, f, kShared, offset, 16, site);
  const Copy copy{static_cast<char*>(shared), valid ? static_cast<const char*>(global) : nullptr, site};
  if (m.options.defer)
    std::memset(shared, 0xff, 16);
  else if (valid)
    std::memcpy(shared, global, 16);
  else
    std::memset(shared, 0, 16);
  f.copies.all.push_back(copy);
}

void cp_async_commit() {
  Copies& c = here_runs().fiber().copies;
  c.groups.push_back(static_cast<uint32_t>(c.all.size()));
}

void cp_async_wait(int in_flight) {
  Machine& m = here_runs();
  Fiber& f = m.fiber();
  Copies& c = f.copies;
  if (c.groups.size() <= static_cast<size_t>(in_flight)) return;
  const size_t done = c.groups.size() - static_cast<size_t>(in_flight);
  for (const size_t end = c.groups[done - 1]; c.retired < end; ++c.retired) retire(m, f, c.all[c.retired]);
  c.groups.erase(c.groups.begin(), c.groups.begin() + static_cast<long>(done));
  if (c.none()) {
    c.all.clear(), c.retired = 0;
    std::fill(c.groups.begin(), c.groups.end(), 0u);  // groups left in flight are empty
  } else if (c.retired >= 256) {
    c.all.erase(c.all.begin(), c.all.begin() + static_cast<long>(c.retired));
    for (uint32_t& end : c.groups) end -= static_cast<uint32_t>(c.retired);
    c.retired = 0;
  }
}

void ldmatrix_x4(uint32_t (&r)[4], const void* shared, bool transpose, Site site) {
  struct Argument {
    uint32_t* r;
    const char* row;
    Fiber* fiber;
    size_t offset;
  } argument{r, static_cast<const char*>(shared), nullptr, 0};
  Machine& m = here_runs();
  argument.fiber = &m.fiber();
  argument.offset = shared_offset(m, shared, 16, "a row of ldmatrix_x4", site);
  // Named by this lane, read by all.
  if (m.options.races) watch<kWarpRead>(m, *argument.fiber, argument.offset, 16, site);
  meet(transpose ? kLdmatrixTrans : kLdmatrix, site, &argument, [transpose](Machine& m, void** arguments) {
    ++m.counters.ldmatrix;
    const auto lane = [arguments](unsigned l) -> Argument& { return *static_cast<Argument*>(arguments[l]); };
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      uint16_t rows[8][8];
      unsigned used = 0, extra = 0;
      for (unsigned i = 0; i < 8; ++i) {
        const Argument& a = lane(matrix * 8 + i);
        std::memcpy(rows[i], a.row, 16);
        const unsigned bank = 1u << a.offset / 16 % 8;
        extra += (used & bank) != 0, used |= bank;
      }
      if (extra) {
        uintptr_t addresses[kLanes] = {};
        for (unsigned i = 0; i < 8; ++i) addresses[i] = lane(matrix * 8 + i).offset;
        m.counters.ldmatrix_conflicts += bank_conflicts(addresses, 0xff, 16);
      }
      for (unsigned l = 0; l < kLanes; ++l) {
        const unsigned i = l / 4, j = l % 4 * 2;
        lane(l).r[matrix] = transpose ? (rows[j][i] | static_cast<uint32_t>(rows[j + 1][i]) << 16) : (rows[i][j] | static_cast<uint32_t>(rows[i][j + 1]) << 16);
      }
    }
  });
}

namespace {

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
};

// Sums in fp32 in order of k: a tensor core adds several products at once and truncates, so its error is of this size but not these bits.
template <float (*widen)(uint16_t)>
void multiply(Machine& m, void** arguments) {
  ++m.counters.mma;
  uint16_t raw_a[16 * 16], raw_b[16 * 8];
  float a[16 * 16], b[16 * 8], d[16][8];
  for (unsigned l = 0; l < kLanes; ++l) {
    const Product& x = *static_cast<Product*>(arguments[l]);
    const unsigned g = l / 4, t = l % 4 * 2;
    for (unsigned i = 0; i < 4; ++i) std::memcpy(&raw_a[(g + (i & 1) * 8) * 16 + t + (i >> 1) * 8], &x.a[i], 4);
    raw_b[t * 8 + g] = static_cast<uint16_t>(x.b0), raw_b[(t + 1) * 8 + g] = static_cast<uint16_t>(x.b0 >> 16);
    raw_b[(t + 8) * 8 + g] = static_cast<uint16_t>(x.b1), raw_b[(t + 9) * 8 + g] = static_cast<uint16_t>(x.b1 >> 16);
    std::memcpy(&d[g][t], x.d, 8), std::memcpy(&d[g + 8][t], x.d + 2, 8);
  }
  for (unsigned i = 0; i < 16 * 16; ++i) a[i] = widen(raw_a[i]);
  for (unsigned i = 0; i < 16 * 8; ++i) b[i] = widen(raw_b[i]);
  for (unsigned i = 0; i < 16; ++i) {
    float sum[8];
    for (unsigned n = 0; n < 8; ++n) sum[n] = d[i][n];
    for (unsigned k = 0; k < 16; ++k)
      for (unsigned n = 0; n < 8; ++n) sum[n] += a[i * 16 + k] * b[k * 8 + n];
    for (unsigned n = 0; n < 8; ++n) d[i][n] = sum[n];
  }
  for (unsigned l = 0; l < kLanes; ++l) {
    float* out = static_cast<Product*>(arguments[l])->d;
    const unsigned g = l / 4, t = l % 4 * 2;
    std::memcpy(out, &d[g][t], 8), std::memcpy(out + 2, &d[g + 8][t], 8);
  }
}

}  // namespace

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  Product x{d, a, b0, b1};
  meet(kMma, site, &x, multiply<bf16_to_float>);
}

void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  Product x{d, a, b0, b1};
  meet(kMma, site, &x, multiply<half_to_float>);
}

uint32_t shuffle_xor(uint32_t v, int mask, Site site) {
  struct Argument {
    uint32_t in, out;
    int mask;
  } argument{v, v, mask};
  meet(kShuffle, site, &argument, [](Machine&, void** arguments) {
    for (unsigned l = 0; l < kLanes; ++l) {
      Argument& a = *static_cast<Argument*>(arguments[l]);
      const unsigned other = l ^ static_cast<unsigned>(a.mask);
      if (other < kLanes) a.out = static_cast<Argument*>(arguments[other])->in;
    }
  });
  return argument.out;
}

void sync_warp(Site site) {
  Machine& m = here_runs();
  const unsigned warp = m.fiber().warp;
  meet(kSyncWarp, site, nullptr, [warp](Machine& m, void**) { ++m.warp[warp].epoch; });
}

// sync_block counts threads, and would let different barriers of one block meet or run on without threads that have ended; both are errors here, since a kernel
// that needs them is wrong elsewhere.
void sync_block(Site site) {
  Machine& m = here_runs();
  Fiber& f = m.fiber();
  if (m.exited) fail("divergence: sync_block" + at(site) + " after " + std::to_string(m.exited) + " threads of the block have ended");
  if (!m.at_barrier)
    m.barrier_site = site;
  else if (m.barrier_site.packed != site.packed)
    fail("divergence: sync_block" + at(site) + " while other threads of the block are in sync_block" + at(m.barrier_site));
  m.warp[f.warp].at_barrier |= 1u << f.lane;
  if (++m.at_barrier < m.threads) return wait(m, f, kSyncBlock, site);
  open_barrier(m);
  if (m.options.policy != kInOrder) go_to(m, f, *next(m));
}

namespace {
float flush(float v) { return std::fabs(v) < FLT_MIN ? std::copysign(0.f, v) : v; }
}  // namespace

float exp2_approx(float v) {
  v = flush(v);
  const double exact = std::exp2(static_cast<double>(v));
  const bool special = v == 0 || !std::isfinite(exact) || exact == 0;  // given exactly
  return flush(static_cast<float>(special ? exact : exact * (1 + here_runs().options.exp2_error * 0x1p-22)));
}

float rcp_approx(float v) {
  v = flush(v);
  float r = 1.f / v;
  const int error = here_runs().options.rcp_error;
  if (error && std::isfinite(r) && r != 0) r = std::nextafter(r, error > 0 ? std::copysign(INFINITY, r) : 0.f);
  return flush(r);
}

}  // namespace fastadapt::emulator
