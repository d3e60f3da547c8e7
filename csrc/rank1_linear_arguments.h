// What the kernels of rank1_linear are given: sizes and raw pointers, free of torch headers.
#pragma once

#include "layout.h"

namespace torch::stable {
class Tensor;
}

namespace latephase::rank1_linear {

// K members, a weight [out, in] that they share; gains [K, in] and [K, out] in the accumulation type.
struct Weights {
  int64_t K, out, in;
  DataType dtype, weight_dtype;  // of the data, and of the weight: the same, or the accumulation type
  const void *weight, *input_gain, *output_gain;
  const torch::stable::Tensor* like;  // any tensor on the device, to allocate workspace from
};

// folded [K, out, in], in the data's type, becomes W ∘ (r_k s_kᵀ).
struct Fold : Weights {
  void* folded;
};

// Of the members' H_k = dy_kᵀ x_k [K, out, in], in the data's type. dweight [out, in], null where nobody asks, is added
// to; ds [K, in] and dr [K, out] are written; all in the accumulation type.
struct FoldBackward : Weights {
  const void* products;
  void *dweight, *ds, *dr;
};

}  // namespace latephase::rank1_linear
