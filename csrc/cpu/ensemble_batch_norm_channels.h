// Ensemble batch norm where columns are channels (channels_last tensors): a member is a slab of n rows of C values,
// read in order. W = lanes of a register.
//
// A slab is cut into tiles of rows; a tile gives one set of sums a channel, and the sums of a slab are merged in the
// order of its tiles. The height of a tile depends on C and the type alone, so that neither the number of members nor
// that of threads changes a bit. Members are worked on in waves small enough to be read again from cache.
#pragma once

#include <algorithm>
#include <new>

#include "ensemble_batch_norm_step.h"
#include "parallel.h"

namespace latephase::LATEPHASE_ISA {
namespace {

template <class A>
class Workspace {  // std::vector would leave functions compiled for this instruction set to other files
 public:
  explicit Workspace(int64_t count) : data_(static_cast<A*>(::operator new(count * sizeof(A), kAlignment))) {}
  ~Workspace() { ::operator delete(data_, kAlignment); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  A* at(int64_t i) const { return data_ + i; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  A* data_;
};

// The caller alone.
inline Parallel serial() {
  return {1, [](int64_t count, int64_t, Parallel::Body body, void* context) { body(0, count, context); }};
}

template <class T>
class Channels {
  using A = typename Accumulation<T>::type;
  static constexpr int W = kLanes<A>;
  static constexpr int kGroup = 8;                 // rows summed by themselves: keeps chains of additions short
  static constexpr int64_t kTileBytes = 64 << 10;  // of a tile: it is read twice for the statistics
  static constexpr int64_t kWaveBytes = 1 << 20;   // of a wave, for each thread: half of its own cache
  static constexpr int64_t kBlock = 64;            // channels merged at once
  static constexpr int64_t kCoefficients = sizeof(Coefficients<A>) / sizeof(A);

 public:
  static void forward(const Forward& f, const Parallel& parallel) {
    with_step<T>(f, [&](const auto& shared) {
      const auto apply = [&](int64_t k, int64_t i0, int64_t i1, Coefficients<A*> at) {
        const auto step = shared;
        for_groups(f.sizes, k, i0, i1, [&](int64_t i, auto rows) {
          for_columns<A>(0, step.columns, [&](int64_t c, auto count) {
            const Coefficients<Vec<A>> values = read(at, c);
            for (int64_t u = 0; u < rows; ++u) step(i + u, c, count, values);
          });
        });
      };
      const auto sum = [&](int64_t k, int64_t i0, int64_t i1, A* sums, Coefficients<A*>) {
        statistics(f, k, i0, i1, sums);
      };
      for_members<3>(f, 1, f.compute_statistics, f.y != nullptr, parallel, sum, merge_statistics, apply);
    });
  }

  static void backward(const Backward& b, const Parallel& parallel) {
    with_step<T>(b, [&](const auto& shared) {
      const auto apply = [&](int64_t k, int64_t i0, int64_t i1, Coefficients<A*> at) {
        const auto step = shared;
        for_groups(b.sizes, k, i0, i1, [&](int64_t i, auto rows) {
          for_columns<A>(0, step.columns, [&](int64_t c, auto count) {
            const Coefficients<Vec<A>> values = read(at, c);
            for (int64_t u = 0; u < rows; ++u) step(i + u, c, count, values);
          });
        });
      };
      const auto sum = [&](int64_t k, int64_t i0, int64_t i1, A* sums, Coefficients<A*> at) {
        const auto step = shared;
        A *totals = sums, *products = sums + width(b.sizes);
        for_groups(b.sizes, k, i0, i1, [&](int64_t i, auto rows) {
          for_columns<A>(0, step.columns, [&](int64_t c, auto count) {
            const Coefficients<Vec<A>> values = read(at, c);
            Vec<A> total{}, product{};
            for (int64_t u = 0; u < rows; ++u) {
              ask_for_next_group(step.x + (i + u) * step.columns + c, step.columns);
              ask_for_next_group(step.dy + (i + u) * step.columns + c, step.columns);
              Vec<A> centred;
              const Vec<A> dz = step.gradient(i + u, c, count, values, centred);
              total += dz;
              product = fma(dz, centred, product);
            }
            store(totals + c, total + load(totals + c));
            store(products + c, product + load(products + c));
          });
        });
      };
      for_members<2>(b, 2, b.compute_sums, b.dx != nullptr, parallel, sum, merge_gradients, apply);
    });
  }

 private:
  static int64_t width(const Sizes& s) { return (s.C + W - 1) / W * W; }
  static int64_t tile_rows(const Sizes& s) {
    return std::clamp<int64_t>(kTileBytes / (s.C * static_cast<int64_t>(sizeof(T))), 32, 128);
  }

  static Coefficients<A*> coefficients_at(const Workspace<A>& workspace, const Sizes& s, int64_t member) {
    A* first = workspace.at(member * kCoefficients * width(s));
    const int64_t w = width(s);
    return {first, first + w, first + 2 * w, first + 3 * w, first + 4 * w, first + 5 * w};
  }
  static Coefficients<A*> from_channel(const Coefficients<A*>& at, int64_t c) {
    return {at.mean + c, at.scale + c, at.bias + c, at.factor + c, at.slope + c, at.offset + c};
  }
  static Coefficients<Vec<A>> read(const Coefficients<A*>& at, int64_t c) {
    return {load(at.mean + c),   load(at.scale + c), load(at.bias + c),
            load(at.factor + c), load(at.slope + c), load(at.offset + c)};
  }

  // Calls body(first row, rows) over member k's rows i0 … i1 in groups; rows is a compile-time kGroup but at the end.
  template <class Body>
  static void for_groups(const Sizes& s, int64_t k, int64_t i0, int64_t i1, const Body& body) {
    int64_t i = k * s.n() + i0;
    const int64_t end = k * s.n() + i1;
    for (; i + kGroup <= end; i += kGroup) body(i, std::integral_constant<int64_t, kGroup>{});
    for (; i < end; ++i) body(i, std::integral_constant<int64_t, 1>{});
  }

  // Whole members side by side while there is one for every thread, since nobody waits for anybody then; all threads
  // together on those that are left over.
  template <int kSums, class Arguments, class... Steps>
  static void for_members(const Arguments& arguments, int64_t tensors, bool sums_needed, bool apply_needed,
                          const Parallel& parallel, const Steps&... steps) {
    const int64_t members = arguments.sizes.K, alone = members - members % parallel.threads;
    parallel(alone, kGrainValues / (arguments.sizes.n() * arguments.sizes.C), [&](int64_t begin, int64_t end) {
      in_waves<kSums>(arguments, begin, end, tensors, sums_needed, apply_needed, serial(), steps...);
    });
    if (alone < members)
      in_waves<kSums>(arguments, alone, members, tensors, sums_needed, apply_needed, parallel, steps...);
  }

  // The processor's own prefetching does not see that eight rows read side by side go on with the next eight. Past the
  // end of the tensor nothing happens.
  static void ask_for_next_group(const T* value, int64_t C) { __builtin_prefetch(value + kGroup * C, 0, 2); }

  // sum(k, first row, end row, sums, coefficients) over all tiles of a wave, merge(arguments, k, first channel,
  // channels, sums of the member's tiles) over its channels, then apply(k, first row, end row, coefficients) over the
  // tiles, last tiles first: they are the ones still in cache. A tile has kSums sums a channel.
  template <int kSums, class Arguments, class Sum, class Merge, class Apply>
  static void in_waves(const Arguments& arguments, int64_t first, int64_t last, int64_t tensors, bool sums_needed,
                       bool apply_needed, const Parallel& parallel, const Sum& sum, const Merge& merge,
                       const Apply& apply) {
    const Sizes& s = arguments.sizes;
    const int64_t rows = tile_rows(s), tiles = (s.n() + rows - 1) / rows;
    const int64_t blocks = (s.C + kBlock - 1) / kBlock, grain = kGrainValues / (rows * s.C);
    const int64_t slab = tensors * s.n() * s.C * static_cast<int64_t>(sizeof(T));
    const int64_t wave = std::clamp<int64_t>(parallel.threads * kWaveBytes / slab, 1, last - first);
    const int64_t tile_sums = kSums * width(s);
    const Workspace<A> sums(sums_needed ? wave * tiles * tile_sums : 0), coefficients(wave * kCoefficients * width(s));
    std::fill_n(coefficients.at(0), wave * kCoefficients * width(s), A(0));
    for (; first < last; first += wave) {
      const int64_t members = std::min(wave, last - first);
      if (sums_needed) {
        if constexpr (std::is_same_v<Arguments, Backward>)
          for (int64_t m = 0; m < members; ++m)
            fill_affine<A>(coefficients_at(coefficients, s, m), arguments, first + m, 0, s.C);
        parallel(members * tiles, grain, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) {
            const int64_t m = t / tiles, i = t % tiles * rows;
            A* tile = sums.at(t * tile_sums);
            std::fill_n(tile, tile_sums, A(0));
            sum(first + m, i, std::min(i + rows, s.n()), tile, coefficients_at(coefficients, s, m));
          }
        });
      }
      parallel(members * blocks, kGrainValues / (kBlock * tiles), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t m = t / blocks, c = t % blocks * kBlock, count = std::min(kBlock, s.C - c);
          if (sums_needed) merge(arguments, first + m, c, count, sums.at(m * tiles * tile_sums + c));
          if (!apply_needed) continue;
          const Coefficients<A*> at = from_channel(coefficients_at(coefficients, s, m), c);
          fill_affine<A>(at, arguments, first + m, c, count);
          if constexpr (std::is_same_v<Arguments, Backward>) fill_correction<A>(at, arguments, first + m, c, count);
        }
      });
      if (!apply_needed) continue;
      parallel(members * tiles, grain, [&](int64_t begin, int64_t end) {
        for (int64_t t = end - 1; t >= begin; --t) {
          const int64_t m = t / tiles, i = t % tiles * rows;
          apply(first + m, i, std::min(i + rows, s.n()), coefficients_at(coefficients, s, m));
        }
      });
    }
  }

