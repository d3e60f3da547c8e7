// Arithmetic, comparisons and conversions of PTX on the lanes of a warp (PTX ISA 9.0, section 9.7).
#pragma once

#include <cmath>
#include <type_traits>

#include "machine.h"

namespace emulator {

// ---------------------------------------------------------------------------------------------- values in registers

template <class T>
using Slot = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
T value_of(Slot<T> slot) {
  if constexpr (sizeof(T) >= 4) {
    return std::bit_cast<T>(slot);
  } else if constexpr (sizeof(T) == 2) {
    return std::bit_cast<T>(static_cast<uint16_t>(slot));
  } else {
    return std::bit_cast<T>(static_cast<uint8_t>(slot));
  }
}

template <class T>
Slot<T> slot_of(T value) {
  if constexpr (sizeof(T) >= 4) {
    return std::bit_cast<Slot<T>>(value);
  } else if constexpr (sizeof(T) == 2) {
    return std::bit_cast<uint16_t>(value);
  } else {
    return std::bit_cast<uint8_t>(value);
  }
}

template <class To, class From, class F>
void unary(Warp& w, const Instruction& i, Mask m, F f) {
  auto* to = w.lanes<Slot<To>>(i.to);
  auto* a = w.lanes<Slot<From>>(i.a);
  each_lane(m, [&](int l) { to[l] = slot_of<To>(f(value_of<From>(a[l]))); });
}

template <class To, class From, class F>
void binary(Warp& w, const Instruction& i, Mask m, F f) {
  auto* to = w.lanes<Slot<To>>(i.to);
  auto *a = w.lanes<Slot<From>>(i.a), *b = w.lanes<Slot<From>>(i.b);
  each_lane(m, [&](int l) { to[l] = slot_of<To>(f(value_of<From>(a[l]), value_of<From>(b[l]))); });
}

template <class T, class F>
void ternary(Warp& w, const Instruction& i, Mask m, F f) {
  auto* to = w.lanes<Slot<T>>(i.to);
  auto *a = w.lanes<Slot<T>>(i.a), *b = w.lanes<Slot<T>>(i.b), *c = w.lanes<Slot<T>>(i.c);
  each_lane(m, [&](int l) { to[l] = slot_of<T>(f(value_of<T>(a[l]), value_of<T>(b[l]), value_of<T>(c[l]))); });
}

inline void set_predicate(Warp& w, int predicate, Mask m, Mask values) {
  w.predicates[predicate] = (w.predicates[predicate] & ~m) | (values & m);
}

// ---------------------------------------------------------------------------------------------- arithmetic

#define LAMBDA(STATEMENT) [](Warp& w, const Instruction& i, Mask m) { STATEMENT; }
#define UNARY(NAME, EXPRESSION) \
  if (op == NAME) return LAMBDA((unary<T, T>(w, i, m, [](T a) { return static_cast<T>(EXPRESSION); })));
#define BINARY(NAME, EXPRESSION) \
  if (op == NAME) return LAMBDA((binary<T, T>(w, i, m, [](T a, T b) { return static_cast<T>(EXPRESSION); })));
#define TERNARY(NAME, EXPRESSION) \
  if (op == NAME) return LAMBDA((ternary<T>(w, i, m, [](T a, T b, T c) { return static_cast<T>(EXPRESSION); })));

template <class T>
T divisor(T b) {
  if (b == 0) fail("division by zero");
  return b;
}

template <class T>
void shift_left(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) {
    const uint32_t by = w.lanes<uint32_t>(i.b)[l];
    const auto a = static_cast<std::make_unsigned_t<T>>(w.lanes<Slot<T>>(i.a)[l]);
    w.lanes<Slot<T>>(i.to)[l] = slot_of<T>(by < sizeof(T) * 8 ? static_cast<T>(a << by) : T{0});
  });
}

template <class T>
void shift_right(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) {
    const uint32_t by = std::min<uint32_t>(w.lanes<uint32_t>(i.b)[l], sizeof(T) * 8);
    const T a = value_of<T>(w.lanes<Slot<T>>(i.a)[l]);
    const bool all = by == sizeof(T) * 8;
    w.lanes<Slot<T>>(i.to)[l] = slot_of<T>(all ? static_cast<T>(a < 0 ? -1 : 0) : static_cast<T>(a >> by));
  });
}

