// The activations there are, and what passes the ReLU and the ReLU6, once for host and device.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace latephase {

enum class Activation { kNone, kRelu, kRelu6, kSilu, kHardswish };

// Whether ensemble batch norm applies it without residual and output gain only.
constexpr bool standalone(Activation a) { return a != Activation::kNone && a != Activation::kRelu; }

// The largest value that rounds to zero in a type with this smallest denormal: what passes the ReLU is decided by the
// value as stored. float and double: 0, since they are stored as computed.
constexpr float kRoundsToZeroHalf = 0x1p-25f;
constexpr float kRoundsToZeroBFloat16 = 0x1p-134f;

// The smallest value that rounds to six; float and double: 6. A ReLU6 passes what rounds to something between.
constexpr float kRoundsToSixHalf = 6 - 0x1p-9f;
constexpr float kRoundsToSixBFloat16 = 6 - 0x1p-6f;

// True where the ReLU lets z (and its gradient) through; NaN passes.
template <class T>
LATEPHASE_HOST_DEVICE bool relu_passes(T z, T rounds_to_zero) {
  return !(z <= rounds_to_zero);
}

}  // namespace latephase
