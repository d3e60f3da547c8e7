// The folded weights of rank1_linear on one instruction set: compiled several times, with LATEPHASE_ISA naming the
// namespace. No torch header here, as in member_gain.kernel.cpp.
#include "rank1_linear.h"

#include "elements.h"
#include "vec.h"

namespace latephase::LATEPHASE_ISA {
namespace {

using namespace latephase::rank1_linear;

constexpr int kRows = 4;  // of the weight, that go through together: a member's s and sums of s are read once for all
constexpr int64_t kColumnsOfSum = 1024;  // after which a sum goes on in double: of a longer one the error would grow

// Calls body(T{}, W{}) for the types of the data and of the weight.
template <class Body>
void with_types(const Weights& w, const Body& body) {
  with_type(w.dtype, [&](auto data) {
    using A = typename Accumulation<decltype(data)>::type;
    w.weight_dtype == w.dtype ? body(data, data) : body(data, A{});
  });
}

// Rows [row, row + rows) of member k's H: adds their share of ds, writes their dr, adds to their dW.
template <int rows, bool has_dweight, class T, class W, class A = typename Accumulation<T>::type>
void backward_rows(const FoldBackward& call, int64_t k, int64_t row, A* ds) {
  const int64_t in = call.in;
  const T* products = static_cast<const T*>(call.products) + (k * call.out + row) * in;
  const W* weight = static_cast<const W*>(call.weight) + row * in;
  const A* s = static_cast<const A*>(call.input_gain) + k * in;
  const A* r = static_cast<const A*>(call.output_gain) + k * call.out + row;
  A* dweight = has_dweight ? static_cast<A*>(call.dweight) + row * in : nullptr;
  double totals[rows] = {};
  for (int64_t first = 0; first < in; first += kColumnsOfSum) {
    Vec<A> sums[rows] = {};
    for_columns<A>(first, std::min(in, first + kColumnsOfSum), [&](int64_t i, auto count) {
      const Vec<A> gain = load(s + i, count);
      Vec<A> column_sums = load(ds + i, count);
      for (int j = 0; j < rows; ++j) {
        const Vec<A> product = load(products + j * in + i, count);
        const Vec<A> weighted = product * load(weight + j * in + i, count);
        sums[j] = fma(weighted, gain, sums[j]);
        column_sums = fma(weighted, splat(r[j]), column_sums);
        if (has_dweight)
          store(dweight + j * in + i, fma(product * splat(r[j]), gain, load(dweight + j * in + i, count)), count);
      }
      store(ds + i, column_sums, count);
    });
    for (int j = 0; j < rows; ++j) totals[j] += lane_sum<A>(sums[j]);
  }
  A* dr = static_cast<A*>(call.dr) + k * call.out + row;
  for (int j = 0; j < rows; ++j) dr[j] = static_cast<A>(totals[j]);
}

}  // namespace

void fold(const Fold& call, int64_t begin, int64_t end) {
  with_types(call, [&](auto data, auto weight_value) {
    using T = decltype(data);
    using A = typename Accumulation<T>::type;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t k = row / call.out, j = row % call.out;
      const auto* weight = static_cast<const decltype(weight_value)*>(call.weight) + j * call.in;
      const A* s = static_cast<const A*>(call.input_gain) + k * call.in;
      T* folded = static_cast<T*>(call.folded) + row * call.in;
      const Vec<A> r = splat(static_cast<const A*>(call.output_gain)[row]);
      for_columns<A>(0, call.in, [&](int64_t i, auto count) {
        store(folded + i, load(weight + i, count) * load(s + i, count) * r, count);
      });
    }
  });
}

void fold_backward(const FoldBackward& call, void* partial_ds, int64_t begin, int64_t end) {
  with_types(call, [&](auto data, auto weight_value) {
    using T = decltype(data);
    using W = decltype(weight_value);
    using A = typename Accumulation<T>::type;
    for (int64_t part = begin; part < end; ++part)
      for (int64_t k = 0; k < call.K; ++k) {
        A* ds = static_cast<A*>(partial_ds) + (part * call.K + k) * call.in;
        std::fill_n(ds, call.in, A(0));
        const int64_t last = std::min((part + 1) * kRowsOfPart, call.out);
        const auto rows = [&](int64_t row, auto count) {
          call.dweight ? backward_rows<count, true, T, W>(call, k, row, ds)
                       : backward_rows<count, false, T, W>(call, k, row, ds);
        };
        int64_t row = part * kRowsOfPart;
        for (; row + kRows <= last; row += kRows) rows(row, std::integral_constant<int, kRows>{});
        for (; row < last; ++row) rows(row, std::integral_constant<int, 1>{});
      }
  });
}

}  // namespace latephase::LATEPHASE_ISA
