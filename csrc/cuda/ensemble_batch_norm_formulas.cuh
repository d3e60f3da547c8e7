// The mathematics of ensemble batch norm on a thread's unit, once for all tiers. The same bits in every kernel: where
// the compiler could fuse a product and a sum or not, this says which.
//
//   z = (x − mean) · scale + bias + residual,   scale = rstd · weight,   y = activation(z) · output gain
//   dx = (dz − Σdz / count − (x − mean) · rstd · Σ(dz · x̂) / count) · scale · output gain,
//   dz = dy · activation'(z)
#pragma once

#include <cmath>

#include "../lerp.h"
#include "affine.cuh"
#include "ensemble_batch_norm_walk.cuh"
#include "reduce.cuh"

namespace latephase::ensemble_batch_norm {

struct Normalization {
  const float* mean;
  const float* rstd;
  Parameter weight, bias, output_gain;
};

// ---------------------------------------------------------------------------------------------- statistics

struct FinishStatistics {
  float* mean;
  float* rstd;  // or null
  float* var;   // or null
  float eps;
  int64_t C;
  float* running_mean;  // or null
  float* running_var;
  int64_t* batches;  // or null
  float momentum, unbias;

  FinishStatistics(const Forward& f)
      : mean(static_cast<float*>(f.mean)),
        rstd(static_cast<float*>(f.rstd)),
        var(static_cast<float*>(f.var)),
        eps(static_cast<float>(f.eps)),
        C(f.sizes.C),
        running_mean(static_cast<float*>(f.running.mean)),
        running_var(static_cast<float*>(f.running.var)),
        batches(f.running.batches),
        momentum(static_cast<float>(f.running.momentum)),
        unbias(static_cast<float>(f.running.unbias)) {}

  // 0 of nothing. By the reciprocal of the count, which a thread's channels have in common.
  __device__ static float variance(const Moments<1>& m) { return __fmul_rn(m.m2[0], __frcp_rn(fmaxf(m.count, 1))); }
  __device__ float inverse_deviation(const Moments<1>& m) const { return __frsqrt_rn(variance(m) + eps); }

  // Reads all before it writes: the compiler cannot know that none of it lies where another is written.
  __device__ void operator()(int64_t group, const Moments<1>& m) const {
    const bool counts = batches != nullptr && group % C == 0;
    const float before_mean = running_mean != nullptr ? running_mean[group] : 0;
    const float before_var = running_mean != nullptr ? running_var[group] : 0;
    const int64_t before_batches = counts ? batches[group / C] : 0;
    mean[group] = m.mean[0];
    if (rstd != nullptr) rstd[group] = inverse_deviation(m);
    if (var != nullptr) var[group] = variance(m);
    if (running_mean == nullptr) return;
    running_mean[group] = lerp(before_mean, m.mean[0], momentum);
    running_var[group] = lerp(before_var, __fmul_rn(variance(m), unbias), momentum);
    if (counts) batches[group / C] = before_batches + 1;
  }
};

// Moments of `count` values from a mean that may be off by rounding, and the sums of the differences from it and of
// their squares.
__device__ __forceinline__ Moments<1> corrected_moments(float count, float inverse_count, float mean, float differences,
                                                        float squares) {
  const float shift = __fmul_rn(differences, inverse_count);
  if (!(squares < INFINITY)) return {count, {mean}, {squares}};  // the correction would turn infinities into NaN
  return {count, {__fadd_rn(mean, shift)}, {fmaxf(__fmaf_rn(-differences, shift, squares), 0)}};
}

// ---------------------------------------------------------------------------------------------- forward

// What comes after z: an activation alone, or an output gain (1 without one) behind the ReLU or nothing.
enum class Ending { kRelu, kStandalone, kReluGain, kGain };

template <class scalar_t>
struct ForwardArguments {
  const scalar_t* x;
  const scalar_t* residual;  // or null
  scalar_t* y;               // or null: statistics only
  uint8_t* mask;             // or null
  Normalization normalization;
  Ending ending;
  Activation activation;  // of kStandalone: apart, so that the ReLU's way is no jump through a table
};

// mean, scale, bias and output gain of each column of a thread.
template <class scalar_t, Layout layout>
struct Normalizer {
  static constexpr int kCount = Channels<layout>::kCount;
  float mean[kCount], scale[kCount], bias[kCount], output_gain[kCount];

  // From the statistics in memory.
  __device__ Normalizer(const Normalization& of, const Geometry& g, const Part& part,
                        const Channels<layout>& channels) {
    const int64_t group = part.member * g.C + channels.first;
    float channel_mean[kCount], rstd[kCount];
    read_channels(channel_mean, of.mean + group, channels);
    read_channels(rstd, of.rstd + group, channels);
    read_affine(of, part, channels);
    set(channel_mean, rstd, of, part, channels);
  }

