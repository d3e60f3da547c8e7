// A unit: eight consecutive values in registers, loaded and stored by the widest access that alignment allows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../activation.h"

namespace latephase {

constexpr int kUnit = 8;

// How two values of a type share a 32-bit word, and what rounds to zero and to six in it. Rectified: max(value, 0), or
// NaN.
template <class scalar_t>
struct Packing;

template <>
struct Packing<__half> {
  static constexpr float kRoundsToZero = kRoundsToZeroHalf, kRoundsToSix = kRoundsToSixHalf;
  static __device__ float low(uint32_t word) { return __half2float(__ushort_as_half(word & 0xffff)); }
  static __device__ float high(uint32_t word) { return __half2float(__ushort_as_half(word >> 16)); }
  static __device__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static __device__ uint32_t pack_rectified(float low, float high) {
    uint32_t word;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
};

template <>
struct Packing<__nv_bfloat16> {
  static constexpr float kRoundsToZero = kRoundsToZeroBFloat16, kRoundsToSix = kRoundsToSixBFloat16;
  static __device__ float low(uint32_t word) { return __uint_as_float(word << 16); }
  static __device__ float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  static __device__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static __device__ uint32_t pack_rectified(float low, float high) {
    uint32_t word;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
};

template <>
struct Packing<float> {
  static constexpr float kRoundsToZero = 0, kRoundsToSix = 6;
  static __device__ float rectified(float value) {
    float result;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(value));
    return result;
  }
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// How long a 16-byte access asks the L2 cache to keep its line: as usual; until it is read again; no longer.
enum class Keep { kNormal, kLonger, kNoLonger };

template <Keep keep>
__device__ __forceinline__ uint64_t cache_policy() {
  uint64_t policy;
  if constexpr (keep == Keep::kLonger) {
    asm("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  }
  return policy;
}

template <Keep keep>
__device__ __forceinline__ uint4 load_vector(const void* p) {
  if constexpr (keep == Keep::kNormal) return __ldg(static_cast<const uint4*>(p));
  uint4 read;
  asm("ld.global.nc.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(read.x), "=r"(read.y), "=r"(read.z), "=r"(read.w)
      : "l"(__cvta_generic_to_global(p)), "l"(cache_policy<keep>()));
  return read;
}

template <Keep keep>
__device__ __forceinline__ void store_vector(void* p, uint4 value) {
  if constexpr (keep == Keep::kNormal) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
  } else {
    asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(__cvta_generic_to_global(p)),
                 "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "l"(cache_policy<keep>())
                 : "memory");
  }
}

// Four bytes of signs of the bytes of a word, 0 or 255 each; which, the selector's digits say, each 8 + a byte.
template <int selector>
__device__ __forceinline__ uint32_t signs(uint32_t word) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(bytes) : "r"(word), "n"(selector));
  return bytes;
}

template <class scalar_t>
struct Unit {
  static constexpr int kPerWord = 4 / sizeof(scalar_t);
  static constexpr int kWords = kUnit / kPerWord;
  uint32_t words[kWords];

  __device__ __forceinline__ float get(int j) const {
    if constexpr (kPerWord == 1) {
      return __uint_as_float(words[j]);
    } else {
      return j % 2 ? Packing<scalar_t>::high(words[j / 2]) : Packing<scalar_t>::low(words[j / 2]);
    }
  }

  // Rounds values to nearest even.
  static __device__ __forceinline__ Unit of(const float (&values)[kUnit]) {
    Unit unit;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (kPerWord == 1) {
        unit.words[w] = __float_as_uint(values[w]);
      } else {
        unit.words[w] = Packing<scalar_t>::pack(values[2 * w], values[2 * w + 1]);
      }
    }
    return unit;
  }

