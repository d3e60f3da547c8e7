// The products of rank1_linear with the gains inside, on one instruction set: compiled several times, with
// LATEPHASE_ISA naming the namespace. A gain meets a value where it is copied into the order in which a tile reads it,
// or where a tile is stored, so that it costs no pass over memory. No torch header here, as in member_gain.kernel.cpp.
#include "rank1_linear_products.h"

#include "tile_product.h"

namespace latephase::LATEPHASE_ISA {
namespace {

using namespace latephase::rank1_linear;

// ---------------------------------------------------------------------------------------------- y

constexpr int64_t kDepth = 512;               // values of a sum that tiles take in one go
constexpr int64_t kFewRows = 32 * kTileRows;  // of all members, so few that they stay in the second cache
constexpr int64_t kSummedRows = 32;           // whose sums are taken by themselves: shorter sums round less
constexpr int64_t kTilesOfGroup = 16;         // else: that a panel of the weight goes through before the next
template <class A>
constexpr int kRowStride = kDepth + kLanes<A>;  // of scaled rows: no power of two, which would crowd the cache

template <class A>
class ProductOf {
 public:
  ProductOf(const Product& call, const Parallel& parallel)
      : call_(call), depths_(call.depth, kDepth), panel_count_(ceil_div(call.columns, kTileColumns<A>)) {
    if (call.y_factor_sums != nullptr) std::fill_n(static_cast<A*>(call.y_factor_sums), call.K * call.columns, A(0));
    const int64_t rows = call.K * call.rows;
    rows <= kFewRows ? few_rows(parallel) : many_rows(parallel);
  }

 private:
  // All rows are scaled for all threads; a panel of the weight is copied by the thread that uses it up.
  void few_rows(const Parallel& parallel) const {
    const int64_t rows = call_.K * call_.rows, size = padded(rows) * kRowStride<A>;
    const Buffer<A> scaled = buffer<A>(depths_.count * size);
    parallel(call_.K * depths_.count, grain(call_.rows * kDepth), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = i / depths_.count, d = i % depths_.count, row = k * call_.rows;
        scale(k, row, call_.rows, d, scaled.get() + d * size + row * kRowStride<A>);
      }
    });
    for (int64_t d = 0; d < depths_.count; ++d) pad(rows, scaled.get() + d * size);
    parallel(panel_count_, grain(rows * call_.depth * kTileColumns<A>), [&](int64_t begin, int64_t end) {
      const Buffer<A> panel = buffer<A>(kDepth * kTileColumns<A>);
      for (int64_t d = 0; d < depths_.count; ++d)
        for (int64_t i = begin; i < end; ++i) {
          pack(d, i, panel.get());
          tiles(0, rows, i, d, scaled.get() + d * size, panel.get());
        }
    });
  }

