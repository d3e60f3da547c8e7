// Pages of 2 MiB for large results on a CPU, as NumPy asks for.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace latephase {

// LATEPHASE_HUGE_PAGES=0 and 1 decide, else the machine: where a virtual machine gives free blocks of 2 MiB back to its
// host (free page reporting), they are slow to get again, and pages of 4 KiB come from what it still has.
inline bool wants_huge_pages() {
  if (const char* set = std::getenv("LATEPHASE_HUGE_PAGES")) return std::strcmp(set, "0") != 0;
  int64_t order = -1;  // of the blocks that are reported; no order at all, 2³² − 1, where nobody takes them
  std::ifstream("/sys/module/page_reporting/parameters/page_reporting_order") >> order;
  return order < 0 || order > 62;
}

// The allocator hands large memory out as it comes from the system: in pages of 4 KiB, each of which costs a page fault
// where it is first written. That takes longer than a kernel that reads and writes the memory once. Asks for large
// pages where they fit in.
inline void ask_for_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kFrom = 4 << 20;
  constexpr uintptr_t kPage = 2 << 20;
  static const bool wanted = wants_huge_pages();
  if (!wanted || bytes < kFrom) return;
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a system without them goes on
#endif
}

}  // namespace latephase
