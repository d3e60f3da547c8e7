// The dispatch: which tier a call takes, and how its groups are cut into blocks.
//
// A group is the values of one member and channel; of packed planes, of the channels that are packed together; in
// channels_last, of a slab of 128 bytes of channels, or of 64. The first of these tiers that fits is taken:
//
//   several groups a block   a group is less than four warps of work (contiguous data only)
//   one group a block        the group fits the shared memory of a block
//   thread-block cluster     it fits that of 2, 4, 8 or 16 blocks, as far as clusters of that size fill the device
//   virtual cluster          it fits that of as many blocks as there are multiprocessors, or fewer, all over the
//                            device; the groups share them (ensemble_batch_norm_virtual.cuh)
//   streaming                any size (ensemble_batch_norm_streaming.cuh)
//
// What a multiprocessor holds matters most: while one block waits for its data, another computes. So the first three
// are tried with four blocks on a multiprocessor, then with two; virtual clusters with two, then with one; and only
// then the first three with one. In channels_last each with rows of 128 bytes, then of 64, but virtual clusters with
// rows of 64 alone: what their blocks read of each other grows with the square of a slab. Planes that can be packed
// are, if that fits a block or a cluster, with as many channels as fit; with three blocks on a multiprocessor, not
// four: of 128 threads a row of 98 units leaves a quarter idle, and their memory. Of a virtual cluster only the number
// of blocks is planned, from the device alone; how many clusters there are depends on the number of groups as well. All
// of it depends on one member's sizes, the type, the layout, the direction and the device, never on the number of
// members: member k of an ensemble is computed as it would be alone.
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
constexpr int kVirtualThreads = 512;
// Wished for, of an operand. What a thread does once costs as much as three or four units; where a value has four
// bytes, its transfer leaves more time for that. A block that has a multiprocessor to itself wants its threads.
constexpr int units_per_thread(int element_size, int per_multiprocessor) {
  return per_multiprocessor == 1 ? 1 : 24 / element_size;
}
constexpr int kMinBlockThreads = 128;  // where groups are small enough to share a block

struct Plan {
  Geometry geometry;
  int slots;           // for units in a block, of each operand
  Grid grid;           // of a virtual cluster: cooperative
  int clusters = 0;    // virtual ones
  int first_late = 0;  // of them, see VirtualCluster
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
  const int64_t slots = plan.slots, parts = threads / g.threads;
  const int64_t sums = (threads_sums(g.layout, threads, channels) + (2 + parts) * channels * 2) * sizeof(float);
  const int64_t merging = (helpers_of(threads, channels) + 1) * channels * int64_t{sizeof(Moments<1>)};
  return slots * kUnit * element_size * operands + (has_gates(g, operands) ? slots : 0) + std::max(sums, merging);
}

// A part cut over a cluster, whose blocks share a multiprocessor and its `threads`.
inline Plan resident_plan(const Sizes& s, Layout layout, int lanes, int cluster, int threads, int per_multiprocessor,
                          int element_size, int operands) {
  Plan plan{Geometry(s, layout, lanes), 0, {}};
  Geometry& g = plan.geometry;
  const int64_t positions = divide_up(g.positions, cluster);
  const auto round_up_to_warps = [](int64_t threads) { return static_cast<int>(divide_up(threads, kWarp) * kWarp); };
  int64_t workers = divide_up(positions, units_per_thread(element_size, per_multiprocessor));
  if (layout != Layout::kPacked) workers = round_up_to_warps(workers * lanes) / lanes;  // else whole rows
  workers = std::min<int64_t>(workers, threads / per_multiprocessor / kWarp * kWarp / lanes);
  workers = divide_up(positions, divide_up(positions, workers));  // none to spare
  g.cut(cluster, round_up_to_warps(workers * lanes));
  const bool several = layout == Layout::kContiguous && cluster == 1;
  const int parts = several ? std::max(1, kMinBlockThreads / g.threads) : 1;
  const int before = (g.positions_per_split - 1) / g.workers;  // the last iteration, of which whole warps may be idle
  const int last =
      parts > 1 ? g.threads * parts : round_up_to_warps((g.positions_per_split - before * g.workers) * lanes);
  plan.slots = before * g.threads * parts + last;
  plan.grid = {divide_up(g.parts, parts), g.threads * parts, 0, cluster};
  plan.grid.shared_bytes = resident_bytes(plan, element_size, operands);
  return plan;
}

