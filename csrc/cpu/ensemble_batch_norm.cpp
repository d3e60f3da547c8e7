// Ensemble batch norm on the CPU: picks the kernels of the best instruction set this processor has, and registers them.
#include "../ensemble_batch_norm.h"

#include <vector>

#include "../lerp.h"
#include "instruction_set.h"
#include "torch_parallel.h"

namespace latephase {

#define LATEPHASE_DECLARE(isa)                                          \
  namespace isa {                                                       \
  void forward(const ensemble_batch_norm::Forward&, const Parallel&);   \
  void backward(const ensemble_batch_norm::Backward&, const Parallel&); \
  }
LATEPHASE_FOR_EACH_ISA(LATEPHASE_DECLARE)

namespace ensemble_batch_norm {
namespace {

template <class Arguments, class Kernel>
void run(const Arguments& arguments, const Kernel& kernel) {
  if (arguments.sizes.numel() != 0) kernel(arguments, torch_parallel());
}

template <class A>
void fill(void* data, int64_t count, A value) {
  std::fill_n(static_cast<A*>(data), data ? count : 0, value);
}

// The sums and statistics of nothing: what a kernel that never runs would leave unwritten.
void fill_empty(const Sizes& s, DataType dtype, std::initializer_list<void*> statistics) {
  if (s.numel() != 0) return;
  for (void* data : statistics)
    dtype == DataType::Double ? fill<double>(data, s.K * s.C, 0) : fill<float>(data, s.K * s.C, 0);
}

template <class A>
void move(void* running, const void* to, int64_t count, A weight, A scale) {
  A* moved = static_cast<A*>(running);
  const A* end = static_cast<const A*>(to);
  for (int64_t i = 0; i < count; ++i) moved[i] = latephase::lerp(moved[i], end[i] * scale, weight);
}

template <class A>
void move_running(const Forward& f) {
  const Running& running = f.running;
  const int64_t groups = f.sizes.K * f.sizes.C;
  move<A>(running.mean, f.mean, groups, static_cast<A>(running.momentum), 1);
  move<A>(running.var, f.var, groups, static_cast<A>(running.momentum), static_cast<A>(running.unbias));
  for (int64_t k = 0; running.batches != nullptr && k < f.sizes.K; ++k) ++running.batches[k];
}

struct Cpu {
  static void forward(const Forward& call) {
    Forward f = call;
    std::vector<double> var;  // of values of the statistics' type
    if (f.running.mean != nullptr && f.var == nullptr) {
      var.resize(f.sizes.K * f.sizes.C);
      f.var = var.data();
    }
    if (f.compute_statistics) fill_empty(f.sizes, f.dtype, {f.mean, f.rstd, f.var});
    run(f, LATEPHASE_KERNEL(forward));
    if (f.running.mean != nullptr) f.dtype == DataType::Double ? move_running<double>(f) : move_running<float>(f);
  }
  static void backward(const Backward& b) {
    if (b.compute_sums) fill_empty(b.sizes, b.dtype, {b.sum_dz, b.sum_dz_xhat});
    run(b, LATEPHASE_KERNEL(backward));
  }
  template <class A>
  static void take(const Tensor& given_mean, const Tensor& given_var, double eps, const Tensor& mean, const Tensor& var,
                   const Tensor& rstd) {
    const A* from_mean = static_cast<const A*>(given_mean.const_data_ptr());
    const A* from_var = static_cast<const A*>(given_var.const_data_ptr());
    A *to_mean = static_cast<A*>(mean.mutable_data_ptr()), *to_var = static_cast<A*>(var.mutable_data_ptr()),
      *to_rstd = static_cast<A*>(rstd.mutable_data_ptr());
    for (int64_t i = 0; i < var.numel(); ++i) {
      to_mean[i] = from_mean[i], to_var[i] = from_var[i];
      to_rstd[i] = static_cast<A>(1 / std::sqrt(static_cast<double>(from_var[i]) + eps));
    }
  }
  static void take_statistics(const Sizes&, const Tensor& input, const Tensor& given_mean, const Tensor& given_var,
                              double eps, const Tensor& mean, const Tensor& var, const Tensor& rstd) {
    input.scalar_type() == ScalarType::Double ? take<double>(given_mean, given_var, eps, mean, var, rstd)
                                              : take<float>(given_mean, given_var, eps, mean, var, rstd);
  }
};

// Of input · input_gain, in training. Returns y, mean and variance of input, rstd, which holds the gain, and the mask.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> with_gain(const Tensor& input, const Tensor& input_gain,
                                                             const OptionalTensor& weight, const OptionalTensor& bias,
                                                             const OptionalTensor& residual, double eps,
                                                             int64_t num_members, const std::string& activation,
                                                             const OptionalTensor& output_gain) {
  const Sizes s = sizes_of(input, num_members);
  Tensor mean = Ops<Cpu>::statistic(input, s), var = Ops<Cpu>::statistic(input, s),
         rstd = Ops<Cpu>::statistic(input, s);
  Forward f = Ops<Cpu>::forward_of(input, s, true, mean);
  f.eps = eps;
  f.var = var.mutable_data_ptr();
  f.rstd = rstd.mutable_data_ptr();
  f.input_gain = affine(kOp, "input_gain", input_gain, input, s);
  auto [y, mask] = Ops<Cpu>::normalize(f, input, weight, bias, residual, activation, output_gain);
  return {y, mean, var, rstd, mask};
}

}  // namespace
}  // namespace ensemble_batch_norm
}  // namespace latephase

STABLE_TORCH_LIBRARY_IMPL(latephase_kernels, CPU, m) {
  latephase::ensemble_batch_norm::Ops<latephase::ensemble_batch_norm::Cpu>::implement(m);
  m.impl("ensemble_batch_norm_with_gain", TORCH_BOX(&latephase::ensemble_batch_norm::with_gain));
}
