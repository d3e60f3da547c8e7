// The state of an emulated GPU: warps with their registers, blocks with their shared memory, clusters; and the checks
// of every access to memory.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

using Mask = uint32_t;  // of a warp's lanes
constexpr int kLanes = 32;

[[noreturn]] inline void fail(const char* format, ...) {
  char text[4096];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  throw std::runtime_error(text);
}

// Calls f(lane) for each lane of a mask.
template <class F>
inline void each_lane(Mask lanes, F&& f) {
  if (lanes == ~0u) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; lanes; lanes &= lanes - 1) f(std::countr_zero(lanes));
  }
}

// ---------------------------------------------------------------------------------------------- kernels

struct Warp;
struct Instruction;
using Execute = void (*)(Warp&, const Instruction&, Mask);

// Where the 32 lanes of a value are: a register of the warp, or a constant of the kernel; 4 bytes each, or 8.
struct Operand {
  uint32_t offset = 0;  // 0: none
  bool constant = false, wide = false;
};

enum class Flow : uint8_t { kNext, kBranch, kExit, kTrap, kWarpSync, kShuffle, kBarrier, kClusterArrive, kClusterWait };
enum class Space : uint8_t { kGlobal, kShared, kSharedOfCluster, kParameter };

struct Instruction {
  Flow flow = Flow::kNext;
  Execute execute = nullptr;
  int guard = -1;  // the predicate that guards it
  bool guard_negated = false;
  Operand to, a, b, c, d;
  Operand elements[4];  // of a vector
  int count = 1;        // of its elements
  int predicate_to = -1, predicate_a = -1, predicate_b = -1;
  int64_t offset = 0;  // of an address; the target of a branch
  Space space = Space::kGlobal;
  int option = 0;  // bytes of a copy or an element, kind of a shuffle, whether an arrival is relaxed, a constant
  std::string text;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<uint32_t> parameter_offsets, parameter_sizes;
  uint32_t parameter_bytes = 0;
  uint32_t register_bytes = kLanes * 8;  // of a warp; the first are nobody's, for offset 0 is none
  int predicates = 0;
  std::vector<uint8_t> constants = std::vector<uint8_t>(kLanes * 8);  // the first nobody's as well
  uint32_t static_shared_bytes = 0;
  int max_threads = 1024;
  std::map<std::string, Operand> special;  // special registers, and where dynamic shared memory begins
};

// ---------------------------------------------------------------------------------------------- state

// Who touched a byte of shared memory, and what it had synchronized with before.
struct Access {
  static constexpr uint32_t kNobody = ~0u;
  uint32_t thread = kNobody;  // in the cluster
  uint32_t block_barriers = 0, warp_barriers = 0, cluster_arrivals = 0;
};

struct ByteHistory {
  Access write, read, other_read;  // since the write: the last read, and the last by another thread
};

struct Cluster;

struct Block {
  Cluster* cluster;
  int rank;   // in the cluster
  int index;  // in the grid
  int threads;
  std::vector<uint8_t> shared;
  std::vector<ByteHistory> history;  // of each byte of it
  std::vector<Warp*> warps;
  int arrived = 0, ended = 0;  // threads
  uint32_t barriers = 0;       // passed
};

struct Cluster {
  std::vector<Block*> blocks;
  int threads;
  int arrived = 0, ended = 0;
  uint32_t phase = 0;                // barriers passed
  std::vector<bool> relaxed{false};  // of each phase: whether an arrival published nothing
};

// Into shared memory, not yet arrived.
struct AsyncCopy {
  uint32_t to;
  uint64_t from;
  int bytes, existing;
};

struct Warp {
  const Kernel* kernel;
  Block* block;
  const uint8_t* parameters;
  int first_thread;  // in the block
  std::vector<uint8_t> registers;
  std::vector<Mask> predicates;
  int at[kLanes] = {};                                               // the next instruction of each lane
  Mask ended = 0, at_warp_sync = 0, at_barrier = 0, at_cluster = 0;  // lanes that wait, or have ended
  uint32_t barriers = 0;                                             // of the warp alone, passed
  uint32_t cluster_arrivals[kLanes] = {}, cluster_waits[kLanes] = {};
  std::vector<AsyncCopy> copies[kLanes];
  uint64_t executed = 0;

  void restart() {
    std::fill(at, at + kLanes, 0);
    ended = at_warp_sync = at_barrier = at_cluster = 0;
    barriers = 0;
    std::fill(cluster_arrivals, cluster_arrivals + kLanes, 0);
    std::fill(cluster_waits, cluster_waits + kLanes, 0);
  }

  template <class Slot>
  Slot* lanes(const Operand& o) {
    return reinterpret_cast<Slot*>(const_cast<uint8_t*>((o.constant ? kernel->constants : registers).data()) +
                                   o.offset);
  }
  // A lane's value, of whichever width.
  uint64_t get(const Operand& o, int lane) { return o.wide ? lanes<uint64_t>(o)[lane] : lanes<uint32_t>(o)[lane]; }
  void set(const Operand& o, int lane, uint64_t value) {
    if (o.wide) {
      lanes<uint64_t>(o)[lane] = value;
    } else {
      lanes<uint32_t>(o)[lane] = static_cast<uint32_t>(value);
    }
  }
  uint32_t thread_in_cluster(int lane) const { return block->rank * block->threads + first_thread + lane; }
};

