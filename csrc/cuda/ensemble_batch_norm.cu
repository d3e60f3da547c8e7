// Ensemble batch norm on CUDA, streaming: each pass reads its operands from memory once.
//
// Work is cut into blocks by (member, channels, split): a thread owns one channel (contiguous data) or the eight of a
// unit (channels_last) and walks over units of its split, kTile at a time. Splits depend on one member's sizes only,
// and partial results are merged in the order of the splits: a member's result is the same bits alone and in any
// ensemble.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "../ensemble_batch_norm.h"
#include "reduce.cuh"
#include "unit.cuh"

namespace latephase::ensemble_batch_norm {
namespace {

constexpr int kMaxLanes = 8;        // units of channels a block spans in channels_last: 64 channels
constexpr int kTargetBlocks = 512;  // blocks a member is split into if there are too few channels
constexpr int kTileBytes = 64;      // that a thread has in flight, of one operand or two halves
constexpr int kMinTilesPerSplit = 2;

template <class scalar_t>
constexpr int kTile = kTileBytes / (kUnit * sizeof(scalar_t));  // units

// ---------------------------------------------------------------------------------------------- geometry

// How one member's data is walked over. A row of units has units_per_row units in contiguous data; in channels_last it
// is a single unit: positions are then rows, and threads side by side (lanes) take the units of a row.
struct Geometry {
  int64_t C, columns;
  int64_t row_stride, mask_row_stride;        // elements and mask bytes between rows of one channel
  int64_t member_stride, mask_member_stride;  // ... and between members
  int64_t positions, positions_per_split;
  int64_t units_per_row, step_rows, step_units;  // a thread's step of `workers` positions, in rows and units
  int splits, channel_blocks, lanes, workers, threads;
  int access_bytes;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int round_up_to_power_of_two(int64_t value, int low, int high) {
  int power = low;
  while (power < high && power < value) power *= 2;
  return power;
}

// The widest access, at most 16 bytes, that every row of every operand is aligned to.
int access_bytes(const Sizes& s, int element_size, std::initializer_list<const void*> operands) {
  uint64_t bits = 16 | static_cast<uint64_t>(s.columns() * element_size);
  for (const void* operand : operands) bits |= reinterpret_cast<uint64_t>(operand);
  return static_cast<int>(bits & -bits);
}

Geometry geometry_of(const Sizes& s, int element_size, int access_bytes) {
  const int tile = kTileBytes / (kUnit * element_size);
  const int64_t units = s.mask_row_bytes();
  Geometry g{};
  g.C = s.C;
  g.columns = s.columns();
  g.row_stride = s.channels_last ? s.C : s.C * s.S;
  g.mask_row_stride = s.channels_last ? units : s.C * units;
  g.units_per_row = s.channels_last ? 1 : units;
  const int64_t rows = s.channels_last ? s.n() : s.B;
  g.member_stride = rows * g.row_stride;
  g.mask_member_stride = rows * g.mask_row_stride;
  g.positions = rows * g.units_per_row;
  g.lanes = s.channels_last ? round_up_to_power_of_two(units, 1, kMaxLanes) : 1;
  g.channel_blocks = static_cast<int>(s.channels_last ? divide_up(units, g.lanes) : s.C);

  const int64_t smallest_split = int64_t{kMaxThreads} / g.lanes * tile * kMinTilesPerSplit;
  g.splits = static_cast<int>(std::min<int64_t>(divide_up(kTargetBlocks, g.channel_blocks),
                                                std::max<int64_t>(1, divide_up(g.positions, smallest_split))));
  g.positions_per_split = divide_up(g.positions, g.splits);
  g.threads = round_up_to_power_of_two(g.lanes * divide_up(g.positions_per_split, tile), kWarp, kMaxThreads);
  g.workers = g.threads / g.lanes;
  g.step_rows = g.workers / g.units_per_row;
  g.step_units = g.workers % g.units_per_row;
  g.access_bytes = access_bytes;
  return g;
}

// Which part of the data a block works on.
struct Part {
  int64_t member, split, channel_block;

