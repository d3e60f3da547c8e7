// Member gain on the CPU: picks the kernels of the best instruction set this processor has, and registers them.
#include "../member_gain.h"

#include <memory>

#include "instruction_set.h"
#include "member_gain.h"

namespace latephase {

#define LATEPHASE_DECLARE(isa)                                                                                  \
  namespace isa {                                                                                               \
  void forward(const member_gain::Call&, const member_gain::Parts&, int64_t begin, int64_t end);                \
  void backward(const member_gain::Call&, const member_gain::Parts&, double* sums, int64_t begin, int64_t end); \
  }
LATEPHASE_FOR_EACH_ISA(LATEPHASE_DECLARE)

namespace member_gain {
namespace {

// Fewer than this are not worth a second thread: values of the data, and sums of the parts.
constexpr int64_t kGrainValues = 16384, kGrainSums = 65536;

// For a loop over `items` that share `values` evenly.
int64_t grain(int64_t items, int64_t values, int64_t least = kGrainValues) {
  return std::max<int64_t>(1, least * items / values);
}

// Adds up the sums of a member's row parts, in their order, and stores them.
template <class A>
void merge(const Call& call, const Parts& parts, double* sums) {
  const Sizes& s = call.sizes;
  const int64_t values = s.K * parts.row_parts * 2 * s.C;
  torch::stable::parallel_for(0, s.K, grain(s.K, values, kGrainSums), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double* total = sums + parts.sums_at(s, k, 0);
      for (int64_t part = 1; part < parts.row_parts; ++part) {
        const double* more = sums + parts.sums_at(s, k, part);
        for (int64_t i = 0; i < 2 * s.C; ++i) total[i] += more[i];
      }
      std::copy_n(total, s.C, static_cast<A*>(call.dgain) + k * s.C);
      std::copy_n(total + s.C, s.C, static_cast<A*>(call.dbias) + k * s.C);
    }
  });
}

struct Cpu {
  static void forward(const Call& call) {
    const Sizes& s = call.sizes;
    if (s.numel() == 0) return;
    const Parts parts(s);
    const int64_t count = parts.count(s);
    torch::stable::parallel_for(0, count, grain(count, s.numel()), [&](int64_t begin, int64_t end) {
      LATEPHASE_KERNEL(forward)(call, parts, begin, end);
    });
  }

  static void backward(const Call& call) {
    const Sizes& s = call.sizes;
    if (s.numel() == 0) {  // the sums of nothing
      const int64_t sum_bytes = s.K * s.C * (call.dtype == DataType::Double ? sizeof(double) : sizeof(float));
      std::fill_n(static_cast<char*>(call.dgain), sum_bytes, 0);
      std::fill_n(static_cast<char*>(call.dbias), sum_bytes, 0);
      return;
    }
    const Parts parts(s);
    const int64_t count = parts.count(s);
    const std::unique_ptr<double[]> sums(new double[parts.sums_at(s, s.K, 0)]);
    torch::stable::parallel_for(0, count, grain(count, s.numel()), [&](int64_t begin, int64_t end) {
      LATEPHASE_KERNEL(backward)(call, parts, sums.get(), begin, end);
    });
    call.dtype == DataType::Double ? merge<double>(call, parts, sums.get()) : merge<float>(call, parts, sums.get());
  }
};

}  // namespace
}  // namespace member_gain
}  // namespace latephase

STABLE_TORCH_LIBRARY_IMPL(latephase_kernels, CPU, m) {
  latephase::member_gain::Ops<latephase::member_gain::Cpu>::implement(m);
}
