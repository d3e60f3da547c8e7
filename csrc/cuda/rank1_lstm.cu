// The steps of rank1_lstm on CUDA: all that is pointwise of a time step in one kernel, forward and backward. A thread
// has eight units of one row; sums and states are float32.
#include "../rank1_lstm.h"
#include "launch.cuh"
#include "rows.cuh"

namespace latephase::rank1_lstm {
namespace {

constexpr int kThreads = 128;  // a step has few rows: small blocks spread over more multiprocessors

// The row and the units of a thread.
struct Place {
  int64_t row, member, unit;
  int valid;  // 0 beyond the end

  __device__ explicit Place(const Sizes& s) {
    const int64_t units = units_of(s.H), index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    row = index / units;
    unit = index % units * kUnit;
    member = row / s.B;
    valid = row < s.rows() ? static_cast<int>(min(s.H - unit, int64_t{kUnit})) : 0;
  }
  __device__ int64_t in_row(const Sizes& s) const { return row * s.H + unit; }
  __device__ int64_t in_member(const Sizes& s) const { return member * s.H + unit; }
  __device__ int64_t in_step(const Sizes& s, int64_t t) const { return (t * s.rows() + row) * s.H + unit; }
  // Of gate q: in gates [K, T, B, 4H], in a row [K·B, 4H], in a gain [K, 4H].
  __device__ int64_t in_gates(const Sizes& s, int64_t t, int q) const {
    return (((member * s.T + t) * s.B + row % s.B) * 4 + q) * s.H + unit;
  }
  __device__ int64_t in_gate_row(const Sizes& s, int q) const { return (row * 4 + q) * s.H + unit; }
  __device__ int64_t in_gate_gain(const Sizes& s, int q) const { return (member * 4 + q) * s.H + unit; }
};

__device__ __forceinline__ float sigmoid(float z) { return 1 / (1 + expf(-z)); }

template <class scalar_t>
__global__ void __launch_bounds__(kThreads)
    lstm_scale_kernel(Sizes s, Rows<scalar_t> x, Rows<float> gain, Rows<scalar_t> out) {
  const Place at(s);
  if (at.valid == 0) return;
  const auto value = x.load(at.in_row(s), at.valid);
  const auto factor = gain.load(at.in_member(s), at.valid);
  float scaled[kUnit];
#pragma unroll
  for (int j = 0; j < kUnit; ++j) scaled[j] = value.get(j) * factor.get(j);
  out.store(at.in_row(s), at.valid, scaled);
}

// A Step's pointers.
template <class scalar_t>
struct Arguments {
  Rows<scalar_t> gates, product, scaled, output, dy, dgates;
  Rows<float> input_gain, output_gain, c0, cells, dc_n, dc;

  explicit Arguments(const Step& step)
      : gates(step.gates, step.sizes.H),
        product(step.product, step.sizes.H),
        scaled(step.scaled, step.sizes.H),
        output(step.output, step.sizes.H),
        dy(step.dy, step.sizes.H),
        dgates(step.dgates, step.sizes.H),
        input_gain(step.input_gain, step.sizes.H),
        output_gain(step.output_gain, step.sizes.H),
        c0(step.c0, step.sizes.H),
        cells(step.cells, step.sizes.H),
        dc_n(step.dc_n, step.sizes.H),
        dc(step.dc, step.sizes.H) {}
};

template <class scalar_t>
__global__ void __launch_bounds__(kThreads) lstm_forward_kernel(Sizes s, int64_t t, Arguments<scalar_t> a) {
  const Place at(s);
  if (at.valid == 0) return;
  // Read before anything is computed, so that the gates do not wait for each other's data.
  Unit<scalar_t> z[4], product[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    z[q] = a.gates.load(at.in_gates(s, t, q), at.valid);
    product[q] = a.product.load(at.in_gate_row(s, q), at.valid);
  }
  const auto before = t == 0 ? a.c0.load(at.in_row(s), at.valid) : a.cells.load(at.in_step(s, t - 1), at.valid);
  const auto gain = a.input_gain.load(at.in_member(s), at.valid);
  float gate[4][kUnit];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const auto r = a.output_gain.load(at.in_gate_gain(s, q), at.valid);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) gate[q][j] = fmaf(product[q].get(j), r.get(j), z[q].get(j));
  }
  float c[kUnit], h[kUnit], scaled[kUnit];
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    gate[0][j] = sigmoid(gate[0][j]);
    gate[1][j] = sigmoid(gate[1][j]);
    gate[2][j] = tanhf(gate[2][j]);
    gate[3][j] = sigmoid(gate[3][j]);
    c[j] = fmaf(gate[1][j], before.get(j), gate[0][j] * gate[2][j]);
    h[j] = gate[3][j] * tanhf(c[j]);
  }
  const auto stored_h = Unit<scalar_t>::of(h);  // what the next step multiplies is the h that is kept