  __device__ Part(const Geometry& g, int64_t block) {
    split = block % g.splits;
    channel_block = block / g.splits % g.channel_blocks;
    member = block / g.splits / g.channel_blocks;
  }
};

// The channels of a thread: one, or those of a unit, of which `live` exist.
template <bool channels_last>
struct Channels {
  static constexpr int kCount = channels_last ? kUnit : 1;
  int64_t first;
  int live;

  __device__ Channels(const Geometry& g, const Part& part) {
    if constexpr (channels_last) {
      first = (part.channel_block * g.lanes + threadIdx.x % g.lanes) * kUnit;
      live = static_cast<int>(min(max(g.C - first, int64_t{0}), int64_t{kUnit}));
    } else {
      first = part.channel_block;
      live = 1;
    }
  }
};

// A thread's walk over the units of its part.
template <bool channels_last>
struct Cursor {
  int64_t offset, mask_offset;  // of the unit in the data and in the mask
  int64_t position, end, unit;
  int live_channels;

  __device__ Cursor(const Geometry& g, const Part& part, const Channels<channels_last>& channels) {
    position = part.split * g.positions_per_split + threadIdx.x / g.lanes;
    end = min((part.split + 1) * g.positions_per_split, g.positions);
    const int64_t row = position / g.units_per_row;
    unit = position % g.units_per_row;
    offset = part.member * g.member_stride + row * g.row_stride;
    mask_offset = part.member * g.mask_member_stride + row * g.mask_row_stride;
    if constexpr (channels_last) {
      offset += channels.first;
      mask_offset += channels.first / kUnit;
      if (channels.live == 0) end = position;
    } else {
      offset += channels.first * g.columns + unit * kUnit;
      mask_offset += channels.first * g.units_per_row + unit;
    }
    live_channels = channels.live;
  }

  __device__ __forceinline__ bool more() const { return position < end; }

  // Values of the unit that exist.
  __device__ __forceinline__ int valid(const Geometry& g) const {
    if (position >= end) return 0;
    if constexpr (channels_last) return live_channels;
    return static_cast<int>(min(g.columns - unit * kUnit, int64_t{kUnit}));
  }

  __device__ __forceinline__ void advance(const Geometry& g) {
    position += g.workers;
    offset += g.step_rows * g.row_stride;
    mask_offset += g.step_rows * g.mask_row_stride;
    if constexpr (!channels_last) {
      offset += g.step_units * kUnit;
      mask_offset += g.step_units;
      unit += g.step_units;
      if (unit >= g.units_per_row) {
        unit -= g.units_per_row;
        offset += g.row_stride - g.units_per_row * kUnit;
        mask_offset += g.mask_row_stride - g.units_per_row;
      }
    }
  }
};

template <class scalar_t, bool channels_last, int tile>
__device__ __forceinline__ void load_tile(Unit<scalar_t> (&units)[tile], const scalar_t* data, const Geometry& g,
                                          Cursor<channels_last> cursor) {
  with_access<scalar_t>(g.access_bytes, [&](auto access) {
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      units[i] = Unit<scalar_t>::template load<decltype(access)::value>(data + cursor.offset, cursor.valid(g));
      cursor.advance(g);
    }
  });
}

template <class scalar_t, bool channels_last>
__device__ __forceinline__ void store_unit(const Unit<scalar_t>& unit, scalar_t* data, const Geometry& g,
                                           const Cursor<channels_last>& cursor) {
  with_access<scalar_t>(g.access_bytes, [&](auto access) {
    unit.template store<decltype(access)::value>(data + cursor.offset, cursor.valid(g));
  });
}

// ---------------------------------------------------------------------------------------------- parameters

// A weight or bias: of scalar_t or float, [K, C] or [C], or absent.
struct Parameter {
  const void* data;
  int64_t member_stride;
  bool is_float;

  explicit Parameter(const Affine& a)
      : data(a.data), member_stride(a.member_stride), is_float(a.dtype == DataType::Float) {}

