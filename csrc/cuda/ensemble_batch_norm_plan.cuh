// The dispatch: which tier a call takes, and how its groups are cut into blocks.
//
// A group is the values of one member and channel; of packed planes, of the channels that are packed together; in
// channels_last, of a slab of 128 bytes of channels, or of 64 where that makes the slab fit. The first of these tiers
// that fits is taken:
//
//   several groups a block   a group is less than four warps of work (contiguous data only)
//   one group a block        the group fits the shared memory of a block
//   thread-block cluster     it fits that of 2, 4, 8 or 16 blocks, as far as clusters of that size fill the device
//   virtual cluster          it fits that of as many blocks as there are multiprocessors, or fewer: one on each;
//                            the groups share them (ensemble_batch_norm_virtual.cuh)
//   streaming                any size (ensemble_batch_norm_streaming.cuh)
//
// the first three with four blocks on a multiprocessor (while one waits for its data, another computes), then two, then
// one; in channels_last all but the last with rows of 128 bytes, then of 64. Planes that can be packed are, if that
// fits a block or a cluster, with as many channels as fit; with three blocks on a multiprocessor, not four: of 128
// threads a row of 98 units leaves a quarter idle, and their memory. Of a virtual cluster only the number of blocks is
// planned, from the device alone; how many clusters there are depends on the number of groups as well. All of it
// depends on one member's sizes, the type, the layout, the direction and the device, never on the number of members:
// member k of an ensemble is computed as it would be alone.
#pragma once

#include <cstdlib>
#include <optional>

#include "ensemble_batch_norm_walk.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "virtual_cluster.cuh"