  // A tile's sums: its mean in A (the shift), Σd and Σd² of d = x − shift.
  static void statistics(const Forward& f, int64_t k, int64_t i0, int64_t i1, A* sums) {
    const Sizes s = f.sizes;  // a copy of its own, as of a step
    const T* x = static_cast<const T*>(f.x);
    A *shifts = sums, *totals = sums + width(s), *squares = totals + width(s);
    for_groups(s, k, i0, i1, [&](int64_t i, auto rows) {
      for_columns<A>(0, s.C, [&](int64_t c, auto count) {
        Vec<A> total{};
        for (int64_t u = 0; u < rows; ++u) {
          ask_for_next_group(x + (i + u) * s.C + c, s.C);
          total += load(x + (i + u) * s.C + c, count);
        }
        store(shifts + c, total + load(shifts + c));
      });
    });
    for (int64_t c = 0; c < s.C; ++c) shifts[c] /= static_cast<A>(i1 - i0);
    for_groups(s, k, i0, i1, [&](int64_t i, auto rows) {
      for_columns<A>(0, s.C, [&](int64_t c, auto count) {
        const Vec<A> shift = load(shifts + c);
        Vec<A> total{}, square{};
        for (int64_t u = 0; u < rows; ++u) {
          const Vec<A> d = load(x + (i + u) * s.C + c, count) - shift;
          total += d;
          square = fma(d, d, square);
        }
        store(totals + c, total + load(totals + c));
        store(squares + c, square + load(squares + c));
      });
    });
  }

