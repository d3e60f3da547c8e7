// The products of rank1_linear with the gains inside, on one instruction set: compiled several times, with
// LATEPHASE_ISA naming the namespace. A gain meets a value where it is copied into the order in which a tile reads it,
// or where a tile is stored, so that it costs no pass over memory. No torch header here, as in member_gain.kernel.cpp.
#include "rank1_linear_products.h"

#include "tile_product.h"

namespace latephase::LATEPHASE_ISA {
namespace {

using namespace latephase::rank1_linear;

constexpr int64_t kDepth = 256;  // values of a sum that tiles take in one go: a panel stays in the first cache

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kGrainWork = 1 << 18;  // additions or copies, fewer are not worth a second thread

// Items of `work` each that a thread takes at least.
int64_t grain(int64_t work) { return 1 + kGrainWork / std::max<int64_t>(1, work); }

// ---------------------------------------------------------------------------------------------- y

constexpr int64_t kRowsOfGroup = 8 * kTileRows;  // that read a panel one after the other
template <class A>
constexpr int kRowStride = kDepth + kLanes<A>;  // of a group's rows: no power of two, which would crowd the cache

template <class A>
class ProductOf {
 public:
  ProductOf(const Product& call, const Parallel& parallel)
      : call_(call),
        depths_(call.depth, kDepth),
        padded_columns_(ceil_div(call.columns, kTileColumns<A>) * kTileColumns<A>),
        panels_(buffer<A>(call.depth * padded_columns_)) {
    parallel(padded_columns_ / kTileColumns<A>, grain(8 * call.depth * kTileColumns<A>),
             [&](int64_t begin, int64_t end) { pack(begin, end); });
    parallel(ceil_div(call.K * call.rows, kTileRows), grain(kTileRows * call.depth * padded_columns_),
             [&](int64_t begin, int64_t end) {
               const int64_t last = std::min(end * kTileRows, call.K * call.rows);
               const Buffer<A> scaled = buffer<A>(kRowsOfGroup * kRowStride<A>);
               for (int64_t row = begin * kTileRows; row < last; row += kRowsOfGroup)
                 group(row, std::min(kRowsOfGroup, last - row), scaled.get());
             });
  }

 private:
  // Part d of the depth: its panels follow each other, [depth, kTileColumns] each.
  A* panels(int64_t d) const { return panels_.get() + depths_.begin(d) * padded_columns_; }

  void pack(int64_t begin, int64_t end) const {
    const A* weight = static_cast<const A*>(call_.weight);
    const int64_t first = begin * kTileColumns<A>, columns = std::min(end * kTileColumns<A>, call_.columns) - first;
    for (int64_t d = 0; d < depths_.count; ++d) {
      const int64_t p = depths_.begin(d), depth = depths_.length(d);
      A* to = panels(d) + first * depth;
      if (!call_.transposed) {
        pack_panels(weight + p * call_.columns + first, call_.columns, depth, columns, depth * kTileColumns<A>, to);
        continue;
      }
      for (int64_t c = 0; c < columns; c += kTileColumns<A>)
        pack_transposed_panel(weight + (first + c) * call_.depth + p, call_.depth, depth,
                              std::min<int64_t>(kTileColumns<A>, columns - c), to + c * depth);
    }
  }

