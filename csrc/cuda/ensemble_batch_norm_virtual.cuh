// The virtual cluster tier: a group is spread over blocks all over the device, which keep it on chip and add up through
// global memory (virtual_cluster.cuh). Each cluster takes group after group: a unit is stored, and the next group's is
// fetched into its place. Two clusters share a multiprocessor and begin one after the other, so that memory is busy
// while one of them computes and waits.
#pragma once

#include "ensemble_batch_norm_resident.cuh"
#include "virtual_cluster.cuh"

namespace latephase::ensemble_batch_norm {

// The positions before one, in values of a channel.
template <Layout layout>
__device__ __forceinline__ int values_before(const Geometry& g, int position) {
  const int at = min(position, static_cast<int>(g.positions));
  if constexpr (by_column(layout)) return at;
  if (g.units_per_row * kUnit == g.columns) return at * kUnit;  // without a division, of which a merge does many
  return at / g.units_per_row * static_cast<int>(g.columns) + at % g.units_per_row * kUnit;
}

// Values of a channel in a split.
template <Layout layout>
__device__ __forceinline__ int values_of(const Geometry& g, int split) {
  return values_before<layout>(g, (split + 1) * g.positions_per_split) -
         values_before<layout>(g, split * g.positions_per_split);
}

// A cluster at work: the current group's part of this block, and the next's.
template <class scalar_t, Layout layout, int operands>
struct Traversal {
  static constexpr int kCount = Channels<layout>::kCount;
  const Geometry& g;
  int slots;
  VirtualCluster cluster;
  int group, groups;  // of the data, which is on chip: few

  __device__ Traversal(const Geometry& g, int slots, const Exchange& exchange)
      : g(g),
        slots(slots),
        cluster(exchange, g.splits, g.part_channels),
        group(cluster.index),
        groups(static_cast<int>(g.parts / g.splits)) {}

  // Meets the other clusters, and starts to fetch the first group.
  template <Width width>
  __device__ void begin(const scalar_t* const (&data)[operands]) const {
    if (!cluster.is_late()) fetch<width>(resident(part()), data);
    cluster.begin();
    if (cluster.is_late()) fetch<width>(resident(part()), data);
  }

  __device__ bool more() const { return group < groups; }
  __device__ void advance() { group += cluster.count; }
  // What this block has of the current group, or of the next one; of none behind the last.
  __device__ Part part() const { return part_of(group); }
  __device__ Part next_part() const { return part_of(group + cluster.count); }
  __device__ Part part_of(int index) const { return Part(g, index, cluster.rank, threadIdx.x, index < groups); }
  __device__ Resident<scalar_t, layout> resident(const Part& part) const { return {g, slots, 1, part}; }

