// Every line of inline PTX, in wrappers named after their instructions; nothing else holds any.
// With CIN_FAST_EMULATION the same names come from csrc/emulation/ptx.h.
#pragma once

#ifdef CIN_FAST_EMULATION
#include "../emulation/ptx.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "panel_extents.h"

// Whether this pass of the compiler makes code for the one chip that has wgmma.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define CIN_FAST_WGMMA
#endif

namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes of global memory into shared memory, or zeros where `valid` is false.
__device__ __forceinline__ void cp_async_16(void* destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(destination)),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane 8 m + r holds the address of row r of matrix m.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// C (16x8) += A (16x16) B (16x8), operands of type T, sums in float32.
template <class T>
__device__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// C (16x8) += A (16x8) B (8x8), operands in TF32.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// To the nearest TF32 number, ties away from zero.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

// 2 to the power of value, within 2 units in the last place; 0 for -infinity.
__device__ __forceinline__ float exp2_approximate(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(value));
  return result;
}

__device__ __forceinline__ uint32_t pack(__nv_bfloat16 low, __nv_bfloat16 high) {
  return __bfloat16_as_ushort(low) | static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16;
}

__device__ __forceinline__ uint32_t pack(__half low, __half high) {
  return __half_as_ushort(low) | static_cast<uint32_t>(__half_as_ushort(high)) << 16;
}

// What follows is sm_90's own.

// Lets a kernel that was launched early start, once every block has come here or ended. Elsewhere
// none is.
__device__ __forceinline__ void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Of a kernel that was launched early: waits until the one before it in the stream has ended and
// all that it wrote is there.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// And this is sm_90a's own.

// The number of wgmma's swizzle of 32 bytes in its descriptors: in each 8 rows of 32 bytes, address
// bit 7 is added to bit 4, modulo 2.
constexpr uint32_t kSwizzle32Bytes = 3;

// What a bulk tensor copy knows of a tensor in global memory: made by encode_tensor_map().
using TensorMap = CUtensorMap;

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes the thread's mbarrier_init visible to bulk copies.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and lets the phase wait for that many bytes of bulk copies too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits for the end of the phase of that parity: of the first phase it is 0.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copies the map's box at (turn, image) into shared memory, zeros beyond the tensor's edges; the
// barrier hears of every byte.
__device__ __forceinline__ void bulk_copy_5d(void* destination, const TensorMap* map,
                                             uint64_t* barrier, int turn, int image) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %3, %4, %3, %5}], [%2];\n" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(0), "r"(turn), "r"(image)
      : "memory");
}

