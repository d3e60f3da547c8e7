// Ensemble batch norm on one instruction set: compiled several times, with LATEPHASE_ISA naming the namespace. No torch
// header here: an inline function compiled for a newer processor must never be the one the linker keeps for all.
//
// Work is shared out by items that do not depend on the number of threads: (member, channel) where columns are spatial,
// (member, block of channels) where columns are channels. An item reads its values once from memory; what it reads
// again comes from cache. W = lanes of a register.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../activation.h"
#include "../ensemble_batch_norm_arguments.h"
#include "vec.h"

namespace latephase::LATEPHASE_ISA {
namespace {

using namespace latephase::ensemble_batch_norm;

constexpr int64_t kTile = 256 * kLanes<float>;  // values summed in the accumulation type before a merge in double
constexpr int kBlock = 4;  // registers of channels an item of the channels-are-columns kernels holds

template <class T>
constexpr typename Accumulation<T>::type kRoundsToZero = 0;
template <>
constexpr float kRoundsToZero<Half> = kRoundsToZeroHalf;
template <>
constexpr float kRoundsToZero<BFloat16> = kRoundsToZeroBFloat16;

// Mean and M2 = Σ(x − mean)² of the values merged so far (Chan, Golub, LeVeque 1979).
struct Moments {
  double count = 0, mean = 0, m2 = 0;
  // `sum` and `squares` are Σd and Σd² of d = x − shift over m values; shift is `mean` once anything was merged, so
  // that the cancellation in Σd² − (Σd)²/m stays below the rounding of the merged M2.
  void merge(double m, double shift, double sum, double squares) {
    const double tile_mean = shift + sum / m, delta = tile_mean - mean;
    m2 += squares - sum * sum / m + (count > 0 ? delta * delta * count * m / (count + m) : 0);
    mean = count > 0 ? mean + delta * m / (count + m) : tile_mean;
    count += m;
  }
};

template <class T>
typename Accumulation<T>::type affine_at(const Affine& p, int64_t k, int64_t c, typename Accumulation<T>::type absent) {
  using A = typename Accumulation<T>::type;
  if (p.data == nullptr) return absent;
  const int64_t i = k * p.member_stride + c;
  switch (p.dtype) {
    case DataType::Float:
      return static_cast<A>(static_cast<const float*>(p.data)[i]);
    case DataType::Double:
      return static_cast<A>(static_cast<const double*>(p.data)[i]);
    case DataType::BFloat16:
      return static_cast<A>(widen(Bits16{} + static_cast<const uint16_t*>(p.data)[i], BFloat16{})[0]);
    case DataType::Half:
      return static_cast<A>(half_to_float(static_cast<const uint16_t*>(p.data)[i]));
  }
  return absent;
}

// One (member, channel)'s coefficients: y = (x − mean) · scale + bias; dx = dz · scale − ((x − mean) · slope + offset).
template <class A>
struct Coefficients {
  Vec<A> mean, scale, bias, slope, offset;
};

template <class A>
inline Vec<A> normalize(Vec<A> x, const Coefficients<A>& c) {
  return fma(x - c.mean, c.scale, c.bias);
}

template <class A>
void set_lane(Coefficients<A>& out, int lane, A mean, A scale, A bias, A slope, A offset) {
  out.mean[lane] = mean, out.scale[lane] = scale, out.bias[lane] = bias;
  out.slope[lane] = slope, out.offset[lane] = offset;
}

// The coefficients of channels c0 … c0 + count, a lane each; lanes past `count` stay zero. `broadcast` copies lane 0 to
// all.
template <class T, class Arguments, class A = typename Accumulation<T>::type>
Coefficients<A> coefficients(const Arguments& f, int64_t k, int64_t c0, int count, bool broadcast) {
  Coefficients<A> out{};
  for (int lane = 0; lane < count; ++lane) {
    const int64_t c = c0 + lane, i = k * f.sizes.C + c;
    const A rstd = static_cast<const A*>(f.rstd)[i];
    const A scale = rstd * affine_at<T>(f.weight, k, c, 1);
    A slope = 0, offset = 0;
    if constexpr (std::is_same_v<Arguments, Backward>) {
      const A* sum_dz = static_cast<const A*>(f.sum_dz);
      const A* sum_dz_xhat = static_cast<const A*>(f.sum_dz_xhat);
      if (f.dx != nullptr && std::isfinite(f.count)) {
        offset = scale * static_cast<A>(sum_dz[i] / f.count);
        slope = scale * rstd * static_cast<A>(sum_dz_xhat[i] / f.count);
      }
    }
    const A mean = static_cast<const A*>(f.mean)[i], bias = affine_at<T>(f.bias, k, c, 0);
    set_lane(out, lane, mean, scale, bias, slope, offset);
  }
  if (broadcast)
    for (int lane = 1; lane < kLanes<A>; ++lane)
      set_lane(out, lane, out.mean[0], out.scale[0], out.bias[0], out.slope[0], out.offset[0]);
  return out;
}

template <class A>
void write_statistics(const Forward& f, int64_t i, const Moments& moments) {
  const double var = moments.m2 < 0 ? 0 : moments.m2 / moments.count;  // NaN stays NaN
  static_cast<A*>(f.mean)[i] = static_cast<A>(moments.mean);
  if (f.var) static_cast<A*>(f.var)[i] = static_cast<A>(var);
  if (f.rstd) static_cast<A*>(f.rstd)[i] = static_cast<A>(1 / std::sqrt(var + f.eps));
}

// ---- one register of values, forward and backward

template <class T, class A>
inline void forward_step(const Forward& f, int64_t at, uint8_t* mask, int64_t column, int count,
                         const Coefficients<A>& c) {
  const T* x = static_cast<const T*>(f.x) + at;
  T* y = static_cast<T*>(f.y) + at;
  const bool whole = count == kLanes<A>;
  Vec<A> z = normalize<A>(whole ? load(x) : load(x, count), c);
  if (f.residual) {
    const T* residual = static_cast<const T*>(f.residual) + at;
    z += whole ? load(residual) : load(residual, count);
  }
  if (f.relu) {
    const Mask<A> passed = ~(z <= splat<A>(kRoundsToZero<T>));
    z = keep<A>(z, passed);
    if (mask) write_mask<A>(mask, column, passed, count);
  }
  whole ? store(y, z) : store(y, z, count);
}

// dz = dy where the activation passed; also returns x − mean.
template <class T, class A>
inline Vec<A> gradient_step(const Backward& b, int64_t at, const uint8_t* mask, int64_t column, int count,
                            const Coefficients<A>& c, Vec<A>& centred) {
  const T* x = static_cast<const T*>(b.x) + at;
  const T* dy = static_cast<const T*>(b.dy) + at;
  const bool whole = count == kLanes<A>;
  const Vec<A> value = whole ? load(x) : load(x, count);
  const Vec<A> dz = whole ? load(dy) : load(dy, count);
  centred = value - c.mean;
  if (!b.relu) return dz;
  const Mask<A> passed =
      mask ? read_mask<A>(mask, column, count) : ~(normalize<A>(value, c) <= splat<A>(kRoundsToZero<T>));
  return keep<A>(dz, passed);
}

template <class T, class A>
inline void backward_step(const Backward& b, int64_t at, const uint8_t* mask, int64_t column, int count,
                          const Coefficients<A>& c) {
  Vec<A> centred;
  const Vec<A> dz = gradient_step<T, A>(b, at, mask, column, count, c, centred);
  // Constant statistics pass no gradient on, so that a NaN elsewhere does not come in through 0 · NaN.
  const bool constant = std::isinf(b.count);
  const Vec<A> dx = constant ? dz * c.scale : fma(dz, c.scale, -fma(centred, c.slope, c.offset));
  T* out = static_cast<T*>(b.dx) + at;
  T* dresidual = b.dresidual ? static_cast<T*>(b.dresidual) + at : nullptr;
  const bool whole = count == kLanes<A>;
  whole ? store(out, dx) : store(out, dx, count);
  if (dresidual) whole ? store(dresidual, dz) : store(dresidual, dz, count);
}

// Calls step(column, count) over [0, columns) in registers.
template <class A, class Step>
inline void for_columns(int64_t begin, int64_t end, const Step& step) {
  int64_t j = begin;
  for (; j + kLanes<A> <= end; j += kLanes<A>) step(j, kLanes<A>);
  if (j < end) step(j, static_cast<int>(end - j));
}

// ---- columns are spatial: an item is one (member, channel), B rows of S values, C·S apart

template <class T>
struct Spatial {
  using A = typename Accumulation<T>::type;

