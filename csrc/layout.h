// How the data of an op lies in memory, free of torch headers.
//
// K members, B rows a member, C channels, S = product of the spatial sizes, n = B·S values a member and channel. The
// data is a dense matrix of `rows` x `columns`: contiguous [K·B·C, S], or (channels_last, or S = 1) [K·B·S, C].
#pragma once

#include <cstdint>

namespace latephase {

enum class DataType : int8_t { Float, Double, BFloat16, Half };

struct Sizes {
  int64_t K, B, C, S;
  bool channels_last;  // columns are channels
  int64_t n() const { return B * S; }
  int64_t numel() const { return K * B * C * S; }
  int64_t rows() const { return channels_last ? K * B * S : K * B * C; }
  int64_t columns() const { return channels_last ? C : S; }
  int64_t mask_row_bytes() const { return (columns() + 7) / 8; }
};

// [K, C] or shared [C] (member_stride 0) or absent (nullptr), in the data's type or the accumulation type.
struct Affine {
  const void* data = nullptr;
  int64_t member_stride = 0;
  DataType dtype = DataType::Float;
};

}  // namespace latephase
