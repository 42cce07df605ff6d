// One kernel for each wrapper of csrc/cuda/ptx.cuh, one warp each: operands come from plain arrays
// in the layout that the PTX manual gives, results go back to plain arrays.
#include "../csrc/cuda/warpgroup.cuh"

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

// Where an element of a panel lies, in bytes.
__device__ int swizzled(int row, int column) {
  const int address = row * 32 + column * 2;
  return address ^ (address >> 7 & 1) << 4;
}

template <class T>
__device__ void store_panel(unsigned char* panel, const T* from, int pitch, int rows) {
  for (int i = threadIdx.x; i < rows * 16; i += blockDim.x)
    *reinterpret_cast<T*>(panel + swizzled(i / 16, i % 16)) = from[i / 16 * pitch + i % 16];
}

template <int kColumns>
__device__ void store_sums(float* to, const float (&d)[kColumns / 8][4]) {
  const int row = threadIdx.x / 32 * 16 + lane() / 4, column = lane() % 4 * 2;
  for (int n = 0; n < kColumns / 8; ++n)
    for (int i = 0; i < 4; ++i) to[(row + i / 2 * 8) * kColumns + n * 8 + column + i % 2] = d[n][i];
}

// What the descriptors say, so that a GPU can be asked which field is wrong.
struct Fields {
  int swizzle, stride, leading;

  __device__ uint64_t operator()(const void* start) const {
    return uint64_t(stride >> 4 | uint32_t(swizzle) << 30) << 32 |
           (uint32_t(leading >> 4) << 16 | ptx::shared_address(start) >> 4);
  }
};

// c (64 x kColumns) = a (64 x 16) b^T, depth along the rows.
template <class T, int kColumns>
__global__ void wgmma_ss(const T* a, const T* b, float* c, Fields fields) {
#ifdef CIN_FAST_WGMMA
  SharedMemory shared;
  unsigned char* left = shared.take<unsigned char>(64 * 32);
  unsigned char* right = shared.take<unsigned char>(kColumns * 32);
  store_panel(left, a, 16, 64);
  store_panel(right, b, 16, kColumns);
  ptx::fence_proxy_async();
  __syncthreads();
  float d[kColumns / 8][4] = {};
  ptx::wgmma_fence();
  ptx::wgmma_ss<T, kColumns>(d, fields(left), fields(right), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  store_sums<kColumns>(c, d);
#endif
}

// c (64 x kColumns) = a (64 x 32) b, depth down the rows of b (32 x kColumns): panels of 16
// columns.
template <class T, int kColumns>
__global__ void wgmma_rs(const T* a, const T* b, float* c, Fields fields) {
#ifdef CIN_FAST_WGMMA
  constexpr int kDepth = 32, kPanelBytes = kDepth * 32;
  SharedMemory shared;
  unsigned char* right = shared.take<unsigned char>(kColumns / 16 * kPanelBytes);
  for (int panel = 0; panel < kColumns / 16; ++panel)
    store_panel(right + panel * kPanelBytes, b + panel * 16, kColumns, kDepth);
  ptx::fence_proxy_async();
  __syncthreads();
  const int row = threadIdx.x / 32 * 16 + lane() / 4, column = lane() % 4 * 2;
  float d[kColumns / 8][4] = {};
  uint32_t left[kDepth / 16][4];
  for (int step = 0; step < kDepth / 16; ++step) {
    for (int i = 0; i < 4; ++i) {
      const T* from = a + (row + i % 2 * 8) * kDepth + step * 16 + column + i / 2 * 8;
      left[step][i] = ptx::pack(from[0], from[1]);
    }
  }
  ptx::wgmma_fence();
  for (int step = 0; step < kDepth / 16; ++step)
    ptx::wgmma_rs<T, kColumns>(d, left[step], fields(right + step * 16 * 32));
  ptx::wgmma_commit();
  ptx::wgmma_wait_behind<0>(float(row));
  store_sums<kColumns>(c, d);
#endif
}

// Two of three warps trade numbers through shared memory; the third never comes.
__global__ void named_barrier(const float* from, float* to) {
  SharedMemory shared;
  float* numbers = shared.take<float>(64);
  if (threadIdx.x >= 64) return;
  numbers[threadIdx.x] = from[threadIdx.x];
  ptx::named_barrier<64>(1);
  to[threadIdx.x] = numbers[threadIdx.x ^ 32];
}

// Two warps take turns, three each: would hang if one did not arrive, or waited where it arrives.
__global__ void turns(const float* from, float* to) {
  const int warp = threadIdx.x / 32;
  float number = from[threadIdx.x];
  if (warp == 1) ptx::named_barrier_arrive<64>(1);
  for (int i = 0; i < 3; ++i) {
    ptx::named_barrier<64>(1 + warp);
    number *= 2;
    ptx::named_barrier_arrive<64>(2 - warp);
  }
  if (warp == 0) ptx::named_barrier<64>(1);
  to[threadIdx.x] = number;
}

// A box of 2 KB at (turn, image). One warp group copies and waits until the four warps of the other
// have read.
__global__ void bulk_copy(const __grid_constant__ ptx::TensorMap map, int turn, int image,
                          uint16_t* to) {
#ifdef CIN_FAST_WGMMA
  constexpr int kNumbers = 2048;
  SharedMemory shared;
  uint16_t* box = shared.take<uint16_t>(kNumbers);
  uint64_t* full = shared.take<uint64_t>(2);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(full + 1, 4);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x > 128) return;
    ptx::mbarrier_arrive_expect(full, 2 * kNumbers);
    ptx::bulk_copy_5d(box, &map, full, turn, image);
    ptx::mbarrier_wait(full + 1, 0);
    return;
  }
  ptx::setmaxnreg_inc<40>();
  ptx::mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < kNumbers; i += 128) to[i] = box[i];
  __syncwarp();
  if (lane() == 0) ptx::mbarrier_arrive(full + 1);
