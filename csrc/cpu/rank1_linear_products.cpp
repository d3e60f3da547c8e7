// The products of rank1_linear with the gains inside, on the CPU: checks, picks the kernels of the best instruction set
// this processor has, and registers them.
#include "rank1_linear_products.h"

#include <vector>

#include "../checks.h"
#include "instruction_set.h"
#include "torch_parallel.h"

namespace latephase {

#define LATEPHASE_DECLARE(isa)                                                \
  namespace isa {                                                             \
  void product(const rank1_linear::Product&, const Parallel&);                \
  void gradients(const rank1_linear::Gradients&, const Parallel&);            \
  void weight_gradient(const rank1_linear::WeightGradient&, const Parallel&); \
  }
LATEPHASE_FOR_EACH_ISA(LATEPHASE_DECLARE)

namespace rank1_linear {
namespace {

constexpr const char* kOp = "rank1_linear";

// The data of a contiguous matrix of x's type.
const void* matrix(const char* name, const Tensor& t, const Tensor& x, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous(), kOp, ": ", name,
                  " must be contiguous, [", rows, ", ", columns, "]");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), kOp, ": ", name, " must have input's type");
  return t.const_data_ptr();
}

// Rows of [K·B, …, columns].
int64_t count_rows(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

// The data of a contiguous [K·B, …, columns] that has x's type and as many rows as x.
const void* rows_data(const char* name, const Tensor& t, const Tensor& x, int64_t columns) {
  STD_TORCH_CHECK(t.dim() >= 2 && count_rows(t) == count_rows(x) && t.size(t.dim() - 1) == columns && t.is_contiguous(),
                  kOp, ": ", name, " must be contiguous, [", x.size(0), ", …, ", columns, "]");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), kOp, ": ", name, " must have input's type");
  return t.const_data_ptr();
}

// Rows a member of x [K·B, …, in].
int64_t rows_of(const Tensor& x, const Tensor& gain) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, kOp,
                  ": input must be float32 or float64");
  STD_TORCH_CHECK(x.dim() >= 2 && gain.dim() == 2 && gain.size(0) > 0 && x.size(0) % gain.size(0) == 0, kOp,
                  ": input must be [K·B, …, in], its gain [K, in]");
  return count_rows(x) / gain.size(0);
}

// A new [K·B, …, columns] for x [K·B, …, *].
Tensor empty_rows(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes(x.sizes().data(), x.sizes().data() + x.dim()), strides(x.dim());
  sizes.back() = columns;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes[d])) strides[d] = stride;
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty_strided(x, x.dim(), sizes.data(), strides.data(), dtype);
}

// The bias's gradient of its sums [K, out] over each member's rows: of one bias for all their sum [out], else as it is.
Tensor bias_gradient(const Tensor& sums, bool shared) {
  if (!shared) return sums;
  const int64_t K = sums.size(0), out = sums.size(1);
  Tensor dbias = empty(sums, {out}, sums.scalar_type());
  const auto add = [&](auto type) {
    using A = decltype(type);
    const A* from = static_cast<const A*>(sums.const_data_ptr());
    std::vector<double> total(out);
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < out; ++j) total[j] += from[k * out + j];
    std::copy(total.begin(), total.end(), static_cast<A*>(dbias.mutable_data_ptr()));
  };
  sums.scalar_type() == ScalarType::Double ? add(double{}) : add(float{});
  return dbias;
}

// What errors call the arguments of a product.
struct Names {
  const char *x, *x_gain, *y_gain;
};

// A product that has its arguments checked, but for its outputs.
Product product_of(const Names& names, const Tensor& x, const Tensor& weight, bool transposed, const Tensor& x_gain,
                   const Tensor& y_gain) {
  const int64_t rows = rows_of(x, x_gain), K = x_gain.size(0), depth = x.size(x.dim() - 1);
  STD_TORCH_CHECK(weight.dim() == 2, kOp, ": weight must have two dimensions");
  const int64_t columns = weight.size(transposed ? 0 : 1);
  Product call{};
  call.K = K, call.rows = rows, call.depth = depth, call.columns = columns, call.transposed = transposed;
  call.dtype = data_type(kOp, x.scalar_type());
  call.x = rows_data(names.x, x, x, depth);
  call.weight = matrix("weight", weight, x, transposed ? columns : depth, transposed ? depth : columns);
  call.x_gain = matrix(names.x_gain, x_gain, x, K, depth);
  call.y_gain = matrix(names.y_gain, y_gain, x, K, columns);
  return call;
}

