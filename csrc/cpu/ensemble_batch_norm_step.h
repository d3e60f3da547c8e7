// One register of values of ensemble batch norm, forward and backward: the arithmetic that both layouts share.
#pragma once

#include <cmath>
#include <type_traits>

#include "../ensemble_batch_norm_arguments.h"
#include "activations.h"
#include "elements.h"

namespace latephase::LATEPHASE_ISA {
namespace {

using namespace latephase::ensemble_batch_norm;

constexpr int64_t kGrainValues = 16384;  // fewer than this are not worth a second thread

// Merges a tile of m values into the mean and M2 = Σ(x − mean)² of `before` values (Chan, Golub, LeVeque 1979). `sum`
// and `squares` are Σd and Σd² of d = x − shift over the tile; shift is near their mean, so that the cancellation in
// Σd² − (Σd)²/m stays below the rounding of M2.
inline void merge_moments(double& mean, double& m2, double before, double m, double shift, double sum, double squares) {
  const double tile_mean = shift + sum / m, delta = tile_mean - mean, share = m / (before + m);
  m2 += squares - sum * sum / m + delta * delta * before * share;
  mean += delta * share;
}

template <class A>
void write_statistics(const Forward& f, int64_t i, double mean, double var) {
  if (var < 0) var = 0;  // NaN stays NaN
  static_cast<A*>(f.mean)[i] = static_cast<A>(mean);
  if (f.var) static_cast<A*>(f.var)[i] = static_cast<A>(var);
  if (!f.rstd) return;
  A gain;
  read_affine<A>(f.input_gain, i / f.sizes.C, i % f.sizes.C, 1, 1, &gain);
  const double factor = gain;
  static_cast<A*>(f.rstd)[i] = static_cast<A>(factor / std::sqrt(factor * factor * var + f.eps));
}

// One (member, channel)'s coefficients, a channel or a register of them in each V:
// z = (x − mean) · scale + bias, y = activation(z) · factor; dx = dz · factor − ((x − mean) · slope + offset).
// The factor is the output gain forward, and scale times the output gain backward.
template <class V>
struct Coefficients {
  V mean, scale, bias, factor, slope, offset;
};

// Pointers to `count` channels' coefficients, filled for channels c0 … of member k: the part known before the backward
// sums, and the part that needs them.
template <class A, class Arguments>
void fill_affine(const Coefficients<A*>& out, const Arguments& f, int64_t k, int64_t c0, int64_t count) {
  const int64_t first = k * f.sizes.C + c0;
  read_affine<A>(f.weight, k, c0, count, 1, out.scale);
  read_affine<A>(f.bias, k, c0, count, 0, out.bias);
  read_affine<A>(f.output_gain, k, c0, count, 1, out.factor);
  for (int64_t j = 0; j < count; ++j) {
    out.mean[j] = static_cast<const A*>(f.mean)[first + j];
    out.scale[j] *= static_cast<const A*>(f.rstd)[first + j];
    if constexpr (std::is_same_v<Arguments, Backward>) out.factor[j] *= out.scale[j];
  }
}

template <class A>
void fill_correction(const Coefficients<A*>& out, const Backward& b, int64_t k, int64_t c0, int64_t count) {
  const int64_t first = k * b.sizes.C + c0;
  const bool constant = std::isinf(b.count);
  for (int64_t j = 0; j < count; ++j) {
    const A mean_dz = static_cast<A>(static_cast<const A*>(b.sum_dz)[first + j] / b.count);
    const A mean_dz_xhat = static_cast<A>(static_cast<const A*>(b.sum_dz_xhat)[first + j] / b.count);
    out.offset[j] = constant ? 0 : out.factor[j] * mean_dz;
    out.slope[j] = constant ? 0 : out.factor[j] * static_cast<const A*>(b.rstd)[first + j] * mean_dz_xhat;
  }
}

// What the backward pass needs of the activation: nothing, or it is recomputed from x, or in the mask that the forward
// pass wrote.
enum class Gate { None, Relu, ReluMask, Relu6, Silu, Hardswish };

// Both steps see the data as rows of s.columns() values, one of mask bits for each. Kernels work with a copy of their
// own: stores to the data could change one that others see, and it would be read again after each.
template <class T, Gate kGate, bool kResidual>
struct ForwardStep {
  using A = typename Accumulation<T>::type;
  const T* x;
  const T* residual;
  T* y;
  uint8_t* mask;
  int64_t columns, mask_row_bytes;

  explicit ForwardStep(const Forward& f)
      : x(static_cast<const T*>(f.x)),
        residual(static_cast<const T*>(f.residual)),
        y(static_cast<T*>(f.y)),
        mask(f.mask),
        columns(f.sizes.columns()),
        mask_row_bytes(f.sizes.mask_row_bytes()) {}

