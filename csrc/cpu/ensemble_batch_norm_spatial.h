// Ensemble batch norm where columns are spatial (contiguous tensors): an item is one (member, channel), B rows of S
// values, C·S apart. An item is small enough to be read again from cache. W = lanes of a register.
#pragma once

#include <algorithm>

#include "ensemble_batch_norm_step.h"
#include "parallel.h"

namespace latephase::LATEPHASE_ISA {
namespace {

template <class T>
class Spatial {
  using A = typename Accumulation<T>::type;
  static constexpr int W = kLanes<A>;
  static constexpr int64_t kTile = 256 * W;  // values summed about the same shift
  static constexpr int64_t kRun = 4;  // registers summed in the accumulation type before they are added in double

 public:
  static void forward(const Forward& f, const Parallel& parallel) {
    with_step<T>(f, [&](const auto& shared) {
      for_items(f.sizes, parallel, [&](int64_t k, int64_t c) {
        if (f.compute_statistics) statistics(f, k, c);
        if (f.y) apply(shared, f, k, c);
      });
    });
  }

  static void backward(const Backward& b, const Parallel& parallel) {
    with_step<T>(b, [&](const auto& shared) {
      for_items(b.sizes, parallel, [&](int64_t k, int64_t c) {
        if (b.compute_sums) reduce(b, shared, k, c);
        if (b.dx) apply(shared, b, k, c);
      });
    });
  }

 private:
  template <class Item>
  static void for_items(const Sizes& s, const Parallel& parallel, const Item& item) {
    parallel(s.K * s.C, kGrainValues / s.n(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) item(i / s.C, i % s.C);
    });
  }

  // Calls body(row) for rows b0 … b1 of an item.
  template <class Body>
  static void for_rows(const Sizes& s, int64_t k, int64_t c, int64_t b0, int64_t b1, const Body& body) {
    for (int64_t b = b0; b < b1; ++b) body((k * s.B + b) * s.C + c);
  }

  template <class Step, class Arguments>
  static void apply(const Step& shared, const Arguments& arguments, int64_t k, int64_t c) {
    const Step step = shared;
    const Coefficients<Vec<A>> at = coefficients(arguments, k, c);
    for_rows(arguments.sizes, k, c, 0, arguments.sizes.B, [&](int64_t row) {
      for_columns<A>(0, step.columns, [&](int64_t j, auto count) { step(row, j, count, at); });
    });
  }

  // Calls tile(first row, end row, first column, end column) over an item in tiles of about kTile values.
  template <class Tile>
  static void for_tiles(const Sizes& s, const Tile& tile) {
    const int64_t rows = std::max<int64_t>(1, kTile / s.S), columns = rows > 1 ? s.S : kTile;
    for (int64_t b = 0; b < s.B; b += rows)
      for (int64_t j = 0; j < s.S; j += columns) tile(b, std::min(b + rows, s.B), j, std::min(j + columns, s.S));
  }

  // Adds Σa and Σab over columns [begin, end); values(column, count, b) gives a and sets b. Few registers are summed
  // before they are added in double: one far value would swallow the digits of those after it.
  template <class Values>
  static void add_products(int64_t begin, int64_t end, DoubleSum<A>& sum, DoubleSum<A>& products,
                           const Values& values) {
    for (int64_t first = begin; first < end; first += kRun * W) {
      Vec<A> total{}, product{};
      const auto add = [&](int64_t j, auto count) {
        Vec<A> b;
        const Vec<A> a = values(j, count, b);
        total += a;
        product = fma(a, b, product);
      };
      if (first + kRun * W <= end)
        for (int64_t j = first; j < first + kRun * W; j += W) add(j, Whole<A>{});
      else
        for_columns<A>(first, end, add);
      sum.add(total);
      products.add(product);
    }
  }

