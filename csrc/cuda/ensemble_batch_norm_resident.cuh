// The on-chip tier: a part is read from memory once, kept in shared memory, reduced, and written once.
//
// Several small groups share a block, a group has a block, or it is split over the blocks of a thread-block cluster,
// which add up their sums through each other's shared memory. Means first, then squares around them.
#pragma once

#include "ensemble_batch_norm_block.cuh"
#include "ensemble_batch_norm_formulas.cuh"

namespace latephase::ensemble_batch_norm {

// Units whose residual a thread loads before it works on the first.
template <class scalar_t, Width width>
constexpr int kBatch = width == Width::kWide && sizeof(scalar_t) == 2 ? 4 : 2;
constexpr int kGateBatch = 8;  // the same, of bits of the gate

// Of the mask of packed planes, in which each plane begins with a byte of its own: from a unit's first to the next
// plane.
__device__ __forceinline__ int bytes_to_next_plane(const Geometry& g, const Channels<Layout::kPacked>& channels) {
  return g.mask_plane - channels.within / kUnit;
}

// ---------------------------------------------------------------------------------------------- forward

// The moments of the thread's channels, over the `values` that the block or the cluster has of each.
template <class scalar_t, Layout layout>
__device__ __forceinline__ Moments<Channels<layout>::kCount> moments_of(const Resident<scalar_t, layout>& r,
                                                                        int64_t values) {
  constexpr int count = Channels<layout>::kCount;
  const Slots<scalar_t> x = r.operand(0);
  float* shared_sums = r.template sums<1>();
  const float n = static_cast<float>(values);
  const float inverse_n = 1 / n;
  float mean[count] = {};
#pragma unroll 4
  for (int i = 0; i < r.units; ++i) {
    const Unit<scalar_t> unit = x.get(i);
    if constexpr (by_column(layout)) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) mean[j] += unit.get(j);
    } else {
      mean[0] += ((unit.get(0) + unit.get(1)) + (unit.get(2) + unit.get(3))) +
                 ((unit.get(4) + unit.get(5)) + (unit.get(6) + unit.get(7)));  // 0 where there is no value
    }
  }
  r.add_up(mean, shared_sums, 0);
#pragma unroll
  for (int c = 0; c < count; ++c) mean[c] = __fmul_rn(mean[c], inverse_n);

  float sums[2 * count] = {};  // of differences from the mean, and of their squares
  const auto add_differences = [&](auto ragged) {
    Cursor<layout> cursor = r.cursor();
#pragma unroll 4
    for (int i = 0; i < r.units; ++i) {
      const Unit<scalar_t> unit = x.get(i);
      const int valid = cursor.valid(r.g);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const int c = by_column(layout) ? j : 0;
        const float difference = !decltype(ragged)::value || j < valid ? unit.get(j) - mean[c] : 0;
        sums[2 * c] += difference;
        sums[2 * c + 1] = fmaf(difference, difference, sums[2 * c + 1]);
      }
      cursor.advance(r.g);
    }
  };
  if (!by_column(layout) && r.g.last_unit != kUnit) {
    add_differences(std::true_type{});
  } else {
    add_differences(std::false_type{});
  }
  r.add_up(sums, shared_sums, 1);
  Moments<count> moments;
  moments.count = n;
  Moments<1> of_columns[count];
  r.channels.fill(of_columns,
                  [&](int c) { return corrected_moments(n, inverse_n, mean[c], sums[2 * c], sums[2 * c + 1]); });
#pragma unroll
  for (int c = 0; c < count; ++c) moments.set(c, of_columns[c]);
  return moments;
}

// Stores the moments of a thread's channels, which all workers of its lane have, and completes what they normalize by.
template <class scalar_t, Layout layout>
__device__ __forceinline__ void complete(Normalizer<scalar_t, layout>& normalizer, const Resident<scalar_t, layout>& r,
                                         const ForwardArguments<scalar_t>& a, const FinishStatistics& finish,
                                         const Moments<Channels<layout>::kCount>& moments) {
  float mean[r.kCount], rstd[r.kCount];
#pragma unroll
  for (int j = 0; j < r.kCount; ++j) mean[j] = moments.mean[j];
  // A column each of the lane's workers: one alone would wait for the running statistics of all, one after the other.
  const int worker = r.part.thread / r.g.lanes;
  if (r.part.split == 0 && worker < r.g.workers)
    for (int j = worker; j < r.kCount; j += r.g.workers)
      if (r.channels.stands_for_channel(j))
        finish(r.part.member * r.g.C + r.channels.first + r.channels.channel_of(j), moments.selected(j));
  r.channels.fill(rstd, [&](int j) { return finish.inverse_deviation(moments.channel(j)); });
  normalizer.set(mean, rstd, a.normalization, r.part, r.channels);
}

