// What kernels use of CUDA C++, for g++: keywords, scalar types, intrinsics, the host calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static_assert(false, "take shared memory from SharedMemory")

struct __nv_bfloat16 {
  uint16_t bits;
};

struct __half {
  _Float16 value;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half value) { return float(value.value); }
inline __half __float2half_rn(float value) { return {_Float16(value)}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
enum {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorUnknown = 999,
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
};

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, int, int bytes) {
  return emulation::set_shared_memory_limit(reinterpret_cast<const void*>(kernel), bytes);
}

inline cudaError_t cudaGetLastError() { return emulation::last_error(); }

inline void __syncthreads(EMULATION_SITE) { emulation::barrier(EMULATION_HERE); }

inline void __syncwarp(uint32_t mask = ~0u, EMULATION_SITE) {
  emulation::collective(emulation::Collective::kSyncWarp, mask, nullptr, EMULATION_HERE);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int distance, EMULATION_SITE) {
  return emulation::shuffle(mask, value, emulation::lane() ^ distance, EMULATION_HERE);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, EMULATION_SITE) {
  return emulation::shuffle(mask, value, source & 31, EMULATION_HERE);
}

struct SharedMemory {
  unsigned taken = 0;

  template <class T>
  T* take(int count) {
    return static_cast<T*>(emulation::shared_memory(taken++, count * sizeof(T)));
  }
};

template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), const char* name, dim3 grid, int threads,
                   size_t shared_bytes, cudaStream_t, bool early, const Arguments&... arguments) {
  emulation::launch(reinterpret_cast<const void*>(kernel), name, grid, dim3(threads), shared_bytes,
                    early, [&] { kernel(arguments...); });
}
