// The time loop of rank1_lstm on the CPU: picks the pointwise kernels of the best instruction set this processor has,
// and registers it.
#include "../rank1_lstm.h"

#include "instruction_set.h"

namespace latephase {

#define LATEPHASE_DECLARE(isa)                                        \
  namespace isa {                                                     \
  void scale(const rank1_lstm::Scale&, int64_t begin, int64_t end);   \
  void forward(const rank1_lstm::Step&, int64_t begin, int64_t end);  \
  void backward(const rank1_lstm::Step&, int64_t begin, int64_t end); \
  }
LATEPHASE_FOR_EACH_ISA(LATEPHASE_DECLARE)

namespace rank1_lstm {
namespace {

constexpr int64_t kGrainUnits = 2048;  // fewer of a step's units are not worth a second thread

template <class Call, class Kernel>
void for_rows(const Call& call, Kernel kernel) {
  torch::stable::parallel_for(0, call.sizes.rows(), std::max<int64_t>(1, kGrainUnits / call.sizes.H),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

struct Cpu {
  static void scale(const Scale& call) { for_rows(call, LATEPHASE_KERNEL(scale)); }
  static void forward(const Step& step) { for_rows(step, LATEPHASE_KERNEL(forward)); }
  static void backward(const Step& step) { for_rows(step, LATEPHASE_KERNEL(backward)); }
};

}  // namespace
}  // namespace rank1_lstm
}  // namespace latephase

STABLE_TORCH_LIBRARY_IMPL(latephase_kernels, CPU, m) {
  latephase::rank1_lstm::Ops<latephase::rank1_lstm::Cpu>::implement(m);
}
