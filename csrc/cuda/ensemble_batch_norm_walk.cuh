// How one member's data is cut into parts and how the threads of a part walk over it; host and device.
//
// A part is (member, channels, split). A thread owns one channel (contiguous data) or the eight of a unit
// (channels_last) and walks over units of its part. Where parts begin and end depends on one member's sizes only.
//
// Small planes (8 × 8), and those that are no whole number of units (7 × 7, 14 × 14), may be packed: so many channels
// side by side make a row that it is of whole units, and aligned as the batch rows are. A thread then owns the eight
// columns of a unit, which belong to one channel or two, and walks from batch row to batch row as in channels_last.
#pragma once

#include <algorithm>
#include <numeric>

#include "../ensemble_batch_norm_arguments.h"
#include "../host_device.h"
#include "unit.cuh"

namespace latephase::ensemble_batch_norm {

enum class Layout { kContiguous, kChannelsLast, kPacked };

// Whether a thread owns the eight columns of a unit; else it owns a channel.
LATEPHASE_HOST_DEVICE constexpr bool by_column(Layout layout) { return layout != Layout::kContiguous; }

inline Layout unpacked(const Sizes& s) { return s.channels_last ? Layout::kChannelsLast : Layout::kContiguous; }

// The widest access, at most 16 bytes, that every row, of so many values, of every operand is aligned to.
inline int access_bytes(int64_t row_values, int element_size, std::initializer_list<const void*> operands) {
  uint64_t bits = 16 | static_cast<uint64_t>(row_values * element_size);
  for (const void* operand : operands) bits |= reinterpret_cast<uint64_t>(operand);
  return static_cast<int>(bits & -bits);
}

constexpr int kPackedLanes = 128;      // units of a row, unless the least that is possible has more
constexpr int kMostPackedLanes = 512;  // threads of a block
constexpr int kPackedRows = 12;        // of a larger plane of whole units, at least: with fewer a thread has too little

// The least channels that planes can be packed by, or 0: a plane is smaller than a unit, or a row too long, or the
// channels do not divide; or the planes are whole units and no smaller than a warp of them, and are better left so.
inline int least_packed(const Sizes& s) {
  const int channels = kUnit / static_cast<int>(std::gcd(s.S, int64_t{kUnit}));
  if (s.channels_last || s.S < kUnit || s.S > kMostPackedLanes * kUnit / channels || s.C % channels != 0) return 0;
  constexpr int warp = 32 * kUnit;
  if (channels == 1 && s.S >= warp && (s.S % warp != 0 || s.S > kPackedLanes * kUnit || s.B < kPackedRows)) return 0;
  return channels;
}

// The most: the least, doubled while the channels divide and a row is not too long.
inline int most_packed(const Sizes& s, int least) {
  int channels = least;
  while (s.C % (2 * channels) == 0 && 2 * channels * s.S <= kPackedLanes * kUnit) channels *= 2;
  return channels;
}

// A row of units has units_per_row units in contiguous data; in channels_last and of packed planes it is a single unit:
// positions are then rows, and threads side by side (lanes) take the units of a row.
struct Geometry {
  int64_t C, columns, n;
  int64_t row_stride, mask_row_stride;        // elements and mask bytes between rows of one channel
  int64_t member_stride, mask_member_stride;  // ... and between members
  int64_t positions, parts;
  int splits, channel_blocks, lanes, workers;
  int part_channels;  // of a part that has all it can have
  Layout layout;
  int plane, mask_plane;                   // values of a packed plane, bytes of its mask
  bool mask_crosses_units;                 // a byte of the mask has bits of two units
  int threads;                             // of a part
  int positions_per_split, units_per_row;  // data for which these are too large fits no device
  int last_unit;                           // values of a row's last unit
  // A thread's step of `workers` positions, in units of a row and in elements, and what to add behind the row's end.
  int step_units;
  int64_t step, mask_step, wrap, mask_wrap;
  int access_bytes = 0;

