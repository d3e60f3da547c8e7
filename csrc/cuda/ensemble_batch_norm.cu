// Ensemble batch norm on CUDA: the registered ops, each by way of the on-chip tier where the groups fit, else
// streaming.
//
//   _plan.cuh       which tier, and how the groups are cut       _walk.cuh       how threads walk over the data
//   _resident.cuh   on chip: one read, one launch                _virtual.cuh    the same, over the whole device
//   _streaming.cuh  groups of any size                           _block.cuh      what a block keeps on chip
//   _formulas.cuh   the mathematics, once for all tiers
#include "../ensemble_batch_norm.h"
#include "ensemble_batch_norm_resident.cuh"
#include "ensemble_batch_norm_streaming.cuh"
#include "ensemble_batch_norm_virtual.cuh"

namespace latephase::ensemble_batch_norm {
namespace {

__global__ void __launch_bounds__(kMaxThreads, 2)
    take_statistics_kernel(const float* given_mean, const float* given_var, float eps, int64_t groups, float* mean,
                           float* var, float* rstd) {
  const int64_t i = int64_t{blockIdx.x} * kMaxThreads + threadIdx.x;
  if (i >= groups) return;
  const float m = given_mean[i], v = given_var[i];
  mean[i] = m, var[i] = v, rstd[i] = __frsqrt_rn(v + eps);
}

std::optional<Plan> plan_on(const Launcher& launch, const Sizes& s, int element_size, int operands) {
  return plan_of(s, element_size, operands,
                 device_of(launch.device_index(), resident_backward_kernel<float, Layout::kChannelsLast, Width::kWide>,
                           resident_threads(Layout::kChannelsLast)));
}

// Calls run with the width, as a constant, that accesses of so many bytes have.
template <class Run>
void with_width(int access_bytes, const Run& run) {
  access_bytes == 16 ? run(std::integral_constant<Width, Width::kWide>{})
                     : run(std::integral_constant<Width, Width::kNarrow>{});
}

// Launches a plan: the kernel of the resident tier, that of packed planes, or that of virtual clusters with memory for
// their exchange.
template <class Arguments, class Finish, class Resident, class Virtual>
void run_on_chip(const Launcher& launch, const Plan& plan, const Arguments& a, const Finish& finish, const Tensor& like,
                 const Resident& resident, const Resident& packed, const Virtual& over_device) {
  const Geometry& g = plan.geometry;
  if (!plan.grid.cooperative) {
    launch(g.layout == Layout::kPacked ? packed : resident, plan.grid, a, g, plan.slots, finish);
    return;
  }
  const Tensor memory = empty(like, {Exchange::floats(plan.clusters, g.splits, g.part_channels)}, ScalarType::Float);
  const Exchange exchange(memory.mutable_data_ptr(), plan.clusters, plan.first_late, g.splits, g.part_channels);
  launch(over_device, plan.grid, a, g, plan.slots, finish, exchange);
}

Ending ending_of(const Forward& f) {
  if (standalone(f.activation)) return Ending::kStandalone;
  if (f.activation == Activation::kNone) return Ending::kGain;
  return f.output_gain.data == nullptr ? Ending::kRelu : Ending::kReluGain;
}

Gate gate_of(const Backward& b) {
  if (standalone(b.activation)) return Gate::kStandalone;
  if (b.activation == Activation::kNone) return Gate::kOpen;
  return b.mask == nullptr ? Gate::kRelu : Gate::kMask;
}

template <class scalar_t, Layout layout>
void run_forward(const Forward& f) {
  const Sizes& s = f.sizes;
  const Launcher launch(*f.like);
  auto* mean = static_cast<float*>(f.mean);
  auto* rstd = static_cast<float*>(f.rstd);
  const ForwardArguments<scalar_t> a{static_cast<const scalar_t*>(f.x),
                                     static_cast<const scalar_t*>(f.residual),
                                     static_cast<scalar_t*>(f.y),
                                     f.mask,
                                     {mean, rstd, Parameter(f.weight), Parameter(f.bias), Parameter(f.output_gain)},
                                     ending_of(f),
                                     f.activation};
  if (f.compute_statistics) {
    const FinishStatistics finish(f);
    if (auto plan = plan_on(launch, s, sizeof(scalar_t), 1)) {
      plan->geometry.access_bytes = access_bytes(plan->geometry.row_values(), sizeof(scalar_t), {a.x, a.residual, a.y});
      with_width(plan->geometry.access_bytes, [&](auto width) {
        constexpr Width kWidth = decltype(width)::value;
        run_on_chip(launch, *plan, a, finish, *f.like, resident_forward_kernel<scalar_t, layout, kWidth>,
                    resident_forward_kernel<scalar_t, Layout::kPacked, kWidth>,
                    virtual_forward_kernel<scalar_t, layout, kWidth>);
      });
      return;
    }
    stream_statistics<scalar_t, layout>(launch, s, a.x, finish, *f.like);
  }
  if (a.y != nullptr && s.numel() > 0) stream_apply<scalar_t, layout>(launch, s, a);
}

template <class scalar_t, Layout layout>
void run_backward(const Backward& b) {
  const Sizes& s = b.sizes;
  const Launcher launch(*b.like);
  auto* rstd = static_cast<const float*>(b.rstd);
  auto* sum_dz = static_cast<float*>(b.sum_dz);
  auto* sum_dz_xhat = static_cast<float*>(b.sum_dz_xhat);
  const BackwardArguments<scalar_t> a{
      static_cast<const scalar_t*>(b.dy),
      static_cast<const scalar_t*>(b.x),
      b.mask,
      static_cast<scalar_t*>(b.dx),
      static_cast<scalar_t*>(b.dresidual),
      {static_cast<const float*>(b.mean), rstd, Parameter(b.weight), Parameter(b.bias), Parameter(b.output_gain)},
      sum_dz,
      sum_dz_xhat,
      static_cast<float>(1 / b.count),
      std::isinf(b.count),
      gate_of(b),
      b.activation};
  if (b.compute_sums) {
    const FinishSums finish{sum_dz, sum_dz_xhat, rstd};
    if (auto plan = plan_on(launch, s, sizeof(scalar_t), 2)) {
      plan->geometry.access_bytes =
          access_bytes(plan->geometry.row_values(), sizeof(scalar_t), {a.dy, a.x, a.dx, a.dresidual});
      with_width(plan->geometry.access_bytes, [&](auto width) {
        constexpr Width kWidth = decltype(width)::value;
        run_on_chip(launch, *plan, a, finish, *b.like, resident_backward_kernel<scalar_t, layout, kWidth>,
                    resident_backward_kernel<scalar_t, Layout::kPacked, kWidth>,
                    virtual_backward_kernel<scalar_t, layout, kWidth>);
      });
      return;
    }
    stream_backward_reduce<scalar_t, layout>(launch, s, a, finish, *b.like);
  }
  if (a.dx != nullptr && s.numel() > 0) stream_backward_apply<scalar_t, layout>(launch, s, a);
}

struct Cuda {
  static void forward(const Forward& f) {
    if (f.sizes.K * f.sizes.C == 0) return;
    with_type(kOp, f.dtype, [&](auto type) {
      f.sizes.channels_last ? run_forward<decltype(type), Layout::kChannelsLast>(f)
                            : run_forward<decltype(type), Layout::kContiguous>(f);
    });
  }

