// The instruction sets that every *.kernel.cpp is compiled for, from the oldest to the newest; setup.py has the flags.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#define LATEPHASE_FOR_EACH_ISA(macro, ...) \
  macro(baseline, ##__VA_ARGS__) macro(x86_64_v3, ##__VA_ARGS__) macro(x86_64_v4, ##__VA_ARGS__)
#else
#define LATEPHASE_FOR_EACH_ISA(macro, ...) macro(baseline, ##__VA_ARGS__)
#endif

namespace latephase {

// Position in LATEPHASE_FOR_EACH_ISA of the newest set this processor has; LATEPHASE_ISA=baseline|x86_64_v3 asks for an
// older one.
inline int chosen_instruction_set() {
  int best = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) best = 1;
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = 2;
#endif
  const char* asked = std::getenv("LATEPHASE_ISA");
  const char* names[] = {"baseline", "x86_64_v3", "x86_64_v4"};
  for (int i = 0; asked != nullptr && i < best; ++i)
    if (std::strcmp(asked, names[i]) == 0) return i;
  return best;
}

// The kernel of a name for this processor, out of namespaces that declare it: LATEPHASE_KERNEL(forward)(arguments).
#define LATEPHASE_OF_ISA(isa, name) isa::name,
#define LATEPHASE_KERNEL(name)                                                                         \
  ([] {                                                                                                \
    static decltype(&baseline::name) const table[] = {LATEPHASE_FOR_EACH_ISA(LATEPHASE_OF_ISA, name)}; \
    static const auto chosen = table[chosen_instruction_set()];                                        \
    return chosen;                                                                                     \
  }())

}  // namespace latephase
