// Ensemble batch norm: sizes, argument checks and the seven registered ops, shared by both devices.
#pragma once

#include <cmath>

#include "checks.h"
#include "ensemble_batch_norm_arguments.h"
#include "stable.h"

namespace latephase::ensemble_batch_norm {

constexpr const char* kOp = "ensemble_batch_norm";

inline Sizes sizes_of(const Tensor& input, int64_t num_members) {
  STD_TORCH_CHECK(input.dim() >= 2, "ensemble_batch_norm: input must be [K·B, C, *]");
  STD_TORCH_CHECK(num_members >= 1 && input.size(0) % num_members == 0,
                  "ensemble_batch_norm: input.size(0)=", input.size(0),
                  " is not divisible by num_members=", num_members);
  Sizes s{num_members, input.size(0) / num_members, input.size(1), 1, false};
  for (int64_t d = 2; d < input.dim(); ++d) s.S *= input.size(d);
  const bool contiguous = input.is_contiguous();
  STD_TORCH_CHECK(contiguous || is_channels_last(input),
                  "ensemble_batch_norm: input must be contiguous or channels_last; call .contiguous()");
  s.channels_last = !contiguous || s.S == 1;
  return s;
}

inline void check_statistic(const char* name, const Tensor& t, const Tensor& input, const Sizes& s) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == s.K && t.size(1) == s.C && t.is_contiguous() &&
                      t.scalar_type() == accumulation_type(input.scalar_type()),
                  "ensemble_batch_norm: ", name, " must be contiguous [K, C] in the accumulation type");
}

// The ops for one device; Device has static forward(const Forward&), backward(const Backward&), and
// take_statistics(sizes, input, given_mean, given_var, eps, mean, var, rstd), which copies the given ones and computes
// rstd = 1 / √(var + eps); all are contiguous [K, C] in the accumulation type, and may be the same.
template <class Device>
struct Ops {
  static Tensor statistic(const Tensor& input, const Sizes& s) {
    return empty(input, {s.K, s.C}, accumulation_type(input.scalar_type()));
  }

  static Tensor new_mask(const Tensor& input, const Sizes& s, bool needed) {
    return needed ? empty(input, {s.rows(), s.mask_row_bytes()}, ScalarType::Byte)
                  : empty(input, {0}, ScalarType::Byte);
  }

  static Forward forward_of(const Tensor& input, const Sizes& s, bool compute, const Tensor& mean) {
    Forward f{s, data_type(kOp, input.scalar_type()), input.const_data_ptr()};
    f.compute_statistics = compute;
    f.mean = mean.mutable_data_ptr();
    f.like = &input;
    return f;
  }

  static Affine gain_of(const OptionalTensor& output_gain, bool residual, Activation activation, const Tensor& input,
                        const Sizes& s) {
    STD_TORCH_CHECK(!output_gain.has_value() || !residual, "ensemble_batch_norm: output_gain takes no residual");
    STD_TORCH_CHECK(!standalone(activation) || !(output_gain.has_value() || residual),
                    "ensemble_batch_norm: only the activations none and relu take a residual or output_gain");
    return affine(kOp, "output_gain", output_gain, input, s);
  }

