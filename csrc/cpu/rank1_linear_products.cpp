// The products of rank1_linear with the gains inside, on the CPU: checks, picks the kernels of the best instruction set
// this processor has, and registers them.
#include "rank1_linear_products.h"

#include "../checks.h"
#include "instruction_set.h"
#include "torch_parallel.h"

namespace latephase {

#define LATEPHASE_DECLARE(isa)                                     \
  namespace isa {                                                  \
  void product(const rank1_linear::Product&, const Parallel&);     \
  void gradients(const rank1_linear::Gradients&, const Parallel&); \
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

// Rows a member of x [K·rows, *].
int64_t rows_of(const Tensor& x, const Tensor& gain) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, kOp,
                  ": input must be float32 or float64");
  STD_TORCH_CHECK(x.dim() == 2 && gain.dim() == 2 && gain.size(0) > 0 && x.size(0) % gain.size(0) == 0, kOp,
                  ": input must be [K·rows, in], its gain [K, in]");
  return x.size(0) / gain.size(0);
}

Tensor product(const Tensor& x, const Tensor& weight, bool transposed, const Tensor& x_gain, const Tensor& y_gain,
               const OptionalTensor& bias) {
  const int64_t rows = rows_of(x, x_gain), K = x_gain.size(0), depth = x.size(1);
  STD_TORCH_CHECK(weight.dim() == 2, kOp, ": weight must have two dimensions");
  const int64_t columns = weight.size(transposed ? 0 : 1);
  Tensor y = empty(x, {x.size(0), columns}, x.scalar_type());
  const void* bias_data = nullptr;
  if (bias.has_value() && bias->dim() == 1) {
    STD_TORCH_CHECK(bias->size(0) == columns && bias->is_contiguous() && bias->scalar_type() == x.scalar_type(), kOp,
                    ": bias must be contiguous, [", columns, "], input's type");
    bias_data = bias->const_data_ptr();
  } else if (bias.has_value()) {
    bias_data = matrix("bias", *bias, x, K, columns);
  }
  const Product call{K,
                     rows,
                     depth,
                     columns,
                     data_type(kOp, x.scalar_type()),
                     transposed,
                     matrix("input", x, x, K * rows, depth),
                     matrix("weight", weight, x, transposed ? columns : depth, transposed ? depth : columns),
                     matrix("input's gain", x_gain, x, K, depth),
                     matrix("output's gain", y_gain, x, K, columns),
                     bias_data,
                     bias.has_value() && bias->dim() == 2 ? columns : 0,
                     y.mutable_data_ptr()};
  LATEPHASE_KERNEL(product)(call, torch_parallel());
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                     const Tensor& input_gain, const Tensor& output_gain) {
  const int64_t rows = rows_of(x, input_gain), K = input_gain.size(0), in = x.size(1), out = output_gain.size(1);
  Tensor dweight = empty(x, {out, in}, x.scalar_type()), ds = empty(x, {K, in}, x.scalar_type()),
         dr = empty(x, {K, out}, x.scalar_type()), dbias = empty(x, {K, out}, x.scalar_type());
  const Gradients call{K,
                       rows,
                       in,
                       out,
                       data_type(kOp, x.scalar_type()),
                       matrix("output's gradient", dy, x, K * rows, out),
                       matrix("input", x, x, K * rows, in),
                       matrix("weight", weight, x, out, in),
                       matrix("input_gain", input_gain, x, K, in),
                       matrix("output_gain", output_gain, x, K, out),
                       dweight.mutable_data_ptr(),
                       ds.mutable_data_ptr(),
                       dr.mutable_data_ptr(),
                       dbias.mutable_data_ptr()};
  LATEPHASE_KERNEL(gradients)(call, torch_parallel());
  return {dweight, ds, dr, dbias};
}

}  // namespace
}  // namespace rank1_linear
}  // namespace latephase

STABLE_TORCH_LIBRARY_IMPL(latephase_kernels, CPU, m) {
  m.impl("rank1_product", TORCH_BOX(&latephase::rank1_linear::product));
  m.impl("rank1_gradients", TORCH_BOX(&latephase::rank1_linear::gradients));
}