  // Rows [row, row + rows) of y.
  void group(int64_t row, int64_t rows, A* scaled) const {
    int64_t members[kRowsOfGroup];
    for (int64_t i = 0; i < rows; ++i) members[i] = (row + i) / call_.rows;
    for (int64_t d = 0; d < depths_.count; ++d) {
      const int64_t first = depths_.begin(d), depth = depths_.length(d);
      for (int64_t i = 0; i < rows; ++i) {
        const A* x = static_cast<const A*>(call_.x) + (row + i) * call_.depth + first;
        const A* gain = static_cast<const A*>(call_.x_gain) + members[i] * call_.depth + first;
        for_columns<A>(0, depth, [&](int64_t p, auto count) {
          store(scaled + i * kRowStride<A> + p, load(x + p, count) * load(gain + p, count), count);
        });
      }
      for (int64_t i = rows; i % kTileRows != 0; ++i) std::fill_n(scaled + i * kRowStride<A>, depth, A(0));
      for (int64_t column = 0; column < padded_columns_; column += kTileColumns<A>)
        for (int64_t i = 0; i < rows; i += kTileRows)
          tile(row + i, std::min<int64_t>(kTileRows, rows - i), column, members + i, scaled + i * kRowStride<A>,
               panels(d) + column * depth, depth, d == 0, d + 1 == depths_.count);
    }
  }

  void tile(int64_t row, int64_t rows, int64_t column, const int64_t* members, const A* a, const A* panel,
            int64_t depth, bool first, bool last) const {
    A* y = static_cast<A*>(call_.y) + row * call_.columns + column;
    const int64_t stride = call_.columns, columns = std::min<int64_t>(kTileColumns<A>, stride - column);
    Tile<A> sums = {};
    if (!first)
      for_rows<A>(sums, rows, columns, [&](int i, Vec<A>& left, Vec<A>& right, auto left_count, auto right_count) {
        left = load(y + i * stride, left_count);
        right = load(y + i * stride + kLanes<A>, right_count);
      });
    accumulate<A, kRowStride<A>, 1>(a, panel, depth, sums);
    const A* y_gain = static_cast<const A*>(call_.y_gain) + column;
    const A* bias = static_cast<const A*>(call_.bias) + column;
    for_rows<A>(sums, rows, columns, [&](int i, Vec<A> left, Vec<A> right, auto left_count, auto right_count) {
      if (last) {
        const A* gain = y_gain + members[i] * stride;
        left *= load(gain, left_count);
        right *= load(gain + kLanes<A>, right_count);
        if (call_.bias != nullptr) {
          const A* shift = bias + members[i] * call_.bias_stride;
          left += load(shift, left_count);
          right += load(shift + kLanes<A>, right_count);
        }
      }
      store(y + i * stride, left, left_count);
      store(y + i * stride + kLanes<A>, right, right_count);
    });
  }

  const Product& call_;
  const EvenParts depths_;
  const int64_t padded_columns_;
  const Buffer<A> panels_;
};

// ---------------------------------------------------------------------------------------------- gradients

constexpr int64_t kUnitTiles = 4;     // of rows of dW: one partial sum of ds
constexpr int64_t kGroupUnits = 8;    // that read x in a tile's order, once it is copied
constexpr int64_t kBlockPanels = 26;  // of columns of dW: one partial sum of dr; more would leave the second cache

template <class A>
constexpr int kRegisters = (kTileRows + kLanes<A> - 1) / kLanes<A>;  // that hold a value for each row of a tile

template <class A>
class GradientsOf {
 public:
  GradientsOf(const Gradients& call, const Parallel& parallel)
      : call_(call),
        blocks_(ceil_div(call.in, kTileColumns<A>), kBlockPanels),
        units_(ceil_div(call.out, kUnitTiles * kTileRows)),
        chunks_(call.rows, kDepth),
        partial_ds_(buffer<A>(units_ * call.K * call.in)),
        partial_dr_(buffer<A>(blocks_.count * call.K * call.out)) {
    const int64_t columns = std::min<int64_t>(call.in, kBlockPanels * kTileColumns<A>);
    parallel(blocks_.count * units_, grain(call.K * call.rows * kUnitTiles * kTileRows * columns),
             [&](int64_t begin, int64_t end) {
               const Buffer<A> x = buffer<A>(kBlockPanels * kTileColumns<A> * kDepth);
               const Buffer<A> dy = buffer<A>(kTileRows * kDepth);
               while (begin < end) {
                 const int64_t block = begin / units_, unit = begin % units_;
                 const int64_t units = std::min({kGroupUnits, end - begin, units_ - unit});
                 group(block, unit, units, x.get(), dy.get());
                 begin += units;
               }
             });
    add(partial_ds_.get(), units_, call.K * call.in, static_cast<A*>(call.ds), parallel);
    add(partial_dr_.get(), blocks_.count, call.K * call.out, static_cast<A*>(call.dr), parallel);
  }