  template <class Count>
  inline void operator()(int64_t row, int64_t column, Count count, const Coefficients<Vec<A>>& c) const {
    const int64_t at = row * columns + column;
    Vec<A> z = fma(load(x + at, count) - c.mean, c.scale, c.bias);
    if constexpr (kResidual) z += load(residual + at, count);
    if constexpr (kGate == Gate::Silu) z = silu<A>(z);
    if constexpr (kGate == Gate::Hardswish) z = hardswish<A>(z);
    if constexpr (kGate == Gate::Relu || kGate == Gate::ReluMask || kGate == Gate::Relu6) {
      const Mask<A> passed = ~(z <= splat<A>(kRoundsToZero<T>));
      z = keep<A>(z, passed);
      if constexpr (kGate == Gate::ReluMask) write_mask<A>(mask + row * mask_row_bytes, column, passed, count);
    }
    if constexpr (kGate == Gate::Relu6) z = z > splat<A>(6) ? splat<A>(6) : z;
    store(y + at, z * c.factor, count);
  }
};

template <class T, Gate kGate>
struct BackwardStep {
  using A = typename Accumulation<T>::type;
  const T* x;
  const T* dy;
  T* dx;
  T* dresidual;
  const uint8_t* mask;
  int64_t columns, mask_row_bytes;
  bool constant;

  explicit BackwardStep(const Backward& b)
      : x(static_cast<const T*>(b.x)),
        dy(static_cast<const T*>(b.dy)),
        dx(static_cast<T*>(b.dx)),
        dresidual(static_cast<T*>(b.dresidual)),
        mask(b.mask),
        columns(b.sizes.columns()),
        mask_row_bytes(b.sizes.mask_row_bytes()),
        constant(std::isinf(b.count)) {}

  // dz = dy · activation'(z); also returns x − mean.
  template <class Count>
  inline Vec<A> gradient(int64_t row, int64_t column, Count count, const Coefficients<Vec<A>>& c,
                         Vec<A>& centred) const {
    const int64_t at = row * columns + column;
    centred = load(x + at, count) - c.mean;
    const Vec<A> dz = load(dy + at, count);
    if constexpr (kGate == Gate::None) return dz;
    if constexpr (kGate == Gate::ReluMask) return keep<A>(dz, read_mask<A>(mask + row * mask_row_bytes, column, count));
    const Vec<A> z = fma(centred, c.scale, c.bias);
    if constexpr (kGate == Gate::Silu) return dz * silu_derivative<A>(z);
    if constexpr (kGate == Gate::Hardswish) return dz * hardswish_derivative<A>(z);
    Mask<A> stopped = z <= splat<A>(kRoundsToZero<T>);
    if constexpr (kGate == Gate::Relu6) stopped |= z >= splat<A>(kRoundsToSix<T>);
    return keep<A>(dz, ~stopped);
  }

  template <class Count>
  inline void operator()(int64_t row, int64_t column, Count count, const Coefficients<Vec<A>>& c) const {
    const int64_t at = row * columns + column;
    Vec<A> centred;
    const Vec<A> dz = gradient(row, column, count, c, centred);
    // Constant statistics pass no gradient on, so that a NaN elsewhere does not come in through 0 · NaN.
    store(dx + at, constant ? dz * c.factor : fma(dz, c.factor, -fma(centred, c.slope, c.offset)), count);
    if (dresidual) store(dresidual + at, dz, count);
  }
};

// Calls body(step) with the step for these arguments.
template <class T, class Body>
void with_step(const Forward& f, const Body& body) {
  if (f.activation == Activation::kRelu6) return body(ForwardStep<T, Gate::Relu6, false>(f));
  if (f.activation == Activation::kSilu) return body(ForwardStep<T, Gate::Silu, false>(f));
  if (f.activation == Activation::kHardswish) return body(ForwardStep<T, Gate::Hardswish, false>(f));
  if (f.activation == Activation::kNone)
    return f.residual ? body(ForwardStep<T, Gate::None, true>(f)) : body(ForwardStep<T, Gate::None, false>(f));
  if (f.mask) return body(ForwardStep<T, Gate::ReluMask, true>(f));
  f.residual ? body(ForwardStep<T, Gate::Relu, true>(f)) : body(ForwardStep<T, Gate::Relu, false>(f));
}

template <class T, class Body>
void with_step(const Backward& b, const Body& body) {
  if (b.activation == Activation::kRelu6) return body(BackwardStep<T, Gate::Relu6>(b));
  if (b.activation == Activation::kSilu) return body(BackwardStep<T, Gate::Silu>(b));
  if (b.activation == Activation::kHardswish) return body(BackwardStep<T, Gate::Hardswish>(b));
  if (b.activation == Activation::kNone) return body(BackwardStep<T, Gate::None>(b));
  b.mask ? body(BackwardStep<T, Gate::ReluMask>(b)) : body(BackwardStep<T, Gate::Relu>(b));
}

}  // namespace
}  // namespace latephase::LATEPHASE_ISA