  __device__ Normalizer() {}  // read_affine() and set() complete it

  // Before the statistics are known, so that nothing waits for it when they are.
  __device__ __forceinline__ void read_affine(const Normalization& of, const Part& part,
                                              const Channels<layout>& channels) {
    of.weight.template read<scalar_t>(scale, part.member, channels, 1);
    of.bias.template read<scalar_t>(bias, part.member, channels, 0);
  }

  __device__ __forceinline__ void set(const float (&channel_mean)[kCount], const float (&rstd)[kCount],
                                      const Normalization& of, const Part& part, const Channels<layout>& channels) {
    of.output_gain.template read<scalar_t>(output_gain, part.member, channels, 1);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      mean[j] = channel_mean[j];
      scale[j] = __fmul_rn(rstd[j], scale[j]);
    }
  }

  // j counts the values of a unit.
  __device__ __forceinline__ float centred(float x, int j) const {
    return __fsub_rn(x, mean[by_column(layout) ? j : 0]);
  }
  __device__ __forceinline__ float normalized(float x, int j) const {
    return __fmaf_rn(centred(x, j), scale[by_column(layout) ? j : 0], bias[by_column(layout) ? j : 0]);
  }
};

__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1, __fadd_rn(1, __expf(-z))); }
__device__ __forceinline__ float silu(float z) { return __fmul_rn(z, sigmoid(z)); }
__device__ __forceinline__ float silu_derivative(float z) {
  const float s = sigmoid(z);
  return __fmul_rn(s, __fmaf_rn(z, __fsub_rn(1, s), 1));
}

template <class scalar_t>
__device__ __forceinline__ float relu6(float z) {
  return relu_passes(z, Packing<scalar_t>::kRoundsToZero) ? (z > 6 ? 6 : z) : 0;
}
template <class scalar_t>
__device__ __forceinline__ bool relu6_passes(float z) {
  return relu_passes(z, Packing<scalar_t>::kRoundsToZero) && !(z >= Packing<scalar_t>::kRoundsToSix);
}

__device__ __forceinline__ float hardswish(float z) { return __fmul_rn(z, __saturatef(__fmaf_rn(z, 1.0f / 6, 0.5f))); }
__device__ __forceinline__ float hardswish_derivative(float z) {
  return z >= 3 ? 1 : z <= -3 ? 0 : __fmaf_rn(z, 1.0f / 3, 0.5f);
}

template <class scalar_t, Layout layout>
__device__ __forceinline__ Unit<scalar_t> output(const ForwardArguments<scalar_t>& a,
                                                 const Normalizer<scalar_t, layout>& normalizer,
                                                 const Unit<scalar_t>& x, const Unit<scalar_t>& residual) {
  float z[kUnit];
#pragma unroll
  for (int j = 0; j < kUnit; ++j) z[j] = normalizer.normalized(x.get(j), j);
  if (a.residual != nullptr) {  // one branch: by single values the compiler would add, and select
#pragma unroll
    for (int j = 0; j < kUnit; ++j) z[j] = __fadd_rn(z[j], residual.get(j));
  }
  if (a.ending == Ending::kRelu) return Unit<scalar_t>::rectified(z);
  if (a.ending == Ending::kStandalone) {
    if (a.activation == Activation::kSilu) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) z[j] = silu(z[j]);
    } else if (a.activation == Activation::kHardswish) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) z[j] = hardswish(z[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) z[j] = relu6<scalar_t>(z[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      if (a.ending == Ending::kReluGain && !relu_passes(z[j], Packing<scalar_t>::kRoundsToZero)) z[j] = 0;
      z[j] = __fmul_rn(z[j], normalizer.output_gain[by_column(layout) ? j : 0]);
    }
  }
  return Unit<scalar_t>::of(z);
}

// ---------------------------------------------------------------------------------------------- backward

// What the backward pass needs of the activation: nothing, its bits, or z again.
enum class Gate { kOpen, kMask, kRelu, kStandalone };

template <class scalar_t>
struct BackwardArguments {
  const scalar_t* dy;
  const scalar_t* x;
  const uint8_t* mask;
  scalar_t* dx;         // or null: sums only
  scalar_t* dresidual;  // or null
  Normalization normalization;
  const float* sum_dz;
  const float* sum_dz_xhat;
  float inverse_count;       // 1 / the values that a statistic was taken over
  bool constant_statistics;  // they were given, not taken over x
  Gate gate;
  Activation activation;  // of kStandalone
};

