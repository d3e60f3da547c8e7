// Functions for host and device alike.
#pragma once

#ifdef __CUDACC__
#define LATEPHASE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LATEPHASE_HOST_DEVICE inline
#endif
