// A parallel loop for kernels that are compiled per instruction set and must not see torch's headers.
#pragma once

#include <cstdint>

namespace latephase {

class Parallel {
 public:
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  using Loop = void (*)(int64_t count, int64_t grain, Body body, void* context);
  Parallel(int64_t threads, Loop loop) : threads(threads), loop_(loop) {}

  // Calls body(begin, end) on ranges that cover [0, count), each but the last at least `grain` long. Two calls of the
  // same count and grain give a thread the same range, so that it finds what it read before in its own cache.
  template <class F>
  void operator()(int64_t count, int64_t grain, const F& body) const {
    const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
    loop_(count, grain, call, const_cast<F*>(&body));
  }

  const int64_t threads;

 private:
  const Loop loop_;
};

}  // namespace latephase
