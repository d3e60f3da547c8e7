// Kernel launches: the tensor's device and current stream, shared memory, clusters, and a check after each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

#include "../stable.h"

namespace latephase {

inline void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "latephase_kernels: CUDA: ", cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr name, int device_index) {
  int value;
  check_cuda(cudaDeviceGetAttribute(&value, name, device_index));
  return value;
}

// Calls run(scalar_t{}) for the type of `dtype`.
template <class Run>
void with_type(const char* op, DataType dtype, const Run& run) {
  switch (dtype) {
    case DataType::Float:
      return run(float{});
    case DataType::Half:
      return run(__half{});
    case DataType::BFloat16:
      return run(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": CUDA kernels take float32, float16 and bfloat16");
  }
}

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;  // dynamic
  int cluster = 1;           // blocks of a thread-block cluster
  bool cooperative = false;  // all blocks are on the device at once, or the launch fails
};

// The arguments of cudaLaunchKernelEx; not copyable, for one part points at another.
struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  LaunchConfig(const Grid& grid, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = stream;
    if (grid.cooperative) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    } else {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    }
    config.attrs = &attribute;
    config.numAttrs = grid.cooperative || grid.cluster > 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// Lets a kernel have all the shared memory of a block, and clusters of more than eight where there are clusters. Once a
// kernel, device and thread, and always the same: other threads may be launching the kernel.
template <class... Parameters>
void allow_resources(void (*kernel)(Parameters...), int device_index) {
  thread_local std::set<std::pair<const void*, int>> done;
  const std::pair key(reinterpret_cast<const void*>(kernel), device_index);
  if (done.count(key)) return;
  const auto set = [&](cudaFuncAttribute attribute, int value) {
    check_cuda(cudaFuncSetAttribute(key.first, attribute, value));
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize,
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index));
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (device_attribute(cudaDevAttrClusterLaunch, device_index)) set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  done.insert(key);
}

// The current stream of a tensor's device, with that device current for as long as this lives.
class Launcher {
 public:
  explicit Launcher(const Tensor& on) : guard_(on.get_device_index()), device_index_(on.get_device_index()) {
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int device_index() const { return device_index_; }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), const Grid& grid, const Arguments&... arguments) const {
    STD_TORCH_CHECK(grid.blocks <= INT32_MAX, "latephase_kernels: input is too large: ", grid.blocks, " thread blocks");
    if (grid.shared_bytes > 0) allow_resources(kernel, device_index_);
    const LaunchConfig launch(grid, stream_);
    check_cuda(cudaLaunchKernelEx(&launch.config, kernel, arguments...));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int device_index_;
  cudaStream_t stream_;
};

// What of a device decides how work is cut.
struct Device {
  int64_t shared_bytes_per_multiprocessor, shared_bytes_per_block, reserved_shared_bytes;
  int max_cluster;                  // 1 without clusters
  int cooperative_multiprocessors;  // 0 without cooperative launches

  // The shared memory of each block when `blocks` of them share a multiprocessor.
  int64_t shared_bytes(int blocks) const {
    return std::min(shared_bytes_per_block, shared_bytes_per_multiprocessor / blocks - reserved_shared_bytes);
  }
};

// Whether clusters of this size, with a multiprocessor for each block, cover at least three quarters of the device.
template <class... Parameters>
bool clusters_fill_device(int device_index, int cluster, void (*kernel)(Parameters...), int threads,
                          int64_t shared_bytes) {
  allow_resources(kernel, device_index);
  const LaunchConfig launch({cluster, threads, shared_bytes, cluster}, nullptr);
  int active = 0;
  if (cudaOccupancyMaxActiveClusters(&active, kernel, &launch.config) != cudaSuccess) {
    cudaGetLastError();  // a size that the device refuses is no error of the caller's
    return false;
  }
  return active * cluster * 4 >= device_attribute(cudaDevAttrMultiProcessorCount, device_index) * 3;
}

// Asked once a device, which must be the current one. The kernel and its threads stand for all that use clusters.
template <class... Parameters>
const Device& device_of(int index, void (*kernel)(Parameters...), int threads) {
  static std::mutex mutex;
  static std::unordered_map<int, Device> known;
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(index); found != known.end()) return found->second;
  Device device{device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index),
                device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                device_attribute(cudaDevAttrReservedSharedMemoryPerBlock, index), 1, 0};
  if (device_attribute(cudaDevAttrCooperativeLaunch, index))
    device.cooperative_multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, index);
  if (device_attribute(cudaDevAttrClusterLaunch, index)) {
    device.max_cluster = 16;
    while (device.max_cluster > 1 &&
           !clusters_fill_device(index, device.max_cluster, kernel, threads, device.shared_bytes_per_block)) {
      device.max_cluster /= 2;
    }
  }
  return known.emplace(index, device).first->second;
}

}  // namespace latephase
