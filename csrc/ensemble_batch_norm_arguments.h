// What a kernel of ensemble batch norm is given: sizes (layout.h) and raw pointers, free of torch headers.
#pragma once

#include <cstdint>

#include "activation.h"
#include "layout.h"

namespace torch::stable {
class Tensor;
}

namespace latephase::ensemble_batch_norm {

// Running statistics that a forward pass in training moves, null where it does not: mean and var [K, C] in the
// accumulation type, and the number of batches seen [K].
struct Running {
  void* mean = nullptr;
  void* var = nullptr;
  int64_t* batches = nullptr;
  double momentum = 0;
  double unbias = 1;  // n / (n − 1)
};

// Pointers not needed by a call are null. Statistics and sums are [K, C] in the accumulation type (float; double for
// double). `device` is the CUDA device's index, `like` any tensor on the device, to allocate workspace from.
struct Forward {
  Sizes sizes;
  DataType dtype;
  const void* x;
  const void* residual = nullptr;
  Affine weight, bias,
      output_gain;          // output_gain multiplies the activation; neither it nor a residual with a standalone one
  bool compute_statistics;  // else mean and rstd are given
  double eps = 0;
  Affine input_gain;  // on the CPU alone: rstd is then input_gain times that of x · input_gain
  void* mean;
  void* rstd = nullptr;  // written when compute_statistics and not null
  void* var = nullptr;
  Running running;
  void* y = nullptr;  // null: statistics only
  uint8_t* mask = nullptr;
  Activation activation = Activation::kNone;
  const torch::stable::Tensor* like;
};

struct Backward {
  Sizes sizes;
  DataType dtype;
  const void* dy;
  const void* x;
  const void* mean;
  const void* rstd;
  Affine weight, bias, output_gain;
  const uint8_t* mask = nullptr;  // of a ReLU; without one, what an activation passes is recomputed from x
  Activation activation = Activation::kNone;
  bool compute_sums;  // else sum_dz and sum_dz_xhat are given
  void* sum_dz;       // of dz before the output gain, like the next
  void* sum_dz_xhat;
  double count;        // values a statistic was taken over; infinity: the statistics were constants
  void* dx = nullptr;  // null: sums only
  void* dresidual = nullptr;
  const torch::stable::Tensor* like;
};

}  // namespace latephase::ensemble_batch_norm