template <class U>
void insert_bits(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) {
    const uint32_t start = w.lanes<uint32_t>(i.c)[l] & 255, length = w.lanes<uint32_t>(i.d)[l] & 255;
    U field = 0;
    for (uint32_t bit = start; bit < start + length && bit < sizeof(U) * 8; ++bit) field |= U{1} << bit;
    const U shifted = start < sizeof(U) * 8 ? w.lanes<U>(i.a)[l] << start : 0;
    w.lanes<U>(i.to)[l] = (w.lanes<U>(i.b)[l] & ~field) | (shifted & field);
  });
}

inline void extract_bits(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) {
    const uint32_t start = w.lanes<uint32_t>(i.b)[l] & 255, length = w.lanes<uint32_t>(i.c)[l] & 255;
    const uint64_t shifted = start < 32 ? w.lanes<uint32_t>(i.a)[l] >> start : 0;
    w.lanes<uint32_t>(i.to)[l] = static_cast<uint32_t>(shifted & ((uint64_t{1} << std::min(length, 32u)) - 1));
  });
}

// The bytes of b and a that the digits of c name; a digit's highest bit asks for the sign of the byte in its place.
inline void permute_bytes(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) {
    const uint64_t bytes = uint64_t{w.lanes<uint32_t>(i.b)[l]} << 32 | w.lanes<uint32_t>(i.a)[l];
    uint32_t to = 0;
    for (int place = 0; place < 4; ++place) {
      const uint32_t digit = w.lanes<uint32_t>(i.c)[l] >> 4 * place & 15, byte = bytes >> 8 * (digit & 7) & 255;
      to |= (digit & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * place;
    }
    w.lanes<uint32_t>(i.to)[l] = to;
  });
}