struct FinishSums {
  float* sum_dz;
  float* sum_dz_xhat;
  const float* rstd;

  // sums: of dz and of dz · (x − mean)
  __device__ void operator()(int64_t group, const Sums<1>& sums) const { store(group, sums, rstd[group]); }
  __device__ void store(int64_t group, const Sums<1>& sums, float rstd_of_group) const {
    sum_dz[group] = sums.first[0];
    sum_dz_xhat[group] = sums.second[0] * rstd_of_group;
  }
};

// The values of a unit that a ReLU let through, which is found again from x; 0 for the others.
template <class scalar_t, Layout layout>
__device__ __forceinline__ Unit<scalar_t> gated(const Normalizer<scalar_t, layout>& normalizer,
                                                const Unit<scalar_t>& dy, const Unit<scalar_t>& x) {
  return dy.keep_where(
      [&](int j) { return relu_passes(normalizer.normalized(x.get(j), j), Packing<scalar_t>::kRoundsToZero); });
}

// dz of a unit before a standalone activation: the sums take it as it is, dx rounded like a tensor.
struct StandaloneGradient {
  float values[kUnit];

  template <class scalar_t, Layout layout>
  __device__ __forceinline__ StandaloneGradient(Activation activation, const Normalizer<scalar_t, layout>& normalizer,
                                                const Unit<scalar_t>& dy, const Unit<scalar_t>& x) {
    if (activation == Activation::kSilu) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j)
        values[j] = __fmul_rn(dy.get(j), silu_derivative(normalizer.normalized(x.get(j), j)));
    } else if (activation == Activation::kHardswish) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j)
        values[j] = __fmul_rn(dy.get(j), hardswish_derivative(normalizer.normalized(x.get(j), j)));
    } else {
#pragma unroll
      for (int j = 0; j < kUnit; ++j)
        values[j] = relu6_passes<scalar_t>(normalizer.normalized(x.get(j), j)) ? dy.get(j) : 0;
    }
  }
  __device__ __forceinline__ float get(int j) const { return values[j]; }
};

// Adds dz and dz · (x − mean) of a unit; both are 0 where no value is.
template <class scalar_t, Layout layout, class Gradient>
__device__ __forceinline__ void add_to(Sums<Channels<layout>::kCount>& sums,
                                       const Normalizer<scalar_t, layout>& normalizer, const Gradient& dz,
                                       const Unit<scalar_t>& x) {
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const int c = by_column(layout) ? j : 0;
    sums.first[c] += dz.get(j);
    sums.second[c] = fmaf(dz.get(j), normalizer.centred(x.get(j), j), sums.second[c]);
  }
}

// How the statistics carry gradients back to x: the mean of dz, and the slope over x − mean. Zeros if they are
// constants. And what gradients are multiplied by on the way.
template <Layout layout>
struct ThroughStatistics {
  static constexpr int kCount = Channels<layout>::kCount;
  float mean_dz[kCount], slope[kCount], factor[kCount];

  __device__ __forceinline__ void set(int j, float sum_dz, float sum_dz_xhat, float rstd, float inverse_count) {
    mean_dz[j] = sum_dz * inverse_count;
    slope[j] = sum_dz_xhat * inverse_count * rstd;
  }

  // Reads the gain again, rather than have it in registers while the sums are taken.
  template <class scalar_t>
  __device__ __forceinline__ void set_factors(const Normalizer<scalar_t, layout>& normalizer, const Normalization& of,
                                              const Part& part, const Channels<layout>& channels) {
    of.output_gain.template read<scalar_t>(factor, part.member, channels, 1);
#pragma unroll
    for (int j = 0; j < kCount; ++j) factor[j] = __fmul_rn(normalizer.scale[j], factor[j]);
  }
};

template <class scalar_t, Layout layout>
__device__ __forceinline__ Unit<scalar_t> input_gradient(const Normalizer<scalar_t, layout>& normalizer,
                                                         const ThroughStatistics<layout>& through,
                                                         bool constant_statistics, const Unit<scalar_t>& dz,
                                                         const Unit<scalar_t>& x) {
  float dx[kUnit];
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const int c = by_column(layout) ? j : 0;
    // Not computed for constants: a NaN in x − mean, times zero, would not be zero.
    const float share =
        constant_statistics ? 0 : fmaf(normalizer.centred(x.get(j), j), through.slope[c], through.mean_dz[c]);
    dx[j] = (dz.get(j) - share) * through.factor[c];
  }
  return Unit<scalar_t>::of(dx);
}

}  // namespace latephase::ensemble_batch_norm
