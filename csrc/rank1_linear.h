// rank1_linear with the gains in the weight: argument checks and the registered ops around the products.
#pragma once

#include "checks.h"
#include "rank1_linear_arguments.h"
#include "stable.h"

namespace latephase::rank1_linear {

constexpr const char* kOp = "rank1_linear";

inline Weights weights_of(const Tensor& data, const Tensor& weight, const Tensor& input_gain,
                          const Tensor& output_gain) {
  STD_TORCH_CHECK(data.dim() == 3 && data.is_contiguous(), kOp, ": folded weights must be contiguous, [K, out, in]");
  const int64_t K = data.size(0), out = data.size(1), in = data.size(2);
  const ScalarType sum = accumulation_type(data.scalar_type());
  const auto check = [&](const char* name, const Tensor& t, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous(), kOp, ": ", name,
                    " must be contiguous, [", rows, ", ", columns, "]");
  };
  check_devices(kOp, data, {&weight, &input_gain, &output_gain});
  check("weight", weight, out, in);
  check("input_gain", input_gain, K, in);
  check("output_gain", output_gain, K, out);
  STD_TORCH_CHECK(weight.scalar_type() == sum || weight.scalar_type() == data.scalar_type(), kOp,
                  ": weight must have the data's type or the accumulation type");
  STD_TORCH_CHECK(input_gain.scalar_type() == sum && output_gain.scalar_type() == sum, kOp,
                  ": gains must have the accumulation type");
  return {K,
          out,
          in,
          data_type(kOp, data.scalar_type()),
          data_type(kOp, weight.scalar_type()),
          weight.const_data_ptr(),
          input_gain.const_data_ptr(),
          output_gain.const_data_ptr(),
          &data};
}

// The ops for one device; Device has static fold(const Fold&) and fold_backward(const FoldBackward&).
template <class Device>
struct Ops {
  static void fold(const Tensor& weight, const Tensor& input_gain, const Tensor& output_gain, const Tensor& folded) {
    Device::fold(Fold{weights_of(folded, weight, input_gain, output_gain), folded.mutable_data_ptr()});
  }

  static std::tuple<Tensor, Tensor> fold_backward(const Tensor& products, const Tensor& weight,
                                                  const Tensor& input_gain, const Tensor& output_gain,
                                                  const OptionalTensor& dweight) {
    const Weights weights = weights_of(products, weight, input_gain, output_gain);
    const ScalarType sum = accumulation_type(products.scalar_type());
    check_devices(kOp, products, {given(dweight)});
    if (dweight.has_value()) {
      const bool fits = dweight->dim() == 2 && dweight->size(0) == weights.out && dweight->size(1) == weights.in;
      STD_TORCH_CHECK(fits && dweight->is_contiguous() && dweight->scalar_type() == sum, kOp,
                      ": dweight must be contiguous, weight's shape, the accumulation type");
    }
    Tensor ds = empty(products, {weights.K, weights.in}, sum), dr = empty(products, {weights.K, weights.out}, sum);
    Device::fold_backward(FoldBackward{weights, products.const_data_ptr(),
                                       dweight.has_value() ? dweight->mutable_data_ptr() : nullptr,
                                       ds.mutable_data_ptr(), dr.mutable_data_ptr()});
    return {ds, dr};
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("rank1_fold", TORCH_BOX(&Ops::fold));
    m.impl("rank1_fold_backward", TORCH_BOX(&Ops::fold_backward));
  }
};

}  // namespace latephase::rank1_linear