template <class T>
Execute integer_arithmetic(const std::string& op) {
  using U = std::make_unsigned_t<T>;  // in which sums wrap around
  BINARY("add", U(a) + U(b))
  BINARY("sub", U(a) - U(b))
  BINARY("mul.lo", uint64_t(a) * uint64_t(b))
  TERNARY("mad.lo", uint64_t(a) * uint64_t(b) + uint64_t(c))
  BINARY("div", a / divisor(b))
  BINARY("rem", a % divisor(b))
  BINARY("min", a < b ? a : b)
  BINARY("max", a > b ? a : b)
  BINARY("and", a & b)
  BINARY("or", a | b)
  BINARY("xor", a ^ b)
  UNARY("not", ~a)
  UNARY("neg", U{0} - U(a))
  UNARY("popc", std::popcount(U(a)))
  if (op == "shl") return shift_left<T>;
  if (op == "shr") return shift_right<T>;
  if constexpr (sizeof(T) >= 4) {
    if (op == "bfi") return insert_bits<U>;
  }
  if constexpr (std::is_same_v<T, uint32_t>) {
    if (op == "bfe") return extract_bits;
    if (op == "prmt") return permute_bytes;
  }
  if constexpr (sizeof(T) < 8) {
    using Wide = std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                    std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>;
    if (op == "mul.wide") return LAMBDA((binary<Wide, T>(w, i, m, [](T a, T b) { return Wide(Wide(a) * Wide(b)); })));
  }
  return nullptr;
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

template <class T>
T smaller(T a, T b) {  // −0 below 0
  return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
T larger(T a, T b) {
  return a != a ? b : b != b ? a : a > b || (a == b && std::signbit(b)) ? a : b;
}
inline float fma_down(float a, float b, float c) {
  const double exact = static_cast<double>(a) * b + c;  // but for its last bit
  const float near = static_cast<float>(exact);
  return near > exact ? std::nextafterf(near, -INFINITY) : near;
}

// The approximations are better than a GPU's, which may be off by two units in the last place.
template <class T>
Execute float_arithmetic(const std::string& op) {
  BINARY("add", a + b)
  BINARY("add.rn", a + b)
  BINARY("sub", a - b)
  BINARY("sub.rn", a - b)
  BINARY("mul", a * b)
  BINARY("mul.rn", a * b)
  BINARY("div.rn", a / b)
  BINARY("div.approx", a * (1 / b))
  TERNARY("fma.rn", std::fma(a, b, c))
  UNARY("neg", -a)
  UNARY("abs", std::abs(a))
  UNARY("rcp.rn", 1 / a)
  UNARY("sqrt.rn", std::sqrt(a))
  BINARY("min", smaller(a, b))
  BINARY("max", larger(a, b))
  BINARY("max.NaN", a != a || b != b ? T(NAN) : larger(a, b))
  BINARY("copysign", std::copysign(b, a))
  if constexpr (std::is_same_v<T, float>) {
    TERNARY("fma.rm", fma_down(a, b, c))
    UNARY("rsqrt.approx.ftz", flushed(static_cast<float>(1 / std::sqrt(static_cast<double>(flushed(a))))))
    UNARY("rcp.approx.ftz", flushed(1 / flushed(a)))
    UNARY("ex2.approx", std::exp2(a))
    UNARY("ex2.approx.ftz", flushed(std::exp2(flushed(a))))
  }
  return nullptr;
}

template <class T>
Execute arithmetic(const std::string& op) {
  if constexpr (std::is_integral_v<T>) {
    return integer_arithmetic<T>(op);
  } else {
    return float_arithmetic<T>(op);
  }
}

// ---------------------------------------------------------------------------------------------- comparisons

template <class T, class F>
void compare(Warp& w, const Instruction& i, Mask m, F f) {
  auto *a = w.lanes<Slot<T>>(i.a), *b = w.lanes<Slot<T>>(i.b);
  Mask values = 0;
  each_lane(m, [&](int l) { values |= static_cast<Mask>(f(value_of<T>(a[l]), value_of<T>(b[l]))) << l; });
  set_predicate(w, i.predicate_to, m, values);
}

#define COMPARISON(NAME, EXPRESSION) \
  if (op == NAME) return LAMBDA((compare<T>(w, i, m, [](T a, T b) { return EXPRESSION; })));

template <class T>
Execute comparison(const std::string& op) {
  COMPARISON("eq", a == b)
  COMPARISON("ne", a < b || a > b)
  COMPARISON("lt", a < b)
  COMPARISON("le", a <= b)
  COMPARISON("gt", a > b)
  COMPARISON("ge", a >= b)
  if constexpr (std::is_floating_point_v<T>) {  // true as well if either is NaN
    COMPARISON("equ", !(a < b || a > b))
    COMPARISON("neu", !(a == b))
    COMPARISON("ltu", !(a >= b))
    COMPARISON("leu", !(a > b))
    COMPARISON("gtu", !(a <= b))
    COMPARISON("geu", !(a < b))
  }
  return nullptr;
}

template <class Unsigned>
void select(Warp& w, const Instruction& i, Mask m) {
  auto* to = w.lanes<Unsigned>(i.to);
  auto *a = w.lanes<Unsigned>(i.a), *b = w.lanes<Unsigned>(i.b);
  const Mask first = w.predicates[i.predicate_a];
  each_lane(m, [&](int l) { to[l] = first >> l & 1 ? a[l] : b[l]; });
}

// Of predicates.
inline Execute logic(const std::string& op) {
#define LOGIC(NAME, EXPRESSION)                                                 \
  if (op == NAME)                                                               \
    return LAMBDA({                                                             \
      [[maybe_unused]] const Mask b = w.predicates[std::max(i.predicate_b, 0)]; \
      const Mask a = w.predicates[i.predicate_a];                               \
      set_predicate(w, i.predicate_to, m, EXPRESSION);                          \
    });
  LOGIC("and", a & b)
  LOGIC("or", a | b)
  LOGIC("xor", a ^ b)
  LOGIC("not", ~a)
  LOGIC("mov", a)
  return nullptr;
}

// ---------------------------------------------------------------------------------------------- conversions

inline float from_half(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
constexpr uint16_t kNan16 = 0x7fff;
inline uint16_t to_half(float x) { return x != x ? kNan16 : std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x != x ? kNan16 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Whether -0 keeps its sign is not written anywhere: here it does.
inline uint16_t relu16(uint16_t bits) { return bits > 0x8000 ? 0 : bits; }
inline uint32_t packed(uint16_t high, uint16_t low) { return static_cast<uint32_t>(high) << 16 | low; }

template <class To, class From>
Execute conversion_of_types() {
  return LAMBDA((unary<To, From>(w, i, m, [](From a) { return static_cast<To>(a); })));
}

template <class To>
Execute conversion_to(const std::string& from) {
  if (from == "s8") return conversion_of_types<To, int8_t>();
  if (from == "u8") return conversion_of_types<To, uint8_t>();
  if (from == "s16") return conversion_of_types<To, int16_t>();
  if (from == "u16") return conversion_of_types<To, uint16_t>();
  if (from == "s32") return conversion_of_types<To, int32_t>();
  if (from == "u32") return conversion_of_types<To, uint32_t>();
  if (from == "s64") return conversion_of_types<To, int64_t>();
  if (from == "u64") return conversion_of_types<To, uint64_t>();
  return nullptr;
}

// `op`: what stands behind "cvt.", the last two parts being the types.
inline Execute conversion(const std::string& op, const std::string& to, const std::string& from) {
#define CONVERSION(NAME, TO, FROM, EXPRESSION) \
  if (op == NAME) return LAMBDA((unary<TO, FROM>(w, i, m, [](FROM a) { return EXPRESSION; })));
#define PACKING(NAME, EXPRESSION) \
  if (op == NAME) return LAMBDA((binary<uint32_t, float>(w, i, m, [](float a, float b) { return EXPRESSION; })));
  CONVERSION("f32.f16", float, uint16_t, from_half(a))
  CONVERSION("f32.bf16", float, uint16_t, from_bfloat16(a))
  CONVERSION("rn.f16.f32", uint16_t, float, to_half(a))
  CONVERSION("rn.bf16.f32", uint16_t, float, to_bfloat16(a))
  PACKING("rn.f16x2.f32", packed(to_half(a), to_half(b)))
  PACKING("rn.bf16x2.f32", packed(to_bfloat16(a), to_bfloat16(b)))
  PACKING("rn.relu.f16x2.f32", packed(relu16(to_half(a)), relu16(to_half(b))))
  PACKING("rn.relu.bf16x2.f32", packed(relu16(to_bfloat16(a)), relu16(to_bfloat16(b))))
  CONVERSION("sat.f32.f32", float, float, a > 0 ? std::min(a, 1.0f) : 0.0f)
  if (op.rfind("rn.f32.", 0) == 0) return conversion_to<float>(from);
  if (op != to + "." + from) return nullptr;
  if (to == "s8") return conversion_to<int8_t>(from);
  if (to == "u8") return conversion_to<uint8_t>(from);
  if (to == "s16") return conversion_to<int16_t>(from);
  if (to == "u16") return conversion_to<uint16_t>(from);
  if (to == "s32") return conversion_to<int32_t>(from);
  if (to == "u32") return conversion_to<uint32_t>(from);
  if (to == "s64") return conversion_to<int64_t>(from);
  if (to == "u64") return conversion_to<uint64_t>(from);
  return nullptr;
}

inline void low_half(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) { w.lanes<uint32_t>(i.to)[l] = static_cast<uint32_t>(w.lanes<uint64_t>(i.a)[l]); });
}

template <class Unsigned>
void move(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) { w.lanes<Unsigned>(i.to)[l] = w.lanes<Unsigned>(i.a)[l]; });
}

// Elements of option bytes each, from and to a whole.
inline void pack(Warp& w, const Instruction& i, Mask m) {
  const int bits = i.option * 8;
  each_lane(m, [&](int l) {
    uint64_t whole = 0;
    for (int e = 0; e < i.count; ++e)
      whole |= (w.lanes<uint32_t>(i.elements[e])[l] & ((uint64_t{1} << bits) - 1)) << e * bits;
    w.set(i.to, l, whole);
  });
}

inline void unpack(Warp& w, const Instruction& i, Mask m) {
  const int bits = i.option * 8;
  each_lane(m, [&](int l) {
    const uint64_t whole = w.get(i.a, l);
    for (int e = 0; e < i.count; ++e)
      w.lanes<uint32_t>(i.elements[e])[l] = static_cast<uint32_t>(whole >> e * bits & ((uint64_t{1} << bits) - 1));
  });
}

}  // namespace emulator
