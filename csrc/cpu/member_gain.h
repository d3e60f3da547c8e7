// How member gain is cut up for the threads of a CPU, the same for every instruction set.
#pragma once

#include <algorithm>

#include "../member_gain_arguments.h"

namespace latephase::member_gain {

constexpr int64_t kPartValues = 32768;  // a part has about as many values, so that the sums of a row stay in cache
constexpr int64_t kMaxColumns = 512;    // a part keeps gains and sums of as many columns on the stack
constexpr int64_t kShortRun = 64;       // up to so many values of a channel in a row, they are columns side by side

// A part is a range of rows and channels of one member. Parts follow from that member's sizes alone, never from K or
// the number of threads, and so do the bits of the sums, which are merged in the order of the parts.
struct Parts {
  int64_t rows, channels;            // of a part, at most
  int64_t row_parts, channel_parts;  // of a member
  int64_t columns_per_channel;       // S, or 1 where the S values of a channel are a row of their own

  explicit Parts(const Sizes& s) {
    columns_per_channel = s.S <= kShortRun ? s.S : 1;
    const int64_t fit = std::min(kMaxColumns / columns_per_channel, kPartValues / s.S);
    channel_parts = (s.C - 1) / std::clamp(fit, int64_t{1}, s.C) + 1;
    // Evenly, but in whole registers of any instruction set where each channel is a column.
    channels = (s.C - 1) / channel_parts + 1;
    if (s.S == 1) channels = (channels + 15) / 16 * 16;
    rows = std::clamp(kPartValues / (channels * s.S), int64_t{1}, s.B);
    row_parts = (s.B - 1) / rows + 1;
  }
  int64_t count(const Sizes& s) const { return s.K * row_parts * channel_parts; }
  // Where the sums of member k's `row_part` begin: [K, row_parts, 2, C], dgain before dbias.
  int64_t sums_at(const Sizes& s, int64_t k, int64_t row_part) const { return (k * row_parts + row_part) * 2 * s.C; }
};

}  // namespace latephase::member_gain
