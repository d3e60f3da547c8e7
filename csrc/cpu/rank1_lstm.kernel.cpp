// The pointwise steps of rank1_lstm on one instruction set: compiled several times, with LATEPHASE_ISA naming the
// namespace. No torch header here, as in member_gain.kernel.cpp. Each function takes rows [begin, end) of the K·B.
#include "../rank1_lstm_arguments.h"
#include "activations.h"
#include "elements.h"

namespace latephase::LATEPHASE_ISA {
namespace {

using namespace latephase::rank1_lstm;

// What a row has in one step, at its first unit. Offsets of gate q are q · H further.
template <class T>
struct Row {
  using A = typename Accumulation<T>::type;
  const Step& step;
  const int64_t H, row, k;
  Row(const Step& step, int64_t row) : step(step), H(step.sizes.H), row(row), k(row / step.sizes.B) {}

  int64_t in_gates() const {
    const rank1_lstm::Sizes& s = step.sizes;
    return ((k * s.T + step.t) * s.B + row % s.B) * 4 * H;
  }
  int64_t in_step(int64_t t) const { return (t * step.sizes.rows() + row) * H; }
  const A* input_gain() const { return static_cast<const A*>(step.input_gain) + k * H; }
  const A* output_gain() const { return static_cast<const A*>(step.output_gain) + k * 4 * H; }
  A* cells() const { return static_cast<A*>(step.cells) + in_step(step.t); }
  const A* cells_before() const {
    return step.t == 0 ? static_cast<const A*>(step.c0) + row * H
                       : static_cast<const A*>(step.cells) + in_step(step.t - 1);
  }
};

template <class T>
void forward_row(const Row<T>& at) {
  using A = typename Accumulation<T>::type;
  const Step& step = at.step;
  const int64_t H = at.H;
  T* gates = static_cast<T*>(step.gates) + at.in_gates();
  const T* product = static_cast<const T*>(step.product) + at.row * 4 * H;
  T* output = static_cast<T*>(step.output) + at.in_step(step.t);
  T* scaled = static_cast<T*>(step.scaled) + at.row * H;
  const A *r = at.output_gain(), *s = at.input_gain(), *before = at.cells_before();
  A* cells = at.cells();
  for_columns<A>(0, H, [&](int64_t j, auto count) {
    const auto gate = [&](int64_t q, const auto& activation) {
      const int64_t i = q * H + j;
      const Vec<A> value = activation(fma(load(product + i, count), load(r + i, count), load(gates + i, count)));
      store(gates + i, value, count);
      return value;
    };
    const auto sigmoid_of = [](Vec<A> z) { return sigmoid(z); };
    const Vec<A> i = gate(0, sigmoid_of), f = gate(1, sigmoid_of), g = gate(2, [](Vec<A> z) { return tanh(z); }),
                 o = gate(3, sigmoid_of);
    const Vec<A> c = fma(f, load(before + j, count), i * g);
    store(cells + j, c, count);
    store(output + j, o * tanh(c), count);
    // What the next step multiplies is the h that is kept.
    store(scaled + j, load(output + j, count) * load(s + j, count), count);
  });
}

template <class T>
void backward_row(const Row<T>& at) {
  using A = typename Accumulation<T>::type;
  const Step& step = at.step;
  const int64_t H = at.H;
  const bool last = step.t == step.sizes.T - 1;  // nothing comes from behind the end
  const T* gates = static_cast<const T*>(step.gates) + at.in_gates();
  T* dgates = static_cast<T*>(step.dgates) + at.in_gates();
  T* scaled = static_cast<T*>(step.scaled) + at.row * 4 * H;
  const T* recurrent = static_cast<const T*>(step.product) + at.row * H;
  const T* dy = step.dy == nullptr ? nullptr : static_cast<const T*>(step.dy) + at.in_step(step.t);
  A* dc = static_cast<A*>(step.dc) + at.row * H;
  const A* dc_after = !last ? dc : step.dc_n == nullptr ? nullptr : static_cast<const A*>(step.dc_n) + at.row * H;
  const A *r = at.output_gain(), *s = at.input_gain(), *before = at.cells_before(), *cells = at.cells();
  for_columns<A>(0, H, [&](int64_t j, auto count) {
    const Vec<A> one = splat(A(1));
    const auto gate = [&](int64_t q) { return load(gates + q * H + j, count); };
    const Vec<A> i = gate(0), f = gate(1), g = gate(2), o = gate(3), tanh_c = tanh(load(cells + j, count));
    Vec<A> dh = dy == nullptr ? Vec<A>{} : load(dy + j, count);
    if (!last) dh = fma(load(recurrent + j, count), load(s + j, count), dh);
    const Vec<A> later = dc_after == nullptr ? Vec<A>{} : load(dc_after + j, count);
    const Vec<A> dc_here = fma(dh * o, one - tanh_c * tanh_c, later);
    const auto store_gate = [&](int64_t q, Vec<A> dz) {
      const int64_t at_gate = q * H + j;
      store(dgates + at_gate, dz, count);
      store(scaled + at_gate, dz * load(r + at_gate, count), count);
    };
    store_gate(0, dc_here * g * (i * (one - i)));
    store_gate(1, dc_here * load(before + j, count) * (f * (one - f)));
    store_gate(2, dc_here * i * (one - g * g));
    store_gate(3, dh * tanh_c * (o * (one - o)));
    store(dc + j, dc_here * f, count);
  });
}

}  // namespace

void scale(const Scale& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    using A = typename Accumulation<T>::type;
    const int64_t H = call.sizes.H;
    for (int64_t row = begin; row < end; ++row) {
      const A* gain = static_cast<const A*>(call.gain) + row / call.sizes.B * H;
      const T* x = static_cast<const T*>(call.x) + row * H;
      T* out = static_cast<T*>(call.out) + row * H;
      for_columns<A>(0, H,
                     [&](int64_t j, auto count) { store(out + j, load(x + j, count) * load(gain + j, count), count); });
    }
  });
}

void forward(const Step& step, int64_t begin, int64_t end) {
  with_type(step.dtype, [&](auto type) {
    for (int64_t row = begin; row < end; ++row) forward_row(Row<decltype(type)>(step, row));
  });
}

void backward(const Step& step, int64_t begin, int64_t end) {
  with_type(step.dtype, [&](auto type) {
    for (int64_t row = begin; row < end; ++row) backward_row(Row<decltype(type)>(step, row));
  });
}

}  // namespace latephase::LATEPHASE_ISA
