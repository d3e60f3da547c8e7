// rank1_linear on the CPU: picks the kernels of the best instruction set this processor has, and registers them.
#include "../rank1_linear.h"

#include <memory>

#include "instruction_set.h"
#include "rank1_linear.h"

namespace latephase {

#define LATEPHASE_DECLARE(isa)                                                                         \
  namespace isa {                                                                                      \
  void fold(const rank1_linear::Fold&, int64_t begin, int64_t end);                                    \
  void fold_backward(const rank1_linear::FoldBackward&, void* partial_ds, int64_t begin, int64_t end); \
  }
LATEPHASE_FOR_EACH_ISA(LATEPHASE_DECLARE)

namespace rank1_linear {
namespace {

constexpr int64_t kGrainValues = 16384;  // fewer than this are not worth a second thread

// Adds up the parts' sums [parts, K, in] in their order and stores them.
template <class A>
void merge(const FoldBackward& call, const A* partial_ds) {
  const int64_t columns = call.K * call.in, count = parts(call);
  torch::stable::parallel_for(0, columns, std::max<int64_t>(1, kGrainValues / std::max<int64_t>(1, count)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  double total = 0;
                                  for (int64_t part = 0; part < count; ++part) total += partial_ds[part * columns + i];
                                  static_cast<A*>(call.ds)[i] = static_cast<A>(total);
                                }
                              });
}

template <class A>
void fold_backward(const FoldBackward& call) {
  const int64_t count = parts(call), values = count * call.K * call.in;
  const std::unique_ptr<A[]> partial_ds(new A[values]);
  const int64_t grain = std::max<int64_t>(1, kGrainValues / std::max<int64_t>(1, kRowsOfPart * call.K * call.in));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    LATEPHASE_KERNEL(fold_backward)(call, partial_ds.get(), begin, end);
  });
  merge(call, partial_ds.get());
}

struct Cpu {
  static void fold(const Fold& call) {
    const int64_t rows = call.K * call.out;
    if (rows * call.in == 0) return;
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrainValues / call.in),
                                [&](int64_t begin, int64_t end) { LATEPHASE_KERNEL(fold)(call, begin, end); });
  }

  static void fold_backward(const FoldBackward& call) {
    call.dtype == DataType::Double ? rank1_linear::fold_backward<double>(call)
                                   : rank1_linear::fold_backward<float>(call);
  }
};

}  // namespace
}  // namespace rank1_linear
}  // namespace latephase

STABLE_TORCH_LIBRARY_IMPL(latephase_kernels, CPU, m) {
  latephase::rank1_linear::Ops<latephase::rank1_linear::Cpu>::implement(m);
}