  template <class scalar_t>
  __device__ float at(int64_t member, int64_t channel, float otherwise) const {
    if (data == nullptr) return otherwise;
    const int64_t i = member * member_stride + channel;
    return is_float ? static_cast<const float*>(data)[i] : widen(static_cast<const scalar_t*>(data)[i]);
  }
};

struct Normalization {
  const float* mean;
  const float* rstd;
  Parameter weight, bias;
};

// z = (x − mean) · scale + bias, for each channel of a thread: the same bits in every kernel.
template <class scalar_t, bool channels_last>
struct Normalizer {
  static constexpr int kCount = Channels<channels_last>::kCount;
  float mean[kCount], scale[kCount], bias[kCount];

  __device__ Normalizer(const Normalization& of, const Geometry& g, const Part& part,
                        const Channels<channels_last>& channels) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      mean[j] = scale[j] = bias[j] = 0;
      if (j >= channels.live) continue;
      const int64_t channel = channels.first + j, i = part.member * g.C + channel;
      mean[j] = of.mean[i];
      scale[j] = __fmul_rn(of.rstd[i], of.weight.template at<scalar_t>(part.member, channel, 1));
      bias[j] = of.bias.template at<scalar_t>(part.member, channel, 0);
    }
  }

  // j counts the values of a unit.
  __device__ __forceinline__ float centred(float x, int j) const { return __fsub_rn(x, mean[channels_last ? j : 0]); }
  __device__ __forceinline__ float normalized(float x, int j) const {
    return __fmaf_rn(centred(x, j), scale[channels_last ? j : 0], bias[channels_last ? j : 0]);
  }
};

// ---------------------------------------------------------------------------------------------- reductions

struct FinishStatistics {
  float* mean;
  float* rstd;  // or null
  float* var;   // or null
  float eps;

  __device__ void operator()(int64_t group, const Moments<1>& m) const {
    const float variance = m.m2[0] / m.count;
    mean[group] = m.count == 0 ? NAN : m.mean[0];
    if (rstd != nullptr) rstd[group] = __frsqrt_rn(variance + eps);
    if (var != nullptr) var[group] = variance;
  }
};

struct FinishSums {
  float* sum_dz;
  float* sum_dz_xhat;
  const float* rstd;

  // sums: of dz and of dz · (x − mean)
  __device__ void operator()(int64_t group, const Sums<1>& sums) const {
    sum_dz[group] = sums.first[0];
    sum_dz_xhat[group] = sums.second[0] * rstd[group];
  }
};

// The end of a reducing kernel: merges the block's threads and finishes, or leaves a partial result [K·C, splits].
template <bool channels_last, template <int> class Partial, class Finish>
__device__ void conclude(const Partial<Channels<channels_last>::kCount>& mine, const Geometry& g, const Part& part,
                         const Channels<channels_last>& channels, Partial<1>* partials, const Finish& finish) {
  constexpr int count = Channels<channels_last>::kCount;
  const auto merged = block_reduce<Partial<count>, channels_last ? kMaxLanes : 1>(mine, g.lanes);
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
  for (int split = threadIdx.x % kWarp; split < splits; split += kWarp) total.merge(partials[group * splits + split]);
  total = warp_reduce(total, 1);
  if (threadIdx.x % kWarp == 0) finish(group, total);
}