#pragma unroll
  for (int j = 0; j < kUnit; ++j) scaled[j] = stored_h.get(j) * gain.get(j);
#pragma unroll
  for (int q = 0; q < 4; ++q) a.gates.store(at.in_gates(s, t, q), at.valid, gate[q]);
  a.cells.store(at.in_step(s, t), at.valid, c);
  a.output.store(at.in_step(s, t), at.valid, h);
  a.scaled.store(at.in_row(s), at.valid, scaled);
}

template <class scalar_t>
__global__ void __launch_bounds__(kThreads) lstm_backward_kernel(Sizes s, int64_t t, Arguments<scalar_t> a) {
  const Place at(s);
  if (at.valid == 0) return;
  const bool last = t == s.T - 1;
  const int valid = at.valid, from_step_after = last ? 0 : valid;  // nothing comes from behind the end
  Unit<scalar_t> gate[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) gate[q] = a.gates.load(at.in_gates(s, t, q), valid);
  const auto recurrent = a.product.load(at.in_row(s), from_step_after);
  const auto gain = a.input_gain.load(at.in_member(s), from_step_after);
  const auto dy = a.dy.load(at.in_step(s, t), a.dy ? valid : 0);
  const auto c = a.cells.load(at.in_step(s, t), valid);
  const auto before = t == 0 ? a.c0.load(at.in_row(s), valid) : a.cells.load(at.in_step(s, t - 1), valid);
  const auto dc_after = last ? a.dc_n.load(at.in_row(s), a.dc_n ? valid : 0) : a.dc.load(at.in_row(s), valid);
  float dz[4][kUnit], dc[kUnit];
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const float i = gate[0].get(j), f = gate[1].get(j), g = gate[2].get(j), o = gate[3].get(j);
    const float tanh_c = tanhf(c.get(j));
    const float dh = fmaf(recurrent.get(j), gain.get(j), dy.get(j));
    const float dc_here = fmaf(dh * o, 1 - tanh_c * tanh_c, dc_after.get(j));
    dz[0][j] = dc_here * g * (i * (1 - i));
    dz[1][j] = dc_here * before.get(j) * (f * (1 - f));
    dz[2][j] = dc_here * i * (1 - g * g);
    dz[3][j] = dh * tanh_c * (o * (1 - o));
    dc[j] = dc_here * f;
  }
  Unit<float> r[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) r[q] = a.output_gain.load(at.in_gate_gain(s, q), valid);  // before the first store
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    a.dgates.store(at.in_gates(s, t, q), valid, dz[q]);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) dz[q][j] *= r[q].get(j);
    a.scaled.store(at.in_gate_row(s, q), valid, dz[q]);
  }
  a.dc.store(at.in_row(s), valid, dc);
}

// ---------------------------------------------------------------------------------------------- launches

template <class Call, class Run>
void run_step(const Call& call, const Run& run) {
  const Grid grid{(call.sizes.rows() * units_of(call.sizes.H) + kThreads - 1) / kThreads, kThreads};
  const Launcher launch(*call.like);
  with_type(kOp, call.dtype, [&](auto type) { run(launch, grid, type); });
}

struct Cuda {
  static void scale(const Scale& call) {
    run_step(call, [&](const Launcher& launch, const Grid& grid, auto type) {
      using scalar_t = decltype(type);
      const int64_t H = call.sizes.H;
      launch(lstm_scale_kernel<scalar_t>, grid, call.sizes, Rows<scalar_t>(call.x, H), Rows<float>(call.gain, H),
             Rows<scalar_t>(call.out, H));
    });
  }

  static void forward(const Step& call) {
    run_step(call, [&](const Launcher& launch, const Grid& grid, auto type) {
      using scalar_t = decltype(type);
      launch(lstm_forward_kernel<scalar_t>, grid, call.sizes, call.t, Arguments<scalar_t>(call));
    });
  }

  static void backward(const Step& call) {
    run_step(call, [&](const Launcher& launch, const Grid& grid, auto type) {
      using scalar_t = decltype(type);
      launch(lstm_backward_kernel<scalar_t>, grid, call.sizes, call.t, Arguments<scalar_t>(call));
    });
  }
};

}  // namespace
}  // namespace latephase::rank1_lstm

STABLE_TORCH_LIBRARY_IMPL(latephase_kernels, CUDA, m) {
  latephase::rank1_lstm::Ops<latephase::rank1_lstm::Cuda>::implement(m);
}