  static void backward(const Backward& b) {
    if (b.sizes.K * b.sizes.C == 0) return;
    with_type(kOp, b.dtype, [&](auto type) {
      b.sizes.channels_last ? run_backward<decltype(type), Layout::kChannelsLast>(b)
                            : run_backward<decltype(type), Layout::kContiguous>(b);
    });
  }

  static void take_statistics(const Sizes& s, const Tensor& input, const Tensor& given_mean, const Tensor& given_var,
                              double eps, const Tensor& mean, const Tensor& var, const Tensor& rstd) {
    const int64_t groups = s.K * s.C;
    if (groups == 0) return;
    const Launcher launch(input);
    const auto to = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
    const auto from = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
    launch(take_statistics_kernel, {divide_up(groups, kMaxThreads), kMaxThreads}, from(given_mean), from(given_var),
           static_cast<float>(eps), groups, to(mean), to(var), to(rstd));
  }
};

}  // namespace
}  // namespace latephase::ensemble_batch_norm

STABLE_TORCH_LIBRARY_IMPL(latephase_kernels, CUDA, m) {
  latephase::ensemble_batch_norm::Ops<latephase::ensemble_batch_norm::Cuda>::implement(m);
}

// The plan of a call as numbers, for whoever wants to know it without a GPU: 0 where it streams, else 1.
// sizes: K, B, C, S, channels_last. device: as Device. plan: blocks, threads, shared bytes, cluster, cooperative,
// splits, lanes, threads of a part, slots, whether planes are packed.
extern "C" __attribute__((visibility("default"))) int latephase_ensemble_batch_norm_plan(const int64_t* sizes,
                                                                                         int element_size, int operands,
                                                                                         const int64_t* device,
                                                                                         int64_t* plan) {
  using namespace latephase;
  const Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4] != 0};
  const Device d{device[0], device[1], device[2], static_cast<int>(device[3]), static_cast<int>(device[4])};
  const auto found = ensemble_batch_norm::plan_of(s, element_size, operands, d);
  if (!found) return 0;
  const Grid& grid = found->grid;
  const ensemble_batch_norm::Geometry& g = found->geometry;
  const int64_t numbers[] = {grid.blocks,       grid.threads,
                             grid.shared_bytes, grid.cluster,
                             grid.cooperative,  int64_t{g.splits},
                             g.lanes,           g.threads,
                             found->slots,      g.layout == ensemble_batch_norm::Layout::kPacked};
  std::copy(std::begin(numbers), std::end(numbers), plan);
  return 1;
}