// The moments of a tile: the mean, then squares around it, corrected for the mean's rounding.
template <bool full, bool channels_last, class scalar_t, int tile>
__device__ __forceinline__ Moments<Channels<channels_last>::kCount> moments_of(const Unit<scalar_t> (&units)[tile],
                                                                               const int (&valid)[tile]) {
  constexpr int count = Channels<channels_last>::kCount;
  Moments<count> moments;
  int values = 0;  // of each channel
#pragma unroll
  for (int i = 0; i < tile; ++i) values += channels_last ? valid[i] > 0 : valid[i];
  moments.count = values;
  const float inverse = 1.0f / moments.count;
#pragma unroll
  for (int c = 0; c < count; ++c) {
    const int first = channels_last ? c : 0, last = channels_last ? c + 1 : kUnit;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      float unit_sum = 0;
#pragma unroll
      for (int j = first; j < last; ++j) unit_sum += units[i].get(j);  // 0 where not valid
      sum += unit_sum;
    }
    const float mean = sum * inverse;
    float sum_of_differences = 0, m2 = 0;
#pragma unroll
    for (int i = 0; i < tile; ++i) {
#pragma unroll
      for (int j = first; j < last; ++j) {
        const bool exists = full || (channels_last ? valid[i] > 0 : j < valid[i]);
        const float difference = exists ? units[i].get(j) - mean : 0;
        sum_of_differences += difference;
        m2 = fmaf(difference, difference, m2);
      }
    }
    const float shift = sum_of_differences * inverse;
    const bool finite = m2 < INFINITY;  // else the correction would turn infinities into NaN
    moments.mean[c] = finite ? mean + shift : mean;
    moments.m2[c] = finite ? fmaxf(m2 - sum_of_differences * shift, 0) : m2;
  }
  return moments;
}

template <class scalar_t, bool channels_last>
__global__ void __launch_bounds__(kMaxThreads, 2)
    statistics_kernel(const scalar_t* x, Geometry g, Moments<1>* partials, FinishStatistics finish) {
  const Part part(g, blockIdx.x);
  const Channels<channels_last> channels(g, part);
  Cursor<channels_last> cursor(g, part, channels);
  constexpr int tile = kTile<scalar_t>;
  auto moments = Moments<Channels<channels_last>::kCount>::zero();
  while (cursor.more()) {
    Unit<scalar_t> units[tile];
    load_tile(units, x, g, cursor);
    int valid[tile];
    bool full = true;
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      valid[i] = cursor.valid(g);
      full &= channels_last ? valid[i] > 0 : valid[i] == kUnit;
      cursor.advance(g);
    }
    moments.merge(full ? moments_of<true, channels_last>(units, valid)
                       : moments_of<false, channels_last>(units, valid));
  }
  conclude<channels_last>(moments, g, part, channels, partials, finish);
}

// ---------------------------------------------------------------------------------------------- forward

template <class scalar_t>
struct ApplyArguments {
  const scalar_t* x;
  const scalar_t* residual;  // or null
  scalar_t* y;
  uint8_t* mask;  // or null
  Normalization normalization;
  bool relu;
};

template <class scalar_t, bool channels_last>
__global__ void __launch_bounds__(kMaxThreads, 2) apply_kernel(ApplyArguments<scalar_t> a, Geometry g) {
  const Part part(g, gridDim.x - 1 - blockIdx.x);  // what the statistics read last may still be in the cache
  const Channels<channels_last> channels(g, part);
  const Normalizer<scalar_t, channels_last> normalizer(a.normalization, g, part, channels);
  Cursor<channels_last> cursor(g, part, channels);
  constexpr int tile = kTile<scalar_t> / 2;
  while (cursor.more()) {
    Unit<scalar_t> x[tile], residual[tile];
    load_tile(x, a.x, g, cursor);
    if (a.residual != nullptr) load_tile(residual, a.residual, g, cursor);
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      float y[kUnit];
      uint32_t passed = 0;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        float z = normalizer.normalized(x[i].get(j), j);
        if (a.residual != nullptr) z = __fadd_rn(z, residual[i].get(j));
        const bool passes = !a.relu || relu_passes(z, Packing<scalar_t>::kRoundsToZero);
        y[j] = passes ? z : 0;
        passed |= uint32_t{passes && j < cursor.valid(g)} << j;
      }
      store_unit(Unit<scalar_t>::of(y), a.y, g, cursor);
      if (a.mask != nullptr && cursor.more()) a.mask[cursor.mask_offset] = passed;
      cursor.advance(g);
    }
  }
}

// ---------------------------------------------------------------------------------------------- backward

enum class Gate { kOpen, kMask, kRecompute };