  // Of `lanes` units side by side a part; cut() completes it.
  Geometry(const Sizes& s, Layout layout, int lanes)
      : C(s.C), columns(s.columns()), n(s.n()), lanes(lanes), layout(layout) {
    const int64_t units = s.mask_row_bytes(), rows = s.channels_last ? s.n() : s.B;
    plane = static_cast<int>(s.S), mask_plane = static_cast<int>(units);
    mask_crosses_units = layout == Layout::kPacked && plane % kUnit != 0;
    part_channels = !by_column(layout) ? 1 : lanes * kUnit / (s.channels_last ? 1 : plane);
    row_stride = s.channels_last ? s.C : s.C * s.S;
    mask_row_stride = s.channels_last ? units : s.C * units;
    member_stride = rows * row_stride;
    mask_member_stride = rows * mask_row_stride;
    units_per_row = by_column(layout) ? 1 : static_cast<int>(std::max<int64_t>(1, units));
    last_unit = static_cast<int>(columns - (units - 1) * kUnit);
    positions = rows * units_per_row;
    channel_blocks = static_cast<int>(divide_up(s.C, part_channels));
    parts = s.K * channel_blocks;
  }

  // Values after which another row begins that must be aligned.
  int64_t row_values() const { return layout == Layout::kPacked ? row_stride : columns; }

  void cut(int into_splits, int threads_per_part) {
    splits = into_splits;
    threads = threads_per_part;
    parts *= splits;
    positions_per_split = static_cast<int>(divide_up(positions, splits));
    workers = threads / lanes;
    const int64_t step_rows = workers / units_per_row;
    step_units = workers % units_per_row;
    step = step_rows * row_stride + step_units * kUnit;
    mask_step = step_rows * mask_row_stride + step_units;
    wrap = row_stride - int64_t{units_per_row} * kUnit;
    mask_wrap = mask_row_stride - units_per_row;
  }
};

// The lanes of a part, at most `most`.
inline int lanes_of(const Sizes& s, int most) {
  return s.channels_last ? round_up_to_power_of_two(s.mask_row_bytes(), 1, most) : 1;
}

// Which part of the data a thread works on, and as which of the part's threads.
struct Part {
  int64_t member, split, channel_block;
  int thread;
  bool exists;

  __device__ Part(const Geometry& g, int64_t part, int thread) : thread(thread), exists(part < g.parts) {
    split = part % g.splits;
    channel_block = part / g.splits % g.channel_blocks;
    member = part / g.splits / g.channel_blocks;
  }
  // A split of the group of that index, where an int can hold it.
  __device__ Part(const Geometry& g, int group, int split, int thread, bool exists)
      : member(group / g.channel_blocks),
        split(split),
        channel_block(group % g.channel_blocks),
        thread(thread),
        exists(exists) {}
};

// The channels of a thread: one, or those of the eight columns of a unit, of which `live` exist. In channels_last each
// column is a channel. Of packed planes the first `turn` columns belong to channel `first`, the others to the next.
template <Layout layout>
struct Channels {
  static constexpr int kCount = by_column(layout) ? kUnit : 1;  // columns
  static constexpr bool kPacked = layout == Layout::kPacked;
  int64_t first;
  int live;
  int turn = 0, within = 0;  // of packed planes; `within` is the first column's place in its plane

  __device__ Channels(const Geometry& g, const Part& part) {
    first = part.channel_block * g.part_channels;
    if constexpr (kPacked) {
      const int column = part.thread % g.lanes * kUnit;
      first += column / g.plane;
      within = column % g.plane;
      turn = min(g.plane - within, kUnit);
      live = part.thread < g.workers * g.lanes ? kUnit : 0;
    } else if constexpr (by_column(layout)) {
      first += part.thread % g.lanes * kUnit;
      live = static_cast<int>(min(max(g.C - first, int64_t{0}), int64_t{kUnit}));
    } else {
      live = 1;
    }
    if (!part.exists) live = 0;
  }