  // Calls tile(first row, rows, first column, columns) over the item in tiles of about kTile values.
  template <class Tile>
  static void for_tiles(const Sizes& s, const Tile& tile) {
    const int64_t rows = std::max<int64_t>(1, kTile / s.S), columns = rows > 1 ? s.S : kTile;
    for (int64_t b = 0; b < s.B; b += rows)
      for (int64_t j = 0; j < s.S; j += columns) tile(b, std::min(b + rows, s.B), j, std::min(j + columns, s.S));
  }

  static Moments statistics(const Forward& f, int64_t first) {
    const Sizes& s = f.sizes;
    Moments moments;
    for_tiles(s, [&](int64_t b0, int64_t b1, int64_t j0, int64_t j1) {
      const double m = static_cast<double>((b1 - b0) * (j1 - j0));
      double sum, squares;
      const auto sums = [&](A shift) {
        Vec<A> total[2] = {}, square[2] = {};
        for (int64_t b = b0; b < b1; ++b) {
          const T* row = static_cast<const T*>(f.x) + first + b * s.C * s.S;
          int64_t j = j0;
          for (; j + 2 * kLanes<A> <= j1; j += 2 * kLanes<A>)
            for (int u = 0; u < 2; ++u) {
              const Vec<A> d = load(row + j + u * kLanes<A>) - shift;
              total[u] += d;
              square[u] = fma(d, d, square[u]);
            }
          for_columns<A>(j, j1, [&](int64_t column, int count) {
            Vec<A> d = load(row + column, count) - shift;
            for (int lane = count; lane < kLanes<A>; ++lane) d[lane] = 0;
            total[0] += d;
            square[0] = fma(d, d, square[0]);
          });
        }
        sum = lane_sum<A>(total[0]) + lane_sum<A>(total[1]);
        squares = lane_sum<A>(square[0]) + lane_sum<A>(square[1]);
      };
      if (moments.count == 0) sums(0);
      const A shift = static_cast<A>(moments.count == 0 ? sum / m : moments.mean);
      sums(shift);
      moments.merge(m, shift, sum, squares);
    });
    return moments;
  }

