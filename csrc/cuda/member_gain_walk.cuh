// How member gain is cut into blocks, and how the threads of a block walk over their part; host and device.
//
// A member is B rows of C·S values in memory: C channels, each a run of S values. A unit is eight values side by side.
//   long runs    a block has (member, channel, split): its threads walk over the units of the runs, over all rows
//   short runs   a block has (member, columns, split): a thread keeps to the eight columns of one unit, whose channels
//                may differ, and walks over the rows; rows are aligned where runs are not
// Everything here follows from one member's sizes, never from K: member k is computed as it would be alone.
#pragma once

#include <algorithm>

#include "../host_device.h"
#include "../member_gain_arguments.h"
#include "reduce.cuh"
#include "unit.cuh"

namespace latephase::member_gain {

constexpr int64_t kTargetBlocks = 512;  // that a member is split into, if it is large enough
constexpr int kTileBytes = 32;          // of x, and of dy, that a thread has in flight
constexpr int kMinTilesPerSplit = 8;
constexpr int kUnitsPerThread = 8;     // wished for, at least
constexpr int kShortRunThreads = 128;  // of a block, at most: the memory that sums of columns meet in grows with it
constexpr int64_t kLongRun = 128;      // values
constexpr int64_t kLongestRun = 1024;  // beyond it a run is long even where it is badly aligned

template <class scalar_t>
constexpr int kTile = kTileBytes / (kUnit * sizeof(scalar_t));  // units

inline bool has_long_runs(const Sizes& s, int element_size) {
  return s.S >= kLongestRun || (s.S >= kLongRun && s.S * element_size % 8 == 0);
}

struct Walk {
  int64_t C, S, row_stride, member_stride;       // strides in values
  int64_t positions, positions_per_split;        // units of a channel, or rows
  int64_t units_per_run, step_rows, step_units;  // a thread's step of `workers` positions; short runs: 1 unit a run
  int64_t parts, blocks;                         // parts: channels, or blocks side by side in a row
  int splits, lanes, workers, threads;           // lanes: threads side by side in a row, each with columns of its own
  int access_bytes;                              // the widest access, at most 16 bytes, that every row is aligned to

  Walk(const Sizes& s, bool long_runs, int element_size, std::initializer_list<const void*> operands) {
    C = s.C, S = s.S;
    row_stride = s.C * s.S, member_stride = s.B * row_stride;
    const int tile = kTileBytes / (kUnit * element_size), max_threads = long_runs ? kMaxThreads : kShortRunThreads;
    const int64_t row_units = divide_up(row_stride, kUnit);
    units_per_run = long_runs ? divide_up(s.S, kUnit) : 1;
    positions = s.B * units_per_run;
    lanes = long_runs ? 1 : round_up_to_power_of_two(row_units, 1, kWarp);
    parts = long_runs ? s.C : divide_up(row_units, lanes);
    const int64_t smallest_split = int64_t{max_threads} / lanes * tile * kMinTilesPerSplit;
    splits = static_cast<int>(
        std::min(divide_up(kTargetBlocks, parts), std::max(int64_t{1}, divide_up(positions, smallest_split))));
    positions_per_split = divide_up(positions, splits);
    threads = round_up_to_power_of_two(lanes * divide_up(positions_per_split, kUnitsPerThread), kWarp, max_threads);
    workers = threads / lanes;
    step_rows = workers / units_per_run;
    step_units = workers % units_per_run;
    blocks = s.K * parts * splits;
    uint64_t bits = 16 | static_cast<uint64_t>((long_runs ? s.S : row_stride) * element_size);
    for (const void* operand : operands) bits |= reinterpret_cast<uint64_t>(operand);
    access_bytes = static_cast<int>(bits & -bits);
  }

  // Short runs: the blocks side by side that a channel's columns may lie in, at most.
  int64_t blocks_per_run() const { return divide_up(S - 1, lanes * kUnit) + 1; }
};

// Which part of the data this block has.
struct Part {
  int64_t member, part, split;

  __device__ explicit Part(const Walk& w) {
    split = blockIdx.x % w.splits;
    part = blockIdx.x / w.splits % w.parts;
    member = blockIdx.x / w.splits / w.parts;
  }
};

// A thread's walk over the units of its part.
template <bool long_runs>
struct Cursor {
  int64_t offset;  // of the unit in the data
  int64_t position, end, unit;
  int live_columns;  // short runs: of the unit

  __device__ Cursor(const Walk& w, const Part& part) {
    position = part.split * w.positions_per_split + threadIdx.x / w.lanes;
    end = min((part.split + 1) * w.positions_per_split, w.positions);
    offset = part.member * w.member_stride;
    if constexpr (long_runs) {
      unit = position % w.units_per_run;
      offset += position / w.units_per_run * w.row_stride + part.part * w.S + unit * kUnit;
    } else {
      const int64_t column = first_column(w, part);
      live_columns = static_cast<int>(min(max(w.row_stride - column, int64_t{0}), int64_t{kUnit}));
      offset += position * w.row_stride + column;
      if (live_columns == 0) end = position;
    }
  }

  static __device__ int64_t first_column(const Walk& w, const Part& part) {
    return (part.part * w.lanes + threadIdx.x % w.lanes) * kUnit;
  }

  __device__ __forceinline__ bool more() const { return position < end; }

  // Values of the unit that exist.
  __device__ __forceinline__ int valid(const Walk& w) const {
    if (position >= end) return 0;
    if constexpr (!long_runs) return live_columns;
    return static_cast<int>(min(w.S - unit * kUnit, int64_t{kUnit}));
  }

  __device__ __forceinline__ void advance(const Walk& w) {
    position += w.workers;
    offset += w.step_rows * w.row_stride;
    if constexpr (long_runs) {
      offset += w.step_units * kUnit;
      unit += w.step_units;
      if (unit >= w.units_per_run) {
        unit -= w.units_per_run;
        offset += w.row_stride - w.units_per_run * kUnit;
      }
    }
  }
};

template <class scalar_t, bool long_runs, int tile>
__device__ __forceinline__ void load_tile(Unit<scalar_t> (&units)[tile], const scalar_t* data, const Walk& w,
                                          Cursor<long_runs> cursor) {
  with_access<scalar_t>(w.access_bytes, [&](auto access) {
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      units[i] = Unit<scalar_t>::template load<decltype(access)::value>(data + cursor.offset, cursor.valid(w));
      cursor.advance(w);
    }
  });
}

template <class scalar_t, bool long_runs>
__device__ __forceinline__ void store_unit(const Unit<scalar_t>& unit, scalar_t* data, const Walk& w,
                                           const Cursor<long_runs>& cursor) {
  with_access<scalar_t>(w.access_bytes, [&](auto access) {
    unit.template store<decltype(access)::value>(data + cursor.offset, cursor.valid(w));
  });
}

}  // namespace latephase::member_gain
