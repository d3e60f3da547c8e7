// Counts what kernels move, where a test asks.
#pragma once

#include <set>

#include "machine.h"

namespace emulator {

// Global memory moves in sectors, shared memory in wavefronts of its banks: as many as the bank with most different
// words needs; accesses of 8 and 16 bytes go by halves and quarters of a warp.
class Traffic {
 public:
  struct Counts {
    int64_t loaded_sectors, stored_sectors;                      // of instructions
    int64_t different_loaded_sectors, different_stored_sectors;  // of the launches: what must come and go at least
    int64_t wavefronts, least_wavefronts;
    int64_t instructions;  // of warps, in PTX
  };
  static constexpr int kSectorBytes = 32, kBanks = 32, kBankBytes = 4;

  static Traffic& get() {
    static Traffic traffic;
    return traffic;
  }
  bool counting() const { return counting_; }
  void begin() { *this = {}, counting_ = true; }
  Counts end() {
    counting_ = false;
    counts_.different_loaded_sectors = static_cast<int64_t>(loaded_.size());
    counts_.different_stored_sectors = static_cast<int64_t>(stored_.size());
    return counts_;
  }

  void executed(uint64_t instructions) { counts_.instructions += static_cast<int64_t>(instructions); }

  void global(const uint64_t* addresses, Mask m, bool writes) {
    std::set<uint64_t> sectors;
    each_lane(m, [&](int l) { sectors.insert(addresses[l] / kSectorBytes); });  // aligned: never two
    (writes ? counts_.stored_sectors : counts_.loaded_sectors) += static_cast<int64_t>(sectors.size());
    (writes ? stored_ : loaded_).insert(sectors.begin(), sectors.end());
  }

  void shared(const uint64_t* addresses, Mask m, int bytes) {
    const int together = bytes == 16 ? 8 : bytes == 8 ? 16 : kLanes;
    for (int first = 0; first < kLanes; first += together) {
      const Mask lanes = m & static_cast<Mask>(((uint64_t{1} << together) - 1) << first);
      if (!lanes) continue;
      std::set<uint64_t> words[kBanks];
      each_lane(lanes, [&](int l) {
        for (int byte = 0; byte < bytes; byte += kBankBytes) {
          const uint64_t word = (addresses[l] + byte) / kBankBytes;
          words[word % kBanks].insert(word);
        }
      });
      size_t most = 0;
      for (const auto& bank : words) most = std::max(most, bank.size());
      counts_.wavefronts += static_cast<int64_t>(most);
      ++counts_.least_wavefronts;
    }
  }

 private:
  bool counting_ = false;
  Counts counts_{};
  std::set<uint64_t> loaded_, stored_;
};

}  // namespace emulator
