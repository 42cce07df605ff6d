// The four ways to multiply tiles, one interface. A warp owns 16 rows of a product and keeps it as
// mma.sync does: lane 4 g + t holds, of each 8 columns, columns 2 t and 2 t + 1 of rows g and
// g + 8, in that order.
//
//   nt: S (16 x 8 N) += rows (16 x depth) columns (8 N x depth)^T, both in shared memory
//   nn: acc (16 x 8 M) += P (16 x 8 N, in registers) values (8 N x 8 M, in shared memory)
//   exponential(z) = base^z, and kUnit = log_base(e)
//   over(z, divisor(y)) = z / y
//   Wide adds up what is later subtracted from a number nearly equal
#pragma once

#include "ptx.cuh"

namespace cin_fast {

__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(float value) { return value; }

template <class T>
__device__ T narrow(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half narrow(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ float narrow(float value) {
  return value;
}

constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }

// bfloat16 and float16 on the tensor cores.
template <class T>
struct HalfProducts {
  using Element = T;
  // Columns that one step of nt consumes, and of a panel that the streaming path loads at once.
  static constexpr int kStep = 16, kPanel = 64;
  // Makes the row pitch an odd number of 16-byte pieces: ldmatrix then meets no bank twice.
  static constexpr int kPad = 8;
  using Wide = float;
  static constexpr float kUnit = kLog2E;
  __device__ static float exponential(float z) { return ptx::exp2_approximate(z); }
  __device__ static float divisor(float y) { return 1.f / y; }
  __device__ static float over(float z, float divisor) { return z * divisor; }

  template <int N>
  __device__ static void nt(float (&s)[N][4], const T* rows, const T* columns, int pitch,
                            int steps) {
    static_assert(N % 2 == 0, "columns come in sixteens");
    const int lane = lane_id();
    rows += lane % 16 * pitch + lane / 16 * 8;
    columns += (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, rows + step * kStep);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, columns + n * 8 * pitch + step * kStep);
        ptx::mma_m16n8k16<T>(s[n], a, {b[0], b[1]});
        ptx::mma_m16n8k16<T>(s[n + 1], a, {b[2], b[3]});
      }
    }
  }

  template <int M, int N>
  __device__ static void nn(float (&acc)[M][4], const float (&p)[N][4], const T* values,
                            int pitch) {
    static_assert(M % 2 == 0 && N % 2 == 0, "both sides come in sixteens");
    const int lane = lane_id();
    values += lane % 16 * pitch + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      const uint32_t a[4] = {pair(p[n][0], p[n][1]), pair(p[n][2], p[n][3]),
                             pair(p[n + 1][0], p[n + 1][1]), pair(p[n + 1][2], p[n + 1][3])};
#pragma unroll
      for (int m = 0; m < M; m += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, values + n * 8 * pitch + m * 8);
        ptx::mma_m16n8k16<T>(acc[m], a, {b[0], b[1]});
        ptx::mma_m16n8k16<T>(acc[m + 1], a, {b[2], b[3]});
      }
    }
  }

  __device__ static uint32_t pair(float low, float high) {
    return ptx::pack(narrow<T>(low), narrow<T>(high));
  }
};

// float32 rounded to TF32 on the tensor cores.
struct Tf32Products {
  using Element = float;
  static constexpr int kStep = 8, kPanel = 32, kPad = 4;
  using Wide = float;
  static constexpr float kUnit = kLog2E;
  __device__ static float exponential(float z) { return ptx::exp2_approximate(z); }
  __device__ static float divisor(float y) { return 1.f / y; }
  __device__ static float over(float z, float divisor) { return z * divisor; }