namespace latephase::ensemble_batch_norm {

// On a multiprocessor: as many as the registers are enough for, more of them with one channel a thread than with eight.
constexpr int resident_threads(Layout layout) { return by_column(layout) ? 512 : 1024; }
constexpr int kVirtualThreads = 512;   // of a block, which has a multiprocessor to itself
constexpr int kUnitsPerThread = 8;     // wished for, at least: what a thread does once costs as much as three or four
constexpr int kMinBlockThreads = 128;  // where groups are small enough to share a block

struct Plan {
  Geometry geometry;
  int iterations;    // units of each thread
  Grid grid;         // of a virtual cluster: cooperative
  int clusters = 0;  // virtual ones
};

// Whether a block has gates in shared memory, a byte a slot.
LATEPHASE_HOST_DEVICE bool has_gates(const Geometry& g, int operands) { return operands == 2 || g.mask_crosses_units; }

// Floats that the sums of a block's threads need: two a channel of each warp, or of packed planes four of each thread,
// on either side of the turn.
LATEPHASE_HOST_DEVICE int threads_sums(Layout layout, int threads, int part_channels) {
  return layout == Layout::kPacked ? threads * 4 : threads / kWarp * part_channels * 2;
}

// Shared memory of a block: slots of each operand; gates; sums (see Resident::add_up), or in their place the results of
// other blocks (VirtualCluster::merge).
inline int64_t resident_bytes(const Plan& plan, int element_size, int operands) {
  const Geometry& g = plan.geometry;
  const int threads = plan.grid.threads, channels = g.part_channels;
  const int64_t slots = int64_t{plan.iterations} * threads, parts = threads / g.threads;
  const int64_t sums = (threads_sums(g.layout, threads, channels) + (2 + parts) * channels * 2) * sizeof(float);
  const int64_t merging = (helpers_of(threads, channels) + 1) * channels * int64_t{sizeof(Moments<1>)};
  return slots * kUnit * element_size * operands + (has_gates(g, operands) ? slots : 0) + std::max(sums, merging);
}

// A part cut over a cluster, with at most this many threads a block.
inline Plan resident_plan(const Sizes& s, Layout layout, int lanes, int cluster, int max_threads, int element_size,
                          int operands) {
  Plan plan{Geometry(s, layout, lanes), 0, {}};
  Geometry& g = plan.geometry;
  const int64_t positions = divide_up(g.positions, cluster);
  int parts = 1;
  if (layout == Layout::kPacked) {  // as many whole rows as there are threads for
    const int64_t rows = std::min<int64_t>(max_threads / lanes, divide_up(positions, kUnitsPerThread));
    g.cut(cluster, static_cast<int>(divide_up(rows * lanes, kWarp) * kWarp));
  } else {
    g.cut(cluster, round_up_to_power_of_two(divide_up(positions * lanes, kUnitsPerThread), kWarp, max_threads));
    if (layout == Layout::kContiguous && cluster == 1) parts = std::max(1, kMinBlockThreads / g.threads);
  }
  plan.iterations = static_cast<int>(divide_up(g.positions_per_split, g.workers));
  plan.grid = {divide_up(g.parts, parts), g.threads * parts, 0, cluster};
  plan.grid.shared_bytes = resident_bytes(plan, element_size, operands);
  return plan;
}

// The plan of a virtual cluster with at most this much shared memory a block, or nothing: the device has too little.
inline std::optional<Plan> virtual_plan(const Sizes& s, int lanes, int64_t budget, int element_size, int operands,
                                        int64_t blocks) {
  const int64_t values = s.n() * (s.channels_last ? lanes * kUnit : 1);
  if (budget == 0 || values * element_size * operands > budget * blocks) return std::nullopt;
  const auto cut = [&](int64_t splits) {
    return resident_plan(s, unpacked(s), lanes, static_cast<int>(splits), kVirtualThreads, element_size, operands);
  };
  for (int64_t splits = std::max<int64_t>(2, divide_up(values * element_size * operands, budget)); splits <= blocks;
       ++splits) {
    if (cut(splits).grid.shared_bytes > budget) continue;
    const int clusters = static_cast<int>(blocks / splits);
    Plan plan = cut(blocks / clusters);  // what is left of the device divided among them
    if (plan.grid.shared_bytes > budget) plan = cut(splits);
    Geometry& g = plan.geometry;
    plan = cut(divide_up(g.positions, g.positions_per_split));  // none without a position
    plan.clusters = static_cast<int>(std::min<int64_t>(clusters, g.parts / g.splits));
    plan.grid.blocks = int64_t{plan.clusters} * g.splits;
    plan.grid.cluster = 1;
    plan.grid.cooperative = true;
    return plan;
  }
  return std::nullopt;
}

// The plan of the on-chip tiers, or nothing: streaming. `operands` are kept on chip: x, or x and dy.
// LATEPHASE_CUDA_SM_MARGIN leaves so many multiprocessors out of virtual clusters, which else wait for all: for kernels
// of collectives that run beside them. For tests of every tier on small data, LATEPHASE_CUDA_SHARED_KIB lowers the
// shared memory of a block (0 always streams) and LATEPHASE_CUDA_CLUSTER the largest thread-block cluster.
inline std::optional<Plan> plan_of(const Sizes& s, int element_size, int operands, const Device& device) {
  if (s.n() == 0) return std::nullopt;
  const auto lowered = [](const char* name, int64_t value, int64_t unit) {
    const char* cap = std::getenv(name);
    return cap != nullptr ? std::min<int64_t>(value, std::atoll(cap) * unit) : value;
  };
  const int64_t most = lowered("LATEPHASE_CUDA_SHARED_KIB", device.shared_bytes(1), 1024);
  const int64_t max_cluster = lowered("LATEPHASE_CUDA_CLUSTER", device.max_cluster, 1);
  const char* margin = std::getenv("LATEPHASE_CUDA_SM_MARGIN");
  const int64_t blocks_of_device = device.cooperative_blocks - (margin != nullptr ? std::atoll(margin) : 0);
  // With as many blocks on a multiprocessor as possible, then as few to a cluster, then as many lanes.
  const auto resident = [&](Layout layout, int most_lanes, int least_lanes) -> std::optional<Plan> {
    const int64_t rows = layout == Layout::kPacked ? s.B : s.n();
    for (const int blocks : {layout == Layout::kPacked ? 3 : 4, 2, 1}) {  // on a multiprocessor
      const int64_t budget = std::min(most, device.shared_bytes(blocks));
      const int threads = resident_threads(layout) / blocks / kWarp * kWarp;
      for (int cluster = 1; cluster <= max_cluster; cluster *= 2) {
        for (int lanes = most_lanes; lanes >= least_lanes; lanes /= 2) {
          const int64_t values = divide_up(rows, cluster) * (by_column(layout) ? lanes * kUnit : 1);
          if (lanes > threads || values * element_size * operands > budget) continue;
          const Plan plan = resident_plan(s, layout, lanes, cluster, threads, element_size, operands);
          if (plan.grid.shared_bytes <= budget) return plan;
        }
      }
    }
    return std::nullopt;
  };
  if (const int least = least_packed(s)) {
    const auto lanes_of_row = [&](int channels) { return static_cast<int>(channels * s.S / kUnit); };
    if (auto plan = resident(Layout::kPacked, lanes_of_row(most_packed(s, least)), lanes_of_row(least))) return plan;
  }
  for (const int row_bytes : {128, 64}) {
    const int lanes = lanes_of(s, row_bytes / (kUnit * element_size));
    if (auto plan = resident(unpacked(s), lanes, lanes)) return plan;
    if (auto plan = virtual_plan(s, lanes, most, element_size, operands, blocks_of_device)) return plan;
    if (!s.channels_last) break;
  }
  return std::nullopt;
}

}  // namespace latephase::ensemble_batch_norm