  static void forward(const Forward& f, int64_t begin, int64_t end) {
    const Sizes& s = f.sizes;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t k = item / s.C, c = item % s.C, first = (k * s.B * s.C + c) * s.S;
      if (f.compute_statistics) write_statistics<A>(f, item, statistics(f, first));
      if (!f.y) continue;
      const Coefficients<A> at = coefficients<T>(f, k, c, 1, true);
      for (int64_t b = 0; b < s.B; ++b) {
        const int64_t row = first + b * s.C * s.S;
        uint8_t* mask = f.mask ? f.mask + row / s.S * s.mask_row_bytes() : nullptr;
        for_columns<A>(0, s.S, [&](int64_t j, int count) { forward_step<T, A>(f, row + j, mask, j, count, at); });
      }
    }
  }

  static void backward(const Backward& b, int64_t begin, int64_t end) {
    const Sizes& s = b.sizes;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t k = item / s.C, c = item % s.C, first = (k * s.B * s.C + c) * s.S;
      const auto mask_of = [&](int64_t row) { return b.mask ? b.mask + row / s.S * s.mask_row_bytes() : nullptr; };
      if (b.compute_sums) {
        const Coefficients<A> at = coefficients<T>(b, k, c, 1, true);
        DoubleSum<A> total, product;
        for (int64_t r = 0; r < s.B; ++r) {
          const int64_t row = first + r * s.C * s.S;
          const uint8_t* mask = mask_of(row);
          for_columns<A>(0, s.S, [&](int64_t j, int count) {
            Vec<A> centred;
            const Vec<A> dz = gradient_step<T, A>(b, row + j, mask, j, count, at, centred);
            total.add(dz);
            product.add(dz * centred);
          });
        }
        static_cast<A*>(b.sum_dz)[item] = static_cast<A>(total.total());
        static_cast<A*>(b.sum_dz_xhat)[item] = static_cast<A>(product.total() * static_cast<const A*>(b.rstd)[item]);
      }
      if (!b.dx) continue;
      const Coefficients<A> at = coefficients<T>(b, k, c, 1, true);
      for (int64_t r = 0; r < s.B; ++r) {
        const int64_t row = first + r * s.C * s.S;
        const uint8_t* mask = mask_of(row);
        for_columns<A>(0, s.S, [&](int64_t j, int count) { backward_step<T, A>(b, row + j, mask, j, count, at); });
      }
    }
  }
};

