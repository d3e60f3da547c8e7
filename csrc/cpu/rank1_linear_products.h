// What the kernels of rank1_linear's products with the gains inside are given, free of torch headers. Everything has
// one type, float or double.
#pragma once

#include "../layout.h"
#include "parallel.h"

namespace latephase::rank1_linear {

// y = ((x ∘ x_gain_k) · B) ∘ y_gain_k + bias; B [depth, columns] is the weight or, `transposed`, that of the weight.
struct Product {
  int64_t K, rows, depth, columns;  // rows a member
  DataType dtype;
  bool transposed;
  const void *x, *weight, *x_gain, *y_gain;  // x [K·rows, depth], gains [K, depth] and [K, columns]
  const void* bias;                          // [K, columns], or [columns] and bias_stride 0, or null
  int64_t bias_stride;
  void* y;        // [K·rows, columns]
  void* product;  // the same before y_gain, or null
  // Sums over a member's rows, or null: of x and of x ∘ x_factor [K, depth], of the product ∘ y_factor [K, columns].
  // For few rows: they are added one by one, and all rows of a member are scaled at one time.
  void *x_sums, *x_factor_sums, *y_factor_sums;
  const void *x_factor, *y_factor;  // [K·rows, depth], [K·rows, columns]
};

// dW = Σ_k (r_k s_kᵀ) ∘ dy_kᵀ x_k of y = ((x ∘ s_k) · Wᵀ) ∘ r_k + bias; alone it is one product of all members' rows,
// (dy ∘ r)ᵀ (x ∘ s).
struct WeightGradient {
  int64_t K, rows, in, out;
  DataType dtype;
  const void *dy, *x, *s, *r;  // [K·rows, out], [K·rows, in], [K, in], [K, out]
  void* dweight;               // [out, in]
};

// With H_k = dy_kᵀ x_k:   ds_k = colsum(r_k · H_k ∘ W),   dr_k = rowsum(H_k ∘ W · s_k),   dbias_k = colsum(dy_k).
struct Gradients : WeightGradient {
  const void* weight;     // [out, in]
  void *ds, *dr, *dbias;  // [K, in], [K, out], [K, out]
};

}  // namespace latephase::rank1_linear
