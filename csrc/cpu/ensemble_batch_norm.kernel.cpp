// Ensemble batch norm on one instruction set: compiled several times, with LATEPHASE_ISA naming the namespace. No torch
// header here: an inline function compiled for a newer processor must never be the one the linker keeps for all. So
// what the headers below define is in unnamed namespaces.
#include "ensemble_batch_norm_channels.h"
#include "ensemble_batch_norm_spatial.h"

namespace latephase::LATEPHASE_ISA {

void forward(const Forward& f, const Parallel& parallel) {
  with_type(f.dtype, [&](auto value) {
    using T = decltype(value);
    f.sizes.channels_last ? Channels<T>::forward(f, parallel) : Spatial<T>::forward(f, parallel);
  });
}

void backward(const Backward& b, const Parallel& parallel) {
  with_type(b.dtype, [&](auto value) {
    using T = decltype(value);
    b.sizes.channels_last ? Channels<T>::backward(b, parallel) : Spatial<T>::backward(b, parallel);
  });
}

}  // namespace latephase::LATEPHASE_ISA
