// One register of accumulation values (float or double), as wide as the instruction set this file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace latephase::LATEPHASE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};

template <class A>
struct Register;
template <>
struct Register<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Register<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename Register<A>::type;
template <class A>
using Mask = typename Register<A>::mask;  // a lane is -1 (true) or 0
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};  // no addition of 0, which would have to turn -0 into 0
}

// a · b + c, rounded once where the instruction set can: the same in every kernel, so that a mask is recomputed
// exactly.
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// v where `mask` is set, else 0.
template <class A>
inline Vec<A> keep(Vec<A> v, Mask<A> mask) {
  return (Vec<A>)((Mask<A>)v & mask);
}

// Lanes below `count`.
template <class A>
inline Mask<A> first_lanes(int count) {
  Mask<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane < Mask<A>{} + count;
}

// In pairs, in double: as accurate as it is short.
template <class A>
inline double lane_sum(Vec<A> v) {
  double lanes[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = v[i];
  for (int width = kLanes<A> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// A sum in double of registers of A, lane by lane.
template <class A>
class DoubleSum {
 public:
  inline void add(Vec<A> v) {
    if constexpr (sizeof(A) == sizeof(double)) {
      sum_[0] += v;
    } else {
#if defined(__aarch64__)  // GCC converts lane by lane
      sum_[0] += (Vec<double>)vcvt_f64_f32(vget_low_f32((float32x4_t)v));
      sum_[1] += (Vec<double>)vcvt_high_f64_f32((float32x4_t)v);
#else
      typedef float HalfRegister __attribute__((vector_size(kVectorBytes / 2)));
      HalfRegister halves[2];
      std::memcpy(halves, &v, sizeof v);
      sum_[0] += __builtin_convertvector(halves[0], Vec<double>);
      sum_[1] += __builtin_convertvector(halves[1], Vec<double>);
#endif
    }
  }
  inline double total() const { return lane_sum<double>(sum_[0] + sum_[1]); }

 private:
  Vec<double> sum_[2] = {};
};

// ---- conversion: W = kLanes<float> 16-bit values ↔ one float register

typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));

// Spelled out, as compilers take detours here.
inline Vec<float> widen(Bits16 bits, BFloat16) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#elif defined(__aarch64__)
  return (Vec<float>)vshll_n_u16((uint16x4_t)bits, 16);
#else
  return (Vec<float>)(__builtin_convertvector(bits, Bits32) << 16);
#endif
}

// To the nearest, ties to even; NaN quiet.
inline Bits16 narrow(Vec<float> v, BFloat16) {
  const Bits32 bits = (Bits32)v;
  const Bits32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
#if defined(__AVX512F__)
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i all = _mm512_mask_mov_epi32((__m512i)rounded, is_nan, (__m512i)(bits | 0x400000u));
  return (Bits16)_mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16));
#elif defined(__AVX2__)
  const __m256 is_nan = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);  // all bits set are a quiet NaN
  const __m256i all = (__m256i)_mm256_or_ps((__m256)rounded, is_nan);
  const __m256i upper_halves = _mm256_set1_epi64x(0x0f0e0b0a07060302);
  return (Bits16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_shuffle_epi8(all, upper_halves), 0b1000));
#else
  const Bits32 is_number = (Bits32)(v == v), all = (rounded & is_number) | ((bits | 0x400000u) & ~is_number);
#if defined(__aarch64__)
  return (Bits16)vshrn_n_u32((uint32x4_t)all, 16);
#else
  return __builtin_convertvector(all >> 16, Bits16);
#endif
#endif
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, body = h & 0x7fffu;
  float value;
  uint32_t bits;
  if (body >= 0x7c00u) {
    bits = sign | 0x7f800000u | (body & 0x3ffu) << 13;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  bits = body << 13;  // exponent too small by 112
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (bits < 0x38800000u) {                        // denormal: let the float adder round to multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

inline Vec<float> widen(Bits16 bits, Half) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#elif defined(__aarch64__)
  return (Vec<float>)vcvt_f32_f16((float16x4_t)bits);
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(bits[i]);
  return v;
#endif
}

inline Bits16 narrow(Vec<float> v, Half) {
#if defined(__AVX512F__)
  return (Bits16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__) && defined(__F16C__)
  return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (Bits16)vcvt_f16_f32((float32x4_t)v);
#else
  Bits16 bits;
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = float_to_half(v[i]);
  return bits;
#endif
}

// ---- memory: whole registers, and the first `count` lanes (the others read as zero). A count of type Whole<A> is
// known to be all of them when compiled.

template <class A>
using Whole = std::integral_constant<int, kLanes<A>>;

// The first `count` values; a loop that ended there would be a call of memcpy.
template <int lanes, class T>
inline void copy_first(const T* from, int count, T* to) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i)
    if (i < count) to[i] = from[i];
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// The first bytes of a register, none to all, in pieces: of 16 bits there is no masked access, and some processors are
// slow to store any by a mask.
inline __m128i load_first(const void* p, int bytes) {
  const auto* from = static_cast<const char*>(p);
  if (bytes & 16) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  __m128i v{};
  if (bytes & 2) {
    uint16_t last;
    std::memcpy(&last, from + (bytes & 12), 2);
    v = _mm_cvtsi32_si128(last);
  }
  if (bytes & 4) v = _mm_unpacklo_epi32(_mm_loadu_si32(from + (bytes & 8)), v);
  if (bytes & 8) v = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), v);
  return v;
}
inline void store_first(void* p, __m128i v, int bytes) {
  auto* to = static_cast<char*>(p);
  if (bytes & 16) return _mm_storeu_si128(static_cast<__m128i*>(p), v);
  if (bytes & 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), v);
    v = _mm_unpackhi_epi64(v, v);
    to += 8;
  }
  if (bytes & 4) {
    _mm_storeu_si32(to, v);
    v = _mm_srli_epi64(v, 32);
    to += 4;
  }
  if (bytes & 2) {
    const auto last = static_cast<uint16_t>(_mm_extract_epi16(v, 0));
    std::memcpy(to, &last, 2);
  }
}
inline void store_first(void* p, __m256i v, int bytes) {
  if (bytes & 32) return _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  if (!(bytes & 16)) return store_first(p, _mm256_castsi256_si128(v), bytes);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(v));
  store_first(static_cast<char*>(p) + 16, _mm256_extracti128_si256(v, 1), bytes & 15);
}
#endif

