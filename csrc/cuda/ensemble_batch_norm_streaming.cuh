// The streaming tier, for groups of any size: one pass reduces and one applies, each reads its operands from memory.
//
// A part is a block. If a member has several splits, partial results are merged in the order of the splits. The L2
// cache is asked to keep what the first pass reads and to give up what the second reads and writes, in reverse order.
#pragma once

#include "ensemble_batch_norm_formulas.cuh"
#include "launch.cuh"

namespace latephase::ensemble_batch_norm {

constexpr Keep kFirstRead = Keep::kLonger, kLastUse = Keep::kNoLonger;
constexpr int kMaxLanes = 8;        // units of channels a block spans in channels_last: 64 channels
constexpr int kTargetBlocks = 512;  // blocks a member is split into if there are too few channels
constexpr int kTileBytes = 64;      // that a thread has in flight, of one operand or two halves
constexpr int kMinTilesPerSplit = 2;

template <class scalar_t>
constexpr int kTile = kTileBytes / (kUnit * sizeof(scalar_t));  // units

inline Geometry streaming_geometry(const Sizes& s, int element_size, int access_bytes) {
  const int tile = kTileBytes / (kUnit * element_size);
  Geometry g(s, unpacked(s), lanes_of(s, kMaxLanes));
  const int64_t smallest_split = int64_t{kMaxThreads} / g.lanes * tile * kMinTilesPerSplit;
  const int splits = static_cast<int>(std::min<int64_t>(divide_up(kTargetBlocks, g.channel_blocks),
                                                        std::max<int64_t>(1, divide_up(g.positions, smallest_split))));
  const int64_t tiles = divide_up(divide_up(g.positions, splits), tile);
  g.cut(splits, round_up_to_power_of_two(g.lanes * tiles, kWarp, kMaxThreads));
  g.access_bytes = access_bytes;
  return g;
}

// ---------------------------------------------------------------------------------------------- reductions

// The end of a reducing kernel: merges the block's threads and finishes, or leaves a partial result [K·C, splits].
template <Layout layout, template <int> class Partial, class Finish>
__device__ void conclude(const Partial<Channels<layout>::kCount>& mine, const Geometry& g, const Part& part,
                         const Channels<layout>& channels, Partial<1>* partials, const Finish& finish) {
  constexpr int count = Channels<layout>::kCount;
  const auto merged = block_reduce<Partial<count>, by_column(layout) ? kMaxLanes : 1>(mine, g.lanes);
  if (threadIdx.x >= g.lanes) return;
#pragma unroll
  for (int j = 0; j < count; ++j) {
    if (j >= channels.live) break;
    const int64_t group = part.member * g.C + channels.first + j;
    if (g.splits == 1) {
      finish(group, merged.channel(j));
    } else {
      partials[group * g.splits + part.split] = merged.channel(j);
    }
  }
}

// A warp a group.
template <class Partial, class Finish>
__global__ void __launch_bounds__(kMaxThreads, 2)
    finalize_kernel(const Partial* partials, int64_t groups, int splits, Finish finish) {
  const int64_t group = int64_t{blockIdx.x} * (kMaxThreads / kWarp) + threadIdx.x / kWarp;
  if (group >= groups) return;
  Partial total = Partial::zero();
  for (int first = threadIdx.x % kWarp; first < splits; first += kAhead * kWarp) {
    Partial read[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int split = first + k * kWarp;
      read[k] = split < splits ? partials[group * splits + split] : Partial::zero();
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) total.merge(read[k]);
  }
  total = warp_reduce(total, 1);
  if (threadIdx.x % kWarp == 0) finish(group, total);
}

// The moments of a tile: the mean, then squares around it, corrected for the mean's rounding.
template <bool full, Layout layout, class scalar_t, int tile>
__device__ __forceinline__ Moments<Channels<layout>::kCount> moments_of(const Unit<scalar_t> (&units)[tile],
                                                                        const int (&valid)[tile]) {
  constexpr int count = Channels<layout>::kCount;
  Moments<count> moments;
  int values = 0;  // of each channel
#pragma unroll
  for (int i = 0; i < tile; ++i) values += by_column(layout) ? valid[i] > 0 : valid[i];
  moments.count = values;
  const float inverse = 1.0f / moments.count;
#pragma unroll
  for (int c = 0; c < count; ++c) {
    const int first = by_column(layout) ? c : 0, last = by_column(layout) ? c + 1 : kUnit;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      float unit_sum = 0;
#pragma unroll
      for (int j = first; j < last; ++j) unit_sum += units[i].get(j);  // 0 where not valid
      sum += unit_sum;
    }
    const float mean = sum * inverse;
    float differences = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < tile; ++i) {
#pragma unroll
      for (int j = first; j < last; ++j) {
        const bool exists = full || (by_column(layout) ? valid[i] > 0 : j < valid[i]);
        const float difference = exists ? units[i].get(j) - mean : 0;
        differences += difference;
        squares = fmaf(difference, difference, squares);
      }
    }
    const Moments<1> corrected = corrected_moments(moments.count, inverse, mean, differences, squares);
    moments.mean[c] = corrected.mean[0];
    moments.m2[c] = corrected.m2[0];
  }
  return moments;
}

