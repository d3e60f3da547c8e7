// Virtual clusters: groups of blocks of one cooperative launch that add up their results through global memory.
//
// All blocks of a cooperative launch are on the device at once, so that one may wait for another. What a launch needs
// of global memory is its own, and its counters begin at zero by its own hand: nothing is kept between launches that
// two streams, or two replays of a captured graph, could both use.
#pragma once

#include <cooperative_groups.h>

#include "../host_device.h"
#include "reduce.cuh"

namespace latephase {

// Memory of a launch, uninitialized.
struct Exchange {
  float2* partials;   // [clusters, 2, blocks of a cluster, values]; of every other round
  unsigned* arrived;  // [clusters]
  int first_late;     // cluster, or their number: see begin()

  static int64_t floats(int clusters, int blocks, int values) {
    return int64_t{clusters} * 2 * blocks * values * 2 + clusters;
  }
  Exchange(void* memory, int clusters, int first_late, int blocks, int values)
      : partials(static_cast<float2*>(memory)),
        arrived(reinterpret_cast<unsigned*>(partials + int64_t{clusters} * 2 * blocks * values)),
        first_late(first_late) {}
};

// Threads that merge the blocks' results of the same value, a share each.
constexpr int kMaxHelpers = 8;
LATEPHASE_HOST_DEVICE int helpers_of(int threads, int values) {
  const int helpers = threads / values;
  return helpers < 1 ? 1 : helpers < kMaxHelpers ? helpers : kMaxHelpers;
}

__device__ __forceinline__ float2 packed(const Moments<1>& m) { return {m.mean[0], m.m2[0]}; }
__device__ __forceinline__ float2 packed(const Sums<1>& s) { return {s.first[0], s.second[0]}; }
__device__ __forceinline__ void unpack(Moments<1>& m, float2 pair, float count) { m = {count, {pair.x}, {pair.y}}; }
__device__ __forceinline__ void unpack(Sums<1>& s, float2 pair, float) { s = {{pair.x}, {pair.y}}; }

// The cluster of this block. All threads of all its blocks call the same functions in the same order.
class VirtualCluster {
 public:
  int blocks, rank;  // of the cluster; of this block in it
  int index, count;  // of the clusters

  // `values` are exchanged in each round.
  __device__ VirtualCluster(const Exchange& exchange, int blocks, int values)
      : blocks(blocks),
        rank(blockIdx.x % blocks),
        index(blockIdx.x / blocks),
        count(gridDim.x / blocks),
        values_(values),
        first_late_(exchange.first_late),
        partials_(exchange.partials + int64_t{index} * 2 * blocks * values),
        arrived_(exchange.arrived + index) {}

  // Where two clusters share multiprocessors, the second half is late: while one computes and meets, the other is to
  // have the memory.
  __device__ bool is_late() const { return index >= first_late_; }

  // Once, before the first round. Waits for the whole grid; a late cluster, until one that is not has met.
  __device__ void begin() const {
    if (rank == 0 && threadIdx.x == 0) *arrived_ = 0;
    cooperative_groups::this_grid().sync();
    if (!is_late()) return;
    if (threadIdx.x == 0) wait_for(arrived_ - first_late_, blocks);
    __syncthreads();
  }

  // Publishes this block's result of a value, which one thread of it calls.
  template <class Partial>
  __device__ void publish(int value, const Partial& partial) const {
    __stcg(round_partials() + rank * values_ + value, packed(partial));
  }

  // Ends a round: the merged results of all blocks are in `totals` [values], in shared memory behind which as many
  // again for each helper have room. Merged in an order fixed by the sizes; count_of(rank) values are behind a result.
  template <class Partial, class Count>
  __device__ void merge(Partial* totals, const Count& count_of) {
    meet();
    const float2* published = round_partials();
    const int helpers = helpers_of(blockDim.x, values_);
    Partial* shares = totals + values_;
    for (int i = threadIdx.x; i < helpers * values_; i += blockDim.x) {
      const int value = i % values_;
      Partial share = Partial::zero();
      for (int first = i / values_; first < blocks; first += kAhead * helpers) {
        float2 read[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const int from = first + k * helpers;
          read[k] = from < blocks ? __ldcg(published + from * values_ + value) : float2{0, 0};
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {  // behind the last block nothing, of no values, is merged
          const int from = first + k * helpers;
          Partial partial;
          unpack(partial, read[k], from < blocks ? count_of(from) : 0);
          share.merge(partial);
        }
      }
      shares[i] = share;
    }
    __syncthreads();
    for (int value = threadIdx.x; value < values_; value += blockDim.x) {
      Partial total = shares[value];
      for (int helper = 1; helper < helpers; ++helper) total.merge(shares[helper * values_ + value]);
      totals[value] = total;
    }
    __syncthreads();
    ++round_;
  }

 private:
  int values_, first_late_;
  float2* partials_;
  unsigned* arrived_;
  unsigned round_ = 0;

  // Of two halves in turn: while a slow block reads one round's, a fast one writes the next's.
  __device__ float2* round_partials() const { return partials_ + static_cast<int64_t>(round_ % 2) * blocks * values_; }

  // Waits until all blocks of the cluster have come this far; what they wrote before is seen afterwards.
  __device__ void meet() const {
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(arrived_)) : "memory");
      wait_for(arrived_, (round_ + 1) * blocks);
    }
    __syncthreads();
  }

  __device__ static void wait_for(const unsigned* arrived, unsigned all) {
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                   : "=r"(seen)
                   : "l"(__cvta_generic_to_global(arrived))
                   : "memory");
    } while (static_cast<int>(seen - all) < 0);
  }
};

}  // namespace latephase
