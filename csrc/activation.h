// Each activation and its derivative, once for host and device.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace latephase {

enum class Activation { kNone, kRelu, kSilu };

// The largest value that rounds to zero in a type with this smallest denormal: what passes the ReLU is decided by the
// value as stored. float and double: 0, since they are stored as computed.
constexpr float kRoundsToZeroHalf = 0x1p-25f;
constexpr float kRoundsToZeroBFloat16 = 0x1p-134f;

// True where the ReLU lets z (and its gradient) through; NaN passes.
template <class T>
LATEPHASE_HOST_DEVICE bool relu_passes(T z, T rounds_to_zero) {
  return !(z <= rounds_to_zero);
}

}  // namespace latephase
