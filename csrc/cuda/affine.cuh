// A per-member or shared parameter on the device.
#pragma once

#include "../layout.h"
#include "unit.cuh"

namespace latephase {

// Of scalar_t or float, [K, C] or [C], or absent.
struct Parameter {
  const void* data;
  int64_t member_stride;
  bool is_float;

  explicit Parameter(const Affine& a)
      : data(a.data), member_stride(a.member_stride), is_float(a.dtype == DataType::Float) {}

  template <class scalar_t>
  __device__ float at(int64_t member, int64_t channel, float otherwise) const {
    if (data == nullptr) return otherwise;
    const int64_t i = member * member_stride + channel;
    return is_float ? static_cast<const float*>(data)[i] : widen(static_cast<const scalar_t*>(data)[i]);
  }
};

}  // namespace latephase
