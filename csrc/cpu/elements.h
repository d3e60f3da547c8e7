// What the kernels of every op need around vec.h: types, columns, parameters. No torch header, as in the kernels.
#pragma once

#include "../activation.h"
#include "../layout.h"
#include "vec.h"

namespace latephase::LATEPHASE_ISA {
namespace {

template <class T>
constexpr typename Accumulation<T>::type kRoundsToZero = 0;
template <>
constexpr float kRoundsToZero<Half> = kRoundsToZeroHalf;
template <>
constexpr float kRoundsToZero<BFloat16> = kRoundsToZeroBFloat16;

template <class T>
constexpr typename Accumulation<T>::type kRoundsToSix = 6;
template <>
constexpr float kRoundsToSix<Half> = kRoundsToSixHalf;
template <>
constexpr float kRoundsToSix<BFloat16> = kRoundsToSixBFloat16;

// Calls body(T{}) for the type of the data.
template <class Body>
inline void with_type(DataType dtype, const Body& body) {
  switch (dtype) {
    case DataType::Float:
      return body(float{});
    case DataType::Double:
      return body(double{});
    case DataType::BFloat16:
      return body(BFloat16{});
    case DataType::Half:
      return body(Half{});
  }
}

// Calls step(column, count) over [begin, end) in registers; count is Whole<A> but for a ragged end.
template <class A, class Step>
inline void for_columns(int64_t begin, int64_t end, const Step& step) {
  int64_t j = begin;
  for (; j + kLanes<A> <= end; j += kLanes<A>) step(j, Whole<A>{});
  if (j < end) step(j, static_cast<int>(end - j));
}

// out[j] = member k's parameter for channel c0 + j.
template <class A>
inline void read_affine(const Affine& p, int64_t k, int64_t c0, int64_t count, A absent, A* out) {
  const auto read = [&](auto type, const auto& convert) {
    const auto* from = static_cast<const decltype(type)*>(p.data) + k * p.member_stride + c0;
    for (int64_t j = 0; j < count; ++j) out[j] = static_cast<A>(convert(from[j]));
  };
  const auto as_is = [](auto value) { return value; };
  if (p.data == nullptr) {
    for (int64_t j = 0; j < count; ++j) out[j] = absent;
    return;
  }
  switch (p.dtype) {
    case DataType::Float:
      return read(float{}, as_is);
    case DataType::Double:
      return read(double{}, as_is);
    case DataType::BFloat16:
      return read(uint16_t{}, [](uint16_t bits) { return widen(Bits16{} + bits, BFloat16{})[0]; });
    case DataType::Half:
      return read(uint16_t{}, half_to_float);
  }
}

}  // namespace
}  // namespace latephase::LATEPHASE_ISA
