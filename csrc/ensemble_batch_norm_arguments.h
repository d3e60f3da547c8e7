// What a kernel of ensemble batch norm is given: sizes and raw pointers, free of torch headers.
//
// K members, B rows a member, C channels, S = product of the spatial sizes, n = B·S values a statistic. The data is a
// dense matrix of `rows` x `columns`: contiguous [K·B·C, S], or (channels_last, or S = 1) [K·B·S, C].
#pragma once

#include <cstdint>

namespace torch::stable {
class Tensor;
}

namespace latephase::ensemble_batch_norm {

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

// Pointers not needed by a call are null. Statistics and sums are [K, C] in the accumulation type (float; double for
// double). `device` is the CUDA device's index, `like` any tensor on the device, to allocate workspace from.
struct Forward {
  Sizes sizes;
  DataType dtype;
  const void* x;
  const void* residual = nullptr;
  Affine weight, bias;
  bool compute_statistics;  // else mean and rstd are given
  double eps = 0;
  void* mean;
  void* rstd = nullptr;  // written when compute_statistics and not null
  void* var = nullptr;
  void* y = nullptr;  // null: statistics only
  uint8_t* mask = nullptr;
  bool relu = false;
  const torch::stable::Tensor* like;
};

struct Backward {
  Sizes sizes;
  DataType dtype;
  const void* dy;
  const void* x;
  const void* mean;
  const void* rstd;
  Affine weight, bias;
  const uint8_t* mask = nullptr;  // with relu and no mask, the mask is recomputed from x
  bool relu = false;
  bool compute_sums;  // else sum_dz and sum_dz_xhat are given
  void* sum_dz;
  void* sum_dz_xhat;
  double count;        // values a statistic was taken over; infinity: the statistics were constants
  void* dx = nullptr;  // null: sums only
  void* dresidual = nullptr;
  const torch::stable::Tensor* like;
};

}  // namespace latephase::ensemble_batch_norm
