// The loop over torch's threads that kernels are given as Parallel.
#pragma once

#include "../stable.h"
#include "parallel.h"

namespace latephase {

inline Parallel torch_parallel() {
  return Parallel(torch::stable::get_num_threads(),
                  [](int64_t count, int64_t grain, Parallel::Body body, void* context) {
                    torch::stable::parallel_for(0, count, std::max<int64_t>(1, grain),
                                                [&](int64_t begin, int64_t end) { body(begin, end, context); });
                  });
}

}  // namespace latephase