 private:
  // A number of units within one block, for all members.
  void group(int64_t block, int64_t unit, int64_t units, A* x, A* dy) const {
    const int64_t first = blocks_.begin(block) * kTileColumns<A>;
    const int64_t columns = std::min(blocks_.length(block) * kTileColumns<A>, call_.in - first);
    const int64_t begin = unit * kUnitTiles * kTileRows;
    const int64_t end = std::min(call_.out, (unit + units) * kUnitTiles * kTileRows);
    for (int64_t k = 0; k < call_.K; ++k)
      for (int64_t u = unit; u < unit + units; ++u) std::fill_n(partial_ds(u, k) + first, columns, A(0));
    // One chunk of a member, or the rows of several members.
    const int64_t at_once = std::max<int64_t>(1, kDepth / std::max<int64_t>(1, call_.rows));
    const int64_t padded = ceil_div(columns, kTileColumns<A>) * kTileColumns<A>;
    for (int64_t k = 0; k < call_.K; k += at_once) {
      const int64_t last = std::min(k + at_once, call_.K);
      for (int64_t chunk = 0; chunk < chunks_.count; ++chunk) {
        const int64_t start = chunks_.begin(chunk), rows = chunks_.length(chunk);
        for (int64_t member = k; member < last; ++member)
          pack_panels(static_cast<const A*>(call_.x) + (member * call_.rows + start) * call_.in + first, call_.in, rows,
                      columns, rows * kTileColumns<A>, x + (member - k) * rows * padded);
        for (int64_t out = begin; out < end; out += kTileRows)
          for (int64_t member = k; member < last; ++member)
            tile_row(block, member, chunk, out, std::min<int64_t>(kTileRows, call_.out - out), first, columns,
                     member * call_.rows + start, rows, x + (member - k) * rows * padded, dy);
      }
    }
  }

