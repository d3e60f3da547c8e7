// The time loop of rank1_lstm: argument checks, and a product and one pointwise step of a device for each time step.
#pragma once

#include "checks.h"
#include "rank1_lstm_arguments.h"
#include "stable.h"

namespace latephase::rank1_lstm {

constexpr const char* kOp = "rank1_lstm";

// out = a · b.
inline void multiply(const Tensor& a, const Tensor& b, Tensor& out) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // out once more: takes the reference
}

inline Tensor as_type(const Tensor& t, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(t, dtype));
}

inline Sizes sizes_of(const Tensor& gates, const Tensor& c0, const Tensor& weight, const Tensor& input_gain,
                      const Tensor& output_gain) {
  STD_TORCH_CHECK(gates.dim() == 4 && gates.is_contiguous() && gates.size(3) % 4 == 0, kOp,
                  ": gates must be contiguous, [K, T, B, 4H]");
  const Sizes s{gates.size(0), gates.size(1), gates.size(2), gates.size(3) / 4};
  const auto check = [&](const char* name, const Tensor& t, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, kOp, ": ", name, " must be [", rows,
                    ", ", columns, "]");
  };
  check_devices(kOp, gates, {&c0, &weight, &input_gain, &output_gain});
  check("c0", c0, s.rows(), s.H);
  check("weight", weight, 4 * s.H, s.H);
  check("input_gain", input_gain, s.K, s.H);
  check("output_gain", output_gain, s.K, 4 * s.H);
  STD_TORCH_CHECK(s.T >= 1, kOp, ": gates must have at least one step");
  return s;
}

inline void check_state(const char* name, const Tensor& t, const Sizes& s) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == s.rows() && t.size(1) == s.H, kOp, ": ", name, " must be [K·B, H]");
}

inline void check_sequence(const char* name, const Tensor& t, const Sizes& s, ScalarType dtype, const char* type) {
  const bool fits = t.dim() == 3 && t.size(0) == s.T && t.size(1) == s.rows() && t.size(2) == s.H;
  STD_TORCH_CHECK(fits && t.scalar_type() == dtype, kOp, ": ", name, " must be [T, K·B, H] of ", type);
}

// What both directions have: arguments in the kernels' types, what the products take and give, and a step of all that.
struct Loop {
  const Sizes sizes;
  const ScalarType dtype, sum;
  Tensor input_gain, output_gain, c0, scaled, product;
  Step step;

  // scaled and product have as many times H columns.
  Loop(const Tensor& gates, const Tensor& c0, const Tensor& weight, const Tensor& input_gain, const Tensor& output_gain,
       int64_t scaled_units, int64_t product_units)
      : sizes(sizes_of(gates, c0, weight, input_gain, output_gain)),
        dtype(gates.scalar_type()),
        sum(accumulation_type(dtype)),
        input_gain(as_type(input_gain, sum)),
        output_gain(as_type(output_gain, sum)),
        c0(as_type(c0, sum)),
        scaled(empty(gates, {sizes.rows(), scaled_units * sizes.H}, dtype)),
        product(empty(gates, {sizes.rows(), product_units * sizes.H}, dtype)),
        step{sizes,
             data_type(kOp, dtype),
             &gates,
             this->input_gain.const_data_ptr(),
             this->output_gain.const_data_ptr(),
             this->c0.const_data_ptr(),
             product.const_data_ptr(),
             scaled.mutable_data_ptr()} {}

  bool is_empty() const { return sizes.rows() * sizes.H == 0; }
  // out = x ∘ input_gain.
  Scale scale(const Tensor& x, Tensor& out) const {
    return {sizes, step.dtype, x.const_data_ptr(), step.input_gain, out.mutable_data_ptr(), step.like};
  }
};