// ---- columns are channels: an item is (member, kBlock registers of channels), n rows, C apart

template <class T>
struct Channels {
  using A = typename Accumulation<T>::type;
  static constexpr int W = kLanes<A>;
  static constexpr int64_t kTileRows = 64;

  // Runs body(std::integral_constant<R registers>, first channel, channels) over an item: the whole block at once, or
  // register by register at the ragged end of the channels.
  template <class Body>
  static void for_blocks(const Sizes& s, int64_t item, const Body& body) {
    const int64_t blocks = (s.C + kBlock * W - 1) / (kBlock * W);
    const int64_t k = item / blocks, c0 = item % blocks * kBlock * W, c1 = std::min<int64_t>(c0 + kBlock * W, s.C);
    if (c1 - c0 == kBlock * W)
      body(std::integral_constant<int, kBlock>{}, k, c0, W);
    else
      for_columns<A>(c0, c1, [&](int64_t c, int count) { body(std::integral_constant<int, 1>{}, k, c, count); });
  }

  template <int R>
  static void statistics(const Forward& f, int64_t k, int64_t c0, int count) {
    const Sizes& s = f.sizes;
    const T* slab = static_cast<const T*>(f.x) + k * s.n() * s.C + c0;
    Moments moments[R * W];
    for (int64_t i0 = 0; i0 < s.n(); i0 += kTileRows) {
      const int64_t i1 = std::min(i0 + kTileRows, s.n());
      const double m = static_cast<double>(i1 - i0);
      Vec<A> shift[R] = {}, total[R], square[R];
      const auto sums = [&] {
        for (int r = 0; r < R; ++r) total[r] = square[r] = Vec<A>{};
        for (int64_t i = i0; i < i1; ++i)
          for (int r = 0; r < R; ++r) {
            const T* x = slab + i * s.C + r * W;
            const Vec<A> d = (count == W ? load(x) : load(x, count)) - shift[r];
            total[r] += d;
            square[r] = fma(d, d, square[r]);
          }
      };
      if (i0 == 0) {
        sums();
        for (int r = 0; r < R; ++r) shift[r] = total[r] / static_cast<A>(m);
      } else {
        for (int c = 0; c < R * W; ++c) shift[c / W][c % W] = static_cast<A>(moments[c].mean);
      }
      sums();
      for (int c = 0; c < R * W; ++c)
        moments[c].merge(m, shift[c / W][c % W], total[c / W][c % W], square[c / W][c % W]);
    }
    for (int c = 0; c < (R == 1 ? count : R * W); ++c) write_statistics<A>(f, k * s.C + c0 + c, moments[c]);
  }

  template <int R, class Arguments>
  static void fill(Coefficients<A> (&at)[R], const Arguments& f, int64_t k, int64_t c0, int count) {
    for (int r = 0; r < R; ++r) at[r] = coefficients<T>(f, k, c0 + r * W, count, false);
  }