  // The results of all blocks of the cluster for the channels of this thread, from those of this block.
  template <class Partial, template <int> class Result>
  __device__ __forceinline__ Result<kCount> merged(const Resident<scalar_t, layout>& r, const Result<kCount>& mine) {
    const int first = threadIdx.x % g.lanes * kCount;
    if (threadIdx.x < g.lanes)
#pragma unroll
      for (int j = 0; j < kCount; ++j) cluster.publish(first + j, mine.channel(j));
    auto* totals = reinterpret_cast<Partial*>(r.template sums<operands>());
    cluster.merge(totals, [&](int split) { return static_cast<float>(values_of<layout>(g, split)); });
    Result<kCount> all = mine;
#pragma unroll
    for (int j = 0; j < kCount; ++j) all.set(j, totals[first + j]);
    __syncthreads();  // the totals' place is used again
    return all;
  }
};

// Starts to fetch the next group's unit of an iteration. The whole warp calls, behind its last use of the slot.
template <Width width, class scalar_t, Layout layout>
__device__ __forceinline__ void refill(const Resident<scalar_t, layout>& r, int operand, int i, const scalar_t* data,
                                       const Cursor<layout>& next) {
  with_access<scalar_t, width>(r.g.access_bytes, [&](auto access) {
    r.operand(operand).template fetch<decltype(access)::value>(i, data, next.offset,
                                                               next.template valid<kWholeUnits<scalar_t, width>>(r.g));
  });
}

template <class scalar_t, Layout layout, Width width>
__global__ void __launch_bounds__(kVirtualThreads, 1)
    virtual_forward_kernel(ForwardArguments<scalar_t> a, Geometry g, int slots, FinishStatistics finish,
                           Exchange exchange) {
  Traversal<scalar_t, layout, 1> traversal(g, slots, exchange);
  traversal.template begin<width>({a.x});
  for (; traversal.more(); traversal.advance()) {
    const auto r = traversal.resident(traversal.part());
    Normalizer<scalar_t, layout> normalizer;
    normalizer.read_affine(a.normalization, r.part, r.channels);
    wait_for_copies();
    const auto own = moments_of(r, values_of<layout>(g, r.part.split));
    const auto moments = traversal.template merged<Moments<1>>(r, own);
    complete(normalizer, r, a, finish, moments);
    const Part next_part = traversal.next_part();
    const Channels<layout> next_channels(g, next_part);
    Cursor<layout> cursor = r.cursor(), next(g, next_part, next_channels);
    constexpr int batch = kBatch<scalar_t, width>;
    for (int first = 0; first < r.iterations; first += batch) {
      Unit<scalar_t> residual[batch];
      if (a.residual != nullptr) load_tile<width>(residual, a.residual, g, cursor);
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int i = first + k;
        if (i >= r.iterations) break;
        if (a.y != nullptr) {
          const Unit<scalar_t> y = output(a, normalizer, r.operand(0).get(i), residual[k]);
          store<width>(r, 0, i, y, a.y, cursor);
          if (a.mask != nullptr && cursor.more())
            a.mask[cursor.mask_offset] = y.nonzero(cursor.template valid<kWholeUnits<scalar_t, width>>(g));
        }
        cursor.advance(g);
        __syncwarp();
        if (next_part.exists) refill<width>(r, 0, i, a.x, next);
        next.advance(g);
      }
    }
  }
}

template <class scalar_t, Layout layout, Width width>
__global__ void __launch_bounds__(kVirtualThreads, 1)
    virtual_backward_kernel(BackwardArguments<scalar_t> a, Geometry g, int slots, FinishSums finish,
                            Exchange exchange) {
  Traversal<scalar_t, layout, 2> traversal(g, slots, exchange);
  traversal.template begin<width>({a.x, a.dy});
  for (; traversal.more(); traversal.advance()) {
    const auto r = traversal.resident(traversal.part());
    if (a.gate == Gate::kMask) fetch_gate(r, a.mask);
    const Normalizer<scalar_t, layout> normalizer(a.normalization, g, r.part, r.channels);
    wait_for_copies();
    const auto sums = traversal.template merged<Sums<1>>(r, sums_of(r, a, normalizer));
    const auto through = through_statistics(r, a, normalizer, finish, sums);
    const Part next_part = traversal.next_part();
    const Channels<layout> next_channels(g, next_part);
    Cursor<layout> cursor = r.cursor(), next(g, next_part, next_channels);
    for (int i = 0; i < r.iterations; ++i) {
      if (a.dx != nullptr) {
        const Unit<scalar_t> x_unit = r.operand(0).get(i), dz_unit = r.operand(1).get(i);
        store<width>(r, 0, i, input_gradient(normalizer, through, a.constant_statistics, dz_unit, x_unit), a.dx,
                     cursor);
        if (a.dresidual != nullptr) store<width>(r, 1, i, dz_unit, a.dresidual, cursor);
      }
      cursor.advance(g);
      __syncwarp();
      if (next_part.exists) {
        refill<width>(r, 0, i, a.x, next);
        refill<width>(r, 1, i, a.dy, next);
      }
      next.advance(g);
    }
  }
}

}  // namespace latephase::ensemble_batch_norm