  static std::tuple<Tensor, Tensor> normalize(Forward& f, const Tensor& input, const OptionalTensor& weight,
                                              const OptionalTensor& bias, const OptionalTensor& residual,
                                              const std::string& activation, const OptionalTensor& output_gain) {
    check_devices(kOp, input, {given(weight), given(bias), given(residual), given(output_gain)});
    f.activation = activation_of(kOp, activation);
    f.weight = affine(kOp, "weight", weight, input, f.sizes);
    f.bias = affine(kOp, "bias", bias, input, f.sizes);
    f.output_gain = gain_of(output_gain, residual.has_value(), f.activation, input, f.sizes);
    if (residual.has_value()) f.residual = data_like(kOp, "residual", *residual, input);
    Tensor y = empty_as(input);
    Tensor mask = new_mask(input, f.sizes, f.activation == Activation::kRelu && residual.has_value());
    f.y = y.mutable_data_ptr();
    f.mask = mask.numel() ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
    Device::forward(f);
    return {y, mask};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> whole(
      const Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
      const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual, bool training,
      double eps, int64_t num_members, const std::string& activation, const OptionalTensor& output_gain) {
    const Sizes s = sizes_of(input, num_members);
    Tensor mean = statistic(input, s), var = statistic(input, s), rstd = statistic(input, s);
    if (!training) {
      STD_TORCH_CHECK(running_mean.has_value() && running_var.has_value(),
                      "ensemble_batch_norm: running_mean and running_var must be given when training=False");
      STD_TORCH_CHECK(running_mean->numel() == s.K * s.C && running_var->numel() == s.K * s.C,
                      "ensemble_batch_norm: running_mean and running_var must be [K, C]");
      check_devices(kOp, input, {given(running_mean), given(running_var)});
      const auto readable = [&](const Tensor& t) { return t.is_contiguous() && t.scalar_type() == mean.scalar_type(); };
      if (readable(*running_mean) && readable(*running_var)) {
        Device::take_statistics(s, input, *running_mean, *running_var, eps, mean, var, rstd);
      } else {
        torch::stable::copy_(mean, *running_mean);
        torch::stable::copy_(var, *running_var);
        Device::take_statistics(s, input, mean, var, eps, mean, var, rstd);
      }
    }
    Forward f = forward_of(input, s, training, mean);
    f.eps = eps;
    f.rstd = rstd.mutable_data_ptr();
    f.var = var.mutable_data_ptr();
    auto [y, mask] = normalize(f, input, weight, bias, residual, activation, output_gain);
    return {y, mean, rstd, var, mask};
  }

  // The whole forward in training, which moves the running statistics as well. Eager calls come here unchecked: what
  // is not right raises before anything changes, and Python then says which argument it was.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> update(const Tensor& input, const Tensor& running_mean,
                                                           const Tensor& running_var, const OptionalTensor& batches,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const OptionalTensor& residual, double momentum, double eps,
                                                           int64_t num_members, const std::string& activation,
                                                           const OptionalTensor& output_gain) {
    const Sizes s = sizes_of(input, num_members);
    check_devices(kOp, input, {&running_mean, &running_var, given(batches)});
    STD_TORCH_CHECK(input.dim() <= 5, "ensemble_batch_norm: input must have at most 3 spatial dimensions");
    STD_TORCH_CHECK(s.n() > 1, "ensemble_batch_norm: training needs more than one value a channel and member");
    STD_TORCH_CHECK(std::isfinite(eps) && eps > 0, "ensemble_batch_norm: eps must be finite and > 0 in training");
    STD_TORCH_CHECK(std::isfinite(momentum), "ensemble_batch_norm: momentum must be finite");
    check_statistic("running_mean", running_mean, input, s);
    check_statistic("running_var", running_var, input, s);
    if (batches.has_value()) {
      STD_TORCH_CHECK(batches->dim() == 1 && batches->size(0) == s.K && batches->is_contiguous() &&
                          batches->scalar_type() == ScalarType::Long,
                      "ensemble_batch_norm: num_batches_tracked must be contiguous int64 [K]");
    }
    Tensor mean = statistic(input, s), rstd = statistic(input, s);
    Forward f = forward_of(input, s, true, mean);
    f.eps = eps;
    f.rstd = rstd.mutable_data_ptr();
    f.running = {running_mean.mutable_data_ptr(), running_var.mutable_data_ptr(),
                 batches.has_value() ? static_cast<int64_t*>(batches->mutable_data_ptr()) : nullptr, momentum,
                 static_cast<double>(s.n()) / static_cast<double>(s.n() - 1)};
    auto [y, mask] = normalize(f, input, weight, bias, residual, activation, output_gain);
    return {y, mean, rstd, mask};
  }

  static std::tuple<Tensor, Tensor> statistics(const Tensor& input, int64_t num_members) {
    const Sizes s = sizes_of(input, num_members);
    Tensor mean = statistic(input, s), var = statistic(input, s);
    Forward f = forward_of(input, s, true, mean);
    f.var = var.mutable_data_ptr();
    Device::forward(f);
    return {mean, var};
  }

  static std::tuple<Tensor, Tensor> apply(const Tensor& input, const Tensor& mean, const Tensor& rstd,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& residual, int64_t num_members,
                                          const std::string& activation, const OptionalTensor& output_gain) {
    const Sizes s = sizes_of(input, num_members);
    check_devices(kOp, input, {&mean, &rstd});
    check_statistic("mean", mean, input, s);
    check_statistic("rstd", rstd, input, s);
    Forward f = forward_of(input, s, false, mean);
    f.rstd = const_cast<void*>(rstd.const_data_ptr());  // read only: compute_statistics is false
    return normalize(f, input, weight, bias, residual, activation, output_gain);
  }