template <class scalar_t, Layout layout>
__global__ void __launch_bounds__(kMaxThreads, 2)
    statistics_kernel(const scalar_t* x, Geometry g, Moments<1>* partials, FinishStatistics finish) {
  const Part part(g, blockIdx.x, threadIdx.x);
  const Channels<layout> channels(g, part);
  Cursor<layout> cursor(g, part, channels);
  constexpr int tile = kTile<scalar_t>;
  auto moments = Moments<Channels<layout>::kCount>::zero();
  while (cursor.more()) {
    Unit<scalar_t> units[tile];
    load_tile<Width::kAny, kFirstRead>(units, x, g, cursor);
    int valid[tile];
    bool full = true;
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      valid[i] = cursor.valid(g);
      full &= by_column(layout) ? valid[i] > 0 : valid[i] == kUnit;
      cursor.advance(g);
    }
    moments.merge(full ? moments_of<true, layout>(units, valid) : moments_of<false, layout>(units, valid));
  }
  conclude<layout>(moments, g, part, channels, partials, finish);
}

// ---------------------------------------------------------------------------------------------- forward

template <class scalar_t, Layout layout>
__global__ void __launch_bounds__(kMaxThreads, 2) apply_kernel(ForwardArguments<scalar_t> a, Geometry g) {
  const Part part(g, gridDim.x - 1 - blockIdx.x, threadIdx.x);  // what was read last may still be in the cache
  const Channels<layout> channels(g, part);
  const Normalizer<scalar_t, layout> normalizer(a.normalization, g, part, channels);
  Cursor<layout> cursor(g, part, channels);
  constexpr int tile = kTile<scalar_t> / 2;
  while (cursor.more()) {
    Unit<scalar_t> x[tile], residual[tile];
    load_tile<Width::kAny, kLastUse>(x, a.x, g, cursor);
    if (a.residual != nullptr) load_tile<Width::kAny, kLastUse>(residual, a.residual, g, cursor);
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      const Unit<scalar_t> y = output(a, normalizer, x[i], residual[i]);
      store_unit<kLastUse>(y, a.y, g, cursor);
      if (a.mask != nullptr && cursor.more()) a.mask[cursor.mask_offset] = y.nonzero(cursor.valid(g));
      cursor.advance(g);
    }
  }
}

// ---------------------------------------------------------------------------------------------- backward

// Loads a tile of x and dz; before a standalone activation, of x and dy.
template <Keep keep, class scalar_t, Layout layout, int tile>
__device__ __forceinline__ void load_gated(Unit<scalar_t> (&dz)[tile], Unit<scalar_t> (&x)[tile],
                                           const BackwardArguments<scalar_t>& a,
                                           const Normalizer<scalar_t, layout>& normalizer, const Geometry& g,
                                           Cursor<layout> cursor) {
  load_tile<Width::kAny, keep>(dz, a.dy, g, cursor);
  load_tile<Width::kAny, keep>(x, a.x, g, cursor);
  if (a.gate == Gate::kMask) {
    uint32_t passed[tile];
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      passed[i] = cursor.more() ? __ldg(a.mask + cursor.mask_offset) : 0;
      cursor.advance(g);
    }
#pragma unroll
    for (int i = 0; i < tile; ++i) dz[i] = dz[i].keep(passed[i]);
  } else if (a.gate == Gate::kRelu) {
#pragma unroll
    for (int i = 0; i < tile; ++i) dz[i] = gated(normalizer, dz[i], x[i]);
  }
}

template <class scalar_t, Layout layout>
__global__ void __launch_bounds__(kMaxThreads, 2)
    backward_reduce_kernel(BackwardArguments<scalar_t> a, Geometry g, Sums<1>* partials, FinishSums finish) {
  const Part part(g, blockIdx.x, threadIdx.x);
  const Channels<layout> channels(g, part);
  const Normalizer<scalar_t, layout> normalizer(a.normalization, g, part, channels);
  Cursor<layout> cursor(g, part, channels);
  constexpr int tile = by_column(layout) ? kTile<scalar_t> : kTile<scalar_t> / 2;
  auto sums = Sums<Channels<layout>::kCount>::zero();
  while (cursor.more()) {
    Unit<scalar_t> dz[tile], x[tile];
    load_gated<kFirstRead>(dz, x, a, normalizer, g, cursor);
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      if (a.gate == Gate::kStandalone) {
        add_to(sums, normalizer, StandaloneGradient(a.activation, normalizer, dz[i], x[i]), x[i]);
      } else {
        add_to(sums, normalizer, dz[i], x[i]);
      }
      cursor.advance(g);
    }
  }
  conclude<layout>(sums, g, part, channels, partials, finish);
}

