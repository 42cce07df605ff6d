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

// Where an element of a panel lies, in bytes: `row_bytes` is the swizzle's row, 128 or 32.
__device__ int swizzled(int row, int column, int row_bytes) {
  const int address = row * row_bytes + column * 2;
  return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4;
}

template <class T>
__device__ void store_panel(unsigned char* panel, int row_bytes, const T* from, int pitch, int rows,
                            int columns) {
  for (int i = threadIdx.x; i < rows * columns; i += blockDim.x)
    *reinterpret_cast<T*>(panel + swizzled(i / columns, i % columns, row_bytes)) =
        from[i / columns * pitch + i % columns];
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
};

// c (64 x kColumns) = a b^T, depth along the rows: 64 of it with a swizzle of 128 bytes, 16
// with 32.
template <class T, int kColumns, int kRowBytes>
__global__ void wgmma_ss(const T* a, const T* b, float* c, Fields fields) {
#ifdef CIN_FAST_WGMMA
  constexpr int kDepth = kRowBytes / 2;
  SharedMemory shared;
  unsigned char* left = shared.take<unsigned char>(64 * kRowBytes);
  unsigned char* right = shared.take<unsigned char>(kColumns * kRowBytes);
  store_panel(left, kRowBytes, a, kDepth, 64, kDepth);
  store_panel(right, kRowBytes, b, kDepth, kColumns, kDepth);
  ptx::fence_proxy_async();
  __syncthreads();
  float d[kColumns / 8][4] = {};
  ptx::wgmma_fence();
  for (int step = 0; step < kDepth / 16; ++step)
    ptx::wgmma_ss<T, kColumns>(
        d,
        cin_fast::operand(ptx::shared_address(left), step * 32, ptx::Swizzle(fields.swizzle),
                          fields.stride, fields.leading),
        cin_fast::operand(ptx::shared_address(right), step * 32, ptx::Swizzle(fields.swizzle),
                          fields.stride, fields.leading),
        step > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  store_sums<kColumns>(c, d);
#endif
}

// c (64 x kColumns) = a (64 x 32) b, depth down the rows of b (32 x kColumns): panels of 64 columns
// with a swizzle of 128 bytes, or 16 columns with 32.
template <class T, int kColumns, int kRowBytes>
__global__ void wgmma_rs(const T* a, const T* b, float* c, Fields fields) {
#ifdef CIN_FAST_WGMMA
  constexpr int kDepth = 32, kAcross = kRowBytes / 2, kPanelBytes = kDepth * kRowBytes;
  SharedMemory shared;
  unsigned char* right = shared.take<unsigned char>(kColumns / kAcross * kPanelBytes);
  for (int panel = 0; panel < kColumns / kAcross; ++panel)
    store_panel(right + panel * kPanelBytes, kRowBytes, b + panel * kAcross, kColumns, kDepth,
                kAcross);
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
    ptx::wgmma_rs<T, kColumns>(
        d, left[step],
        cin_fast::operand(ptx::shared_address(right), step * 16 * kRowBytes,
                          ptx::Swizzle(fields.swizzle), fields.stride, fields.leading));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
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

// A box of 8 rows at (column, row, image), unswizzled. One warp group copies and waits until the
// four warps of the other have read.
template <class T>
__global__ void bulk_copy(const __grid_constant__ ptx::TensorMap map, int row_bytes, int column,
                          int row, int image, T* to) {
#ifdef CIN_FAST_WGMMA
  SharedMemory shared;
  unsigned char* box = shared.take<unsigned char>(8 * 128);
  uint64_t* full = shared.take<uint64_t>(2);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(full + 1, 4);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int columns = row_bytes / 2;
  if (threadIdx.x >= 128) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x > 128) return;
    ptx::mbarrier_arrive_expect(full, 8 * row_bytes);
    ptx::bulk_copy_3d(box, &map, full, column, row, image);
    ptx::mbarrier_wait(full + 1, 0);
    return;
  }
  ptx::setmaxnreg_inc<40>();
  ptx::mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < 8 * columns; i += 128)
    to[i] = *reinterpret_cast<const T*>(box + swizzled(i / columns, i % columns, row_bytes));
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