  // The channel of a column that is live, counted from `first`.
  __device__ __forceinline__ int channel_of(int column) const { return kPacked ? column >= turn : column; }
  // results[j] = of(j) for each column j; of packed planes computed once a channel, in its first or last column.
  template <class T, class Of>
  __device__ __forceinline__ void fill(T (&results)[kCount], const Of& of) const {
    if constexpr (kPacked) {
      const T before = of(0), behind = of(kUnit - 1);
#pragma unroll
      for (int j = 0; j < kCount; ++j) results[j] = j < turn ? before : behind;
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) results[j] = of(j);
    }
  }
  // Whether a column is the one to write its channel's results: of packed planes the first of those whose channel
  // begins with the unit, or the last of those whose channel begins within it.
  __device__ __forceinline__ bool stands_for_channel(int column) const {
    if constexpr (kPacked) return column == 0 ? within == 0 : column == kUnit - 1 && turn < kUnit;
    return column < live;
  }
};

// A thread's walk over the units of its part.
template <Layout layout>
struct Cursor {
  int64_t offset, mask_offset;  // of the unit in the data and in the mask
  int left;                     // positions from here to the end of the part
  int unit;                     // of the row
  int live_channels;

  __device__ Cursor(const Geometry& g, const Part& part, const Channels<layout>& channels) {
    const int64_t position = part.split * g.positions_per_split + part.thread / g.lanes;
    const int64_t end = min((part.split + 1) * g.positions_per_split, g.positions);
    const int64_t row = by_column(layout) ? position : position / g.units_per_row;
    unit = static_cast<int>(position - row * g.units_per_row);
    offset = part.member * g.member_stride + row * g.row_stride;
    mask_offset = part.member * g.mask_member_stride + row * g.mask_row_stride;
    if constexpr (layout == Layout::kPacked) {
      offset += channels.first * g.plane + channels.within;
      mask_offset += channels.first * g.mask_plane + channels.within / kUnit;
    } else if constexpr (by_column(layout)) {
      offset += channels.first;
      mask_offset += channels.first / kUnit;
    } else {
      offset += channels.first * g.columns + unit * kUnit;
      mask_offset += channels.first * g.units_per_row + unit;
    }
    live_channels = channels.live;
    left = live_channels == 0 ? 0 : static_cast<int>(end - position);
  }

  __device__ __forceinline__ bool more() const { return left > 0; }

  // Values of the unit that exist; if all units are whole, all or none.
  template <bool whole = false>
  __device__ __forceinline__ int valid(const Geometry& g) const {
    if (left <= 0) return 0;
    if (whole) return kUnit;
    if constexpr (by_column(layout)) return live_channels;
    return unit + 1 == g.units_per_row ? g.last_unit : kUnit;
  }

  __device__ __forceinline__ void advance(const Geometry& g) {
    left -= g.workers;
    offset += g.step;
    mask_offset += g.mask_step;
    if constexpr (!by_column(layout)) {
      unit += g.step_units;
      if (unit >= g.units_per_row) {
        unit -= g.units_per_row;
        offset += g.wrap;
        mask_offset += g.mask_wrap;
      }
    }
  }
};

// Rows of two-byte values that are aligned to 16 bytes are made of whole units.
template <class scalar_t, Width width>
constexpr bool kWholeUnits = width == Width::kWide && sizeof(scalar_t) == 2;

template <Width width = Width::kAny, Keep keep = Keep::kNormal, class scalar_t, Layout layout, int tile>
__device__ __forceinline__ void load_tile(Unit<scalar_t> (&units)[tile], const scalar_t* data, const Geometry& g,
                                          Cursor<layout> cursor) {
  with_access<scalar_t, width>(g.access_bytes, [&](auto access) {
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      units[i] = Unit<scalar_t>::template load<decltype(access)::value, keep>(
          data + cursor.offset, cursor.template valid<kWholeUnits<scalar_t, width>>(g));
      cursor.advance(g);
    }
  });
}

template <Keep keep = Keep::kNormal, class scalar_t, Layout layout>
__device__ __forceinline__ void store_unit(const Unit<scalar_t>& unit, scalar_t* data, const Geometry& g,
                                           const Cursor<layout>& cursor) {
  with_access<scalar_t>(g.access_bytes, [&](auto access) {
    unit.template store<decltype(access)::value, keep>(data + cursor.offset, cursor.valid(g));
  });
}

}  // namespace latephase::ensemble_batch_norm