  // The ReLU of values; NaN stays NaN.
  static __device__ __forceinline__ Unit rectified(const float (&values)[kUnit]) {
    Unit unit;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (kPerWord == 1) {
        unit.words[w] = __float_as_uint(Packing<scalar_t>::rectified(values[w]));
      } else {
        unit.words[w] = Packing<scalar_t>::pack_rectified(values[2 * w], values[2 * w + 1]);
      }
    }
    return unit;
  }

  // Of a rectified unit: which of the first `valid` values the ReLU let through, a bit each.
  __device__ __forceinline__ uint32_t nonzero(int valid) const {
    uint32_t bits = 0;
    if constexpr (kPerWord == 1) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) bits |= uint32_t{words[w] != 0} << w;
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w)  // without signs, as of −0, what is not zero carries into bits 15 and 31
        bits = bits >> 2 | (((words[w] & 0x7fff7fff) + 0x7fff7fff) & 0x80008000);
      bits = bits >> 9 | bits >> 24;  // bits 9, 11, 13, 15 and 25, 27, 29, 31 to 0 … 7
    }
    return bits & ((1u << valid) - 1);
  }

  // The values whose bit in `kept` (0 … 255) is set, and 0 for the others.
  __device__ __forceinline__ Unit keep(uint32_t kept) const {
    Unit unit;
    if constexpr (kPerWord == 1) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) unit.words[w] = kept >> w & 1 ? words[w] : 0;
    } else {
      constexpr uint32_t to_signs = 1 << 7 | 1 << 14 | 1 << 21 | 1 << 28;  // four bits to the signs of four bytes
      const uint32_t low = (kept & 15) * to_signs, high = (kept >> 4) * to_signs;
      unit.words[0] = words[0] & signs<0x9988>(low);
      unit.words[1] = words[1] & signs<0xbbaa>(low);
      unit.words[2] = words[2] & signs<0x9988>(high);
      unit.words[3] = words[3] & signs<0xbbaa>(high);
    }
    return unit;
  }

  // The values j for which passes(j), and 0 for the others.
  template <class Passes>
  __device__ __forceinline__ Unit keep_where(const Passes& passes) const {
    Unit unit = *this;
#pragma unroll
    for (int j = 0; j < kUnit; ++j)
      if (!passes(j)) unit.words[j / kPerWord] &= kPerWord == 1 ? 0 : j % 2 ? 0xffff : 0xffff0000;
    return unit;
  }

  // Reads the first `valid` values (0 … 8) at p by accesses of `bytes`, which p's alignment and valid are multiples of;
  // the others are 0.
  template <int bytes, Keep keep = Keep::kNormal>
  static __device__ __forceinline__ Unit load(const scalar_t* p, int valid) {
    constexpr int step = bytes >= 4 ? bytes / 4 : 1;
    Unit unit;
#pragma unroll
    for (int w = 0; w < kWords; w += step) {
      const int first = w * kPerWord;
      if constexpr (bytes == 16) {
        const uint4 read = first < valid ? load_vector<keep>(p + first) : uint4{0, 0, 0, 0};
        unit.words[w] = read.x, unit.words[w + 1] = read.y, unit.words[w + 2] = read.z, unit.words[w + 3] = read.w;
      } else if constexpr (bytes == 8) {
        const uint2 read = first < valid ? __ldg(reinterpret_cast<const uint2*>(p + first)) : uint2{0, 0};
        unit.words[w] = read.x, unit.words[w + 1] = read.y;
      } else if constexpr (bytes == 4) {
        unit.words[w] = first < valid ? __ldg(reinterpret_cast<const uint32_t*>(p + first)) : 0;
      } else {
        const auto* halves = reinterpret_cast<const uint16_t*>(p + first);
        const uint32_t low = first < valid ? __ldg(halves) : 0;
        const uint32_t high = first + 1 < valid ? __ldg(halves + 1) : 0;
        unit.words[w] = low | high << 16;
      }
    }
    return unit;
  }

  template <int bytes, Keep keep = Keep::kNormal>
  __device__ __forceinline__ void store(scalar_t* p, int valid) const {
    constexpr int step = bytes >= 4 ? bytes / 4 : 1;
#pragma unroll
    for (int w = 0; w < kWords; w += step) {
      const int first = w * kPerWord;
      if (first >= valid) break;
      // In PTX: written in C++, the compiler merges these with the narrow stores of the other widths.
      if constexpr (bytes == 16) {
        store_vector<keep>(p + first, {words[w], words[w + 1], words[w + 2], words[w + 3]});
      } else if constexpr (bytes == 8) {
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p + first)), "r"(words[w]),
                     "r"(words[w + 1])
                     : "memory");
      } else if constexpr (bytes == 4) {
        *reinterpret_cast<uint32_t*>(p + first) = words[w];
      } else {
        auto* halves = reinterpret_cast<uint16_t*>(p + first);
        halves[0] = words[w];
        if (first + 1 < valid) halves[1] = words[w] >> 16;
      }
    }
  }
};

// Which widths of access a kernel is compiled for: any, 16 bytes only, or those below.
enum class Width { kAny, kWide, kNarrow };

template <int bytes>
struct AccessBytes {
  static constexpr int value = bytes;
};

// A run-time width of access, uniform over the grid, turned into a compile-time one: body(AccessBytes<bytes>).
template <class scalar_t, Width width = Width::kAny, class Body>
__device__ __forceinline__ void with_access(int bytes, const Body& body) {
  if (width == Width::kWide || (width == Width::kAny && bytes == 16)) {
    body(AccessBytes<16>{});
  } else if constexpr (width != Width::kWide) {
    if (bytes == 8) {
      body(AccessBytes<8>{});
    } else if (bytes == 4) {
      body(AccessBytes<4>{});
    } else if constexpr (sizeof(scalar_t) == 2) {
      body(AccessBytes<2>{});
    }
  }
}

}  // namespace latephase
