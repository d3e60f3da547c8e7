// The gradients of rank1_linear's weight, gains and bias on one instruction set: compiled several times, with
// LATEPHASE_ISA naming the namespace. No torch header here, as in member_gain.kernel.cpp.
#include "rank1_linear_products.h"
#include "tile_product.h"

namespace latephase::LATEPHASE_ISA {
namespace {

using namespace latephase::rank1_linear;

// ---------------------------------------------------------------------------------------------- by member

constexpr int64_t kDepth = 256;       // rows that tiles take in one go: a panel of x stays in the first cache
constexpr int64_t kUnitTiles = 2;     // of rows of dW: one partial sum of ds
constexpr int64_t kGroupUnits = 16;   // that read x in a tile's order, once it is copied
constexpr int64_t kBlockPanels = 26;  // of columns of dW: one partial sum of dr; more would leave the second cache

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
               const Buffer<A> dy = buffer<A>(kPackedTiles * packed_stride<A>(kDepth));
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
        for (int64_t out = begin; out < end; out += kPackedTiles * kTileRows)
          for (int64_t member = k; member < last; ++member) {
            const int64_t outs = std::min<int64_t>(kPackedTiles * kTileRows, end - out);
            pack_dy(block, member, chunk, out, outs, start, rows, dy);
            for (int64_t i = 0; i < outs; i += kTileRows)
              tile_row(block, member, chunk, out + i, std::min<int64_t>(kTileRows, outs - i), first, columns, rows,
                       x + (member - k) * rows * padded, dy + i / kTileRows * packed_stride<A>(rows));
          }
      }
    }
  }

  // Columns [out, out + outs) of some rows of member k, from `start` on; in the first block their sums, too.
  void pack_dy(int64_t block, int64_t k, int64_t chunk, int64_t out, int64_t outs, int64_t start, int64_t rows,
               A* dy) const {
    Vec<A> sums[kPackedTiles][kTileRegisters<A>] = {};
    pack_tiles(static_cast<const A*>(call_.dy) + (k * call_.rows + start) * call_.out + out, call_.out, rows, outs, dy,
               [&](int64_t, int tile, int v, Vec<A> values, auto) {
                 sums[tile][v] += values;
                 return values;
               });
    if (block > 0) return;
    A* dbias = static_cast<A*>(call_.dbias) + k * call_.out + out;
    for (int64_t i = 0; i < outs; i += kTileRows)
      for (int v = 0; v < kTileRegisters<A>; ++v) {
        const int there = lanes_there(outs - i, v);
        A* to = dbias + i + v * kLanes<A>;
        store(to, chunk == 0 ? sums[i / kTileRows][v] : load(to, there) + sums[i / kTileRows][v], there);
      }
  }

  // Lanes of register v that belong to a tile of `rows` rows.
  static int lanes_there(int64_t rows, int v) {
    return static_cast<int>(std::clamp<int64_t>(std::min<int64_t>(kTileRows, rows) - v * kLanes<A>, 0, kLanes<A>));
  }

  // Rows [out, out + outs) of H_k within the block, of one chunk of rows of dy and x.
  void tile_row(int64_t block, int64_t k, int64_t chunk, int64_t out, int64_t outs, int64_t first, int64_t columns,
                int64_t rows, const A* x, const A* dy) const {
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
#pragma GCC unroll 3
    for (int v = 0; v < kTileRegisters<A>; ++v, dr += kLanes<A>) {
      const int there = lanes_there(outs, v);
      Vec<A> square[kLanes<A>];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<A>; ++i)
        square[i] = v * kLanes<A> + i < kTileRows ? sums_of_rows[v * kLanes<A> + i] : Vec<A>{};
      const Vec<A> sums = sums_of_registers<A>(square);
      store(dr, chunk == 0 ? sums : load(dr, there) + sums, there);
    }
  }

  A* partial_ds(int64_t unit, int64_t k) const { return partial_ds_.get() + (unit * call_.K + k) * call_.in; }

  static void add(const A* parts, int64_t count, int64_t size, A* sums, const Parallel& parallel) {
    parallel(size, grain(8 * count), [&](int64_t begin, int64_t end) {
      constexpr int64_t kAtOnce = 64;
      for (int64_t i = begin; i < end; i += kAtOnce) {
        double total[kAtOnce] = {};
        const int64_t there = std::min(kAtOnce, end - i);
        for (int64_t part = 0; part < count; ++part)
          for (int64_t j = 0; j < there; ++j) total[j] += parts[part * size + i + j];
        std::copy_n(total, there, sums + i);
      }
    });
  }

  const Gradients& call_;
  const EvenParts blocks_;  // of panels
  const int64_t units_;
  const EvenParts chunks_;  // of a member's rows
  const Buffer<A> partial_ds_, partial_dr_;
};

// ---------------------------------------------------------------------------------------------- of all members

