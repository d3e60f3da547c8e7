// Member gain on CUDA: each pass reads its operands from memory once. Backward, a block adds up its part of dgain and
// dbias while it writes dx; parts of the same channel are merged in their order by a second, small kernel.
#include "../member_gain.h"
#include "affine.cuh"
#include "launch.cuh"
#include "member_gain_walk.cuh"
#include "reduce.cuh"
#include "unit.cuh"

namespace latephase::member_gain {
namespace {

template <class scalar_t>
struct Arguments {
  const scalar_t* x;
  Parameter gain, bias;
  bool relu;
  scalar_t* y;         // forward
  const scalar_t* dy;  // backward
  scalar_t* dx;
};

// The gain and bias of each value of a thread's units: all of one channel, or each of its own.
template <class scalar_t, bool long_runs>
struct Formula {
  static constexpr int kCount = long_runs ? 1 : kUnit;
  float gain[kCount], bias[kCount];
  bool relu;

  __device__ Formula(const Arguments<scalar_t>& a, const Walk& w, const Part& part, const Cursor<long_runs>& cursor)
      : relu(a.relu) {
    const int64_t column = long_runs ? part.part * w.S : Cursor<long_runs>::first_column(w, part);
    if constexpr (!long_runs) {
      if (w.S == 1) {
        const Adjacent channels{column, cursor.live_columns};
        a.gain.template read<scalar_t>(gain, part.member, channels, 1);
        a.bias.template read<scalar_t>(bias, part.member, channels, -0.0f);
        return;
      }
    }
    int64_t channel = column / w.S, next_run = (channel + 1) * w.S - column;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      gain[j] = bias[j] = 0;
      if (!long_runs && j >= cursor.live_columns) continue;
      if (j == next_run) ++channel, next_run += w.S;
      gain[j] = a.gain.template at<scalar_t>(part.member, channel, 1);
      bias[j] = a.bias.template at<scalar_t>(part.member, channel, -0.0f);  // x · gain − 0 is x · gain
    }
  }

  // j counts the values of a unit.
  __device__ __forceinline__ float output(float x, int j) const {
    return __fmaf_rn(x, gain[long_runs ? 0 : j], bias[long_runs ? 0 : j]);
  }
  __device__ __forceinline__ bool passes(float z) const {
    return !relu || relu_passes(z, Packing<scalar_t>::kRoundsToZero);
  }
  __device__ __forceinline__ float scaled(float dz, int j) const { return __fmul_rn(dz, gain[long_runs ? 0 : j]); }
};

template <class scalar_t, bool long_runs>
__global__ void __launch_bounds__(kMaxThreads, 2) gain_kernel(Arguments<scalar_t> a, Walk w) {
  const Part part(w);
  Cursor<long_runs> cursor(w, part);
  const Formula<scalar_t, long_runs> formula(a, w, part, cursor);
  constexpr int tile = 2 * kTile<scalar_t>;
  while (cursor.more()) {
    Unit<scalar_t> x[tile];
    load_tile(x, a.x, w, cursor);
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      float y[kUnit];
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const float z = formula.output(x[i].get(j), j);
        y[j] = formula.passes(z) ? z : 0;
      }
      store_unit(Unit<scalar_t>::of(y), a.y, w, cursor);
      cursor.advance(w);
    }
  }
}

// ---------------------------------------------------------------------------------------------- backward

// dgain and dbias [K, C]. Sums are of dz and of dz · x.
struct Finish {
  float* dgain;
  float* dbias;

  __device__ void operator()(int64_t group, const Sums<1>& sums) const {
    dbias[group] = sums.first[0];
    dgain[group] = sums.second[0];
  }
};

// Where the parts of a channel's sums go: `each` of them a group, [K·C, each]; one is final.
struct Destination {
  Sums<1>* partials;
  int64_t each;
  Finish finish;

