// The activations of an LSTM's gates, the SiLU and the Hardswish, a register at a time; NaN stays NaN. Float within a
// few roundings of what std::exp and std::tanh give, where that is no denormal; double is theirs.
#pragma once

#include <cmath>
#include <initializer_list>

#include "vec.h"

namespace latephase::LATEPHASE_ISA {
namespace {

template <class Function>
inline Vec<double> lane_by_lane(Vec<double> x, const Function& function) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = function(x[i]);
  return x;
}

// eˣ = 2ⁿ · eʳ with |r| ≤ ln 2 / 2 (Cephes, expf); ∞ from 88.4 on, and e⁻⁸⁷ below -87.
inline Vec<float> exp(Vec<float> x) {
  const Vec<float> lowest = splat(-87.0f), highest = splat(89.0f);
#if defined(__AVX512F__)
  x = (Vec<float>)_mm512_min_ps((__m512)highest, _mm512_max_ps((__m512)lowest, (__m512)x));  // of NaN: the second
  const Vec<float> n = (Vec<float>)_mm512_roundscale_ps((__m512)(x * splat(0x1.715476p0f)), 0);
#else
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const Vec<float> magic = splat(0x1.8p23f);  // the sum's last bits are those of the nearest integer
  const Vec<float> shifted = fma(x, splat(0x1.715476p0f), magic), n = shifted - magic;
#endif
  const Vec<float> r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  Vec<float> p = splat(1.9875691500e-4f);
  for (const float coefficient :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, splat(coefficient));
  p = fma(p, r * r, r) + splat(1.0f);
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Mask<float> exponent = ((Mask<float>)shifted - (Mask<float>)magic + 127) << 23;
  return p * (Vec<float>)exponent;
#endif
}

inline Vec<float> sigmoid(Vec<float> x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

// Near 0 by the odd polynomial of Cephes' tanhf, which 1 − 2 / (e²ˣ + 1) would cancel.
inline Vec<float> tanh(Vec<float> x) {
  const Mask<float> sign = (Mask<float>)x & (Mask<float>)splat(-0.0f);
  const Vec<float> size = (Vec<float>)((Mask<float>)x ^ sign), square = x * x;
  Vec<float> p = splat(-5.70498872745e-3f);
  for (const float coefficient : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    p = fma(p, square, splat(coefficient));
  const Vec<float> large = splat(1.0f) - splat(2.0f) / (exp(size + size) + splat(1.0f));
  return size < splat(0.625f) ? fma(p * square, x, x) : (Vec<float>)((Mask<float>)large | sign);
}

inline Vec<double> sigmoid(Vec<double> x) {
  return lane_by_lane(x, [](double z) { return 1 / (1 + std::exp(-z)); });
}
inline Vec<double> tanh(Vec<double> x) {
  return lane_by_lane(x, [](double z) { return std::tanh(z); });
}

template <class A>
inline Vec<A> silu(Vec<A> x) {
  return x * sigmoid(x);
}
template <class A>
inline Vec<A> silu_derivative(Vec<A> x) {
  const Vec<A> s = sigmoid(x), one = splat<A>(1);
  return s * fma(x, one - s, one);
}

template <class A>
inline Vec<A> hardswish(Vec<A> x) {
  const Vec<A> zero = splat<A>(0), six = splat<A>(6);
  Vec<A> factor = x + splat<A>(3);
  factor = factor < zero ? zero : factor;
  factor = factor > six ? six : factor;
  return x * (factor * splat<A>(A(1) / 6));
}
template <class A>
inline Vec<A> hardswish_derivative(Vec<A> x) {
  const Vec<A> zero = splat<A>(0), one = splat<A>(1), three = splat<A>(3);
  const Vec<A> rising = fma(x, splat<A>(A(1) / 3), splat<A>(0.5));
  return x >= three ? one : x <= -three ? zero : rising;
}

}  // namespace
}  // namespace latephase::LATEPHASE_ISA