// Of packed planes: writes the mask from the bits of the units, which are all in shared memory.
template <class scalar_t>
__device__ __forceinline__ void store_packed_mask(const Resident<scalar_t, Layout::kPacked>& r, uint8_t* mask) {
  const Channels<Layout::kPacked>& channels = r.channels;
  const int byte = (channels.within + kUnit - 1) / kUnit;   // the first of the plane's that begins in the unit
  const int begin = byte * kUnit - channels.within;         // at this column, if before the turn
  const int values = min(r.g.plane - byte * kUnit, kUnit);  // of it that exist
  const int next_plane = bytes_to_next_plane(r.g, channels);
  const int next = (r.part.thread + 1) % r.g.lanes != 0;  // unit; no byte goes on behind a row
  __syncthreads();
  const uint8_t* gate = &r.template gate<1>(0);
  uint8_t* to = mask + r.cursor().mask_offset;
  for (int i = 0; i < r.units; ++i, gate += blockDim.x, to += r.g.mask_step) {
    const uint32_t bits = gate[0] | gate[next] << kUnit;
    if (begin < channels.turn) to[begin > 0] = bits >> begin & ((1 << values) - 1);
    if (channels.turn < kUnit) to[next_plane] = bits >> channels.turn;
  }
}

template <class scalar_t, Layout layout, Width width>
__global__ void __launch_bounds__(resident_threads(layout), 1)
    resident_forward_kernel(ForwardArguments<scalar_t> a, Geometry g, int slots, FinishStatistics finish) {
  const Resident<scalar_t, layout> r(g, slots, g.splits, part_of_block(g));
  fetch<width>(r, {a.x});
  Normalizer<scalar_t, layout> normalizer;
  normalizer.read_affine(a.normalization, r.part, r.channels);
  wait_for_copies();
  const auto moments = moments_of(r, g.n);
  r.arrive_at_end();
  complete(normalizer, r, a, finish, moments);
  Cursor<layout> cursor = r.cursor();
  for (int first = 0; a.y != nullptr && first < r.iterations; first += kBatch<scalar_t, width>) {
    Unit<scalar_t> residual[kBatch<scalar_t, width>];
    if (a.residual != nullptr) load_tile<width>(residual, a.residual, g, cursor);
#pragma unroll
    for (int k = 0; k < kBatch<scalar_t, width>; ++k) {
      const int i = first + k;
      if (i >= r.iterations) break;
      const Unit<scalar_t> y = output(a, normalizer, r.operand(0).get(i), residual[k]);
      store<width>(r, 0, i, y, a.y, cursor);
      if (a.mask != nullptr && cursor.more()) {
        const uint32_t passed = y.nonzero(cursor.template valid<kWholeUnits<scalar_t, width>>(g));
        if (layout == Layout::kPacked && g.mask_crosses_units) {
          r.template gate<1>(i) = passed;
        } else {
          a.mask[cursor.mask_offset] = passed;
        }
      }
      cursor.advance(g);
    }
  }
  if constexpr (layout == Layout::kPacked)
    if (a.mask != nullptr && g.mask_crosses_units) store_packed_mask(r, a.mask);
  r.wait_at_end();
}

// ---------------------------------------------------------------------------------------------- backward

template <class scalar_t, Layout layout>
__device__ __forceinline__ void fetch_gate(const Resident<scalar_t, layout>& r, const uint8_t* mask) {
  Cursor<layout> cursor = r.cursor();
  const auto fetch_with = [&](const auto& read) {
    for (int first = 0; first < r.iterations; first += kGateBatch) {
      uint32_t passed[kGateBatch];
#pragma unroll
      for (int k = 0; k < kGateBatch; ++k) {
        passed[k] = cursor.more() ? read(mask + cursor.mask_offset) : 0;
        cursor.advance(r.g);
      }
#pragma unroll
      for (int k = 0; k < kGateBatch; ++k)
        if (first + k < r.iterations) r.template gate<2>(first + k) = passed[k];
    }
  };
  if constexpr (layout == Layout::kPacked) {  // bits of two bytes of a plane, and of the first of the next
    const int turn = r.channels.turn, shift = r.channels.within % kUnit;
    const int next_plane = bytes_to_next_plane(r.g, r.channels);
    fetch_with([&](const uint8_t* from) {
      uint32_t bits = __ldg(from);
      if (shift + turn > kUnit) bits |= __ldg(from + 1) << kUnit;
      bits = bits >> shift & ((1 << turn) - 1);
      if (turn < kUnit) bits |= __ldg(from + next_plane) << turn;
      return bits & 0xff;
    });
  } else {
    fetch_with([](const uint8_t* from) { return uint32_t{__ldg(from)}; });
  }
}

