// The folded weights of rank1_linear on CUDA: one pass writes every member's W ∘ (r_k s_kᵀ), another reads every
// member's H_k = dy_kᵀ x_k once for dW, ds and dr. No block's work depends on the number of members.
#include <algorithm>
#include <type_traits>

#include "../rank1_linear.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace latephase::rank1_linear {
namespace {

constexpr int kMembersOfThread = 4;  // whose weights a thread folds from one read of W
constexpr int kRowsOfThread = 2;     // for one read of a member's input gains
constexpr int kRowsOfWarp = 2, kRowsOfBlock = kRowsOfWarp * kMaxThreads / kWarp;
constexpr int kColumnsOfBlock = kWarp * kUnit;

template <class weight_t>
struct Arguments {
  int64_t K, out, in;
  Rows<weight_t> weight;
  Rows<float> input_gain;
  const float* output_gain;

  explicit Arguments(const Weights& w)
      : K(w.K),
        out(w.out),
        in(w.in),
        weight(w.weight, in),
        input_gain(w.input_gain, in),
        output_gain(static_cast<const float*>(w.output_gain)) {}
};

// A weight of the data's type, or float.
template <class scalar_t, bool own_type>
using weight_of = std::conditional_t<own_type, scalar_t, float>;

// A thread has eight columns of some rows of W, for some members.
template <class scalar_t, bool own_type>
__global__ void __launch_bounds__(kMaxThreads)
    fold_kernel(Arguments<weight_of<scalar_t, own_type>> a, Rows<scalar_t> folded) {
  const int64_t units = units_of(a.in), threads = divide_up(a.out, kRowsOfThread) * units;
  const int64_t blocks = divide_up(threads, kMaxThreads);
  const int64_t index = blockIdx.x % blocks * kMaxThreads + threadIdx.x;
  if (index >= threads) return;
  const int64_t first_row = index / units * kRowsOfThread, column = index % units * kUnit;
  const int valid = static_cast<int>(min(a.in - column, int64_t{kUnit}));
  Unit<weight_of<scalar_t, own_type>> weight[kRowsOfThread];
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i)
    weight[i] = a.weight.load((first_row + i) * a.in + column, first_row + i < a.out ? valid : 0);
  const int64_t first = blockIdx.x / blocks * kMembersOfThread, last = min(first + kMembersOfThread, a.K);
  for (int64_t k = first; k < last; ++k) {
    const auto s = a.input_gain.load(k * a.in + column, valid);
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const int64_t row = first_row + i;
      if (row >= a.out) break;
      const float r = a.output_gain[k * a.out + row];
      float values[kUnit];
#pragma unroll
      for (int j = 0; j < kUnit; ++j) values[j] = weight[i].get(j) * s.get(j) * r;
      folded.store((k * a.out + row) * a.in + column, valid, values);
    }
  }
}

// ---------------------------------------------------------------------------------------------- backward

// ds of each block of rows [row blocks, K, in], and dr of each block of columns [column blocks, K, out].
struct Partials {
  float *ds, *dr;
};

// What a thread reads of one member: its columns of H and its gains.
template <class scalar_t>
struct OfMember {
  Unit<scalar_t> product[kRowsOfWarp];
  Unit<float> input_gain;
  float output_gain[kRowsOfWarp];
};

// A block has kRowsOfBlock rows and kColumnsOfBlock columns of W, a warp kRowsOfWarp of the rows, and goes through the
// members: dW stays in registers, the next member's H and gains are on their way meanwhile.
template <class scalar_t, bool own_type>
__global__ void __launch_bounds__(kMaxThreads)
    fold_backward_kernel(Arguments<weight_of<scalar_t, own_type>> a, Rows<scalar_t> products, Rows<float> dweight,
                         Partials to) {
  __shared__ float warps[2][kMaxThreads / kWarp][kColumnPlaces];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t column_blocks = divide_up(a.in, kColumnsOfBlock);
  const int64_t row_block = blockIdx.x / column_blocks, column_block = blockIdx.x % column_blocks;
  const int64_t first_row = row_block * kRowsOfBlock + warp * kRowsOfWarp,
                first_column = column_block * kColumnsOfBlock;
  const int64_t column = first_column + lane * kUnit;
  const int valid = static_cast<int>(min(max(a.in - column, int64_t{0}), int64_t{kUnit}));
  const auto valid_of = [&](int i) { return first_row + i < a.out ? valid : 0; };
  const auto member = [&](int64_t k) {
    OfMember<scalar_t> read;
    read.input_gain = a.input_gain.load(k * a.in + column, valid);
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const int64_t row = k * a.out + first_row + i;
      read.product[i] = products.load(row * a.in + column, valid_of(i));
      read.output_gain[i] = first_row + i < a.out ? a.output_gain[row] : 0;
    }
    return read;
  };
  Unit<weight_of<scalar_t, own_type>> weight[kRowsOfWarp];
  float total[kRowsOfWarp][kUnit] = {};
#pragma unroll
  for (int i = 0; i < kRowsOfWarp; ++i) weight[i] = a.weight.load((first_row + i) * a.in + column, valid_of(i));
  auto next = member(0);
  for (int64_t k = 0; k < a.K; ++k) {
    const auto now = next;
    if (k + 1 < a.K) next = member(k + 1);
    float column_sums[kUnit] = {};
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const int64_t row = first_row + i;
      const float r = now.output_gain[i];
      float row_sum = 0;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const float s = now.input_gain.get(j), h = now.product[i].get(j), weighted = h * weight[i].get(j);
        row_sum = fmaf(weighted, s, row_sum);
        column_sums[j] = fmaf(weighted, r, column_sums[j]);
        total[i][j] = fmaf(h * r, s, total[i][j]);
      }
      for (int offset = kWarp / 2; offset > 0; offset /= 2) row_sum += __shfl_down_sync(~0u, row_sum, offset);
      if (lane == 0 && row < a.out) to.dr[(column_block * a.K + k) * a.out + row] = row_sum;
    }