// The plan of virtual clusters with so many blocks on a multiprocessor, or nothing: the device has too little. As many
// clusters then share each multiprocessor.
inline std::optional<Plan> virtual_plan(const Sizes& s, int lanes, int per_multiprocessor, int64_t budget,
                                        int64_t multiprocessors, int element_size, int operands) {
  const int64_t bytes = s.n() * (s.channels_last ? lanes * kUnit : 1) * element_size * operands;
  if (budget == 0 || bytes > budget * multiprocessors) return std::nullopt;
  const auto cut = [&](int64_t splits) {
    return resident_plan(s, unpacked(s), lanes, static_cast<int>(splits), kVirtualThreads, per_multiprocessor,
                         element_size, operands);
  };
  for (int64_t splits = std::max<int64_t>(2, divide_up(bytes, budget)); splits <= multiprocessors; ++splits) {
    if (cut(splits).grid.shared_bytes > budget) continue;
    const int64_t clusters = multiprocessors / splits * per_multiprocessor;
    Plan plan = cut(multiprocessors * per_multiprocessor / clusters);  // what is left of the device divided among them
    if (plan.grid.shared_bytes > budget) plan = cut(splits);
    Geometry& g = plan.geometry;
    plan = cut(divide_up(g.positions, g.positions_per_split));  // none without a position
    if (g.splits == 1) return std::nullopt;
    plan.clusters = static_cast<int>(std::min<int64_t>(clusters, g.parts / g.splits));
    plan.first_late = plan.clusters * g.splits > multiprocessors ? (plan.clusters + 1) / 2 : plan.clusters;
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
  const int64_t max_cluster = lowered("LATEPHASE_CUDA_CLUSTER", device.max_cluster, 1);
  const char* margin_set = std::getenv("LATEPHASE_CUDA_SM_MARGIN");
  const int64_t margin = margin_set != nullptr ? std::atoll(margin_set) : 0;
  const int64_t multiprocessors = device.cooperative_multiprocessors - margin;
  const auto budget_of = [&](int per_multiprocessor) {
    return lowered("LATEPHASE_CUDA_SHARED_KIB", device.shared_bytes(per_multiprocessor), 1024);
  };
  // With as few blocks to a cluster as possible, then as many lanes.
  const auto resident = [&](Layout layout, int per_multiprocessor, int most_lanes,
                            int least_lanes) -> std::optional<Plan> {
    const int64_t rows = layout == Layout::kPacked ? s.B : s.n(), budget = budget_of(per_multiprocessor);
    for (int cluster = 1; cluster <= max_cluster; cluster *= 2) {
      for (int lanes = most_lanes; lanes >= least_lanes; lanes /= 2) {
        const int64_t values = divide_up(rows, cluster) * (by_column(layout) ? lanes * kUnit : 1);
        if (lanes > resident_threads(layout) / per_multiprocessor || values * element_size * operands > budget)
          continue;
        const Plan plan = resident_plan(s, layout, lanes, cluster, resident_threads(layout), per_multiprocessor,
                                        element_size, operands);
        if (plan.grid.shared_bytes <= budget) return plan;
      }
    }
    return std::nullopt;
  };
  if (const int least = least_packed(s)) {
    const auto lanes_of_row = [&](int channels) { return static_cast<int>(channels * s.S / kUnit); };
    for (const int per_multiprocessor : {3, 2, 1}) {
      if (auto plan =
              resident(Layout::kPacked, per_multiprocessor, lanes_of_row(most_packed(s, least)), lanes_of_row(least)))
        return plan;
    }
  }
  const int lanes_of_rows[] = {lanes_of(s, 128 / (kUnit * element_size)), lanes_of(s, 64 / (kUnit * element_size))};
  const auto resident_by_rows = [&](int per_multiprocessor) -> std::optional<Plan> {
    for (const int lanes : lanes_of_rows)
      if (auto plan = resident(unpacked(s), per_multiprocessor, lanes, lanes)) return plan;
    return std::nullopt;
  };
  for (const int per_multiprocessor : {4, 2})
    if (auto plan = resident_by_rows(per_multiprocessor)) return plan;
  for (const int per_multiprocessor : {2, 1}) {
    if (margin > 0 && per_multiprocessor > 1) continue;  // half a block on each would leave none free
    if (auto plan = virtual_plan(s, lanes_of_rows[1], per_multiprocessor, budget_of(per_multiprocessor),
                                 multiprocessors, element_size, operands))
      return plan;
  }
  return resident_by_rows(1);
}

}  // namespace latephase::ensemble_batch_norm
