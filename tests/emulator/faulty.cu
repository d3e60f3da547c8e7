// A kernel without a fault, and some with one each that the emulator must find. Blocks are of 64 threads.
#include <cuda_runtime.h>

__device__ float of_the_other_block(float* shared) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(blockIdx.x % 2 ^ 1));
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

extern "C" {

// out[b] = the sum of block b's 64 values, by way of all that kernels do: copies, shuffles, barriers, clusters of two.
__global__ void sound(const float* in, float* out) {
  __shared__ float values[64], sums[2];
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(values + threadIdx.x));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(in + blockIdx.x * 64 + threadIdx.x), "r"(4)
               : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  float sum = values[63 - threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  if (threadIdx.x == 0) {
    out[blockIdx.x ^ 1] = of_the_other_block(sums) + of_the_other_block(sums + 1);
  }
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__global__ void beyond_the_end(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + gridDim.x * 64 - 63];
}

__global__ void misaligned(const float* in, float* out) {
  if (threadIdx.x == 0) *reinterpret_cast<float2*>(out) = *reinterpret_cast<const float2*>(in + 1);
}

__global__ void no_barrier(const float* in, float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = values[threadIdx.x ^ 32];
}

__global__ void no_warp_barrier(const float* in, float* out) {
  __shared__ volatile float values[64];
  values[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void written_while_read(const float* in, float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[0];
  if (threadIdx.x == 63) values[0] = 0;
  __syncthreads();
  out[threadIdx.x] += values[0];
}

__global__ void never_written(const float*, float* out) {
  __shared__ volatile float values[64];
  if (threadIdx.x == 0) values[0] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void half_at_the_barrier(const float* in, float* out) {
  if (threadIdx.x < 32) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void waits_for_ever(const float* in, float* out) {
  while (*reinterpret_cast<const volatile float*>(in) < 2) {
  }
  out[threadIdx.x] = 0;
}

__global__ void copy_not_awaited(const float* in, float*) {
  __shared__ float values[64];
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(values + threadIdx.x));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(in + threadIdx.x) : "memory");
}

__global__ void not_released(const float* in, float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = in[threadIdx.x];
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
  out[threadIdx.x] = of_the_other_block(values + threadIdx.x);
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__global__ void ended_too_early(const float* in, float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = in[threadIdx.x];
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  if (blockIdx.x % 2) return;
  for (int i = 0; i < 10000; ++i) out[threadIdx.x] += in[threadIdx.x];
  out[threadIdx.x] = of_the_other_block(values + threadIdx.x);
}

}  // extern "C"
