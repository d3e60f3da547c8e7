// Pages of 2 MiB for large results on a CPU, as NumPy asks for.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace latephase {

// The allocator hands large memory out as it comes from the system: in pages of 4 KiB, each of which costs a page fault
// where it is first written. That takes longer than a kernel that reads and writes the memory once. Asks for large
// pages where they fit in; LATEPHASE_HUGE_PAGES=0 does not.
inline void ask_for_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kFrom = 4 << 20;
  constexpr uintptr_t kPage = 2 << 20;
  static const bool wanted = [] {
    const char* set = std::getenv("LATEPHASE_HUGE_PAGES");
    return set == nullptr || std::strcmp(set, "0") != 0;
  }();
  if (!wanted || bytes < kFrom) return;
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a system without them goes on
#endif
}

}  // namespace latephase
