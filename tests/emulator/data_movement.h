// Loads, stores, atomics, copies and shuffles of PTX (PTX ISA 9.0, section 9.7).
#pragma once

#include <type_traits>

#include "machine.h"
#include "traffic.h"

namespace emulator {

// ---------------------------------------------------------------------------------------------- accesses

// Where an access goes, checked.
inline uint8_t* place_of(Warp& w, const Instruction& i, int lane, int bytes, bool writes) {
  const int64_t address = i.offset + static_cast<int64_t>(w.get(i.a, lane));
  if (i.space == Space::kParameter) {
    if (address + bytes > w.kernel->parameter_bytes) fail("no parameter at %ld: %s", address, i.text.c_str());
    return const_cast<uint8_t*>(w.parameters) + address;
  }
  if (i.space == Space::kGlobal) {
    GlobalMemory::get().check(static_cast<uint64_t>(address), bytes, bytes, i);
    return reinterpret_cast<uint8_t*>(address);
  }
  const SharedPlace place = shared_place(w, static_cast<uint32_t>(address), bytes, i);
  check_history(w, lane, place, bytes, writes, i);
  return place.data();
}

// Counts what the lanes of an instruction move together.
inline void count_traffic(Warp& w, Mask m, Space space, const Operand& base, int64_t offset, int bytes, bool writes) {
  if (space == Space::kParameter || !Traffic::get().counting()) return;
  uint64_t addresses[kLanes];
  each_lane(m, [&](int l) { addresses[l] = offset + w.get(base, l); });
  if (space == Space::kGlobal) {
    Traffic::get().global(addresses, m, writes);
  } else {
    Traffic::get().shared(addresses, m, bytes);
  }
}

template <class T>  // an integer
void load(Warp& w, const Instruction& i, Mask m) {
  count_traffic(w, m, i.space, i.a, i.offset, sizeof(T) * i.count, false);
  each_lane(m, [&](int l) {
    const uint8_t* from = place_of(w, i, l, sizeof(T) * i.count, false);
    for (int e = 0; e < i.count; ++e) {
      T value;
      std::memcpy(&value, from + e * sizeof(T), sizeof(T));
      using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
      w.set(i.elements[e], l, static_cast<uint64_t>(static_cast<Wide>(value)));
    }
  });
}

template <class T>
void store(Warp& w, const Instruction& i, Mask m) {
  count_traffic(w, m, i.space, i.a, i.offset, sizeof(T) * i.count, true);
  each_lane(m, [&](int l) {
    uint8_t* to = place_of(w, i, l, sizeof(T) * i.count, true);
    for (int e = 0; e < i.count; ++e) {
      const T value = static_cast<T>(w.get(i.elements[e], l));
      std::memcpy(to + e * sizeof(T), &value, sizeof(T));
    }
  });
}

inline void atomic_add(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) {
    auto* place = reinterpret_cast<uint32_t*>(place_of(w, i, l, 4, true));
    const uint32_t before = *place;
    *place += w.lanes<uint32_t>(i.b)[l];
    if (i.to.offset) w.lanes<uint32_t>(i.to)[l] = before;
  });
}

// What is copied arrives when it is waited for; until then there are NaNs.
inline void copy_async(Warp& w, const Instruction& i, Mask m) {
  Mask existing = 0;
  each_lane(m, [&](int l) {
    const AsyncCopy copy{w.lanes<uint32_t>(i.to)[l], w.lanes<uint64_t>(i.a)[l], i.option,
                         i.b.offset ? static_cast<int>(w.lanes<uint32_t>(i.b)[l]) : i.option};
    if (copy.existing < 0 || copy.existing > copy.bytes) fail("a copy of %d bytes: %s", copy.existing, i.text.c_str());
    if (copy.existing > 0) {
      GlobalMemory::get().check(copy.from, copy.existing, copy.bytes, i);
      existing |= Mask{1} << l;
    }
    const SharedPlace place = shared_place(w, copy.to, copy.bytes, i);
    check_history(w, l, place, copy.bytes, true, i);
    std::memset(place.data(), 0xff, copy.bytes);
    w.copies[l].push_back(copy);
  });
  count_traffic(w, existing, Space::kGlobal, i.a, 0, i.option, false);
  count_traffic(w, m, Space::kShared, i.to, 0, i.option, true);
}

inline void wait_for_copies(Warp& w, const Instruction&, Mask m) {
  each_lane(m, [&](int l) {
    for (const AsyncCopy& copy : w.copies[l]) {
      uint8_t* to = w.block->shared.data() + (copy.to - kSharedBase);
      std::memset(to, 0, copy.bytes);
      std::memcpy(to, reinterpret_cast<const void*>(copy.from), copy.existing);
    }
    w.copies[l].clear();
  });
}

inline void map_to_block(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) {
    w.lanes<uint32_t>(i.to)[l] = (w.lanes<uint32_t>(i.a)[l] & kOwnAddress) | (w.lanes<uint32_t>(i.b)[l] + 1)
                                                                                 << kRankShift;
  });
}

// ---------------------------------------------------------------------------------------------- shuffles

// i.option: the first letter of idx, down, up, bfly.
inline void shuffle(Warp& w, const Instruction& i, Mask m) {
  uint32_t values[kLanes];
  std::memcpy(values, w.lanes<uint32_t>(i.a), sizeof values);
  Mask in_range = 0;
  each_lane(m, [&](int l) {
    const int b = w.lanes<uint32_t>(i.b)[l] & 31, c = w.lanes<uint32_t>(i.c)[l];
    const int segment = c >> 8 & 31, first = l & segment, last = first | (c & 31 & ~segment);
    int from = i.option == 'i' ? first | (b & ~segment) : i.option == 'd' ? l + b : i.option == 'u' ? l - b : l ^ b;
    const bool valid = i.option == 'u' ? from >= last : from <= last;
    if (!valid) from = l;
    if (!(m >> from & 1)) fail("a shuffle from lane %d, which takes no part: %s", from, i.text.c_str());
    w.lanes<uint32_t>(i.to)[l] = values[from];
    in_range |= Mask{valid} << l;
  });
  if (i.predicate_to >= 0) set_predicate(w, i.predicate_to, m, in_range);
}

}  // namespace emulator
