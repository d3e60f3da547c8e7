// What of CUDA the library was compiled with and what the driver has, for Python to compare (backend.py).
#include <cuda_runtime.h>

#define LATEPHASE_EXPORT extern "C" __attribute__((visibility("default")))

// 1000 · major + 10 · minor, as everywhere in CUDA.
LATEPHASE_EXPORT int latephase_cuda_runtime_version() { return CUDART_VERSION; }

// 0 without a driver.
LATEPHASE_EXPORT int latephase_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
