// What keeps data on chip: copies into shared memory that no register waits for, and thread-block clusters.
#pragma once

#include <cuda_runtime.h>

namespace latephase {

// Starts to copy `bytes` (4, 8 or 16) into shared memory, or zeros if they do not exist.
template <int bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exists) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const auto from = __cvta_generic_to_global(global);
  const int existing = exists ? bytes : 0;
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(existing) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(bytes), "r"(existing)
                 : "memory");
  }
}

// What this warp started to copy has arrived, for all of its lanes.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}

// Thread-block clusters, on devices that have them (on others no kernel is launched with one). All threads of the
// cluster arrive, then wait. What they wrote to shared memory before arriving is seen by all after the wait, if
// `release`; without, it is only known that all have come this far.
template <bool release>
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  if constexpr (release) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The value at the same place in the shared memory of a block of the cluster.
__device__ __forceinline__ float of_block(int rank, const float* shared) {
  float value = 0;
#if __CUDA_ARCH__ >= 900
  const auto here = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
#endif
  return value;
}

}  // namespace latephase
