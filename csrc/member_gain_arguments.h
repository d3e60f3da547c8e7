// What a kernel of member gain is given: sizes (layout.h) and raw pointers, free of torch headers.
#pragma once

#include "layout.h"

namespace torch::stable {
class Tensor;
}

namespace latephase::member_gain {

// Forward: y of x. Backward: dx, dgain and dbias of x and dy. Pointers that a call does not need are null.
// B counts all rows of a member that hold C channels of S values each; channels_last is S = 1. dgain and dbias are
// [K, C] in the accumulation type (float; double for double). `like` is any tensor on the device, to allocate
// workspace from.
struct Call {
  Sizes sizes;
  DataType dtype;
  const void* x;
  Affine gain, bias;
  bool relu;
  void* y = nullptr;
  const void* dy = nullptr;
  void* dx = nullptr;
  void* dgain = nullptr;
  void* dbias = nullptr;
  const torch::stable::Tensor* like;
};

}  // namespace latephase::member_gain