template <class scalar_t, Layout layout>
__global__ void __launch_bounds__(kMaxThreads, 2) backward_apply_kernel(BackwardArguments<scalar_t> a, Geometry g) {
  const Part part(g, gridDim.x - 1 - blockIdx.x, threadIdx.x);
  const Channels<layout> channels(g, part);
  const Normalizer<scalar_t, layout> normalizer(a.normalization, g, part, channels);
  ThroughStatistics<layout> through;
  through.set_factors(normalizer, a.normalization, part, channels);
  const int64_t group = part.member * g.C + channels.first;
  float sum_dz[through.kCount], sum_dz_xhat[through.kCount], rstd[through.kCount];
  read_channels(sum_dz, a.sum_dz + group, channels);
  read_channels(sum_dz_xhat, a.sum_dz_xhat + group, channels);
  read_channels(rstd, a.normalization.rstd + group, channels);
#pragma unroll
  for (int j = 0; j < through.kCount; ++j) {
    through.set(j, 0, 0, 0, 0);
    if (a.constant_statistics || j >= channels.live) continue;
    through.set(j, sum_dz[j], sum_dz_xhat[j], rstd[j], a.inverse_count);
  }
  Cursor<layout> cursor(g, part, channels);
  constexpr int tile = kTile<scalar_t> / 2;
  while (cursor.more()) {
    Unit<scalar_t> dz[tile], x[tile];
    load_gated<kLastUse>(dz, x, a, normalizer, g, cursor);
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      if (a.gate == Gate::kStandalone)
        dz[i] = Unit<scalar_t>::of(StandaloneGradient(a.activation, normalizer, dz[i], x[i]).values);
      store_unit<kLastUse>(input_gradient(normalizer, through, a.constant_statistics, dz[i], x[i]), a.dx, g, cursor);
      if (a.dresidual != nullptr) store_unit<kLastUse>(dz[i], a.dresidual, g, cursor);
      cursor.advance(g);
    }
  }
}

// ---------------------------------------------------------------------------------------------- launches

inline Grid grid_of(const Geometry& g) { return {g.parts, g.threads}; }

// Runs kernel(partials), and the merge of its partial results if there is more than one a group.
template <class Partial, class Finish, class Kernel>
void reduce(const Launcher& launch, const Sizes& s, const Geometry& g, const Tensor& like, const Finish& finish,
            const Kernel& kernel) {
  const int64_t groups = s.K * s.C;
  const Grid finalize_grid{divide_up(groups, kMaxThreads / kWarp), kMaxThreads};
  Partial* partials = nullptr;
  if (s.n() == 0) {
    launch(finalize_kernel<Partial, Finish>, finalize_grid, partials, groups, 0, finish);
    return;
  }
  Tensor workspace =
      empty(like, {g.splits > 1 ? groups * g.splits * int64_t{sizeof(Partial) / sizeof(float)} : 0}, ScalarType::Float);
  if (g.splits > 1) partials = static_cast<Partial*>(workspace.mutable_data_ptr());
  kernel(partials);
  if (g.splits > 1) launch(finalize_kernel<Partial, Finish>, finalize_grid, partials, groups, g.splits, finish);
}

template <class scalar_t, Layout layout>
void stream_statistics(const Launcher& launch, const Sizes& s, const scalar_t* x, const FinishStatistics& finish,
                       const Tensor& like) {
  const Geometry g = streaming_geometry(s, sizeof(scalar_t), access_bytes(s.columns(), sizeof(scalar_t), {x}));
  reduce<Moments<1>>(launch, s, g, like, finish, [&](Moments<1>* partials) {
    launch(statistics_kernel<scalar_t, layout>, grid_of(g), x, g, partials, finish);
  });
}

template <class scalar_t, Layout layout>
void stream_apply(const Launcher& launch, const Sizes& s, const ForwardArguments<scalar_t>& a) {
  const int bytes = access_bytes(s.columns(), sizeof(scalar_t), {a.x, a.residual, a.y});
  const Geometry g = streaming_geometry(s, sizeof(scalar_t), bytes);
  launch(apply_kernel<scalar_t, layout>, grid_of(g), a, g);
}

template <class scalar_t, Layout layout>
void stream_backward_reduce(const Launcher& launch, const Sizes& s, const BackwardArguments<scalar_t>& a,
                            const FinishSums& finish, const Tensor& like) {
  const Geometry g = streaming_geometry(s, sizeof(scalar_t), access_bytes(s.columns(), sizeof(scalar_t), {a.dy, a.x}));
  reduce<Sums<1>>(launch, s, g, like, finish, [&](Sums<1>* partials) {
    launch(backward_reduce_kernel<scalar_t, layout>, grid_of(g), a, g, partials, finish);
  });
}

template <class scalar_t, Layout layout>
void stream_backward_apply(const Launcher& launch, const Sizes& s, const BackwardArguments<scalar_t>& a) {
  const int bytes = access_bytes(s.columns(), sizeof(scalar_t), {a.dy, a.x, a.dx, a.dresidual});
  const Geometry g = streaming_geometry(s, sizeof(scalar_t), bytes);
  launch(backward_apply_kernel<scalar_t, layout>, grid_of(g), a, g);
}

}  // namespace latephase::ensemble_batch_norm