  // The weight is copied for all threads; rows are scaled by the thread that uses them up.
  void many_rows(const Parallel& parallel) const {
    const Buffer<A> panels = buffer<A>(panel_count_ * kTileColumns<A> * call_.depth);
    const auto panel = [&](int64_t d, int64_t i) {
      return panels.get() + kTileColumns<A> * (depths_.begin(d) * panel_count_ + i * depths_.length(d));
    };
    parallel(panel_count_, grain(8 * call_.depth * kTileColumns<A>), [&](int64_t begin, int64_t end) {
      for (int64_t d = 0; d < depths_.count; ++d)
        for (int64_t i = begin; i < end; ++i) pack(d, i, panel(d, i));
    });
    // Rows that stay together: a tile's, or a member's where there is a sum over them.
    const int64_t rows = call_.K * call_.rows;
    const int64_t unit = call_.x_sums != nullptr || call_.y_factor_sums != nullptr ? call_.rows : kTileRows;
    const int64_t units = std::max<int64_t>(1, kTilesOfGroup * kTileRows / unit);
    parallel(ceil_div(rows, unit), grain(unit * call_.depth * call_.columns), [&](int64_t begin, int64_t end) {
      const Buffer<A> scaled = buffer<A>(padded(units * unit) * kRowStride<A>);
      const EvenParts groups(end - begin, units);
      for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t row = (begin + groups.begin(g)) * unit, last = std::min(row + groups.length(g) * unit, rows);
        for (int64_t d = 0; d < depths_.count; ++d) {
          for (int64_t from = row, to; from < last; from = to) {
            const int64_t k = from / call_.rows;
            to = std::min(last, (k + 1) * call_.rows);
            scale(k, from, to - from, d, scaled.get() + (from - row) * kRowStride<A>);
          }
          pad(last - row, scaled.get());
          for (int64_t i = 0; i < panel_count_; ++i) tiles(row, last - row, i, d, scaled.get(), panel(d, i));
        }
      }
    });
  }

  static int64_t padded(int64_t rows) { return ceil_div(rows, kTileRows) * kTileRows; }

  static void pad(int64_t rows, A* scaled) {
    std::fill_n(scaled + rows * kRowStride<A>, (padded(rows) - rows) * kRowStride<A>, A(0));
  }

  // Panel i of part d of the depth.
  void pack(int64_t d, int64_t i, A* panel) const {
    const A* weight = static_cast<const A*>(call_.weight);
    const int64_t p = depths_.begin(d), depth = depths_.length(d), first = i * kTileColumns<A>;
    const int64_t columns = std::min<int64_t>(kTileColumns<A>, call_.columns - first);
    if (call_.transposed)
      pack_transposed_panel(weight + first * call_.depth + p, call_.depth, depth, columns, panel);
    else
      pack_panels(weight + p * call_.columns + first, call_.columns, depth, columns, 0, panel);
  }

  // Part d of some rows of member k; of all its rows if there is a sum over them.
  void scale(int64_t k, int64_t row, int64_t rows, int64_t d, A* scaled) const {
    const int64_t first = depths_.begin(d), at = k * call_.depth + first;
    const A* x = static_cast<const A*>(call_.x) + row * call_.depth + first;
    const A* factor = static_cast<const A*>(call_.x_factor) + row * call_.depth + first;
    const A* gain = static_cast<const A*>(call_.x_gain) + at;
    A sums[kDepth], factor_sums[kDepth];
    A* total = static_cast<A*>(call_.x_sums) + at;
    A* factor_total = static_cast<A*>(call_.x_factor_sums) + at;
    const int64_t depth = depths_.length(d);
    if (call_.x_sums != nullptr) std::fill_n(total, depth, A(0)), std::fill_n(factor_total, depth, A(0));
    for (int64_t begin = 0; begin < rows; begin += kSummedRows) {
      if (call_.x_sums != nullptr) std::fill_n(sums, depth, A(0)), std::fill_n(factor_sums, depth, A(0));
      const int64_t end = std::min(begin + kSummedRows, rows);
      for (int64_t i = begin; i < end; ++i, x += call_.depth, factor += call_.depth, scaled += kRowStride<A>)
        for_columns<A>(0, depth, [&](int64_t p, auto count) {
          const Vec<A> value = load(x + p, count);
          __builtin_prefetch(x + call_.depth + p);
          if (call_.x_sums != nullptr) __builtin_prefetch(factor + call_.depth + p);
          store(scaled + p, value * load(gain + p, count), count);
          if (call_.x_sums == nullptr) return;
          store(sums + p, load(sums + p, count) + value, count);
          store(factor_sums + p, fma(value, load(factor + p, count), load(factor_sums + p, count)), count);
        });
      if (call_.x_sums == nullptr) continue;
      for (int64_t p = 0; p < depth; ++p) total[p] += sums[p], factor_total[p] += factor_sums[p];
    }
  }

  // All tiles of some rows in panel i, of part d.
  void tiles(int64_t row, int64_t rows, int64_t i, int64_t d, const A* scaled, const A* panel) const {
    for (int64_t r = 0; r < rows; r += kTileRows)
      tile(row + r, std::min<int64_t>(kTileRows, rows - r), i * kTileColumns<A>, scaled + r * kRowStride<A>, panel, d);
  }

  // A tile of y: the sums so far, which lie there, and part d of the depth.
  void tile(int64_t row, int64_t rows, int64_t column, const A* a, const A* panel, int64_t d) const {
    A* y = static_cast<A*>(call_.y) + row * call_.columns + column;
    const int64_t stride = call_.columns, columns = std::min<int64_t>(kTileColumns<A>, stride - column);
    const bool last = d + 1 == depths_.count;
    const A* product = static_cast<const A*>(call_.product) + row * stride + column;
    const A* factor = static_cast<const A*>(call_.y_factor) + row * stride + column;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t line = 0; line < columns; line += 64 / static_cast<int>(sizeof(A))) {
        __builtin_prefetch(y + i * stride + line, 1);
        if (last && call_.product != nullptr) __builtin_prefetch(product + i * stride + line, 1);
        if (last && call_.y_factor_sums != nullptr) __builtin_prefetch(factor + i * stride + line);
      }
    Tile<A> sums = {};
    if (d > 0)
      for_rows<A>(sums, rows, columns, [&](int i, Vec<A>& left, Vec<A>& right, auto left_count, auto right_count) {
        left = load(y + i * stride, left_count);
        right = load(y + i * stride + kLanes<A>, right_count);
      });
    accumulate<A, kRowStride<A>, 1>(a, panel, depths_.length(d), sums);
    if (!last) {
      for_rows<A>(sums, rows, columns, [&](int i, Vec<A> left, Vec<A> right, auto left_count, auto right_count) {
        store(y + i * stride, left, left_count);
        store(y + i * stride + kLanes<A>, right, right_count);
      });
      return;
    }
    finish(sums, row, rows, column, columns, y);
  }

  // What comes behind the sums.
  void finish(Tile<A>& sums, int64_t row, int64_t rows, int64_t column, int64_t columns, A* y) const {
    const int64_t stride = call_.columns, offset = row * stride + column;
    int64_t k = row / call_.rows, next = (k + 1) * call_.rows - row;  // a member's first row, from this one
    const A* gain = static_cast<const A*>(call_.y_gain) + k * stride + column;
    const A* bias = static_cast<const A*>(call_.bias) + k * call_.bias_stride + column;
    A* product = static_cast<A*>(call_.product) + offset;
    const A* factor = static_cast<const A*>(call_.y_factor) + offset;
    A* factor_sums = static_cast<A*>(call_.y_factor_sums) + k * stride + column;
    for_rows<A>(sums, rows, columns, [&](int i, Vec<A> left, Vec<A> right, auto left_count, auto right_count) {
      if (i == next) {
        next += call_.rows;
        gain += stride;
        bias += call_.bias_stride;
        factor_sums += stride;
      }
      const auto store_half = [&](int at, Vec<A> value, auto count) {
        if (call_.product != nullptr) store(product + i * stride + at, value, count);
        if (call_.y_factor_sums != nullptr)
          store(factor_sums + at, fma(value, load(factor + i * stride + at, count), load(factor_sums + at, count)),
                count);
        value *= load(gain + at, count);
        if (call_.bias != nullptr) value += load(bias + at, count);
        store(y + i * stride + at, value, count);
      };
      store_half(0, left, left_count);
      store_half(kLanes<A>, right, right_count);
    });
  }

  const Product& call_;
  const EvenParts depths_;
  const int64_t panel_count_;
};

}  // namespace

void product(const Product& call, const Parallel& parallel) {
  call.dtype == DataType::Double ? void(ProductOf<double>(call, parallel)) : void(ProductOf<float>(call, parallel));
}

}  // namespace latephase::LATEPHASE_ISA
