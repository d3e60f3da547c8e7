// What of CUDA the library was compiled with, for Python to compare with the driver's (backend.py).
#include <cuda_runtime.h>

// 1000 · major + 10 · minor, as everywhere in CUDA.
extern "C" __attribute__((visibility("default"))) int latephase_cuda_runtime_version() { return CUDART_VERSION; }
