// What the pointwise steps of rank1_lstm are given: sizes and raw pointers, free of torch headers.
//
// In the data's type: gates and dgates [K, T, B, 4H] (i, f, g, o), output and dy [T, K·B, H], products and what goes
// into them [K·B, ·]. In the accumulation type: cells [T, K·B, H], c0, dc_n and dc [K·B, H], gains [K, ·].
#pragma once

#include "host_device.h"
#include "layout.h"

namespace torch::stable {
class Tensor;
}

namespace latephase::rank1_lstm {

// K members, T steps, B rows a member, H units.
struct Sizes {
  int64_t K, T, B, H;
  LATEPHASE_HOST_DEVICE int64_t rows() const { return K * B; }
};

// out = x ∘ gain_k, all of H columns.
struct Scale {
  Sizes sizes;
  DataType dtype;
  const void *x, *gain;
  void* out;
  const torch::stable::Tensor* like;
};

// All that is pointwise of one time step. Pointers that a direction does not need are null.
//
// Forward: the gates' input parts, and product ∘ output_gain, become activated gates in place; c and h of step t; and
// scaled = h ∘ input_gain, whose product [K·B, 4H] the next step takes.
// Backward: dgates of step t; the gradient of c one step before in dc; and scaled = dgates ∘ output_gain, whose product
// [K·B, H] the step before takes. dy and dc_n are null where there are none.
struct Step {
  Sizes sizes;
  DataType dtype;
  const torch::stable::Tensor* like;
  const void *input_gain, *output_gain, *c0, *product;
  void* scaled;
  void *gates = nullptr, *cells = nullptr;  // only read on the way back
  void* output = nullptr;
  const void *dy = nullptr, *dc_n = nullptr;
  void *dc = nullptr, *dgates = nullptr;
  int64_t t = 0;
};

}  // namespace latephase::rank1_lstm