// Copies bytes as they lie, from 16-byte aligned memory: a multiple of 16.
__device__ __forceinline__ void bulk_copy(void* destination, const void* source, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(shared_address(destination)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Makes this thread's ordinary stores to shared memory visible to wgmma and bulk copies.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Where kThreads threads, in whole warps, meet: a barrier of the block, 1 to 15, as 0 is
// __syncthreads's.
template <int kThreads>
__device__ __forceinline__ void named_barrier(int barrier) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Arrives there without waiting for the others.
template <int kThreads>
__device__ __forceinline__ void named_barrier_arrive(int barrier) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Moves registers from warp groups that need few to those that need many.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Before the first wgmma, and whenever registers that the next one uses were written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most kPending committed groups of wgmma are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// The same, but not before `known` is: ptxas moves a wait up past arithmetic that could run while
// wgmma does. The instruction that holds it back sleeps for no time, where `known` is negative.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_behind(float known) {
  asm volatile(
      "{\n.reg .pred negative;\nsetp.lt.f32 negative, %0, 0f00000000;\n"
      "@negative nanosleep.u32 0;\nwgmma.wait_group.sync.aligned %1;\n}\n" ::"f"(known),
      "n"(kPending)
      : "memory");
}

// Placeholders %0 to %(n-1), and the operands that they stand for.
#define TEN(t)                                                                                     \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9"
#define NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_16 TEN() ", %10, %11, %12, %13, %14, %15"
#define NAMES_32 TEN() ", " TEN(1) ", " TEN(2) ", %30, %31"
#define NAMES_64 NAMES_60 ", %60, %61, %62, %63"
#define NAMES_60 TEN() ", " TEN(1) ", " TEN(2) ", " TEN(3) ", " TEN(4) ", " TEN(5)
#define NAMES_96 NAMES_60 ", " TEN(6) ", " TEN(7) ", " TEN(8) ", %90, %91, %92, %93, %94, %95"
#define NAMES_104 NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define SUMS_4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define SUMS_8(n) SUMS_4(n), SUMS_4(n + 1)
#define SUMS_16(n) SUMS_8(n), SUMS_8(n + 2)
#define SUMS_32(n) SUMS_16(n), SUMS_16(n + 4)
#define SUMS_64(n) SUMS_32(n), SUMS_32(n + 8)
#define SUMS_104(n) SUMS_64(n), SUMS_32(n + 16), SUMS_8(n + 24)

// D (64 x kColumns) (+)= A (64 x 16) B (16 x kColumns); a lane holds D as mma.sync's, its warp
// sixteen rows. In wgmma_ss descriptors give A's rows and B's columns, sixteen elements each; in
// wgmma_rs A is in registers as mma.sync's, and the descriptor gives B's rows.
template <class T, int kColumns>
__device__ void wgmma_ss(float (*d)[4], uint64_t a, uint64_t b, bool accumulate);
template <class T, int kColumns>
__device__ void wgmma_rs(float (*d)[4], const uint32_t (&a)[4], uint64_t b);

#define WGMMA_SS(T, TYPE, N, SUMS, A, B, ACCUMULATE)                                    \
  template <>                                                                           \
  __device__ __forceinline__ void wgmma_ss<T, N>(float (*d)[4], uint64_t a, uint64_t b, \
                                                 bool accumulate) {                     \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #ACCUMULATE     \
                 ", 0;\n"                                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE        \
                 "\n{" NAMES_##SUMS "}, %" #A ", %" #B ", accumulate, 1, 1, 0, 0;\n}\n" \
                 : SUMS_##SUMS(0)                                                       \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                  \
  }
#define WGMMA_RS(T, TYPE, N, SUMS, A0, A1, A2, A3, B)                                   \
  template <>                                                                           \
  __device__ __forceinline__ void wgmma_rs<T, N>(float (*d)[4], const uint32_t (&a)[4], \
                                                 uint64_t b) {                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE        \
                 "\n{" NAMES_##SUMS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B \
                                    ", 1, 1, 1, 1;\n"                                   \
                 : SUMS_##SUMS(0)                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                 \
  }
#define WGMMA(T, TYPE)                          \
  WGMMA_SS(T, TYPE, 16, 8, 8, 9, 10)            \
  WGMMA_SS(T, TYPE, 32, 16, 16, 17, 18)         \
  WGMMA_SS(T, TYPE, 64, 32, 32, 33, 34)         \
  WGMMA_SS(T, TYPE, 128, 64, 64, 65, 66)        \
  WGMMA_RS(T, TYPE, 16, 8, 8, 9, 10, 11, 12)    \
  WGMMA_RS(T, TYPE, 64, 32, 32, 33, 34, 35, 36) \
  WGMMA_RS(T, TYPE, 208, 104, 104, 105, 106, 107, 108)
WGMMA(__nv_bfloat16, "bf16")
WGMMA(__half, "f16")
#undef WGMMA
#undef WGMMA_RS
#undef WGMMA_SS
#undef SUMS_104
#undef SUMS_64
#undef SUMS_32
#undef SUMS_16
#undef SUMS_8
#undef SUMS_4
#undef NAMES_104
#undef NAMES_96
#undef NAMES_60
#undef NAMES_64
#undef NAMES_32
#undef NAMES_16
#undef NAMES_8
#undef TEN

}  // namespace ptx

// A copy takes box_turns of box_panels of one image.
inline cudaError_t encode_tensor_map(ptx::TensorMap* map, const void* data,
                                     const PanelExtents& extents, const PanelStrides& strides,
                                     int box_turns, int box_panels) {
  // The driver's function, found at run time: a machine without a driver can load this library.
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &status);
  if (error != cudaSuccess) return error;
  if (status != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  constexpr int kElements = 256;
  constexpr cuuint64_t kBytes = 2 * kElements;
  const auto wide = [](int number) { return static_cast<cuuint64_t>(number); };
  const auto narrow = [](int number) { return static_cast<cuuint32_t>(number); };
  const cuuint64_t sizes[5] = {kElements, wide(extents.groups), wide(extents.turns),
                               wide(extents.panels), wide(extents.images)};
  const cuuint64_t bytes[4] = {kBytes, kBytes * strides.step, kBytes * strides.height,
                               kBytes * strides.height * extents.panels};
  const cuuint32_t box[5] = {kElements, narrow(extents.groups), narrow(box_turns),
                             narrow(box_panels), 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, const_cast<void*>(data), sizes, bytes, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Pieces of the block's dynamic shared memory, each aligned to 128 bytes, the first to 1,024.
struct SharedMemory {
  unsigned char* next;

  __device__ SharedMemory() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    next = dynamic_shared_memory;
  }

  template <class T>
  __device__ T* take(int count) {
    T* piece = reinterpret_cast<T*>(next);
    next += (count * sizeof(T) + 127) / 128 * 128;
    return piece;
  }
};

// An early kernel may start before the one before it in the stream has ended, from sm_90 on.
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), const char*, dim3 grid, int threads,
                   size_t shared_bytes, cudaStream_t stream, bool early,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  // Its error is also the last error, which launch() reads.
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

#endif