  __device__ void put(int64_t group, int64_t i, const Sums<1>& sums) const {
    if (each == 1) {
      finish(group, sums);
    } else {
      partials[group * each + i] = sums;
    }
  }
};

// The end of a backward block that has one channel.
__device__ void conclude(const Sums<1>& mine, const Walk& w, const Part& part, const Destination& to) {
  const Sums<1> total = block_reduce<Sums<1>, 1>(mine, 1);
  if (threadIdx.x == 0) to.put(part.member * w.C + part.part, part.split, total);
}

// The end of a backward block that has columns side by side: sums of columns become sums of channels. A channel may
// lie in several such blocks; its `run_blocks` places are counted from the first of them.
__device__ void conclude(const Sums<kUnit>& mine, const Walk& w, const Part& part, const Destination& to) {
  __shared__ float first[kColumnPlaces], second[kColumnPlaces];
  const Sums<kUnit> merged = block_reduce<Sums<kUnit>, kWarp, kShortRunThreads>(mine, w.lanes);
  if (threadIdx.x < w.lanes) {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      first[place_of_column(threadIdx.x, j)] = merged.first[j];
      second[place_of_column(threadIdx.x, j)] = merged.second[j];
    }
  }
  __syncthreads();
  const int64_t width = w.lanes * kUnit, begin = part.part * width, end = min(begin + width, w.row_stride);
  const int64_t run_blocks = to.each / w.splits, last_channel = (end - 1) / w.S;
  int group = 1;  // threads that add up a channel
  while (group < kWarp && group < w.S) group *= 2;
  for (int64_t base = begin / w.S; base <= last_channel; base += blockDim.x / group) {
    const int64_t channel = base + threadIdx.x / group;
    auto sums = Sums<1>::zero();
    if (channel <= last_channel) {
      const int64_t run_end = min((channel + 1) * w.S, end);
      for (int64_t column = max(channel * w.S, begin) + threadIdx.x % group; column < run_end; column += group) {
        const int in_block = static_cast<int>(column - begin);
        const int place = place_of_column(in_block / kUnit, in_block % kUnit);
        sums.merge({{first[place]}, {second[place]}});
      }
    }
    for (int offset = group / 2; offset > 0; offset /= 2) sums.merge(sums.shuffled_down(offset));
    if (threadIdx.x % group != 0 || channel > last_channel) continue;
    int64_t place = part.part - channel * w.S / width;
    const bool run_ends = (channel + 1) * w.S <= end;
    to.put(part.member * w.C + channel, part.split * run_blocks + place, sums);
    while (run_ends && ++place < run_blocks) {
      to.put(part.member * w.C + channel, part.split * run_blocks + place, Sums<1>::zero());
    }
  }
}

template <class scalar_t, bool long_runs>
__global__ void __launch_bounds__(kMaxThreads, 2) gain_backward_kernel(Arguments<scalar_t> a, Walk w, Destination to) {
  const Part part(w);
  Cursor<long_runs> cursor(w, part);
  const Formula<scalar_t, long_runs> formula(a, w, part, cursor);
  constexpr int tile = kTile<scalar_t>;
  auto sums = Sums<Formula<scalar_t, long_runs>::kCount>::zero();
  while (cursor.more()) {
    Unit<scalar_t> dy[tile], x[tile];
    load_tile(dy, a.dy, w, cursor);
    load_tile(x, a.x, w, cursor);
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      float dx[kUnit];
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const int c = long_runs ? 0 : j;
        const float value = x[i].get(j);  // 0, and dy as well, where there is none
        const float dz = formula.passes(formula.output(value, j)) ? dy[i].get(j) : 0;
        dx[j] = formula.scaled(dz, j);
        sums.first[c] += dz;
        sums.second[c] = fmaf(dz, value, sums.second[c]);
      }
      store_unit(Unit<scalar_t>::of(dx), a.dx, w, cursor);
      cursor.advance(w);
    }
  }
  conclude(sums, w, part, to);
}

