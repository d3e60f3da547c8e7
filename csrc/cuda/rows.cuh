// Units of rows in global memory, at the widest access that all rows of a tensor are aligned to.
#pragma once

#include "../host_device.h"
#include "unit.cuh"

namespace latephase {

LATEPHASE_HOST_DEVICE int64_t units_of(int64_t columns) { return (columns + kUnit - 1) / kUnit; }

// Rows of `columns` values one behind the other; `bytes` is the widest access, at most 16, that each is aligned to.
template <class scalar_t>
struct Rows {
  scalar_t* data;
  int bytes;

  Rows(const void* p, int64_t columns) : data(static_cast<scalar_t*>(const_cast<void*>(p))) {
    const uint64_t bits = 16 | static_cast<uint64_t>(columns * sizeof(scalar_t)) | reinterpret_cast<uint64_t>(p);
    bytes = static_cast<int>(bits & -bits);
  }

  __device__ explicit operator bool() const { return data != nullptr; }

  // The unit at `offset`, of which `valid` values exist. No other thread of the kernel may write there.
  __device__ __forceinline__ Unit<scalar_t> load(int64_t offset, int valid) const {
    Unit<scalar_t> unit;
    with_access<scalar_t>(bytes, [&](auto access) {
      unit = Unit<scalar_t>::template load<decltype(access)::value>(data + offset, valid);
    });
    return unit;
  }

  // Rounds values and stores those that exist.
  __device__ __forceinline__ void store(int64_t offset, int valid, const float (&values)[kUnit]) const {
    const auto unit = Unit<scalar_t>::of(values);
    with_access<scalar_t>(bytes,
                          [&](auto access) { unit.template store<decltype(access)::value>(data + offset, valid); });
  }
};

}  // namespace latephase
