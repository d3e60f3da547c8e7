// Linear interpolation as torch.lerp computes it, once for host and device.
#pragma once

#include <cmath>

#include "host_device.h"

namespace latephase {

// From `start` (weight 0) to `end` (weight 1), exact at both.
template <class T>
LATEPHASE_HOST_DEVICE T lerp(T start, T end, T weight) {
  using std::fma;
  const bool near_start = weight < T(0.5) && weight > T(-0.5);
  return near_start ? fma(weight, end - start, start) : fma(weight - 1, end - start, end);
}

}  // namespace latephase