template <class scalar_t>
struct BackwardArguments {
  const scalar_t* dy;
  const scalar_t* x;
  const uint8_t* mask;
  scalar_t* dx;
  scalar_t* dresidual;  // or null
  Normalization normalization;
  const float* sum_dz;
  const float* sum_dz_xhat;
  double count;
  Gate gate;
};

// Loads a tile of dy and x, and which of its values the activation let through, a bit each.
template <class scalar_t, bool channels_last, int tile>
__device__ __forceinline__ void load_gated(Unit<scalar_t> (&dy)[tile], Unit<scalar_t> (&x)[tile],
                                           uint32_t (&passed)[tile], const BackwardArguments<scalar_t>& a,
                                           const Normalizer<scalar_t, channels_last>& normalizer, const Geometry& g,
                                           Cursor<channels_last> cursor) {
  load_tile(dy, a.dy, g, cursor);
  load_tile(x, a.x, g, cursor);
#pragma unroll
  for (int i = 0; i < tile; ++i) passed[i] = 0xff;
  if (a.gate == Gate::kMask) {
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      if (cursor.more()) passed[i] = __ldg(a.mask + cursor.mask_offset);
      cursor.advance(g);
    }
  } else if (a.gate == Gate::kRecompute) {
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      passed[i] = 0;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const float z = normalizer.normalized(x[i].get(j), j);
        passed[i] |= uint32_t{relu_passes(z, Packing<scalar_t>::kRoundsToZero)} << j;
      }
    }
  }
}

template <class scalar_t, bool channels_last>
__global__ void __launch_bounds__(kMaxThreads, 2)
    backward_reduce_kernel(BackwardArguments<scalar_t> a, Geometry g, Sums<1>* partials, FinishSums finish) {
  const Part part(g, blockIdx.x);
  const Channels<channels_last> channels(g, part);
  const Normalizer<scalar_t, channels_last> normalizer(a.normalization, g, part, channels);
  Cursor<channels_last> cursor(g, part, channels);
  constexpr int tile = kTile<scalar_t> / 2;
  auto sums = Sums<Channels<channels_last>::kCount>::zero();
  while (cursor.more()) {
    Unit<scalar_t> dy[tile], x[tile];
    uint32_t passed[tile];
    load_gated(dy, x, passed, a, normalizer, g, cursor);
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      const int valid = cursor.valid(g);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const int c = channels_last ? j : 0;
        const float dz = j < valid && passed[i] >> j & 1 ? dy[i].get(j) : 0;
        sums.first[c] += dz;
        sums.second[c] = fmaf(dz, j < valid ? normalizer.centred(x[i].get(j), j) : 0, sums.second[c]);
      }
      cursor.advance(g);
    }
  }
  conclude<channels_last>(sums, g, part, channels, partials, finish);
}

// dx = (dz − sum_dz / count − x̂ · sum_dz_xhat / count) · scale
template <class scalar_t, bool channels_last>
__global__ void __launch_bounds__(kMaxThreads, 2) backward_apply_kernel(BackwardArguments<scalar_t> a, Geometry g) {
  const Part part(g, gridDim.x - 1 - blockIdx.x);
  const Channels<channels_last> channels(g, part);
  const Normalizer<scalar_t, channels_last> normalizer(a.normalization, g, part, channels);
  constexpr int count = Channels<channels_last>::kCount;
  const bool constant_statistics = isinf(a.count);
  const float inverse_count = static_cast<float>(1 / a.count);
  float mean_dz[count], slope[count];
#pragma unroll
  for (int j = 0; j < count; ++j) {
    mean_dz[j] = slope[j] = 0;
    if (constant_statistics || j >= channels.live) continue;
    const int64_t i = part.member * g.C + channels.first + j;
    mean_dz[j] = a.sum_dz[i] * inverse_count;
    slope[j] = a.sum_dz_xhat[i] * inverse_count * a.normalization.rstd[i];
  }
  Cursor<channels_last> cursor(g, part, channels);
  constexpr int tile = kTile<scalar_t> / 2;
  while (cursor.more()) {
    Unit<scalar_t> dy[tile], x[tile];
    uint32_t passed[tile];
    load_gated(dy, x, passed, a, normalizer, g, cursor);
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      float dz[kUnit], dx[kUnit];
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const int c = channels_last ? j : 0;
        dz[j] = passed[i] >> j & 1 ? dy[i].get(j) : 0;
        const float through_statistics =
            constant_statistics ? 0 : fmaf(normalizer.centred(x[i].get(j), j), slope[c], mean_dz[c]);
        dx[j] = (dz[j] - through_statistics) * normalizer.scale[c];
      }
      store_unit(Unit<scalar_t>::of(dx), a.dx, g, cursor);
      if (a.dresidual != nullptr) store_unit(Unit<scalar_t>::of(dz), a.dresidual, g, cursor);
      cursor.advance(g);
    }
  }
}

