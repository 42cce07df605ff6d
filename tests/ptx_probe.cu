// One kernel for each wrapper of csrc/cuda/ptx.cuh, one warp each: operands come from plain arrays
// in the layout that the PTX manual gives, results go back to plain arrays.
#include "../csrc/cuda/ptx.cuh"

namespace {

__device__ int lane() { return threadIdx.x % 32; }

// c (16x8) += a (16x16) b^T, b (8x16).
template <class T>
__global__ void mma_16(const T* a, const T* b, float* c) {
  const int group = lane() / 4, pair = lane() % 4 * 2;
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    const T* from = a + (group + i % 2 * 8) * 16 + pair + i / 2 * 8;
    left[i] = ptx::pack(from[0], from[1]);
    sums[i] = c[(group + i / 2 * 8) * 8 + pair + i % 2];
  }
  for (int i = 0; i < 2; ++i) {
    const T* from = b + group * 16 + pair + i * 8;
    right[i] = ptx::pack(from[0], from[1]);
  }
  ptx::mma_m16n8k16<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + pair + i % 2] = sums[i];
}

// c (16x8) += a (16x8) b^T, b (8x8), rounded to TF32 here.
__global__ void mma_8(const float* a, const float* b, float* c) {
  const int group = lane() / 4, member = lane() % 4;
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    left[i] = ptx::round_to_tf32(a[(group + i % 2 * 8) * 8 + member + i / 2 * 4]);
    sums[i] = c[(group + i / 2 * 8) * 8 + member * 2 + i % 2];
  }
  for (int i = 0; i < 2; ++i) right[i] = ptx::round_to_tf32(b[group * 8 + member + i * 4]);
  ptx::mma_m16n8k8_tf32(sums, left, right);
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = sums[i];
}

// Four 8x8 matrices one below the other; to[4 lane + m] is what the lane gets of matrix m.
template <bool kTransposed>
__global__ void ldmatrix(const uint16_t* from, uint32_t* to) {
  SharedMemory shared;
  uint16_t* rows = shared.take<uint16_t>(32 * 8);
  for (int i = 0; i < 8; ++i) rows[lane() * 8 + i] = from[lane() * 8 + i];
  __syncthreads();
  uint32_t matrices[4];
  if (kTransposed)
    ptx::ldmatrix_x4_trans(matrices, rows + lane() * 8);
  else
    ptx::ldmatrix_x4(matrices, rows + lane() * 8);
  for (int m = 0; m < 4; ++m) to[lane() * 4 + m] = matrices[m];
}

// Two groups of copies; odd lanes of the second copy zeros.
__global__ void cp_async(const float* from, float* to) {
  SharedMemory shared;
  float* first = shared.take<float>(128);
  float* second = shared.take<float>(128);
  const int i = lane() * 4;
  ptx::cp_async_16(first + i, from + i, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(second + i, from + 128 + i, lane() % 2 == 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  for (int e = 0; e < 4; ++e) to[i + e] = first[i + e];
  ptx::cp_async_wait<0>();
  for (int e = 0; e < 4; ++e) to[128 + i + e] = second[i + e];
}

__global__ void scalars(const float* from, float* powers, uint32_t* rounded) {
  powers[threadIdx.x] = ptx::exp2_approximate(from[threadIdx.x]);
  rounded[threadIdx.x] = ptx::round_to_tf32(from[threadIdx.x]);
}

template <class... Parameters, class... Arguments>
int run(const char* name, void (*kernel)(Parameters...), Arguments... arguments) {
  launch_kernel(kernel, name, dim3(1), 32, 2048, nullptr, arguments...);
  return cudaGetLastError();
}

}  // namespace

extern "C" int probe_mma_bf16(const void* a, const void* b, float* c) {
  using T = __nv_bfloat16;
  return run("mma", mma_16<T>, static_cast<const T*>(a), static_cast<const T*>(b), c);
}
extern "C" int probe_mma_fp16(const void* a, const void* b, float* c) {
  using T = __half;
  return run("mma", mma_16<T>, static_cast<const T*>(a), static_cast<const T*>(b), c);
}
extern "C" int probe_mma_tf32(const float* a, const float* b, float* c) {
  return run("mma", mma_8, a, b, c);
}
extern "C" int probe_ldmatrix(const uint16_t* from, uint32_t* to) {
  return run("ldmatrix", ldmatrix<false>, from, to);
}
extern "C" int probe_ldmatrix_trans(const uint16_t* from, uint32_t* to) {
  return run("ldmatrix", ldmatrix<true>, from, to);
}
extern "C" int probe_cp_async(const float* from, float* to) {
  return run("cp_async", cp_async, from, to);
}
extern "C" int probe_scalars(const float* from, float* powers, uint32_t* rounded) {
  return run("scalars", scalars, from, powers, rounded);
}