#endif
}

// 512 bytes as they lie.
__global__ void bulk_copy_bytes(const float* from, float* to) {
#ifdef CIN_FAST_WGMMA
  SharedMemory shared;
  float* numbers = shared.take<float>(128);
  uint64_t* full = shared.take<uint64_t>(1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(full, 512);
    ptx::bulk_copy(numbers, from, 512, full);
  }
  ptx::mbarrier_wait(full, 0);
  to[threadIdx.x] = numbers[threadIdx.x];
#endif
}

// Takes its time behind the launch of the kernel that follows, then writes what that one copies.
__global__ void grid_dependency_first(const float* from, float* to) {
  ptx::grid_dependency_launch();
  volatile float* const changing = to;
  for (int i = 0; i < 100000; ++i) changing[threadIdx.x] = 0.f;
  to[threadIdx.x] = from[threadIdx.x];
}

__global__ void grid_dependency_second(const float* from, float* to) {
  ptx::grid_dependency_wait();
  to[threadIdx.x] = from[threadIdx.x];
}

template <class... Parameters, class... Arguments>
int run(const char* name, int threads, void (*kernel)(Parameters...), Arguments... arguments) {
  launch_kernel(kernel, name, dim3(1), threads, 40960, nullptr, false, arguments...);
  return cudaGetLastError();
}

template <class T, int kColumns>
int run_wgmma(const void* a, const void* b, float* c, const int* fields) {
  const Fields f{fields[0], fields[1], fields[2]};
  const T *left = static_cast<const T*>(a), *right = static_cast<const T*>(b);
  // The wide one exists from registers alone, others of 32 and 128 from shared memory.
  if constexpr (kColumns == 208)
    return run("wgmma_rs", 128, wgmma_rs<T, kColumns>, left, right, c, f);
  else if constexpr (kColumns == 32 || kColumns == 128)
    return run("wgmma_ss", 128, wgmma_ss<T, kColumns>, left, right, c, f);
  else
    return fields[3] ? run("wgmma_rs", 128, wgmma_rs<T, kColumns>, left, right, c, f)
                     : run("wgmma_ss", 128, wgmma_ss<T, kColumns>, left, right, c, f);
}

}  // namespace

#define PROBE_WGMMA(COLUMNS)                                                          \
  extern "C" int probe_wgmma_##COLUMNS##_bf16(const void* a, const void* b, float* c, \
                                              const int* fields) {                    \
    return run_wgmma<__nv_bfloat16, COLUMNS>(a, b, c, fields);                        \
  }                                                                                   \
  extern "C" int probe_wgmma_##COLUMNS##_fp16(const void* a, const void* b, float* c, \
                                              const int* fields) {                    \
    return run_wgmma<__half, COLUMNS>(a, b, c, fields);                               \
  }
PROBE_WGMMA(16)
PROBE_WGMMA(32)
PROBE_WGMMA(64)
PROBE_WGMMA(128)
PROBE_WGMMA(208)

// numbers: images, panels, turns, groups of a turn, height, step, turns and panels of a box, and
// the copy's turn and image.
extern "C" int probe_bulk_copy(const void* from, void* to, const int* numbers) {
  ptx::TensorMap map;
  const cudaError_t error =
      encode_tensor_map(&map, from, {numbers[0], numbers[1], numbers[2], numbers[3]},
                        {numbers[4], numbers[5]}, numbers[6], numbers[7]);
  if (error != cudaSuccess) return error;
  return run("bulk_copy", 256, bulk_copy, map, numbers[8], numbers[9], static_cast<uint16_t*>(to));
}
extern "C" int probe_bulk_copy_bytes(const float* from, float* to) {
  return run("bulk_copy_bytes", 128, bulk_copy_bytes, from, to);
}
extern "C" int probe_grid_dependency(const float* from, float* between, float* to) {
  launch_kernel(grid_dependency_first, "grid_dependency_first", dim3(1), 32, 0, nullptr, false,
                from, between);
  launch_kernel(grid_dependency_second, "grid_dependency_second", dim3(1), 32, 0, nullptr, true,
                between, to);
  return cudaGetLastError();
}
extern "C" int probe_mma_bf16(const void* a, const void* b, float* c) {
  using T = __nv_bfloat16;
  return run("mma", 32, mma_16<T>, static_cast<const T*>(a), static_cast<const T*>(b), c);
}
extern "C" int probe_mma_fp16(const void* a, const void* b, float* c) {
  using T = __half;
  return run("mma", 32, mma_16<T>, static_cast<const T*>(a), static_cast<const T*>(b), c);
}
extern "C" int probe_mma_tf32(const float* a, const float* b, float* c) {
  return run("mma", 32, mma_8, a, b, c);
}
extern "C" int probe_ldmatrix(const uint16_t* from, uint32_t* to) {
  return run("ldmatrix", 32, ldmatrix<false>, from, to);
}
extern "C" int probe_ldmatrix_trans(const uint16_t* from, uint32_t* to) {
  return run("ldmatrix", 32, ldmatrix<true>, from, to);
}
extern "C" int probe_cp_async(const float* from, float* to) {
  return run("cp_async", 32, cp_async, from, to);
}
extern "C" int probe_named_barrier(const float* from, float* to) {
  return run("named_barrier", 96, named_barrier, from, to);
}
extern "C" int probe_turns(const float* from, float* to) {
  return run("turns", 64, turns, from, to);
}
extern "C" int probe_scalars(const float* from, float* powers, uint32_t* rounded) {
  return run("scalars", 32, scalars, from, powers, rounded);
}