  // Rows [out, out + outs) of H_k within the block, of one chunk of rows of dy and x.
  void tile_row(int64_t block, int64_t k, int64_t chunk, int64_t out, int64_t outs, int64_t first, int64_t columns,
                int64_t row, int64_t rows, const A* x, A* dy) const {
    Vec<A> dbias[kRegisters<A>] = {};
    for (int64_t p = 0; p < rows; ++p) {
      const A* from = static_cast<const A*>(call_.dy) + (row + p) * call_.out + out;
#pragma GCC unroll 3
      for (int v = 0; v < kRegisters<A>; ++v) {
        const int there = static_cast<int>(std::clamp<int64_t>(outs - v * kLanes<A>, 0, kLanes<A>));
        const Vec<A> values = load(from + v * kLanes<A>, there);
        dbias[v] += values;
        store(dy + p * kTileRows + v * kLanes<A>, values, std::min<int>(kLanes<A>, kTileRows - v * kLanes<A>));
      }
    }
    Vec<A> sums_of_rows[kTileRows] = {};
    const A* r = static_cast<const A*>(call_.r) + k * call_.out + out;
    for (int64_t c = 0; c < columns; c += kTileColumns<A>) {
      const int64_t column = first + c;
      const int64_t count = std::min<int64_t>(kTileColumns<A>, columns - c);
      const A* s = static_cast<const A*>(call_.s) + k * call_.in + column;
      A* ds = partial_ds(out / (kUnitTiles * kTileRows), k) + column;
      const A* weight = static_cast<const A*>(call_.weight) + out * call_.in + column;
      A* dweight = static_cast<A*>(call_.dweight) + out * call_.in + column;
      for (int64_t i = 0; i < outs; ++i)
        for (int64_t line = 0; line < count; line += 64 / static_cast<int>(sizeof(A))) {
          __builtin_prefetch(weight + i * call_.in + line);
          __builtin_prefetch(dweight + i * call_.in + line, 1);
        }
      Tile<A> products = {};
      accumulate<A, 1, kTileRows>(dy, x + c * rows, rows, products);
      const bool starts = k == 0 && chunk == 0;
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes<A>, count)), more = static_cast<int>(count) - lanes;
      const Vec<A> s_left = load(s, lanes), s_right = load(s + kLanes<A>, more);
      Vec<A> ds_left = load(ds, lanes), ds_right = load(ds + kLanes<A>, more);
      for_rows<A>(products, outs, count, [&](int i, Vec<A> left, Vec<A> right, auto left_count, auto right_count) {
        const Vec<A> gain = splat(r[i]);
        Vec<A> sum_of_row = sums_of_rows[i];
        const auto add = [&](int64_t at, Vec<A> product, Vec<A> s_v, Vec<A>& sum_of_columns, auto lanes_there) {
          const Vec<A> weighted = product * load(weight + at, lanes_there);
          sum_of_row = fma(weighted, s_v, sum_of_row);
          sum_of_columns = fma(weighted, gain, sum_of_columns);
          const Vec<A> before = starts ? Vec<A>{} : load(dweight + at, lanes_there);
          store(dweight + at, fma(product * gain, s_v, before), lanes_there);
        };
        add(i * call_.in, left, s_left, ds_left, left_count);
        add(i * call_.in + kLanes<A>, right, s_right, ds_right, right_count);
        sums_of_rows[i] = sum_of_row;
      });
      store(ds, ds_left, lanes);
      store(ds + kLanes<A>, ds_right, more);
    }
    A* dr = partial_dr_.get() + (block * call_.K + k) * call_.out + out;
    A* bias_sums = static_cast<A*>(call_.dbias) + k * call_.out + out;
#pragma GCC unroll 3
    for (int v = 0; v < kRegisters<A>; ++v, dr += kLanes<A>, bias_sums += kLanes<A>) {
      const int there = static_cast<int>(std::clamp<int64_t>(outs - v * kLanes<A>, 0, kLanes<A>));
      Vec<A> square[kLanes<A>];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<A>; ++i)
        square[i] = v * kLanes<A> + i < kTileRows ? sums_of_rows[v * kLanes<A> + i] : Vec<A>{};
      const Vec<A> sums = sums_of_registers<A>(square);
      store(dr, chunk == 0 ? sums : load(dr, there) + sums, there);
      if (block == 0) store(bias_sums, chunk == 0 ? dbias[v] : load(bias_sums, there) + dbias[v], there);
    }
  }

  A* partial_ds(int64_t unit, int64_t k) const { return partial_ds_.get() + (unit * call_.K + k) * call_.in; }

  static void add(const A* parts, int64_t count, int64_t size, A* sums, const Parallel& parallel) {
    parallel(size, grain(8 * count), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double sum = 0;
        for (int64_t part = 0; part < count; ++part) sum += parts[part * size + i];
        sums[i] = static_cast<A>(sum);
      }
    });
  }

  const Gradients& call_;
  const EvenParts blocks_;  // of panels
  const int64_t units_;
  const EvenParts chunks_;  // of a member's rows
  const Buffer<A> partial_ds_, partial_dr_;
};

}  // namespace

void product(const Product& call, const Parallel& parallel) {
  call.dtype == DataType::Double ? void(ProductOf<double>(call, parallel)) : void(ProductOf<float>(call, parallel));
}

void gradients(const Gradients& call, const Parallel& parallel) {
  call.dtype == DataType::Double ? void(GradientsOf<double>(call, parallel)) : void(GradientsOf<float>(call, parallel));
}

}  // namespace latephase::LATEPHASE_ISA