__global__ void __launch_bounds__(kMaxThreads, 2)
    inverse_deviation_kernel(const float* var, float eps, int64_t groups, float* rstd) {
  const int64_t i = int64_t{blockIdx.x} * kMaxThreads + threadIdx.x;
  if (i < groups) rstd[i] = __frsqrt_rn(var[i] + eps);
}

// ---------------------------------------------------------------------------------------------- launches

// The current stream of a tensor's device, with that device current for as long as this lives.
class Launcher {
 public:
  explicit Launcher(const Tensor& on) : guard_(on.get_device_index()) {
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    STD_TORCH_CHECK(blocks <= INT32_MAX, "ensemble_batch_norm: input is too large: ", blocks, " thread blocks");
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream_>>>(arguments...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "ensemble_batch_norm: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

int64_t blocks_of(const Sizes& s, const Geometry& g) { return s.K * g.channel_blocks * g.splits; }

// Runs kernel(partials, finish), and the merge of its partial results if there is more than one a group.
template <class Partial, class Finish, class Kernel>
void reduce(const Launcher& launch, const Sizes& s, const Geometry& g, const Tensor& like, const Finish& finish,
            const Kernel& kernel) {
  const int64_t groups = s.K * s.C, finalize_blocks = divide_up(groups, kMaxThreads / kWarp);
  Partial* partials = nullptr;
  if (s.n() == 0) {
    launch(finalize_kernel<Partial, Finish>, finalize_blocks, kMaxThreads, partials, groups, 0, finish);
    return;
  }
  Tensor workspace =
      empty(like, {g.splits > 1 ? groups * g.splits * int64_t{sizeof(Partial) / sizeof(float)} : 0}, ScalarType::Float);
  if (g.splits > 1) partials = static_cast<Partial*>(workspace.mutable_data_ptr());
  kernel(partials);
  if (g.splits > 1) {
    launch(finalize_kernel<Partial, Finish>, finalize_blocks, kMaxThreads, partials, groups, g.splits, finish);
  }
}

template <class scalar_t, bool channels_last>
void run_forward(const Forward& f) {
  const Sizes& s = f.sizes;
  const Launcher launch(*f.like);
  auto* x = static_cast<const scalar_t*>(f.x);
  auto* mean = static_cast<float*>(f.mean);
  auto* rstd = static_cast<float*>(f.rstd);
  if (f.compute_statistics) {
    const Geometry g = geometry_of(s, sizeof(scalar_t), access_bytes(s, sizeof(scalar_t), {x}));
    const FinishStatistics finish{mean, rstd, static_cast<float*>(f.var), static_cast<float>(f.eps)};
    reduce<Moments<1>>(launch, s, g, *f.like, finish, [&](Moments<1>* partials) {
      launch(statistics_kernel<scalar_t, channels_last>, blocks_of(s, g), g.threads, x, g, partials, finish);
    });
  }
  if (f.y == nullptr || s.numel() == 0) return;
  const Geometry g = geometry_of(s, sizeof(scalar_t), access_bytes(s, sizeof(scalar_t), {x, f.residual, f.y}));
  const ApplyArguments<scalar_t> arguments{x,
                                           static_cast<const scalar_t*>(f.residual),
                                           static_cast<scalar_t*>(f.y),
                                           f.mask,
                                           {mean, rstd, Parameter(f.weight), Parameter(f.bias)},
                                           f.relu};
  launch(apply_kernel<scalar_t, channels_last>, blocks_of(s, g), g.threads, arguments, g);
}

template <class scalar_t, bool channels_last>
void run_backward(const Backward& b) {
  const Sizes& s = b.sizes;
  const Launcher launch(*b.like);
  auto* rstd = static_cast<const float*>(b.rstd);
  auto* sum_dz = static_cast<float*>(b.sum_dz);
  auto* sum_dz_xhat = static_cast<float*>(b.sum_dz_xhat);
  const BackwardArguments<scalar_t> arguments{
      static_cast<const scalar_t*>(b.dy),
      static_cast<const scalar_t*>(b.x),
      b.mask,
      static_cast<scalar_t*>(b.dx),
      static_cast<scalar_t*>(b.dresidual),
      {static_cast<const float*>(b.mean), rstd, Parameter(b.weight), Parameter(b.bias)},
      sum_dz,
      sum_dz_xhat,
      b.count,
      !b.relu             ? Gate::kOpen
      : b.mask != nullptr ? Gate::kMask
                          : Gate::kRecompute};
  if (b.compute_sums) {
    const Geometry g = geometry_of(s, sizeof(scalar_t), access_bytes(s, sizeof(scalar_t), {b.dy, b.x}));
    const FinishSums finish{sum_dz, sum_dz_xhat, rstd};
    reduce<Sums<1>>(launch, s, g, *b.like, finish, [&](Sums<1>* partials) {
      launch(backward_reduce_kernel<scalar_t, channels_last>, blocks_of(s, g), g.threads, arguments, g, partials,
             finish);
    });
  }
  if (b.dx == nullptr || s.numel() == 0) return;
  const Geometry g =
      geometry_of(s, sizeof(scalar_t), access_bytes(s, sizeof(scalar_t), {b.dy, b.x, b.dx, b.dresidual}));
  launch(backward_apply_kernel<scalar_t, channels_last>, blocks_of(s, g), g.threads, arguments, g);
}

// Calls run(scalar_t{}) for the type of `dtype`.
template <class Run>
void with_type(DataType dtype, const Run& run) {
  switch (dtype) {
    case DataType::Float:
      return run(float{});
    case DataType::Half:
      return run(__half{});
    case DataType::BFloat16:
      return run(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, "ensemble_batch_norm: CUDA kernels take float32, float16 and bfloat16");
  }
}

struct Cuda {
  static void forward(const Forward& f) {
    if (f.sizes.K * f.sizes.C == 0) return;
    with_type(f.dtype, [&](auto type) {
      f.sizes.channels_last ? run_forward<decltype(type), true>(f) : run_forward<decltype(type), false>(f);
    });
  }

  static void backward(const Backward& b) {
    if (b.sizes.K * b.sizes.C == 0) return;
    with_type(b.dtype, [&](auto type) {
      b.sizes.channels_last ? run_backward<decltype(type), true>(b) : run_backward<decltype(type), false>(b);
    });
  }

  static void inverse_deviation(const Sizes& s, const Tensor& input, const Tensor& var, double eps,
                                const Tensor& rstd) {
    const int64_t groups = s.K * s.C;
    if (groups == 0) return;
    const Launcher launch(input);
    launch(inverse_deviation_kernel, divide_up(groups, kMaxThreads), kMaxThreads,
           static_cast<const float*>(var.const_data_ptr()), static_cast<float>(eps), groups,
           static_cast<float*>(rstd.mutable_data_ptr()));
  }
};

}  // namespace
}  // namespace latephase::ensemble_batch_norm

STABLE_TORCH_LIBRARY_IMPL(latephase_kernels, CUDA, m) {
  latephase::ensemble_batch_norm::Ops<latephase::ensemble_batch_norm::Cuda>::implement(m);
}
