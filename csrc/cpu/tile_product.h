// The inner product of matrices in registers: a tile of kTileRows rows and kTileColumns<A> columns, and the orders in
// which it reads its factors. Rows and columns that are not there are zeros.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "elements.h"

namespace latephase::LATEPHASE_ISA {
namespace {

// Sums, one row of the second factor, and a value of the first: 27 of 32 registers, or 15 of 16. On ARM, where a
// multiplication takes a lane of a register, compilers load the values of all rows first: 26 of 32.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#elif defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 6;
#endif
template <class A>
constexpr int kTileColumns = 2 * kLanes<A>;

template <class A>
using Tile = Vec<A>[kTileRows][2];

template <class A>
struct Aligned {
  void operator()(A* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
// Values on the boundaries of cache lines, uninitialized.
template <class A>
using Buffer = std::unique_ptr<A[], Aligned<A>>;
template <class A>
inline Buffer<A> buffer(int64_t size) {
  return Buffer<A>(static_cast<A*>(::operator new[](size * sizeof(A), std::align_val_t{64})));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kGrainWork = 1 << 18;  // additions or copies, fewer are not worth a second thread

// Items of `work` each that a thread takes at least.
inline int64_t grain(int64_t work) { return 1 + kGrainWork / std::max<int64_t>(1, work); }

// [0, size) in parts of at most `limit` whose sizes differ by one at most; a single empty part of nothing.
struct EvenParts {
  int64_t size, count;
  EvenParts(int64_t size, int64_t limit) : size(size), count(std::max<int64_t>(1, (size + limit - 1) / limit)) {}
  int64_t begin(int64_t i) const { return size * i / count; }
  int64_t length(int64_t i) const { return begin(i + 1) - begin(i); }
};

// sums += a · b over `depth` values. Row i of a at a + i · row_stride, one value after the other `step` apart; b
// [depth, kTileColumns]. Unrolled, as what counts a loop takes turns from the multiplications.
template <class A, int row_stride, int step>
__attribute__((always_inline)) inline void accumulate_part(const A* a, const A* b, int64_t depth, Tile<A>& sums) {
#pragma GCC unroll 8
  for (int64_t p = 0; p < depth; ++p, a += step, b += kTileColumns<A>) {
    const Vec<A> left = load(b), right = load(b + kLanes<A>);
#pragma GCC unroll 12
    for (int i = 0; i < kTileRows; ++i) {
      const Vec<A> value = splat(a[i * row_stride]);
      sums[i][0] = fma(value, left, sums[i][0]);
      sums[i][1] = fma(value, right, sums[i][1]);
    }
  }
}

// The same in parts: a sum is rounded once a value, by its size so far, so that the error of a long one would grow.
template <class A, int row_stride, int step>
__attribute__((always_inline)) inline void accumulate(const A* a, const A* b, int64_t depth, Tile<A>& sums) {
  constexpr int64_t kPart = 128;
  if (depth <= kPart) return accumulate_part<A, row_stride, step>(a, b, depth, sums);
  for (int64_t first = 0; first < depth; first += kPart) {
    Tile<A> part = {};
    accumulate_part<A, row_stride, step>(a + first * step, b + first * kTileColumns<A>, std::min(kPart, depth - first),
                                         part);
#pragma GCC unroll 12
    for (int i = 0; i < kTileRows; ++i) sums[i][0] = sums[i][0] + part[i][0], sums[i][1] = sums[i][1] + part[i][1];
  }
}

// Calls row(i, left, right, left_count, right_count) with the registers of every row of a tile that is there, and how
// many of their lanes are: known when compiled if the tile is whole.
template <class A, class Row>
__attribute__((always_inline)) inline void for_rows(Tile<A>& sums, int64_t rows, int64_t columns, const Row& row) {
  if (rows == kTileRows && columns == kTileColumns<A>) {
#pragma GCC unroll 12
    for (int i = 0; i < kTileRows; ++i) row(i, sums[i][0], sums[i][1], Whole<A>{}, Whole<A>{});
    return;
  }
  const int left = static_cast<int>(std::min<int64_t>(kLanes<A>, columns)), right = static_cast<int>(columns) - left;
  Tile<A> some;  // a copy, as indices that are not known when compiled would keep `sums` out of the registers
#pragma GCC unroll 12
  for (int i = 0; i < kTileRows; ++i) some[i][0] = sums[i][0], some[i][1] = sums[i][1];
  for (int i = 0; i < rows; ++i) row(i, some[i][0], some[i][1], left, right);
#pragma GCC unroll 12
  for (int i = 0; i < kTileRows; ++i) sums[i][0] = some[i][0], sums[i][1] = some[i][1];
}

// Writes rows [depth, columns] of a matrix as panels [depth, kTileColumns], `panel_stride` apart, zeros to the right.
template <class A>
inline void pack_panels(const A* rows, int64_t row_stride, int64_t depth, int64_t columns, int64_t panel_stride,
                        A* panels) {
  for (int64_t c = 0; c < columns; c += kTileColumns<A>, panels += panel_stride) {
    const int64_t count = std::min<int64_t>(kTileColumns<A>, columns - c);
    const A* from = rows + c;
    A* to = panels;
    for (int64_t p = 0; p < depth; ++p, from += row_stride, to += kTileColumns<A>) {
      __builtin_prefetch(from + 16 * row_stride);
      __builtin_prefetch(from + 16 * row_stride + kLanes<A>);
      if (count == kTileColumns<A>) {
        store(to, load(from));
        store(to + kLanes<A>, load(from + kLanes<A>));
      } else {
        std::copy_n(from, count, to);
        std::fill(to + count, to + kTileColumns<A>, A(0));
      }
    }
  }
}

constexpr int kPackedTiles = 4;  // that share the cache lines of a row where it is read

template <class A>
constexpr int kTileRegisters = (kTileRows + kLanes<A> - 1) / kLanes<A>;  // that hold a value for each row of a tile

// Between tiles: whole registers are stored, beyond a tile's last row.
template <class A>
constexpr int64_t packed_stride(int64_t depth) {
  return depth * kTileRows + kTileRegisters<A> * kLanes<A>;
}

// Writes columns [columns ≤ kPackedTiles · kTileRows, depth] of a transposed matrix as tiles [depth, kTileRows],
// `packed_stride` apart: what change(p, tile, v, register, count) makes of each register v of a tile's row p.
template <class A, class Change>
__attribute__((always_inline)) inline void pack_tiles(const A* rows, int64_t row_stride, int64_t depth, int64_t columns,
                                                      A* tiles, const Change& change) {
  for (int64_t p = 0; p < depth; ++p, rows += row_stride, tiles += kTileRows) {
    for (int column = 0; column < kPackedTiles * kTileRows; column += 64 / static_cast<int>(sizeof(A)))
      __builtin_prefetch(rows + 4 * row_stride + column);
#pragma GCC unroll 4
    for (int tile = 0; tile < kPackedTiles; ++tile) {
      if (tile * kTileRows >= columns) break;
#pragma GCC unroll 3
      for (int v = 0; v < kTileRegisters<A>; ++v) {
        const int column = tile * kTileRows + v * kLanes<A>, there = static_cast<int>(columns) - column;
        A* to = tiles + tile * packed_stride<A>(depth) + v * kLanes<A>;
        const auto pack = [&](auto count) { store(to, change(p, tile, v, load(rows + column, count), count)); };
        there >= kLanes<A> ? pack(Whole<A>{}) : pack(std::max(0, there));
      }
    }
  }
}

// Swaps, of a pair of rows `s` apart in a square of registers, the squares of s values off the diagonal.
template <class A>
inline void swap_squares(Vec<A>& upper, Vec<A>& lower, int s) {
  Mask<A> to_upper, to_lower;  // lanes of the upper row, then of the lower one
  for (int i = 0; i < kLanes<A>; ++i) {
    to_upper[i] = (i & s) == 0 ? i : kLanes<A> + i - s;
    to_lower[i] = (i & s) == 0 ? i + s : kLanes<A> + i;
  }
#if defined(__clang__)
  A lanes[2 * kLanes<A>];
  store(lanes, upper);
  store(lanes + kLanes<A>, lower);
  for (int i = 0; i < kLanes<A>; ++i) upper[i] = lanes[to_upper[i]], lower[i] = lanes[to_lower[i]];
#else
  const Vec<A> before = upper;
  upper = __builtin_shuffle(before, lower, to_upper);
  lower = __builtin_shuffle(before, lower, to_lower);
#endif
}

// The sum over the lanes of each register of a square, one after the other.
template <class A>
inline Vec<A> sums_of_registers(Vec<A> (&square)[kLanes<A>]) {
#pragma GCC unroll 4
  for (int s = 1; s < kLanes<A>; s *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; i += 2 * s) {
      swap_squares<A>(square[i], square[i + s], s);
      square[i] += square[i + s];
    }
  return square[0];
}

// Writes columns [columns ≤ kTileColumns, depth] of a transposed matrix as one panel [depth, kTileColumns].
template <class A>
inline void pack_transposed_panel(const A* rows, int64_t row_stride, int64_t depth, int64_t columns, A* panel) {
  for (int half = 0; half < 2; ++half, panel += kLanes<A>, rows += kLanes<A> * row_stride, columns -= kLanes<A>)
    for (int64_t p = 0; p < depth; p += kLanes<A>) {
      Vec<A> square[kLanes<A>];
      const int count = static_cast<int>(std::min<int64_t>(kLanes<A>, depth - p));
      for (int i = 0; i < kLanes<A>; ++i) {
        const A* from = rows + i * row_stride + p;
        __builtin_prefetch(from + 4 * kLanes<A>);
        square[i] = i >= columns ? Vec<A>{} : count == kLanes<A> ? load(from) : load(from, count);
      }
#pragma GCC unroll 4
      for (int s = 1; s < kLanes<A>; s *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<A>; ++i)
          if ((i & s) == 0) swap_squares<A>(square[i], square[i + s], s);
      for (int i = 0; i < count; ++i) store(panel + (p + i) * kTileColumns<A>, square[i]);
    }
}

}  // namespace
}  // namespace latephase::LATEPHASE_ISA