template <class T, int kColumns, int kRowBytes>
int run_wgmma(bool from_registers, const void* a, const void* b, float* c, const int* fields) {
  const Fields f{fields[0], fields[1], fields[2]};
  const T *left = static_cast<const T*>(a), *right = static_cast<const T*>(b);
  if constexpr (kColumns == 32 || kColumns == 128)
    return run("wgmma_ss", 128, wgmma_ss<T, kColumns, kRowBytes>, left, right, c, f);
  else if constexpr (kColumns == 192)
    return run("wgmma_rs", 128, wgmma_rs<T, kColumns, kRowBytes>, left, right, c, f);
  else
    return from_registers
               ? run("wgmma_rs", 128, wgmma_rs<T, kColumns, kRowBytes>, left, right, c, f)
               : run("wgmma_ss", 128, wgmma_ss<T, kColumns, kRowBytes>, left, right, c, f);
}

template <class T>
int run_bulk_copy(const void* from, void* to, const int* numbers) {
  const int images = numbers[0], rows = numbers[1], columns = numbers[2], row_bytes = numbers[3];
  ptx::TensorMap map;
  const cudaError_t error = encode_tensor_map(
      &map, static_cast<const T*>(from), images, rows, columns, columns, 8, row_bytes / 2,
      row_bytes == 128 ? ptx::Swizzle::k128Bytes : ptx::Swizzle::k32Bytes);
  if (error != cudaSuccess) return error;
  return run("bulk_copy", 256, bulk_copy<T>, map, row_bytes, numbers[4], numbers[5], numbers[6],
             static_cast<T*>(to));
}

}  // namespace

#define PROBE_WGMMA(NAME, REGISTERS, COLUMNS, ROW_BYTES)                                          \
  extern "C" int probe_##NAME##_bf16(const void* a, const void* b, float* c, const int* fields) { \
    return run_wgmma<__nv_bfloat16, COLUMNS, ROW_BYTES>(REGISTERS, a, b, c, fields);              \
  }                                                                                               \
  extern "C" int probe_##NAME##_fp16(const void* a, const void* b, float* c, const int* fields) { \
    return run_wgmma<__half, COLUMNS, ROW_BYTES>(REGISTERS, a, b, c, fields);                     \
  }
PROBE_WGMMA(wgmma_ss_16_128, false, 16, 128)
PROBE_WGMMA(wgmma_ss_16_32, false, 16, 32)
PROBE_WGMMA(wgmma_ss_32_128, false, 32, 128)
PROBE_WGMMA(wgmma_ss_64_128, false, 64, 128)
PROBE_WGMMA(wgmma_ss_128_128, false, 128, 128)
PROBE_WGMMA(wgmma_ss_32_32, false, 32, 32)
PROBE_WGMMA(wgmma_ss_64_32, false, 64, 32)
PROBE_WGMMA(wgmma_ss_128_32, false, 128, 32)
PROBE_WGMMA(wgmma_rs_192_128, true, 192, 128)
PROBE_WGMMA(wgmma_rs_64_128, true, 64, 128)
PROBE_WGMMA(wgmma_rs_16_32, true, 16, 32)

extern "C" int probe_bulk_copy_bf16(const void* from, void* to, const int* numbers) {
  return run_bulk_copy<__nv_bfloat16>(from, to, numbers);
}
extern "C" int probe_bulk_copy_fp16(const void* from, void* to, const int* numbers) {
  return run_bulk_copy<__half>(from, to, numbers);
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
extern "C" int probe_scalars(const float* from, float* powers, uint32_t* rounded) {
  return run("scalars", 32, scalars, from, powers, rounded);
}
