// Argument checks that every op shares; a message starts with the op's name.
#pragma once

#include "activation.h"
#include "layout.h"
#include "stable.h"

namespace latephase {

inline ScalarType accumulation_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline DataType data_type(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DataType::Float;
    case ScalarType::Double:
      return DataType::Double;
    case ScalarType::BFloat16:
      return DataType::BFloat16;
    case ScalarType::Half:
      return DataType::Half;
    default:
      STD_TORCH_CHECK(false, op, ": input must be float32, float64, bfloat16 or float16");
  }
}

// True if `t` is dense with channels innermost; size-1 dimensions do not count.
inline bool is_channels_last(const Tensor& t) {
  int64_t expected = t.size(1);
  if (t.size(1) != 1 && t.stride(1) != 1) return false;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (d == 1) continue;
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// Raises unless `t` has exactly the input's sizes, type and, where they matter, strides.
inline const void* data_like(const char* op, const char* name, const Tensor& t, const Tensor& input) {
  bool same = t.dim() == input.dim() && t.scalar_type() == input.scalar_type();
  for (int64_t d = 0; same && d < input.dim(); ++d)
    same = t.size(d) == input.size(d) && (t.stride(d) == input.stride(d) || t.size(d) == 1 || t.numel() == 0);
  STD_TORCH_CHECK(same, op, ": ", name, " must have input's shape, type and strides");
  return t.const_data_ptr();
}

// Raises unless every tensor that is there lies on the input's device. On the CPU the dispatcher has seen to that: a
// call with a tensor of another device goes there.
inline void check_devices([[maybe_unused]] const char* op, [[maybe_unused]] const Tensor& input,
                          [[maybe_unused]] std::initializer_list<const Tensor*> others) {
#if defined(USE_CUDA)
  const auto place = [](const Tensor& t) {
    int32_t type, index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
    return std::pair(type, index);
  };
  for (const Tensor* other : others)
    STD_TORCH_CHECK(other == nullptr || place(*other) == place(input), op, ": all tensors must be on input's device");
#endif
}

// The tensor that is there, for check_devices.
inline const Tensor* given(const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; }

inline Affine affine(const char* op, const char* name, const OptionalTensor& t, const Tensor& input, const Sizes& s) {
  if (!t.has_value()) return {};
  const bool per_member = t->dim() == 2 && t->size(0) == s.K && t->size(1) == s.C;
  const bool shared = t->dim() == 1 && t->size(0) == s.C;
  STD_TORCH_CHECK((per_member || shared) && t->is_contiguous(), op, ": ", name, " must be contiguous, [K, C] or [C]");
  const ScalarType dtype = t->scalar_type();
  STD_TORCH_CHECK(dtype == input.scalar_type() || dtype == accumulation_type(input.scalar_type()), op, ": ", name,
                  " must have input's type or the accumulation type");
  return {t->const_data_ptr(), per_member ? s.C : 0, data_type(op, dtype)};
}

inline Activation activation_of(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "silu") return Activation::kSilu;
  STD_TORCH_CHECK(name == "hardswish", op, ": unknown activation ", name);
  return Activation::kHardswish;
}

}  // namespace latephase