// ---------------------------------------------------------------------------------------------- shared memory

// Addresses: a block's own memory begins here; another block's of the cluster have its rank + 1 above the shift.
constexpr uint32_t kSharedBase = 1024;
constexpr uint32_t kRankShift = 24;
constexpr uint32_t kOwnAddress = (1u << kRankShift) - 1;

struct SharedPlace {
  Block* block;
  uint32_t offset;
  uint8_t* data() const { return block->shared.data() + offset; }
};

inline SharedPlace shared_place(Warp& w, uint32_t address, int bytes, const Instruction& i) {
  Block* block = w.block;
  if (i.space == Space::kSharedOfCluster && address >> kRankShift) {
    const uint32_t rank = (address >> kRankShift) - 1;
    if (rank >= block->cluster->blocks.size()) fail("the cluster has no block %u: %s", rank, i.text.c_str());
    block = block->cluster->blocks[rank];
    if (block->ended == block->threads) fail("shared memory of a block that has ended: %s", i.text.c_str());
    address &= kOwnAddress;
  }
  if (address % bytes) fail("misaligned shared address %#x: %s", address, i.text.c_str());
  if (address < kSharedBase || address - kSharedBase + bytes > block->shared.size())
    fail("shared address %#x + %d is outside %zu bytes: %s", address, bytes, block->shared.size(), i.text.c_str());
  return {block, address - kSharedBase};
}

// Whether what another thread did is known to be over: both have passed a barrier since. `published`: it must also be
// visible, which a relaxed arrival at the cluster's barrier does not make it.
inline bool is_over(const Warp& w, int lane, const Access& before, bool published) {
  const uint32_t threads = w.block->threads;
  if (before.thread == Access::kNobody || before.thread == w.thread_in_cluster(lane)) return true;
  if (before.thread / threads == static_cast<uint32_t>(w.block->rank)) {
    if (before.block_barriers != w.block->barriers) return true;
    const bool same_warp = before.thread % threads / kLanes == static_cast<uint32_t>(w.first_thread) / kLanes;
    if (same_warp && before.warp_barriers != w.barriers) return true;
  }
  return w.cluster_waits[lane] > before.cluster_arrivals &&
         !(published && w.block->cluster->relaxed[before.cluster_arrivals]);
}

// Races, and reads of what nothing has written.
inline void check_history(const Warp& w, int lane, const SharedPlace& place, int bytes, bool writes,
                          const Instruction& i) {
  const uint32_t thread = w.thread_in_cluster(lane);
  const Access now{thread, w.block->barriers, w.barriers, w.cluster_arrivals[lane]};
  for (int byte = 0; byte < bytes; ++byte) {
    ByteHistory& h = place.block->history[place.offset + byte];
    const auto race = [&](uint32_t other, const char* did, const char* does) {
      fail("race in shared memory at byte %u: thread %u %s, thread %u %s: %s", place.offset + byte, other, did, thread,
           does, i.text.c_str());
    };
    if (!writes && h.write.thread == Access::kNobody)
      fail("read of shared memory that nothing has written, byte %u: %s", place.offset + byte, i.text.c_str());
    if (!is_over(w, lane, h.write, true)) race(h.write.thread, "wrote", writes ? "writes" : "reads");
    if (writes) {
      for (const Access* read : {&h.read, &h.other_read})
        if (!is_over(w, lane, *read, false)) race(read->thread, "read", "writes");
      h = {now, {}, {}};
    } else {
      if (h.read.thread != thread) h.other_read = h.read;
      h.read = now;
    }
  }
}

// ---------------------------------------------------------------------------------------------- global memory

// Bounds of the allocation at an address, if there is one (allocations.cpp).
using FindAllocation = bool (*)(uint64_t address, uint64_t* begin, uint64_t* end);

class GlobalMemory {
 public:
  static GlobalMemory& get() {
    static GlobalMemory memory;
    return memory;
  }

  // At the begin of a launch: what was known of allocations may be over. The workspace is the launch's own.
  void begin(FindAllocation find, const void* workspace, uint64_t bytes) {
    find_ = find;
    workspace_ = {reinterpret_cast<uint64_t>(workspace), reinterpret_cast<uint64_t>(workspace) + bytes};
    for (Range& range : known_) range = {};
  }

  void check(uint64_t address, int bytes, int alignment, const Instruction& i) {
    if (address % alignment) fail("misaligned global address %#lx: %s", address, i.text.c_str());
    const auto inside = [&](const Range& r) { return address >= r.begin && address + bytes <= r.end; };
    for (const Range& range : known_)
      if (inside(range)) return;
    if (inside(workspace_)) return;
    Range range{};
    if (!find_(address, &range.begin, &range.end))
      fail("nothing is at global address %#lx: %s", address, i.text.c_str());
    if (!inside(range))
      fail("global address %#lx + %d is outside [%#lx, %#lx): %s", address, bytes, range.begin, range.end,
           i.text.c_str());
    known_[turn_++ % kKnown] = range;
  }

 private:
  struct Range {
    uint64_t begin = 0, end = 0;
  };
  static constexpr int kKnown = 4;
  FindAllocation find_ = nullptr;
  Range workspace_, known_[kKnown];
  unsigned turn_ = 0;
};

}  // namespace emulator
