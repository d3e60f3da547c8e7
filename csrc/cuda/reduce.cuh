// Reductions over a warp and a block in an order that is fixed by the block's shape alone.
#pragma once

#include <cstdint>

#include "unit.cuh"

namespace latephase {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
// Results of other blocks that a thread reads before it merges the first: within a merge the compiler starts no read.
constexpr int kAhead = 4;

// The moments of `count` values in each of N channels: their mean and their sum of squares around it.
template <int N>
struct Moments {
  float count;
  float mean[N];
  float m2[N];

  static __device__ Moments zero() {
    Moments m;
    m.count = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) m.mean[j] = m.m2[j] = 0;
    return m;
  }

  // Chan, Golub and LeVeque's pairwise update. With nothing all stays, by selection: behind a branch the loads of b
  // would be started late.
  __device__ void merge(const Moments& b) {
    const float total = count + b.count;
    const float share = __fdividef(b.count, total);  // to 2 ulp: as good here, and without a branch
    const float spread = count * share;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float delta = b.mean[j] - mean[j];
      const float merged_mean = fmaf(delta, share, mean[j]), merged_m2 = m2[j] + fmaf(delta, delta * spread, b.m2[j]);
      mean[j] = b.count == 0 ? mean[j] : merged_mean;
      m2[j] = b.count == 0 ? m2[j] : merged_m2;
    }
    count = total;
  }

  __device__ Moments shuffled_down(int offset) const {
    Moments m;
    m.count = __shfl_down_sync(~0u, count, offset);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      m.mean[j] = __shfl_down_sync(~0u, mean[j], offset);
      m.m2[j] = __shfl_down_sync(~0u, m2[j], offset);
    }
    return m;
  }

  __device__ Moments<1> channel(int j) const { return {count, {mean[j]}, {m2[j]}}; }
  // The same for a j that is not known when this is compiled.
  __device__ Moments<1> selected(int j) const {
    Moments<1> m = channel(0);
#pragma unroll
    for (int other = 1; other < N; ++other)
      if (j == other) m = channel(other);
    return m;
  }
  __device__ void set(int j, const Moments<1>& m) { count = m.count, mean[j] = m.mean[0], m2[j] = m.m2[0]; }
};

// Two sums in each of N channels.
template <int N>
struct Sums {
  float first[N];
  float second[N];

  static __device__ Sums zero() {
    Sums s;
#pragma unroll
    for (int j = 0; j < N; ++j) s.first[j] = s.second[j] = 0;
    return s;
  }

  __device__ void merge(const Sums& b) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      first[j] += b.first[j];
      second[j] += b.second[j];
    }
  }

  __device__ Sums shuffled_down(int offset) const {
    Sums s;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      s.first[j] = __shfl_down_sync(~0u, first[j], offset);
      s.second[j] = __shfl_down_sync(~0u, second[j], offset);
    }
    return s;
  }

  __device__ Sums<1> channel(int j) const { return {{first[j]}, {second[j]}}; }
  __device__ void set(int j, const Sums<1>& s) { first[j] = s.first[0], second[j] = s.second[0]; }
};

// Merges the values of the lanes that are equal modulo `lanes` (a power of two); valid in lanes 0 … lanes − 1.
template <class T>
__device__ T warp_reduce(T value, int lanes) {
  for (int offset = kWarp / 2; offset >= lanes; offset /= 2) value.merge(value.shuffled_down(offset));
  return value;
}

// Merges the values of the threads that are equal modulo `lanes`; valid in threads 0 … lanes − 1. The block is made of
// whole warps. Once a kernel: the shared memory is not reusable. The floats of a value lie apart there, those of lanes
// side by side: no two lanes meet in a bank.
template <class T, int max_lanes, int max_threads = kMaxThreads>
__device__ T block_reduce(T value, int lanes) {
  constexpr int floats = sizeof(T) / sizeof(float);
  __shared__ float shared[floats * (max_threads / kWarp) * max_lanes];
  value = warp_reduce(value, lanes);
  if (blockDim.x == kWarp) return value;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, apart = blockDim.x / kWarp * lanes;
  if (lane < lanes)
#pragma unroll
    for (int i = 0; i < floats; ++i)
      shared[i * apart + warp * lanes + lane] = reinterpret_cast<const float*>(&value)[i];
  __syncthreads();
  if (threadIdx.x < lanes) {
    for (int other = 1; other < blockDim.x / kWarp; ++other) {
      T found;
#pragma unroll
      for (int i = 0; i < floats; ++i) reinterpret_cast<float*>(&found)[i] = shared[i * apart + other * lanes + lane];
      value.merge(found);
    }
  }
  return value;
}

// Where a block has a float of each column of a warp's units in shared memory. Neither lanes that write column j of
// their units meet in a bank, nor threads that read columns side by side.
constexpr int kColumnsApart = kWarp + kUnit / 2, kColumnPlaces = kUnit * kColumnsApart;
__device__ __forceinline__ int place_of_column(int unit, int j) { return j * kColumnsApart + unit; }

}  // namespace latephase
