// Member gain on one instruction set: compiled several times, with LATEPHASE_ISA naming the namespace. No torch header
// here: an inline function compiled for a newer processor must never be the one the linker keeps for all.
//
// A part (member_gain.h) is read and written once, row by row. Sums are taken in the accumulation type over kTile
// registers or rows, and in double beyond.
#include "member_gain.h"

#include "elements.h"
#include "vec.h"

namespace latephase::LATEPHASE_ISA {
namespace {

using namespace latephase::member_gain;

constexpr int64_t kTile = 64;

// What the activation lets through of one register, decided by the output x · gain + bias as stored.
template <class T, bool relu, class A = typename Accumulation<T>::type>
inline Vec<A> gated(Vec<A> value, Vec<A> output) {
  return relu ? keep<A>(value, ~(output <= splat<A>(kRoundsToZero<T>))) : value;
}

// One part: its place in the data, and its columns' gains and biases, zeros behind them up to a whole register.
template <class T>
struct Part {
  using A = typename Accumulation<T>::type;
  int64_t k, row_part, first_channel, channels, columns, first_row, rows;
  A gain[kMaxColumns], bias[kMaxColumns];

  Part(const Call& call, const Parts& parts, int64_t index) {
    const Sizes& s = call.sizes;
    first_channel = index % parts.channel_parts * parts.channels;
    channels = std::min(parts.channels, s.C - first_channel);
    columns = channels * parts.columns_per_channel;
    row_part = index / parts.channel_parts % parts.row_parts;
    first_row = row_part * parts.rows;
    rows = std::min(parts.rows, s.B - first_row);
    k = index / parts.channel_parts / parts.row_parts;
    fill(gain, call.gain, 1, parts.columns_per_channel);
    fill(bias, call.bias, -A(0), parts.columns_per_channel);  // x · gain − 0 is x · gain, whatever its sign
  }
  void fill(A* values, const Affine& parameter, A absent, int64_t columns_per_channel) const {
    read_affine<A>(parameter, k, first_channel, channels, absent, values);
    if (columns_per_channel > 1)  // spread out, the last first: what is still to be read lies before it
      for (int64_t c = channels - 1; c >= 0; --c)
        std::fill_n(values + c * columns_per_channel, columns_per_channel, values[c]);
    std::fill_n(values + columns, padded() - columns, A(0));
  }
  int64_t padded() const { return (columns + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }
  // Of the first channel in row `row` of the part.
  int64_t offset(const Sizes& s, int64_t row) const {
    return ((k * s.B + first_row + row) * s.C + first_channel) * s.S;
  }
};

// ---- long runs: rows of `channels` runs of S values

template <class T, bool relu>
struct LongRuns {
  using A = typename Accumulation<T>::type;

  static void forward(const Call& call, const Part<T>& part) {
    for (int64_t row = 0; row < part.rows; ++row)
      for (int64_t c = 0; c < part.channels; ++c) {
        const int64_t at = part.offset(call.sizes, row) + c * call.sizes.S;
        const T* x = static_cast<const T*>(call.x) + at;
        T* y = static_cast<T*>(call.y) + at;
        const Vec<A> gain = splat(part.gain[c]), bias = splat(part.bias[c]);
        for_columns<A>(0, call.sizes.S, [&](int64_t j, auto count) {
          const Vec<A> z = fma(load(x + j, count), gain, bias);
          store(y + j, gated<T, relu>(z, z), count);
        });
      }
  }

  static void backward(const Call& call, const Part<T>& part, double* dgain, double* dbias) {
    std::fill_n(dgain, part.channels, 0.0);
    std::fill_n(dbias, part.channels, 0.0);
    for (int64_t row = 0; row < part.rows; ++row)
      for (int64_t c = 0; c < part.channels; ++c) {
        const int64_t at = part.offset(call.sizes, row) + c * call.sizes.S;
        const T* x = static_cast<const T*>(call.x) + at;
        const T* dy = static_cast<const T*>(call.dy) + at;
        T* dx = static_cast<T*>(call.dx) + at;
        const Vec<A> gain = splat(part.gain[c]), bias = splat(part.bias[c]);
        for (int64_t begin = 0; begin < call.sizes.S; begin += kTile * kLanes<A>) {
          Vec<A> product = {}, total = {};
          for_columns<A>(begin, std::min(begin + kTile * kLanes<A>, call.sizes.S), [&](int64_t j, auto count) {
            const Vec<A> value = load(x + j, count);
            const Vec<A> dz = gated<T, relu>(load(dy + j, count), fma(value, gain, bias));
            store(dx + j, dz * gain, count);
            product = fma(dz, value, product);
            total += dz;
          });
          dgain[c] += lane_sum<A>(product);
          dbias[c] += lane_sum<A>(total);
        }
      }
  }
};

// ---- short runs: rows of `columns` values, C·S apart

// Calls step(row, rows) over [begin, end); `rows` is known when compiled. Rows that lie apart come several at once,
// which share what is loaded of a column; rows side by side one by one, in the order of the memory.
template <class Step>
inline void for_rows(int64_t begin, int64_t end, bool apart, const Step& step) {
  constexpr int kAtOnce = 4;
  int64_t row = begin;
  if (apart)
    for (; row + kAtOnce <= end; row += kAtOnce) step(row, std::integral_constant<int, kAtOnce>{});
  for (; row < end; ++row) step(row, std::integral_constant<int, 1>{});
}

template <class T, bool relu>
struct ShortRuns {
  using A = typename Accumulation<T>::type;