  static Backward backward_of(const Tensor& dy, const Tensor& input, const Tensor& mean, const Tensor& rstd,
                              const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mask,
                              int64_t num_members, const std::string& activation, const Tensor& sum_dz,
                              const Tensor& sum_dz_xhat, bool compute_sums) {
    const Sizes s = sizes_of(input, num_members);
    check_devices(kOp, input, {&dy, &mean, &rstd, given(weight), given(bias), &mask, &sum_dz, &sum_dz_xhat});
    check_statistic("mean", mean, input, s);
    check_statistic("rstd", rstd, input, s);
    check_statistic("sum_dz", sum_dz, input, s);
    check_statistic("sum_dz_xhat", sum_dz_xhat, input, s);
    Backward b{s,
               data_type(kOp, input.scalar_type()),
               data_like(kOp, "dy", dy, input),
               input.const_data_ptr(),
               mean.const_data_ptr(),
               rstd.const_data_ptr(),
               affine(kOp, "weight", weight, input, s),
               affine(kOp, "bias", bias, input, s)};
    b.activation = activation_of(kOp, activation);
    if (mask.numel()) {
      STD_TORCH_CHECK(mask.numel() == s.rows() * s.mask_row_bytes() && mask.scalar_type() == ScalarType::Byte,
                      "ensemble_batch_norm: mask does not belong to this input");
      b.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    }
    b.compute_sums = compute_sums;
    b.sum_dz = const_cast<void*>(sum_dz.const_data_ptr());
    b.sum_dz_xhat = const_cast<void*>(sum_dz_xhat.const_data_ptr());
    b.like = &input;
    return b;
  }

  static std::tuple<Tensor, Tensor> input_gradients(Backward& b, const Tensor& input, double count, bool residual_grad,
                                                    const OptionalTensor& output_gain) {
    check_devices(kOp, input, {given(output_gain)});
    b.output_gain = gain_of(output_gain, residual_grad, b.activation, input, b.sizes);
    Tensor dx = empty_as(input);
    Tensor dresidual = residual_grad ? empty_as(input) : empty(input, {0}, input.scalar_type());
    b.count = count;
    b.dx = dx.mutable_data_ptr();
    b.dresidual = residual_grad ? dresidual.mutable_data_ptr() : nullptr;
    Device::backward(b);
    return {dx, dresidual};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> whole_backward(
      const Tensor& dy, const Tensor& input, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
      const OptionalTensor& bias, const Tensor& mask, bool training, int64_t num_members, const std::string& activation,
      bool residual_grad, const OptionalTensor& output_gain) {
    const Sizes s = sizes_of(input, num_members);
    Tensor sum_dz = statistic(input, s), sum_dz_xhat = statistic(input, s);
    Backward b =
        backward_of(dy, input, mean, rstd, weight, bias, mask, num_members, activation, sum_dz, sum_dz_xhat, true);
    const double count = training ? static_cast<double>(s.n()) : HUGE_VAL;
    auto [dx, dresidual] = input_gradients(b, input, count, residual_grad, output_gain);
    return {dx, sum_dz_xhat, sum_dz, dresidual};
  }

  static std::tuple<Tensor, Tensor> backward_reduce(const Tensor& dy, const Tensor& input, const Tensor& mean,
                                                    const Tensor& rstd, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, const Tensor& mask, int64_t num_members,
                                                    const std::string& activation) {
    const Sizes s = sizes_of(input, num_members);
    Tensor sum_dz = statistic(input, s), sum_dz_xhat = statistic(input, s);
    Backward b =
        backward_of(dy, input, mean, rstd, weight, bias, mask, num_members, activation, sum_dz, sum_dz_xhat, true);
    Device::backward(b);
    return {sum_dz, sum_dz_xhat};
  }

  static std::tuple<Tensor, Tensor> backward_apply(const Tensor& dy, const Tensor& input, const Tensor& mean,
                                                   const Tensor& rstd, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const Tensor& mask, const Tensor& sum_dz,
                                                   const Tensor& sum_dz_xhat, double count, int64_t num_members,
                                                   const std::string& activation, bool residual_grad,
                                                   const OptionalTensor& output_gain) {
    Backward b =
        backward_of(dy, input, mean, rstd, weight, bias, mask, num_members, activation, sum_dz, sum_dz_xhat, false);
    return input_gradients(b, input, count, residual_grad, output_gain);
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("ensemble_batch_norm", TORCH_BOX(&Ops::whole));
    m.impl("ensemble_batch_norm_update", TORCH_BOX(&Ops::update));
    m.impl("ensemble_batch_norm_backward", TORCH_BOX(&Ops::whole_backward));
    m.impl("ensemble_batch_norm_statistics", TORCH_BOX(&Ops::statistics));
    m.impl("ensemble_batch_norm_apply", TORCH_BOX(&Ops::apply));
    m.impl("ensemble_batch_norm_backward_reduce", TORCH_BOX(&Ops::backward_reduce));
    m.impl("ensemble_batch_norm_backward_apply", TORCH_BOX(&Ops::backward_apply));
  }
};

}  // namespace latephase::ensemble_batch_norm