#pragma unroll
    for (int j = 0; j < kUnit; ++j) warps[k % 2][warp][place_of_column(lane, j)] = column_sums[j];
    __syncthreads();  // one a member: the other half of `warps` is written next
    const int64_t mine = first_column + threadIdx.x;
    if (mine < a.in) {
      float sum = 0;
#pragma unroll
      for (int other = 0; other < kMaxThreads / kWarp; ++other)
        sum += warps[k % 2][other][place_of_column(threadIdx.x / kUnit, threadIdx.x % kUnit)];
      to.ds[(row_block * a.K + k) * a.in + mine] = sum;
    }
  }
  if (!dweight) return;
#pragma unroll
  for (int i = 0; i < kRowsOfWarp; ++i) {
    const int64_t place = (first_row + i) * a.in + column;
    const auto before = dweight.load(place, valid_of(i));
#pragma unroll
    for (int j = 0; j < kUnit; ++j) total[i][j] += before.get(j);
    dweight.store(place, valid_of(i), total[i]);
  }
}

// total [columns] = the sum of partials [count, columns], in an order of its own.
struct Merge {
  const float* partials;
  int64_t count, columns;
  float* total;

  LATEPHASE_HOST_DEVICE int64_t blocks() const { return divide_up(columns, int64_t{kWarp}); }
};

// Both sums; a thread has every eighth part of a column. (A reference to either would put both on the stack.)
__global__ void __launch_bounds__(kMaxThreads) fold_merge_kernel(Merge ds, Merge dr) {
  __shared__ float lanes[kMaxThreads];
  const bool first = blockIdx.x < ds.blocks();
  const Merge of{first ? ds.partials : dr.partials, first ? ds.count : dr.count, first ? ds.columns : dr.columns,
                 first ? ds.total : dr.total};
  const int64_t column = (blockIdx.x - (first ? 0 : ds.blocks())) * kWarp + threadIdx.x % kWarp;
  float sum = 0;
  if (column < of.columns) {
#pragma unroll 4
    for (int64_t i = threadIdx.x / kWarp; i < of.count; i += kMaxThreads / kWarp)
      sum += of.partials[i * of.columns + column];
  }
  lanes[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp || column >= of.columns) return;
  for (int other = 1; other < kMaxThreads / kWarp; ++other) sum += lanes[other * kWarp + threadIdx.x];
  of.total[column] = sum;
}

// ---------------------------------------------------------------------------------------------- launches

// Calls run(scalar_t{}, own_type) for the types of the data and the weight.
template <class Run>
void with_types(const Weights& w, const Run& run) {
  with_type(kOp, w.dtype, [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), float>)
      if (w.weight_dtype != w.dtype) return run(type, std::false_type{});
    run(type, std::true_type{});
  });
}

struct Cuda {
  static void fold(const Fold& call) {
    const int64_t threads = divide_up(call.out, kRowsOfThread) * units_of(call.in);
    if (call.K * threads == 0) return;
    with_types(call, [&](auto type, auto own) {
      using scalar_t = decltype(type);
      const Arguments<weight_of<scalar_t, own>> arguments(call);
      const Grid grid{divide_up(threads, kMaxThreads) * divide_up(call.K, kMembersOfThread), kMaxThreads};
      Launcher{*call.like}(fold_kernel<scalar_t, own>, grid, arguments, Rows<scalar_t>(call.folded, call.in));
    });
  }

  static void fold_backward(const FoldBackward& call) {
    const Launcher launch(*call.like);
    const int64_t row_blocks = divide_up(call.out, kRowsOfBlock), column_blocks = divide_up(call.in, kColumnsOfBlock);
    const int64_t ds_values = row_blocks * call.K * call.in, dr_values = column_blocks * call.K * call.out;
    Tensor workspace = empty(*call.like, {ds_values + dr_values}, ScalarType::Float);
    float* partials = static_cast<float*>(workspace.mutable_data_ptr());
    const Partials to{partials, partials + ds_values};
    with_types(call, [&](auto type, auto own) {
      using scalar_t = decltype(type);
      if (row_blocks * column_blocks * call.K == 0) return;
      const Arguments<weight_of<scalar_t, own>> arguments(call);
      launch(fold_backward_kernel<scalar_t, own>, {row_blocks * column_blocks, kMaxThreads}, arguments,
             Rows<scalar_t>(call.products, call.in), Rows<float>(call.dweight, call.in), to);
    });
    const Merge ds{to.ds, row_blocks, call.K * call.in, static_cast<float*>(call.ds)};
    const Merge dr{to.dr, column_blocks, call.K * call.out, static_cast<float*>(call.dr)};
    if (ds.columns + dr.columns == 0) return;
    launch(fold_merge_kernel, {ds.blocks() + dr.blocks(), kMaxThreads}, ds, dr);
  }
};

}  // namespace
}  // namespace latephase::rank1_linear

STABLE_TORCH_LIBRARY_IMPL(latephase_kernels, CUDA, m) {
  latephase::rank1_linear::Ops<latephase::rank1_linear::Cuda>::implement(m);
}