inline void load(const float* p, Vec<float>& v) { std::memcpy(&v, p, sizeof v); }
inline void load(const double* p, Vec<double>& v) { std::memcpy(&v, p, sizeof v); }
inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }

template <class T>
inline void load(const T* p, Vec<float>& v) {
  Bits16 bits;
  std::memcpy(&bits, p, sizeof bits);
  v = widen(bits, T{});
}
template <class T>
inline void store(T* p, Vec<float> v) {
  const Bits16 bits = narrow(v, T{});
  std::memcpy(p, &bits, sizeof bits);
}

template <class T>
inline Vec<typename Accumulation<T>::type> load(const T* p) {
  Vec<typename Accumulation<T>::type> v;
  load(p, v);
  return v;
}
template <class T>
inline Vec<typename Accumulation<T>::type> load(const T* p, Whole<typename Accumulation<T>::type>) {
  return load(p);
}
template <class T>
inline Vec<typename Accumulation<T>::type> load(const T* p, int count) {
  using A = typename Accumulation<T>::type;
#if defined(__AVX512F__)
  const uint32_t lanes_there = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) return (Vec<double>)_mm512_maskz_loadu_pd(lanes_there, p);
  if constexpr (sizeof(T) == 4) return (Vec<float>)_mm512_maskz_loadu_ps(lanes_there, p);
  if constexpr (sizeof(T) == 2) return widen((Bits16)_mm256_maskz_loadu_epi16(lanes_there, p), T{});
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 8) return (Vec<double>)_mm256_maskload_pd(p, (__m256i)first_lanes<double>(count));
  if constexpr (sizeof(T) == 4) return (Vec<float>)_mm256_maskload_ps(p, (__m256i)first_lanes<float>(count));
  if constexpr (sizeof(T) == 2) return widen((Bits16)load_first(p, 2 * count), T{});
#endif
  T lanes[kLanes<A>] = {};
  copy_first<kLanes<A>>(p, count, lanes);
  return load(lanes);
}
template <class T, class V>
inline void store(T* p, V v, Whole<typename Accumulation<T>::type>) {
  store(p, v);
}
template <class T, class V>
inline void store(T* p, V v, int count) {
#if defined(__AVX512F__)
  const uint32_t lanes_there = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, lanes_there, (__m512d)v);
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, lanes_there, (__m512)v);
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, lanes_there, (__m256i)narrow(v, T{}));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 2) return store_first(p, (__m128i)narrow(v, T{}), 2 * count);
  if constexpr (sizeof(T) > 2) return store_first(p, (__m256i)v, static_cast<int>(sizeof(T)) * count);
#endif
  constexpr int kCount = kLanes<typename Accumulation<T>::type>;
  T lanes[kCount];
  store(lanes, v);
  copy_first<kCount>(lanes, count, p);
}

// ---- packed masks: bit j of a row says whether column j passed

template <class A>
inline uint32_t to_bits(Mask<A> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask((__m512i)mask);
  return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#elif defined(__aarch64__)
  if constexpr (sizeof(A) == 4) return vaddvq_u32((uint32x4_t)mask & uint32x4_t{1, 2, 4, 8});
  return static_cast<uint32_t>(vaddvq_u64((uint64x2_t)mask & uint64x2_t{1, 2}));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<A>; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

template <class A>
inline Mask<A> from_bits(uint32_t bits) {
  Mask<A> lane_bit;
  for (int i = 0; i < kLanes<A>; ++i) lane_bit[i] = 1 << i;
  return ((Mask<A>{} + static_cast<int>(bits)) & lane_bit) != 0;
}

// `column` is a multiple of kLanes<A>, so that a group of lanes never straddles a byte unless it fills whole ones.
template <class A>
inline void write_mask(uint8_t* row, int64_t column, Mask<A> passed, int count) {
  uint32_t bits = to_bits<A>(passed);
  if (count < kLanes<A>) bits &= (1u << count) - 1;
  uint8_t* byte = row + column / 8;
  if (column % 8 == 0)
    *byte = static_cast<uint8_t>(bits);
  else
    *byte |= static_cast<uint8_t>(bits << column % 8);
  if (count > 8) byte[1] = static_cast<uint8_t>(bits >> 8);
}

template <class A>
inline Mask<A> read_mask(const uint8_t* row, int64_t column, int count) {
  uint32_t bits = row[column / 8] >> column % 8;
  if (count > 8) bits |= static_cast<uint32_t>(row[column / 8 + 1]) << 8;
  return from_bits<A>(bits);
}

}  // namespace latephase::LATEPHASE_ISA
