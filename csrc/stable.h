// What this project takes of the LibTorch stable ABI: the target version, the headers, aliases, and new tensors.
#pragma once

#ifdef TORCH_FEATURE_VERSION
#error "a torch header came before stable.h: the library would ask for symbols of the torch it is built with"
#endif
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020a000000000000ULL  // 2.10
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "huge_pages.h"

namespace latephase {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A new tensor of like's device, through the C shim itself: torch::stable::new_empty looks its operator up at each
// call, which takes longer than a small kernel.
inline Tensor empty_strided(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides,
                            int32_t dtype) {
  int32_t device_type, device_index;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle));
  Tensor made(handle);
  if (device_type == aoti_torch_device_type_cpu())
    ask_for_huge_pages(made.mutable_data_ptr(), made.numel() * static_cast<int64_t>(made.element_size()));
  return made;
}

// A new contiguous tensor.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[5], stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes.begin()[d])) strides[d] = stride;
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  return empty_strided(like, static_cast<int64_t>(sizes.size()), sizes.begin(), strides, shim_dtype);
}

// A new tensor of like's sizes, strides and type; like must be dense.
inline Tensor empty_as(const Tensor& like) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_strided(like, like.dim(), like.sizes().data(), like.strides().data(), dtype);
}

}  // namespace latephase