  template <int N>
  __device__ static void nt(float (&s)[N][4], const float* rows, const float* columns, int pitch,
                            int steps) {
    const int group = lane_id() / 4, member = lane_id() % 4;
    rows += group * pitch + member;
    columns += group * pitch + member;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const float* r = rows + step * kStep;
      const uint32_t a[4] = {ptx::round_to_tf32(r[0]), ptx::round_to_tf32(r[8 * pitch]),
                             ptx::round_to_tf32(r[4]), ptx::round_to_tf32(r[8 * pitch + 4])};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float* c = columns + n * 8 * pitch + step * kStep;
        ptx::mma_m16n8k8_tf32(s[n], a, {ptx::round_to_tf32(c[0]), ptx::round_to_tf32(c[4])});
      }
    }
  }

  // The sum over p's columns may run in any order: taking 2 t for t and 2 t + 1 for t + 4 makes a
  // lane's own elements of p the operand.
  template <int M, int N>
  __device__ static void nn(float (&acc)[M][4], const float (&p)[N][4], const float* values,
                            int pitch) {
    const int group = lane_id() / 4, member = lane_id() % 4;
    values += 2 * member * pitch + group;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint32_t a[4] = {ptx::round_to_tf32(p[n][0]), ptx::round_to_tf32(p[n][2]),
                             ptx::round_to_tf32(p[n][1]), ptx::round_to_tf32(p[n][3])};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float* v = values + n * 8 * pitch + m * 8;
        ptx::mma_m16n8k8_tf32(acc[m], a, {ptx::round_to_tf32(v[0]), ptx::round_to_tf32(v[pitch])});
      }
    }
  }
};

// float32 as IEEE 754 has it, on the ordinary units.
struct IeeeProducts {
  using Element = float;
  static constexpr int kStep = 4, kPanel = 32, kPad = 4;
  using Wide = double;
  static constexpr float kUnit = 1.f;
  __device__ static float exponential(float z) { return expf(z); }
  __device__ static float divisor(float y) { return y; }
  __device__ static float over(float z, float divisor) { return z / divisor; }

  template <int N>
  __device__ static void nt(float (&s)[N][4], const float* rows, const float* columns, int pitch,
                            int steps) {
    const int group = lane_id() / 4, member = lane_id() % 4;
    rows += group * pitch;
    columns += 2 * member * pitch;
    // Summed up by panel first: partial sums stay small, and with them what rounding takes.
    float panel[N][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const float4 low = *reinterpret_cast<const float4*>(rows + step * kStep);
      const float4 high = *reinterpret_cast<const float4*>(rows + 8 * pitch + step * kStep);
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float* c = columns + (n * 8 + e) * pitch + step * kStep;
          const float4 column = *reinterpret_cast<const float4*>(c);
          panel[n][e] = dot(panel[n][e], low, column);
          panel[n][e + 2] = dot(panel[n][e + 2], high, column);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] += panel[n][e];
    }
  }

  template <int M, int N>
  __device__ static void nn(float (&acc)[M][4], const float (&p)[N][4], const float* values,
                            int pitch) {
#pragma unroll
    for (int m = 0; m < M; m += kTogether) add_tiles(acc, m, p, values + m * 8, pitch);
  }

  // As in nt, the tile's share is summed up by itself first: kTogether columns of tiles at once.
  static constexpr int kTogether = 4;

  template <int M, int N>
  __device__ static void add_tiles(float (&acc)[M][4], int first, const float (&p)[N][4],
                                   const float* values, int pitch) {
    const int quad = lane_id() & ~3, member = lane_id() % 4;
    values += 2 * member;
    float share[kTogether][4] = {};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      for (int owner = 0; owner < 4; ++owner) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float low = __shfl_sync(~0u, p[n][e], quad + owner);
          const float high = __shfl_sync(~0u, p[n][e + 2], quad + owner);
          const float* row = values + (n * 8 + owner * 2 + e) * pitch;
#pragma unroll
          for (int m = 0; m < kTogether; ++m) {
            if (first + m >= M) continue;
            const float2 v = *reinterpret_cast<const float2*>(row + m * 8);
            share[m][0] = fmaf(low, v.x, share[m][0]);
            share[m][1] = fmaf(low, v.y, share[m][1]);
            share[m][2] = fmaf(high, v.x, share[m][2]);
            share[m][3] = fmaf(high, v.y, share[m][3]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTogether; ++m) {
      if (first + m >= M) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[first + m][e] += share[m][e];
    }
  }

  __device__ static float dot(float sum, const float4& a, const float4& b) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
  }
};

}  // namespace cin_fast