  static void forward(const Call& call, const Part<T>& part) {
    const int64_t stride = call.sizes.C * call.sizes.S;
    for_rows(0, part.rows, stride > part.columns, [&](int64_t row, auto rows) {
      const int64_t at = part.offset(call.sizes, row);
      const T* x = static_cast<const T*>(call.x) + at;
      T* y = static_cast<T*>(call.y) + at;
      for_columns<A>(0, part.columns, [&](int64_t j, auto count) {
        const Vec<A> gain = load(part.gain + j), bias = load(part.bias + j);
        for (int r = 0; r < rows; ++r) {
          const Vec<A> z = fma(load(x + r * stride + j, count), gain, bias);
          store(y + r * stride + j, gated<T, relu>(z, z), count);
        }
      });
    });
  }

  // sums[c] += the S values of channel c.
  static void add_runs(const A* values, int64_t channels, int64_t S, double* sums) {
    if (S == 1)  // in vectors
      for (int64_t c = 0; c < channels; ++c) sums[c] += values[c];
    else
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = 0; i < S; ++i) sums[c] += *values++;
  }

  static void backward(const Call& call, const Part<T>& part, double* dgain, double* dbias) {
    const int64_t stride = call.sizes.C * call.sizes.S;
    std::fill_n(dgain, part.channels, 0.0);
    std::fill_n(dbias, part.channels, 0.0);
    for (int64_t begin = 0; begin < part.rows; begin += kTile) {
      A products[kMaxColumns], totals[kMaxColumns];
      std::fill_n(products, part.padded(), A(0));
      std::fill_n(totals, part.padded(), A(0));
      for_rows(begin, std::min(begin + kTile, part.rows), stride > part.columns, [&](int64_t row, auto rows) {
        const int64_t at = part.offset(call.sizes, row);
        const T* x = static_cast<const T*>(call.x) + at;
        const T* dy = static_cast<const T*>(call.dy) + at;
        T* dx = static_cast<T*>(call.dx) + at;
        for_columns<A>(0, part.columns, [&](int64_t j, auto count) {
          const Vec<A> gain = load(part.gain + j), bias = load(part.bias + j);
          Vec<A> product = load(products + j), total = load(totals + j);
          for (int r = 0; r < rows; ++r) {
            const int64_t i = r * stride + j;
            const Vec<A> value = load(x + i, count);
            const Vec<A> dz = gated<T, relu>(load(dy + i, count), fma(value, gain, bias));
            store(dx + i, dz * gain, count);
            product = fma(dz, value, product);
            total += dz;
          }
          store(products + j, product);
          store(totals + j, total);
        });
      });
      add_runs(products, part.channels, call.sizes.S, dgain);
      add_runs(totals, part.channels, call.sizes.S, dbias);
    }
  }
};

// Calls body(kernels, T{}) for a call.
template <class Body>
void with_kernels(const Call& call, const Body& body) {
  with_type(call.dtype, [&](auto value) {
    using T = decltype(value);
    if (call.sizes.S <= kShortRun)
      call.relu ? body(ShortRuns<T, true>{}, value) : body(ShortRuns<T, false>{}, value);
    else
      call.relu ? body(LongRuns<T, true>{}, value) : body(LongRuns<T, false>{}, value);
  });
}

}  // namespace

void forward(const Call& call, const Parts& parts, int64_t begin, int64_t end) {
  with_kernels(call, [&](auto kernels, auto value) {
    for (int64_t i = begin; i < end; ++i) kernels.forward(call, Part<decltype(value)>(call, parts, i));
  });
}

void backward(const Call& call, const Parts& parts, double* sums, int64_t begin, int64_t end) {
  with_kernels(call, [&](auto kernels, auto value) {
    for (int64_t i = begin; i < end; ++i) {
      const Part<decltype(value)> part(call, parts, i);
      double* dgain = sums + parts.sums_at(call.sizes, part.k, part.row_part) + part.first_channel;
      kernels.backward(call, part, dgain, dgain + call.sizes.C);
    }
  });
}

}  // namespace latephase::LATEPHASE_ISA
