// Functions for host and device alike.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LATEPHASE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LATEPHASE_HOST_DEVICE inline
#endif

namespace latephase {

LATEPHASE_HOST_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

LATEPHASE_HOST_DEVICE int round_up_to_power_of_two(int64_t value, int low, int high) {
  int power = low;
  while (power < high && power < value) power *= 2;
  return power;
}

}  // namespace latephase
