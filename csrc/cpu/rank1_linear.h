// How the folded weights of rank1_linear are cut up for the threads of a CPU, the same for every instruction set.
#pragma once

#include <algorithm>

#include "../rank1_linear_arguments.h"

namespace latephase::rank1_linear {

constexpr int64_t kRowsOfPart = 32;  // rows of the weight, of all members: a part of dW stays in cache meanwhile

inline int64_t parts(const Weights& w) { return (w.out + kRowsOfPart - 1) / kRowsOfPart; }

}  // namespace latephase::rank1_linear