std::tuple<Tensor, Tensor> product(const Tensor& x, const Tensor& weight, bool transposed, const Tensor& x_gain,
                                   const Tensor& y_gain, const OptionalTensor& bias, bool keep) {
  Product call = product_of({"input", "input's gain", "output's gain"}, x, weight, transposed, x_gain, y_gain);
  if (bias.has_value() && bias->dim() == 1) {
    STD_TORCH_CHECK(bias->size(0) == call.columns && bias->is_contiguous() && bias->scalar_type() == x.scalar_type(),
                    kOp, ": bias must be contiguous, [", call.columns, "], input's type");
    call.bias = bias->const_data_ptr();
  } else if (bias.has_value()) {
    call.bias = matrix("bias", *bias, x, call.K, call.columns);
    call.bias_stride = call.columns;
  }
  Tensor y = empty_rows(x, call.columns);
  Tensor product = keep ? empty_as(y) : empty(x, {0}, x.scalar_type());
  call.y = y.mutable_data_ptr();
  if (keep) call.product = product.mutable_data_ptr();
  LATEPHASE_KERNEL(product)(call, torch_parallel());
  return {y, product};
}

// dx like x, ds [K, in], dr [K, out] and dbias.
std::tuple<Tensor, Tensor, Tensor, Tensor> product_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                            const Tensor& input_gain, const Tensor& output_gain,
                                                            const Tensor& product, bool shared_bias) {
  Product call =
      product_of({"output's gradient", "output_gain", "input_gain"}, dy, weight, false, output_gain, input_gain);
  call.x_factor = rows_data("product", product, dy, call.depth);
  call.y_factor = rows_data("input", x, dy, call.columns);
  Tensor dx = empty_rows(x, call.columns), ds = empty_as(input_gain), dr = empty_as(output_gain),
         dbias = empty_as(output_gain);
  call.y = dx.mutable_data_ptr();
  call.y_factor_sums = ds.mutable_data_ptr();
  call.x_factor_sums = dr.mutable_data_ptr();
  call.x_sums = dbias.mutable_data_ptr();
  LATEPHASE_KERNEL(product)(call, torch_parallel());
  return {dx, ds, dr, bias_gradient(dbias, shared_bias)};
}

// What both gradients of the weight have, but for the output.
WeightGradient weight_gradient_of(const Tensor& dy, const Tensor& x, const Tensor& input_gain,
                                  const Tensor& output_gain) {
  STD_TORCH_CHECK(output_gain.dim() == 2, kOp, ": output_gain must have two dimensions");
  WeightGradient call{};
  call.rows = rows_of(x, input_gain), call.K = input_gain.size(0);
  call.in = x.size(x.dim() - 1), call.out = output_gain.size(1);
  call.dtype = data_type(kOp, x.scalar_type());
  call.dy = rows_data("output's gradient", dy, x, call.out);
  call.x = rows_data("input", x, x, call.in);
  call.s = matrix("input_gain", input_gain, x, call.K, call.in);
  call.r = matrix("output_gain", output_gain, x, call.K, call.out);
  return call;
}

Tensor weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& input_gain, const Tensor& output_gain) {
  WeightGradient call = weight_gradient_of(dy, x, input_gain, output_gain);
  Tensor dweight = empty(x, {call.out, call.in}, x.scalar_type());
  call.dweight = dweight.mutable_data_ptr();
  LATEPHASE_KERNEL(weight_gradient)(call, torch_parallel());
  return dweight;
}

// dweight, ds [K, in], dr [K, out] and dbias.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                     const Tensor& input_gain, const Tensor& output_gain,
                                                     bool shared_bias) {
  Gradients call{weight_gradient_of(dy, x, input_gain, output_gain)};
  call.weight = matrix("weight", weight, x, call.out, call.in);
  Tensor dweight = empty(x, {call.out, call.in}, x.scalar_type()), ds = empty_as(input_gain),
         dr = empty_as(output_gain), dbias = empty_as(output_gain);
  call.dweight = dweight.mutable_data_ptr();
  call.ds = ds.mutable_data_ptr();
  call.dr = dr.mutable_data_ptr();
  call.dbias = dbias.mutable_data_ptr();
  LATEPHASE_KERNEL(gradients)(call, torch_parallel());
  return {dweight, ds, dr, bias_gradient(dbias, shared_bias)};
}

}  // namespace
}  // namespace rank1_linear
}  // namespace latephase

STABLE_TORCH_LIBRARY_IMPL(latephase_kernels, CPU, m) {
  m.impl("rank1_product", TORCH_BOX(&latephase::rank1_linear::product));
  m.impl("rank1_product_backward", TORCH_BOX(&latephase::rank1_linear::product_backward));
  m.impl("rank1_weight_gradient", TORCH_BOX(&latephase::rank1_linear::weight_gradient));
  m.impl("rank1_gradients", TORCH_BOX(&latephase::rank1_linear::gradients));
}