  static void merge_statistics(const Forward& f, int64_t k, int64_t c0, int64_t count, const A* sums) {
    const Sizes& s = f.sizes;
    const int64_t rows = tile_rows(s), w = width(s);
    double mean[kBlock] = {}, m2[kBlock] = {};
    for (int64_t i = 0; i < s.n(); i += rows, sums += 3 * w) {
      const double before = static_cast<double>(i), m = static_cast<double>(std::min(rows, s.n() - i));
      for (int64_t j = 0; j < count; ++j)
        merge_moments(mean[j], m2[j], before, m, sums[j], sums[w + j], sums[2 * w + j]);
    }
    for (int64_t j = 0; j < count; ++j)
      write_statistics<A>(f, k * s.C + c0 + j, mean[j], m2[j] / static_cast<double>(s.n()));
  }

  static void merge_gradients(const Backward& b, int64_t k, int64_t c0, int64_t count, const A* sums) {
    const Sizes& s = b.sizes;
    const int64_t rows = tile_rows(s), w = width(s);
    double sum_dz[kBlock] = {}, sum_dz_centred[kBlock] = {};
    for (int64_t i = 0; i < s.n(); i += rows, sums += 2 * w)
      for (int64_t j = 0; j < count; ++j) {
        sum_dz[j] += sums[j];
        sum_dz_centred[j] += sums[w + j];
      }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t i = k * s.C + c0 + j;
      static_cast<A*>(b.sum_dz)[i] = static_cast<A>(sum_dz[j]);
      static_cast<A*>(b.sum_dz_xhat)[i] = static_cast<A>(sum_dz_centred[j] * static_cast<const A*>(b.rstd)[i]);
    }
  }
};

}  // namespace
}  // namespace latephase::LATEPHASE_ISA
