// Units kept in shared memory: a slot for each thread and iteration of a block.
//
// A warp's 32 units of an iteration lie side by side. Global memory is accessed in pieces (as wide as alignment
// allows) of which neighbouring lanes take neighbouring ones, whosever slot they belong to: narrow rows stay coalesced.
#pragma once

#include "on_chip.cuh"
#include "reduce.cuh"
#include "unit.cuh"

namespace latephase {

template <class scalar_t>
class Slots {
 public:
  static constexpr int kBytes = sizeof(Unit<scalar_t>);

  // The whole block's slots begin at `memory`.
  __device__ explicit Slots(char* memory) : warp_(memory + threadIdx.x / kWarp * kWarp * kBytes) {}

  // This thread's unit of iteration i.
  __device__ __forceinline__ Unit<scalar_t> get(int i) const {
    Unit<scalar_t> unit;
#pragma unroll
    for (int byte = 0; byte < kBytes; byte += 16) {
      const uint4 read = *reinterpret_cast<const uint4*>(at(i, threadIdx.x % kWarp, byte));
      uint32_t* words = unit.words + byte / 4;
      words[0] = read.x, words[1] = read.y, words[2] = read.z, words[3] = read.w;
    }
    return unit;
  }

  __device__ __forceinline__ void put(int i, const Unit<scalar_t>& unit) const {
#pragma unroll
    for (int byte = 0; byte < kBytes; byte += 16) {
      const uint32_t* words = unit.words + byte / 4;
      *reinterpret_cast<uint4*>(at(i, threadIdx.x % kWarp, byte)) = {words[0], words[1], words[2], words[3]};
    }
  }

  // Starts to fill the slots of iteration i, each lane's with its `valid` values at data + offset, then zeros. The
  // whole warp calls. They are there after wait_for_copies().
  //
  // Vectors bypass L1, so that lanes side by side take the pieces of a sector; of narrower pieces each lane takes its
  // own, and L1 has the rest of the sector for the next.
  template <int bytes>
  __device__ __forceinline__ void fetch(int i, const scalar_t* data, int64_t offset, int valid) const {
    constexpr int values = bytes / sizeof(scalar_t);
    if constexpr (bytes == 16) {
      for_each_piece<bytes>(i, offset, valid, [&](char* slot, int64_t piece_offset, bool exists) {
        copy_async<bytes>(slot, data + piece_offset, exists);
      });
    } else if constexpr (bytes >= 4) {
#pragma unroll
      for (int first = 0; first < kUnit; first += values)
        copy_async<bytes>(at(i, threadIdx.x % kWarp, first * sizeof(scalar_t)), data + offset + first, first < valid);
    } else {
      put(i, Unit<scalar_t>::template load<bytes>(data + offset, valid));
    }
  }

  // Writes a unit, by way of its slot, to data + offset. The whole warp calls.
  template <int bytes>
  __device__ __forceinline__ void store(int i, const Unit<scalar_t>& unit, scalar_t* data, int64_t offset,
                                        int valid) const {
    if constexpr (bytes == kBytes) {
      unit.template store<bytes>(data + offset, valid);
      return;
    }
    put(i, unit);
    __syncwarp();
    for_each_piece<bytes>(i, offset, valid, [&](const char* slot, int64_t piece_offset, bool exists) {
      if (exists) copy_piece<bytes>(data + piece_offset, slot);
    });
  }

 private:
  char* warp_;

  // With two vectors a unit, every other four units have them swapped: else lanes side by side meet in the banks.
  __device__ __forceinline__ char* at(int i, int owner, int byte) const {
    int vector = owner * (kBytes / 16) + byte / 16;
    if constexpr (kBytes == 32) vector ^= owner >> 2 & 1;
    return warp_ + i * static_cast<int>(blockDim.x) * kBytes + vector * 16 + byte % 16;
  }

  // body(place in the slot, offset in the data, whether it exists) for this lane's share of the warp's pieces.
  template <int bytes, class Body>
  __device__ __forceinline__ void for_each_piece(int i, int64_t offset, int valid, const Body& body) const {
    constexpr int pieces = kBytes / bytes, values = bytes / sizeof(scalar_t);
#pragma unroll
    for (int k = 0; k < pieces; ++k) {
      const int piece = k * kWarp + threadIdx.x % kWarp;
      const int owner = piece / pieces, first = piece % pieces * values;
      const int64_t from = pieces == 1 ? offset : __shfl_sync(~0u, offset, owner);
      const int existing = pieces == 1 ? valid : __shfl_sync(~0u, valid, owner);
      body(at(i, owner, first * sizeof(scalar_t)), from + first, first < existing);
    }
  }

  template <int bytes>
  static __device__ __forceinline__ void copy_piece(void* to, const void* from) {
    if constexpr (bytes == 16) {
      *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
    } else if constexpr (bytes == 8) {
      *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
    } else if constexpr (bytes == 4) {
      *static_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(from);
    } else {
      *static_cast<uint16_t*>(to) = *static_cast<const uint16_t*>(from);
    }
  }
};

}  // namespace latephase