// The ops for one device; Device has static scale(const Scale&), forward(const Step&) and backward(const Step&).
// Everything is put on the current stream, nothing waits: a loop can be captured in a graph.
template <class Device>
struct Ops {
  static std::tuple<Tensor, Tensor> steps(const Tensor& gates, const Tensor& h0, const Tensor& c0, const Tensor& weight,
                                          const Tensor& input_gain, const Tensor& output_gain) {
    Loop loop(gates, c0, weight, input_gain, output_gain, 1, 4);
    const Sizes& s = loop.sizes;
    check_devices(kOp, gates, {&h0});
    check_state("h0", h0, s);
    Tensor output = empty(gates, {s.T, s.rows(), s.H}, loop.dtype),
           cells = empty(gates, {s.T, s.rows(), s.H}, loop.sum);
    if (loop.is_empty()) return {output, cells};
    const Tensor h = as_type(h0, loop.dtype);
    const Tensor weight_t = torch::stable::transpose(torch::stable::to(weight, loop.dtype), 0, 1);
    Step& step = loop.step;
    step.gates = gates.mutable_data_ptr();
    step.cells = cells.mutable_data_ptr();
    step.output = output.mutable_data_ptr();
    Device::scale(loop.scale(h, loop.scaled));
    for (step.t = 0; step.t < s.T; ++step.t) {
      multiply(loop.scaled, weight_t, loop.product);
      Device::forward(step);
    }
    return {output, cells};
  }

  static std::tuple<Tensor, Tensor, Tensor> steps_backward(const Tensor& gates, const Tensor& cells,
                                                           const OptionalTensor& dy, const OptionalTensor& dc_n,
                                                           const Tensor& c0, const Tensor& weight,
                                                           const Tensor& input_gain, const Tensor& output_gain) {
    Loop loop(gates, c0, weight, input_gain, output_gain, 4, 1);
    const Sizes& s = loop.sizes;
    check_devices(kOp, gates, {&cells, given(dy), given(dc_n)});
    check_sequence("cells", cells, s, loop.sum, "the accumulation type");
    STD_TORCH_CHECK(cells.is_contiguous(), kOp, ": cells must be contiguous");
    if (dy.has_value()) check_sequence("dy", *dy, s, loop.dtype, "gates' type");
    if (dc_n.has_value()) check_state("dc_n", *dc_n, s);
    Tensor dgates = empty(gates, {s.K, s.T, s.B, 4 * s.H}, loop.dtype);
    Tensor dh0 = empty(gates, {s.rows(), s.H}, loop.dtype), dc = empty(gates, {s.rows(), s.H}, loop.sum);
    if (loop.is_empty()) return {dgates, dh0, dc};
    const Tensor own_weight = torch::stable::to(weight, loop.dtype);
    const OptionalTensor own_dy = dy.has_value() ? OptionalTensor(torch::stable::contiguous(*dy)) : std::nullopt;
    const OptionalTensor own_dc_n = dc_n.has_value() ? OptionalTensor(as_type(*dc_n, loop.sum)) : std::nullopt;
    Step& step = loop.step;
    step.gates = const_cast<void*>(gates.const_data_ptr());
    step.cells = const_cast<void*>(cells.const_data_ptr());
    step.dy = own_dy.has_value() ? own_dy->const_data_ptr() : nullptr;
    step.dc_n = own_dc_n.has_value() ? own_dc_n->const_data_ptr() : nullptr;
    step.dc = dc.mutable_data_ptr();
    step.dgates = dgates.mutable_data_ptr();
    for (step.t = s.T - 1; step.t >= 0; --step.t) {
      Device::backward(step);
      multiply(loop.scaled, own_weight, loop.product);
    }
    Device::scale(loop.scale(loop.product, dh0));
    return {dgates, dh0, dc};
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("rank1_lstm_steps", TORCH_BOX(&Ops::steps));
    m.impl("rank1_lstm_steps_backward", TORCH_BOX(&Ops::steps_backward));
  }
};

}  // namespace latephase::rank1_lstm
