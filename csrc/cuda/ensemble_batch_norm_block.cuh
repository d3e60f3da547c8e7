// What a block keeps on chip of its part, or of several: units fetched into shared memory and stored from it, and sums
// over the threads of a part and over the blocks of a cluster.
#pragma once

#include "ensemble_batch_norm_plan.cuh"
#include "slots.cuh"

namespace latephase::ensemble_batch_norm {

extern __shared__ uint4 on_chip[];

// The part of this thread where a block holds one or several.
__device__ __forceinline__ Part part_of_block(const Geometry& g) {
  return Part(g, int64_t{blockIdx.x} * (blockDim.x / g.threads) + threadIdx.x / g.threads, threadIdx.x % g.threads);
}

// A part, a thread's place in it, and the block's shared memory: slots of each operand, bits of the gate, sums.
template <class scalar_t, Layout layout>
struct Resident {
  static constexpr int kCount = Channels<layout>::kCount;
  const Geometry& g;
  int slots;    // of the block, of each operand
  int cluster;  // blocks of the thread-block cluster that shares a group
  Part part;
  Channels<layout> channels;
  int units;       // of this thread
  int iterations;  // of its warp

  __device__ Resident(const Geometry& g, int slots, int cluster, const Part& part)
      : g(g),
        slots(slots),
        cluster(cluster),
        part(part),
        channels(g, part),
        units((max(cursor().left, 0) + g.workers - 1) / g.workers),
        iterations(__shfl_sync(~0u, units, 0)) {}  // behind a warp's first thread none has more

  __device__ Cursor<layout> cursor() const { return Cursor<layout>(g, part, channels); }

  __device__ char* memory() const { return reinterpret_cast<char*>(on_chip); }
  __device__ int operand_bytes() const { return slots * Slots<scalar_t>::kBytes; }
  __device__ Slots<scalar_t> operand(int i) const { return Slots<scalar_t>(memory() + i * operand_bytes()); }
  // The gate's bits of this thread's unit of iteration i, behind the operands where there are gates.
  template <int operands>
  __device__ uint8_t& gate(int i) const {
    return reinterpret_cast<uint8_t*>(memory() + operands * operand_bytes())[i * blockDim.x + threadIdx.x];
  }
  template <int operands>
  __device__ float* sums() const {
    const int gates = has_gates(g, operands) ? slots : 0;
    return reinterpret_cast<float*>(memory() + operands * operand_bytes() + gates);
  }

  // Whether this thread writes the results of its channels.
  __device__ bool writes() const { return part.split == 0 && part.thread < g.lanes; }

  // The sums of each thread's values over the threads of the same part (and cluster) and channels, for all of them: one
  // or two values a column, side by side. `round` counts the calls of a kernel.
  template <int N>
  __device__ void add_up(float (&values)[N], float* sums, int round) const {
    constexpr int each = N / kCount;
    const int warps_of_part = g.threads / kWarp;
    const int width = g.part_channels * each, widest = g.part_channels * 2;
    float* behind = sums + threads_sums(layout, blockDim.x, g.part_channels);
    float* of_this_block = behind + round * widest;  // rounds apart: other blocks may still read the last
    float* totals = behind + 2 * widest;
    float* of_parts = cluster > 1 ? of_this_block : totals;
    if constexpr (layout == Layout::kPacked) {
      add_up_packed(values, sums, of_parts);
    } else {
      add_up_lanes(values, sums, of_parts);
    }
    if (cluster > 1) {
      cluster_arrive<true>();
      cluster_wait();
      for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0;
        for (int rank = 0; rank < cluster; ++rank) sum += of_block(rank, of_this_block + i);
        totals[i] = sum;
      }
    }
    __syncthreads();
    const float* of_part = totals + threadIdx.x / kWarp / warps_of_part * width;
    const int first_channel = static_cast<int>(channels.first - part.channel_block * g.part_channels);
    const int lane = part.thread % g.lanes;
#pragma unroll
    for (int k = 0; k < each; ++k) {
      float of_columns[kCount];
      channels.fill(of_columns, [&](int j) {
        if constexpr (layout == Layout::kPacked) return of_part[(first_channel + channels.channel_of(j)) * each + k];
        return of_part[(j * each + k) * g.lanes + lane];
      });
#pragma unroll
      for (int j = 0; j < kCount; ++j) values[j * each + k] = of_columns[j];
    }
  }