template <class A>
class WeightGradientOf {
 public:
  WeightGradientOf(const WeightGradient& call, const Parallel& parallel) : call_(call) {
    const EvenParts chunks(call.K * call.rows, kRowsOfChunk), blocks(ceil_div(call.in, kTileColumns<A>), kBlockPanels);
    const Buffer<A> panels = buffer<A>(std::min(kRowsOfChunk, call.K * call.rows) * kBlockPanels * kTileColumns<A>);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
      for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t row = chunks.begin(chunk), rows = chunks.length(chunk), first = blocks.begin(block);
        parallel(blocks.length(block), grain(rows * kTileColumns<A>), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            pack(row, rows, (first + i) * kTileColumns<A>, panels.get() + i * rows * kTileColumns<A>);
        });
        parallel(ceil_div(call.out, kTileRows), grain(rows * kTileRows * blocks.length(block) * kTileColumns<A>),
                 [&](int64_t begin, int64_t end) {
                   const Buffer<A> dy = buffer<A>(kPackedTiles * packed_stride<A>(rows));
                   for (int64_t i = begin; i < end; i += kPackedTiles) {
                     const int64_t tiles = std::min<int64_t>(kPackedTiles, end - i);
                     pack_dy(row, rows, i * kTileRows, tiles, dy.get());
                     for (int64_t tile = 0; tile < tiles; ++tile)
                       tile_row(row, rows, (i + tile) * kTileRows, first * kTileColumns<A>, blocks.length(block),
                                panels.get(), dy.get() + tile * packed_stride<A>(rows));
                   }
                 });
      }
  }

 private:
  static constexpr int64_t kRowsOfChunk = 384;

  void pack(int64_t row, int64_t rows, int64_t column, A* panel) const {
    const int64_t count = std::min<int64_t>(kTileColumns<A>, call_.in - column);
    const int left = std::min<int>(kLanes<A>, count), right = count - left;
    for (int64_t p = 0; p < rows; ++p, panel += kTileColumns<A>) {
      const A* x = static_cast<const A*>(call_.x) + (row + p) * call_.in + column;
      const A* s = static_cast<const A*>(call_.s) + (row + p) / call_.rows * call_.in + column;
      store(panel, load(x, left) * load(s, left));
      store(panel + kLanes<A>, load(x + kLanes<A>, right) * load(s + kLanes<A>, right));
    }
  }

  void pack_dy(int64_t row, int64_t rows, int64_t out, int64_t tiles, A* dy) const {
    const int64_t outs = std::min(tiles * kTileRows, call_.out - out);
    pack_tiles(static_cast<const A*>(call_.dy) + row * call_.out + out, call_.out, rows, outs, dy,
               [&](int64_t p, int tile, int v, Vec<A> values, auto count) {
                 const int64_t k = (row + p) / call_.rows, at = tile * kTileRows + v * kLanes<A>;
                 return values * load(static_cast<const A*>(call_.r) + k * call_.out + out + at, count);
               });
  }

  void tile_row(int64_t row, int64_t rows, int64_t out, int64_t column, int64_t panels, const A* x, const A* dy) const {
    const int64_t outs = std::min<int64_t>(kTileRows, call_.out - out);
    A* dweight = static_cast<A*>(call_.dweight) + out * call_.in + column;
    for (int64_t i = 0; i < panels; ++i, dweight += kTileColumns<A>, x += rows * kTileColumns<A>) {
      const int64_t count = std::min<int64_t>(kTileColumns<A>, call_.in - column - i * kTileColumns<A>);
      for (int64_t j = 0; j < outs; ++j)
        for (int64_t line = 0; line < count; line += 64 / static_cast<int>(sizeof(A)))
          __builtin_prefetch(dweight + j * call_.in + line, 1);
      Tile<A> sums = {};
      if (row > 0)
        for_rows<A>(sums, outs, count, [&](int j, Vec<A>& left, Vec<A>& right, auto left_count, auto right_count) {
          left = load(dweight + j * call_.in, left_count);
          right = load(dweight + j * call_.in + kLanes<A>, right_count);
        });
      accumulate<A, 1, kTileRows>(dy, x, rows, sums);
      for_rows<A>(sums, outs, count, [&](int j, Vec<A> left, Vec<A> right, auto left_count, auto right_count) {
        store(dweight + j * call_.in, left, left_count);
        store(dweight + j * call_.in + kLanes<A>, right, right_count);
      });
    }
  }

  const WeightGradient& call_;
};

}  // namespace

void gradients(const Gradients& call, const Parallel& parallel) {
  call.dtype == DataType::Double ? void(GradientsOf<double>(call, parallel)) : void(GradientsOf<float>(call, parallel));
}

void weight_gradient(const WeightGradient& call, const Parallel& parallel) {
  call.dtype == DataType::Double ? void(WeightGradientOf<double>(call, parallel))
                                 : void(WeightGradientOf<float>(call, parallel));
}

}  // namespace latephase::LATEPHASE_ISA