  static void forward(const Forward& f, int64_t begin, int64_t end) {
    const Sizes& s = f.sizes;
    for (int64_t item = begin; item < end; ++item)
      for_blocks(s, item, [&](auto registers, int64_t k, int64_t c0, int count) {
        constexpr int R = decltype(registers)::value;
        if (f.compute_statistics) statistics<R>(f, k, c0, count);
        if (!f.y) return;
        Coefficients<A> at[R];
        fill(at, f, k, c0, count);
        for (int64_t i = k * s.n(); i < (k + 1) * s.n(); ++i) {
          uint8_t* mask = f.mask ? f.mask + i * s.mask_row_bytes() : nullptr;
          for (int r = 0; r < R; ++r) forward_step<T, A>(f, i * s.C + c0 + r * W, mask, c0 + r * W, count, at[r]);
        }
      });
  }

  static void backward(const Backward& b, int64_t begin, int64_t end) {
    const Sizes& s = b.sizes;
    for (int64_t item = begin; item < end; ++item)
      for_blocks(s, item, [&](auto registers, int64_t k, int64_t c0, int count) {
        constexpr int R = decltype(registers)::value;
        Coefficients<A> at[R];
        if (b.compute_sums) {
          fill(at, b, k, c0, count);
          reduce<R>(b, k, c0, count, at);
        }
        if (!b.dx) return;
        fill(at, b, k, c0, count);
        for (int64_t i = k * s.n(); i < (k + 1) * s.n(); ++i) {
          const uint8_t* mask = b.mask ? b.mask + i * s.mask_row_bytes() : nullptr;
          for (int r = 0; r < R; ++r) backward_step<T, A>(b, i * s.C + c0 + r * W, mask, c0 + r * W, count, at[r]);
        }
      });
  }

  template <int R>
  static void reduce(const Backward& b, int64_t k, int64_t c0, int count, const Coefficients<A> (&at)[R]) {
    const Sizes& s = b.sizes;
    double sum_dz[R * W] = {}, sum_dz_centred[R * W] = {};
    for (int64_t i0 = 0; i0 < s.n(); i0 += kTileRows) {
      Vec<A> total[R] = {}, product[R] = {};
      for (int64_t i = k * s.n() + i0; i < k * s.n() + std::min(i0 + kTileRows, s.n()); ++i) {
        const uint8_t* mask = b.mask ? b.mask + i * s.mask_row_bytes() : nullptr;
        for (int r = 0; r < R; ++r) {
          Vec<A> centred;
          const Vec<A> dz = gradient_step<T, A>(b, i * s.C + c0 + r * W, mask, c0 + r * W, count, at[r], centred);
          total[r] += dz;
          product[r] = fma(dz, centred, product[r]);
        }
      }
      for (int c = 0; c < R * W; ++c) {
        sum_dz[c] += total[c / W][c % W];
        sum_dz_centred[c] += product[c / W][c % W];
      }
    }
    for (int c = 0; c < (R == 1 ? count : R * W); ++c) {
      const int64_t i = k * s.C + c0 + c;
      static_cast<A*>(b.sum_dz)[i] = static_cast<A>(sum_dz[c]);
      static_cast<A*>(b.sum_dz_xhat)[i] = static_cast<A>(sum_dz_centred[c] * static_cast<const A*>(b.rstd)[i]);
    }
  }
};

template <class Body>
void with_type(DataType dtype, const Body& body) {
  switch (dtype) {
    case DataType::Float:
      return body(float{});
    case DataType::Double:
      return body(double{});
    case DataType::BFloat16:
      return body(BFloat16{});
    case DataType::Half:
      return body(Half{});
  }
}

}  // namespace

int64_t items(const Sizes& s, DataType dtype) {
  const int lanes = dtype == DataType::Double ? kLanes<double> : kLanes<float>;
  return s.K * (s.channels_last ? (s.C + kBlock * lanes - 1) / (kBlock * lanes) : s.C);
}

void forward(const Forward& f, int64_t begin, int64_t end) {
  with_type(f.dtype, [&](auto value) {
    using T = decltype(value);
    f.sizes.channels_last ? Channels<T>::forward(f, begin, end) : Spatial<T>::forward(f, begin, end);
  });
}

void backward(const Backward& b, int64_t begin, int64_t end) {
  with_type(b.dtype, [&](auto value) {
    using T = decltype(value);
    b.sizes.channels_last ? Channels<T>::backward(b, begin, end) : Spatial<T>::backward(b, begin, end);
  });
}

}  // namespace latephase::LATEPHASE_ISA