  // No block of a cluster may end while another reads its sums: after the last add_up, and at the end.
  __device__ void arrive_at_end() const {
    if (cluster > 1) cluster_arrive<false>();
  }
  __device__ void wait_at_end() const {
    if (cluster > 1) cluster_wait();
  }

 private:
  // The sums over a block's threads of the same part and lane, [parts, N, lanes], by way of those of warps.
  template <int N>
  __device__ void add_up_lanes(float (&values)[N], float* of_warps, float* of_parts) const {
    const int warps = blockDim.x / kWarp, warps_of_part = g.threads / kWarp, parts = warps / warps_of_part;
    const int width = g.lanes * N;
    for (int offset = kWarp / 2; offset >= g.lanes; offset /= 2)  // outside: the values do not wait for each other
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] += __shfl_down_sync(~0u, values[j], offset);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (lane < g.lanes)
#pragma unroll
      for (int j = 0; j < N; ++j) of_warps[warp * width + j * g.lanes + lane] = values[j];
    __syncthreads();
    for (int i = threadIdx.x; i < parts * width; i += blockDim.x) {
      const float* first = of_warps + i / width * warps_of_part * width + i % width;
      float sum = 0;
      for (int other = 0; other < warps_of_part; ++other) sum += first[other * width];
      of_parts[i] = sum;
    }
  }

  // Of packed planes: the sums over a block's columns of the same channel, [part_channels, N / 8], by way of the two of
  // each thread: over the columns before the turn and behind it.
  template <int N>
  __device__ void add_up_packed(const float (&values)[N], float* of_threads, float* of_channels) const {
    constexpr int each = N / kUnit;
    const int threads = static_cast<int>(blockDim.x);
#pragma unroll
    for (int k = 0; k < each; ++k) {
      float before = 0, behind = 0;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        before += j < channels.turn ? values[j * each + k] : 0;
        behind += j < channels.turn ? 0 : values[j * each + k];
      }
      of_threads[2 * k * threads + threadIdx.x] = before;
      of_threads[(2 * k + 1) * threads + threadIdx.x] = behind;
    }
    __syncthreads();
    const int sums = g.part_channels * each;
    const auto add_up_in_teams = [&](auto size) {
      constexpr int team = decltype(size)::value;  // threads that add up a sum together
      const int rank = threadIdx.x % team;
      for (int first = 0; first < sums; first += threads / team) {
        const int i = first + threadIdx.x / team;
        const int begin = i / each * g.plane, end = begin + g.plane;
        float sum = 0;
        for (int lane = begin / kUnit + rank; i < sums && lane * kUnit < end; lane += team) {
          const int place = 2 * (i % each) + (lane * kUnit < begin);  // behind the turn if it begins in the unit
          const float* of_lane = of_threads + place * threads + lane;
          for (int worker = 0; worker < g.workers; ++worker) sum += of_lane[worker * g.lanes];
        }
#pragma unroll
        for (int offset = team / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
        if (rank == 0 && i < sums) of_channels[i] = sum;
      }
    };
    if (sums * kWarp <= threads) {
      add_up_in_teams(std::integral_constant<int, kWarp>{});
    } else {
      add_up_in_teams(std::integral_constant<int, 8>{});
    }
  }
};

// Starts to fetch the part's operands.
template <Width width, class scalar_t, Layout layout, int operands>
__device__ __forceinline__ void fetch(const Resident<scalar_t, layout>& r, const scalar_t* const (&data)[operands]) {
  with_access<scalar_t, width>(r.g.access_bytes, [&](auto access) {
    Cursor<layout> cursor = r.cursor();
    for (int i = 0; i < r.iterations; ++i) {
      const int valid = cursor.template valid<kWholeUnits<scalar_t, width>>(r.g);
#pragma unroll
      for (int operand = 0; operand < operands; ++operand)
        r.operand(operand).template fetch<decltype(access)::value>(i, data[operand], cursor.offset, valid);
      cursor.advance(r.g);
    }
  });
}

template <Width width, class scalar_t, Layout layout>
__device__ __forceinline__ void store(const Resident<scalar_t, layout>& r, int operand, int i,
                                      const Unit<scalar_t>& unit, scalar_t* data, const Cursor<layout>& cursor) {
  with_access<scalar_t, width>(r.g.access_bytes, [&](auto access) {
    r.operand(operand).template store<decltype(access)::value>(
        i, unit, data, cursor.offset, cursor.template valid<kWholeUnits<scalar_t, width>>(r.g));
  });
}

}  // namespace latephase::ensemble_batch_norm