// A warp a group.
__global__ void __launch_bounds__(kMaxThreads, 2) gain_merge_kernel(int64_t groups, Destination from) {
  const int64_t group = int64_t{blockIdx.x} * (kMaxThreads / kWarp) + threadIdx.x / kWarp;
  if (group >= groups) return;
  auto total = Sums<1>::zero();
  for (int64_t i = threadIdx.x % kWarp; i < from.each; i += kWarp) total.merge(from.partials[group * from.each + i]);
  total = warp_reduce(total, 1);
  if (threadIdx.x % kWarp == 0) from.finish(group, total);
}

// ---------------------------------------------------------------------------------------------- launches

template <class scalar_t>
Arguments<scalar_t> arguments_of(const Call& call) {
  return {static_cast<const scalar_t*>(call.x),
          Parameter(call.gain),
          Parameter(call.bias),
          call.relu,
          static_cast<scalar_t*>(call.y),
          static_cast<const scalar_t*>(call.dy),
          static_cast<scalar_t*>(call.dx)};
}

template <class scalar_t, bool long_runs>
void run_forward(const Call& call) {
  const Walk walk(call.sizes, long_runs, sizeof(scalar_t), {call.x, call.y});
  Launcher{*call.like}(gain_kernel<scalar_t, long_runs>, {walk.blocks, walk.threads}, arguments_of<scalar_t>(call),
                       walk);
}

template <class scalar_t, bool long_runs>
void run_backward(const Call& call) {
  const Launcher launch(*call.like);
  const Walk walk(call.sizes, long_runs, sizeof(scalar_t), {call.x, call.dy, call.dx});
  const int64_t groups = call.sizes.K * call.sizes.C;
  Destination to{nullptr,
                 walk.splits * (long_runs ? 1 : walk.blocks_per_run()),
                 {static_cast<float*>(call.dgain), static_cast<float*>(call.dbias)}};
  const int64_t floats = to.each > 1 ? groups * to.each * int64_t{sizeof(Sums<1>) / sizeof(float)} : 0;
  Tensor workspace = empty(*call.like, {floats}, ScalarType::Float);
  if (floats > 0) to.partials = static_cast<Sums<1>*>(workspace.mutable_data_ptr());
  launch(gain_backward_kernel<scalar_t, long_runs>, {walk.blocks, walk.threads}, arguments_of<scalar_t>(call), walk,
         to);
  if (floats > 0) {
    launch(gain_merge_kernel, {divide_up(groups, kMaxThreads / kWarp), kMaxThreads}, groups, to);
  }
}

struct Cuda {
  static void forward(const Call& call) {
    if (call.sizes.numel() == 0) return;
    with_type(kOp, call.dtype, [&](auto type) {
      using scalar_t = decltype(type);
      has_long_runs(call.sizes, sizeof(scalar_t)) ? run_forward<scalar_t, true>(call)
                                                  : run_forward<scalar_t, false>(call);
    });
  }

  static void backward(const Call& call) {
    const int64_t groups = call.sizes.K * call.sizes.C;
    if (groups == 0) return;
    if (call.sizes.numel() == 0) {  // the sums of nothing
      const Destination none{nullptr, 0, {static_cast<float*>(call.dgain), static_cast<float*>(call.dbias)}};
      Launcher{*call.like}(gain_merge_kernel, {divide_up(groups, kMaxThreads / kWarp), kMaxThreads}, groups, none);
      return;
    }
    with_type(kOp, call.dtype, [&](auto type) {
      using scalar_t = decltype(type);
      has_long_runs(call.sizes, sizeof(scalar_t)) ? run_backward<scalar_t, true>(call)
                                                  : run_backward<scalar_t, false>(call);
    });
  }
};

}  // namespace
}  // namespace latephase::member_gain

STABLE_TORCH_LIBRARY_IMPL(latephase_kernels, CUDA, m) {
  latephase::member_gain::Ops<latephase::member_gain::Cuda>::implement(m);
}