// Turns dy into dz where it lies, and adds up dz and dz · (x − mean) of the thread's channels over the block or the
// cluster.
template <class scalar_t, Layout layout>
__device__ __forceinline__ Sums<Channels<layout>::kCount> sums_of(const Resident<scalar_t, layout>& r,
                                                                  const BackwardArguments<scalar_t>& a,
                                                                  const Normalizer<scalar_t, layout>& normalizer) {
  constexpr int count = Channels<layout>::kCount;
  const Slots<scalar_t> x = r.operand(0), dz = r.operand(1);
  auto sums = Sums<count>::zero();
#pragma unroll 2
  for (int i = 0; i < r.units; ++i) {
    const Unit<scalar_t> x_unit = x.get(i);
    Unit<scalar_t> dz_unit = dz.get(i);
    if (a.gate == Gate::kStandalone) {
      const StandaloneGradient gradient(a.activation, normalizer, dz_unit, x_unit);
      dz.put(i, Unit<scalar_t>::of(gradient.values));
      add_to(sums, normalizer, gradient, x_unit);
      continue;
    }
    if (a.gate != Gate::kOpen) {
      dz_unit = a.gate == Gate::kMask ? dz_unit.keep(r.template gate<2>(i)) : gated(normalizer, dz_unit, x_unit);
      dz.put(i, dz_unit);
    }
    add_to(sums, normalizer, dz_unit, x_unit);
  }
  float totals[2 * count];
#pragma unroll
  for (int j = 0; j < count; ++j) totals[2 * j] = sums.first[j], totals[2 * j + 1] = sums.second[j];
  r.add_up(totals, r.template sums<2>(), 0);
#pragma unroll
  for (int j = 0; j < count; ++j) sums.first[j] = totals[2 * j], sums.second[j] = totals[2 * j + 1];
  return sums;
}

// Stores the sums of a thread's channels where it is its place to, and returns how they carry gradients to x.
template <class scalar_t, Layout layout>
__device__ __forceinline__ ThroughStatistics<layout> through_statistics(const Resident<scalar_t, layout>& r,
                                                                        const BackwardArguments<scalar_t>& a,
                                                                        const Normalizer<scalar_t, layout>& normalizer,
                                                                        const FinishSums& finish,
                                                                        const Sums<Channels<layout>::kCount>& sums) {
  ThroughStatistics<layout> through;
  through.set_factors(normalizer, a.normalization, r.part, r.channels);
  const int64_t group = r.part.member * r.g.C + r.channels.first;
  float rstd[through.kCount];
  read_channels(rstd, finish.rstd + group, r.channels);
#pragma unroll
  for (int j = 0; j < through.kCount; ++j) {
    through.set(j, 0, 0, 0, 0);
    if (j >= r.channels.live) continue;
    if (r.writes() && r.channels.stands_for_channel(j))
      finish.store(group + r.channels.channel_of(j), sums.channel(j), rstd[j]);
    if (!a.constant_statistics) through.set(j, sums.first[j], sums.second[j] * rstd[j], rstd[j], a.inverse_count);
  }
  return through;
}

template <class scalar_t, Layout layout, Width width>
__global__ void __launch_bounds__(resident_threads(layout), 1)
    resident_backward_kernel(BackwardArguments<scalar_t> a, Geometry g, int slots, FinishSums finish) {
  const Resident<scalar_t, layout> r(g, slots, g.splits, part_of_block(g));
  fetch<width>(r, {a.x, a.dy});
  if (a.gate == Gate::kMask) fetch_gate(r, a.mask);
  const Normalizer<scalar_t, layout> normalizer(a.normalization, g, r.part, r.channels);
  wait_for_copies();

  const auto sums = sums_of(r, a, normalizer);
  r.arrive_at_end();

  const auto through = through_statistics(r, a, normalizer, finish, sums);
  const Slots<scalar_t> x = r.operand(0), dz = r.operand(1);
  Cursor<layout> cursor = r.cursor();
  for (int i = 0; a.dx != nullptr && i < r.iterations; ++i) {
    const Unit<scalar_t> x_unit = x.get(i), dz_unit = dz.get(i);
    store<width>(r, 0, i, input_gradient(normalizer, through, a.constant_statistics, dz_unit, x_unit), a.dx, cursor);
    if (a.dresidual != nullptr) store<width>(r, 1, i, dz_unit, a.dresidual, cursor);
    cursor.advance(g);
  }
  r.wait_at_end();
}

}  // namespace latephase::ensemble_batch_norm
