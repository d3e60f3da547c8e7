// The CUDA runtime and what of torch the compiled CUDA library calls, emulated: linked to its object files in their
// place. Its ops become those of CPU tensors, its kernels run from their PTX. The environment says what there is:
//
//   LATEPHASE_EMULATOR_PTX              folder of the .ptx files
//   LATEPHASE_EMULATOR_CLUSTERS         0: a device without thread-block clusters
//   LATEPHASE_EMULATOR_SEED             blocks and warps take turns at random
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "launch.h"
#include "program.h"

namespace emulator {
namespace {

// What limits and attributes say of a device of compute capability 9.0 and 10.0 (CUDA C++ Programming Guide).
constexpr int kMultiprocessors = 132;
constexpr int kSharedOfMultiprocessor = 228 << 10, kSharedOfBlock = 227 << 10, kReservedShared = 1 << 10;
constexpr int kSharedByDefault = 48 << 10;
constexpr int kPortableCluster = 8, kLargestCluster = 16;

struct Function {
  std::string name;
  int max_dynamic_shared = kSharedByDefault;
  bool large_clusters = false;
};

struct Device {
  Program program;
  std::map<const void*, Function> functions;
  FindAllocation find_allocation;
  bool clusters;
  uint64_t seed;
  std::string error, launched;

  Device() {
    const auto number = [](const char* name, uint64_t otherwise) {
      const char* value = std::getenv(name);
      return value ? std::strtoull(value, nullptr, 0) : otherwise;
    };
    clusters = number("LATEPHASE_EMULATOR_CLUSTERS", 1);
    seed = number("LATEPHASE_EMULATOR_SEED", 0);
    find_allocation = reinterpret_cast<FindAllocation>(dlsym(RTLD_DEFAULT, "emulator_find_allocation"));
    if (!find_allocation) fail("allocations.cpp is not preloaded");
    const char* folder = std::getenv("LATEPHASE_EMULATOR_PTX");
    if (!folder) fail("LATEPHASE_EMULATOR_PTX is not set");
    for (const auto& file : std::filesystem::directory_iterator(folder)) {
      std::ifstream in(file.path());
      program.add({std::istreambuf_iterator<char>(in), {}});
    }
  }
};

Device& device() {
  static Device device;
  return device;
}

void run(const cudaLaunchConfig_t& config, const Function& function, void** arguments) {
  Device& d = device();
  const Kernel& kernel = d.program.kernel(function.name);
  int cluster = 1;
  bool cooperative = false;
  for (unsigned a = 0; a < config.numAttrs; ++a) {
    const cudaLaunchAttribute& attribute = config.attrs[a];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = static_cast<int>(attribute.val.clusterDim.x);
    if (attribute.id == cudaLaunchAttributeCooperative) cooperative = attribute.val.cooperative;
  }
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1) fail("grids of one dimension are emulated");
  const int blocks = static_cast<int>(grid.x), threads = static_cast<int>(block.x);
  const int shared = static_cast<int>(config.dynamicSmemBytes + kernel.static_shared_bytes);
  if (blocks <= 0) fail("a grid of %u blocks", grid.x);
  if (threads < 1 || threads > kernel.max_threads)
    fail("%d threads, the launch bounds are %d", threads, kernel.max_threads);
  if (blocks % cluster) fail("%d blocks are no whole clusters of %d", blocks, cluster);
  if (cluster > (function.large_clusters ? kLargestCluster : kPortableCluster)) fail("a cluster of %d blocks", cluster);
  if (cluster > 1 && !d.clusters) fail("the device has no clusters");
  if (shared > function.max_dynamic_shared)
    fail("%d bytes of shared memory, allowed are %d", shared, function.max_dynamic_shared);
  if (cooperative && blocks > kMultiprocessors * (kSharedOfMultiprocessor / (shared + kReservedShared)))
    fail("%d blocks of a cooperative launch do not fit the device", blocks);
  Launch(kernel, blocks, threads, config.dynamicSmemBytes, cluster, cooperative, arguments, d.find_allocation,
         d.seed ? d.seed++ : 0)
      .run();
  d.launched += function.name + "\n";
}

}  // namespace
}  // namespace emulator

using emulator::device;

extern "C" {

// ---------------------------------------------------------------------------------------------- the CUDA runtime

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  const emulator::Function& function = device().functions.at(kernel);
  try {
    emulator::run(*config, function, arguments);
    return cudaSuccess;
  } catch (const std::exception& error) {
    device().error = "emulated " + function.name + ": " + error.what();
    return cudaErrorLaunchFailure;
  }
}

const char* cudaGetErrorString(cudaError_t) { return device().error.c_str(); }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  emulator::Function& function = device().functions.at(kernel);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > emulator::kSharedOfBlock) return cudaErrorInvalidValue;
    function.max_dynamic_shared = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    function.large_clusters = value;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::kMultiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = emulator::kSharedOfMultiprocessor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::kSharedOfBlock;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = emulator::kReservedShared;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    case cudaDevAttrClusterLaunch:
      *value = device().clusters;
      break;
    default:
      device().error = "emulator: no such device attribute";
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel, const cudaLaunchConfig_t* config) {
  const int cluster = static_cast<int>(config->attrs[0].val.clusterDim.x);
  if (cluster > emulator::kPortableCluster && !device().functions.at(kernel).large_clusters)
    return cudaErrorInvalidClusterSize;
  *count = emulator::kMultiprocessors / cluster;
  return cudaSuccess;
}

// Of the code that nvcc writes around kernels.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  device().functions[kernel].name = name;
}
// Of launches by <<<…>>>, of which there are none.
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }

// ---------------------------------------------------------------------------------------------- torch

int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = nullptr, 0; }
int aoti_torch_create_device_guard(int, void** guard) { return *guard = nullptr, 0; }
int aoti_torch_delete_device_guard(void*) { return 0; }

int aoti_torch_library_init_impl(const char* name, const char*, const char* file, uint32_t line, void** library) {
  using Init = int (*)(const char*, const char*, const char*, uint32_t, void**);
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  return reinterpret_cast<Init>(dlsym(torch, "aoti_torch_library_init_impl"))(name, "CPU", file, line, library);
}

// ---------------------------------------------------------------------------------------------- for tests

// The names of the kernels launched since the last call, a line each.
__attribute__((visibility("default"))) const char* emulator_launched() {
  static std::string names;
  names = std::exchange(device().launched, {});
  return names.c_str();
}

// From here on kernels' traffic is counted; until there, as in Traffic::Counts.
__attribute__((visibility("default"))) void emulator_count_traffic() { emulator::Traffic::get().begin(); }
__attribute__((visibility("default"))) void emulator_traffic(emulator::Traffic::Counts* counts) {
  *counts = emulator::Traffic::get().end();
}

// Runs a kernel by its name; returns what was found, or nothing.
__attribute__((visibility("default"))) const char* emulator_run(const char* name, int blocks, int threads, int cluster,
                                                                void** arguments) {
  static std::string found;
  found.clear();
  try {
    emulator::Launch(device().program.kernel(name), blocks, threads, 0, cluster, false, arguments,
                     device().find_allocation, 0)
        .run();
  } catch (const std::exception& error) {
    found = error.what();
  }
  return found.c_str();
}
}