  // Asks for a row of a few cache lines: the processor's own prefetching finds no order in so many short ones.
  template <int kForWriting>
  static void ask_for_row(const T* data, int64_t row, int64_t S) {
    const int64_t bytes = S * static_cast<int64_t>(sizeof(T));
    if (bytes < 256 || bytes > 1024) return;
    const char* first = reinterpret_cast<const char*>(data + row * S);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i, kForWriting, 2);
  }

  // The mean of an item's first values: often near that of all.
  static double first_mean(const Sizes& s, const T* x, int64_t k, int64_t c) {
    const int64_t count = std::min(s.S, kRun * W);
    Vec<A> total{};
    for_columns<A>(0, count, [&](int64_t j, auto lanes) { total += load(x + (k * s.B * s.C + c) * s.S + j, lanes); });
    return lane_sum<A>(total) / static_cast<double>(count);
  }

  static void statistics(const Forward& f, int64_t k, int64_t c) {
    const T* x = static_cast<const T*>(f.x);
    const int64_t S = f.sizes.S;
    double mean = 0, m2 = 0, before = 0;
    for_tiles(f.sizes, [&](int64_t b0, int64_t b1, int64_t j0, int64_t j1) {
      const double m = static_cast<double>((b1 - b0) * (j1 - j0));
      double sum, squares;
      const auto sums = [&](A shift) {
        DoubleSum<A> total, square;
        for_rows(f.sizes, k, c, b0, b1, [&](int64_t row) {
          ask_for_row<0>(x, row + 1, S);  // the next item's
          if (f.y) ask_for_row<1>(static_cast<const T*>(f.y), row, S);
          add_products(j0, j1, total, square, [&](int64_t j, auto count, Vec<A>& d) {
            d = keep<A>(load(x + row * S + j, count) - shift, first_lanes<A>(count));
            return d;
          });
        });
        sum = total.total(), squares = square.total();
      };
      A shift = static_cast<A>(before == 0 ? first_mean(f.sizes, x, k, c) : mean);
      sums(shift);
      if (!(sum * sum <= squares * m / 2)) {  // the mean is not near, or not a number: find it first
        sums(0);
        shift = static_cast<A>(sum / m);
        sums(shift);
      }
      merge_moments(mean, m2, before, m, shift, sum, squares);
      before += m;
    });
    write_statistics<A>(f, k * f.sizes.C + c, mean, m2 / before);
  }

  template <class Step>
  static void reduce(const Backward& b, const Step& step, int64_t k, int64_t c) {
    const Coefficients<Vec<A>> at = coefficients(b, k, c);
    DoubleSum<A> sum_dz, sum_dz_centred;
    for_rows(b.sizes, k, c, 0, b.sizes.B, [&](int64_t row) {
      ask_for_row<0>(step.x, row + 1, step.columns);
      ask_for_row<0>(step.dy, row + 1, step.columns);
      if (b.dx) ask_for_row<1>(step.dx, row, step.columns);
      add_products(0, step.columns, sum_dz, sum_dz_centred,
                   [&](int64_t j, auto count, Vec<A>& centred) { return step.gradient(row, j, count, at, centred); });
    });
    const int64_t i = k * b.sizes.C + c;
    static_cast<A*>(b.sum_dz)[i] = static_cast<A>(sum_dz.total());
    static_cast<A*>(b.sum_dz_xhat)[i] = static_cast<A>(sum_dz_centred.total() * static_cast<const A*>(b.rstd)[i]);
  }

  template <class Arguments>
  static Coefficients<Vec<A>> coefficients(const Arguments& f, int64_t k, int64_t c) {
    Coefficients<A> one{};
    const Coefficients<A*> out{&one.mean, &one.scale, &one.bias, &one.factor, &one.slope, &one.offset};
    fill_affine<A>(out, f, k, c, 1);
    if constexpr (std::is_same_v<Arguments, Backward>) fill_correction<A>(out, f, k, c, 1);
    return {splat(one.mean), splat(one.scale), splat(one.bias), splat(one.factor), splat(one.slope), splat(one.offset)};
  }
};

}  // namespace
}  // namespace latephase::LATEPHASE_ISA
