// A per-member or shared parameter on the device.
#pragma once

#include "../layout.h"
#include "unit.cuh"

namespace latephase {

// Channels side by side, one a column of a unit, of which `live` exist.
struct Adjacent {
  static constexpr bool kPacked = false;
  int64_t first;
  int live;
};

// What each column of a thread has of the values at `from`, one for each of the thread's channels, which no kernel
// writes meanwhile; 0 for columns that are not live. By vectors where all are there and aligned.
template <class T, int count, class Channels>
__device__ __forceinline__ void read_channels(float (&values)[count], const T* from, const Channels& channels) {
  if constexpr (Channels::kPacked) {
    channels.fill(values, [&](int j) { return j < channels.live ? widen(from[channels.channel_of(j)]) : 0; });
  } else {
    if constexpr (count == kUnit) {
      if (channels.live == kUnit && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        const auto unit = Unit<T>::template load<16>(from, kUnit);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) values[j] = unit.get(j);
        return;
      }
    }
#pragma unroll
    for (int j = 0; j < count; ++j) values[j] = j < channels.live ? widen(from[j]) : 0;
  }
}

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

  // Of each column of a thread's channels; 0 for those that are not live.
  template <class scalar_t, int count, class Channels>
  __device__ __forceinline__ void read(float (&values)[count], int64_t member, const Channels& channels,
                                       float otherwise) const {
    const int64_t i = member * member_stride + channels.first;
    if (data == nullptr) {
#pragma unroll
      for (int j = 0; j < count; ++j) values[j] = otherwise;
    } else if (is_float) {
      read_channels(values, static_cast<const float*>(data) + i, channels);
    } else {
      read_channels(values, static_cast<const scalar_t*>(data) + i, channels);
    }
  }
};

}  // namespace latephase
