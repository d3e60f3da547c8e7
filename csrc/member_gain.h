// Member gain: sizes, argument checks and the registered ops, shared by both devices.
#pragma once

#include "checks.h"
#include "member_gain_arguments.h"
#include "stable.h"

namespace latephase::member_gain {

constexpr const char* kOp = "member_gain";

// In memory a member is B rows of C channels of S values: the dimensions outside the channels' one, and inside it.
inline Sizes sizes_of(const Tensor& input, const Tensor& gain, int64_t channel_dim) {
  STD_TORCH_CHECK(channel_dim >= 1 && channel_dim < input.dim(), kOp,
                  ": channel_dim must be 1 to input.dim() - 1, got ", channel_dim);
  STD_TORCH_CHECK(gain.dim() == 2 && gain.size(0) >= 1, kOp, ": gain must be [K, C] with at least one member");
  const int64_t K = gain.size(0), C = input.size(channel_dim);
  STD_TORCH_CHECK(input.size(0) % K == 0, kOp, ": input.size(0)=", input.size(0), " is not divisible by the ", K,
                  " members of gain");
  const bool contiguous = input.is_contiguous();
  STD_TORCH_CHECK(contiguous || is_channels_last(input), kOp,
                  ": input must be contiguous or channels_last; call .contiguous()");
  int64_t S = 1;
  if (contiguous || channel_dim > 1) {
    if (!contiguous) S = input.size(1);
    for (int64_t d = channel_dim + 1; d < input.dim(); ++d) S *= input.size(d);
  }
  const int64_t B = C * S == 0 ? 0 : input.numel() / (K * C * S);
  return {K, B, C, S, S == 1};
}

inline bool is_relu(const std::string& name) {
  const Activation activation = activation_of(kOp, name);
  STD_TORCH_CHECK(!standalone(activation), "member_gain: activation must be none or relu, got ", name);
  return activation == Activation::kRelu;
}

// The ops for one device; Device has static forward(const Call&) and backward(const Call&).
template <class Device>
struct Ops {
  static Call call_of(const Tensor& input, const Tensor& gain, const OptionalTensor& bias, int64_t channel_dim,
                      const std::string& activation) {
    const Sizes s = sizes_of(input, gain, channel_dim);
    check_devices(kOp, input, {&gain, given(bias)});
    Call call{s,
              data_type(kOp, input.scalar_type()),
              input.const_data_ptr(),
              affine(kOp, "gain", gain, input, s),
              affine(kOp, "bias", bias, input, s),
              is_relu(activation)};
    call.like = &input;
    return call;
  }

  static Tensor forward(const Tensor& input, const Tensor& gain, const OptionalTensor& bias, int64_t channel_dim,
                        const std::string& activation) {
    Tensor y = empty_as(input);
    forward_into(input, gain, bias, channel_dim, activation, y);
    return y;
  }

  // Writes y, which may be input itself.
  static void forward_into(const Tensor& input, const Tensor& gain, const OptionalTensor& bias, int64_t channel_dim,
                           const std::string& activation, const Tensor& y) {
    Call call = call_of(input, gain, bias, channel_dim, activation);
    check_devices(kOp, input, {&y});
    data_like(kOp, "out", y, input);
    call.y = y.mutable_data_ptr();
    Device::forward(call);
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& input, const Tensor& gain,
                                                     const OptionalTensor& bias, int64_t channel_dim,
                                                     const std::string& activation) {
    Tensor dx = empty_as(input);
    auto [dgain, dbias] = backward_into(dy, input, gain, bias, channel_dim, activation, dx);
    return {dx, dgain, dbias};
  }

  // Writes dx, which may be dy itself.
  static std::tuple<Tensor, Tensor> backward_into(const Tensor& dy, const Tensor& input, const Tensor& gain,
                                                  const OptionalTensor& bias, int64_t channel_dim,
                                                  const std::string& activation, const Tensor& dx) {
    Call call = call_of(input, gain, bias, channel_dim, activation);
    check_devices(kOp, input, {&dy, &dx});
    data_like(kOp, "out", dx, input);
    const ScalarType sum = accumulation_type(input.scalar_type());
    Tensor dgain = empty(input, {call.sizes.K, call.sizes.C}, sum),
           dbias = empty(input, {call.sizes.K, call.sizes.C}, sum);
    call.dy = data_like(kOp, "dy", dy, input);
    call.dx = dx.mutable_data_ptr();
    call.dgain = dgain.mutable_data_ptr();
    call.dbias = dbias.mutable_data_ptr();
    Device::backward(call);
    return {dgain, dbias};
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("member_gain", TORCH_BOX(&Ops::forward));
    m.impl("member_gain_backward", TORCH_BOX(&Ops::backward));
    m.impl("member_gain_into", TORCH_BOX(&Ops::forward_into));
    m.impl("member_gain_backward_into", TORCH_BOX(&Ops::backward_into));
  }
};

}  // namespace latephase::member_gain
