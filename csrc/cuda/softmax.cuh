// Rows of softmax(scale x x^T): a weight is base^(factor (s - peak)) / sum, where the base is that
// of the products' exponential(), factor = scale log_base(e), s is an element of x x^T, and peak is
// the s of its row's largest weight. Subtracting first makes the peak's own weight exactly 1.
#pragma once

#include "tiles.cuh"

namespace cin_fast {

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

template <class Number>
__device__ __forceinline__ Number quad_sum(Number value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// Peak and sum of a lane's two rows, over the columns seen so far. The sum is the lane's own share
// until finish() adds up the four lanes of a row.
template <class Products>
struct RunningSoftmax {
  // Elements count with this sign, so that the largest weight is at the largest of them.
  float sign, steepness;
  float peak[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};

  __device__ explicit RunningSoftmax(float factor)
      : sign(factor < 0.f ? -1.f : 1.f), steepness(fabsf(factor)) {}

  // Turns elements of x x^T into weights, not yet divided by their sum; `shrink` brings what was
  // accumulated before to the new peak. `columns` counts the tile's columns that exist.
  template <int N>
  __device__ void weigh(float (&s)[N][4], float (&shrink)[2], int columns) {
    float higher[2] = {peak[0], peak[1]};
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool exists = n * 8 + lane_column() + e % 2 < columns;
        s[n][e] = exists ? sign * s[n][e] : -INFINITY;
        higher[e / 2] = fmaxf(higher[e / 2], s[n][e]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      higher[half] = quad_max(higher[half]);
      shrink[half] = Products::exponential((peak[half] - higher[half]) * steepness);
      peak[half] = higher[half];
      sum[half] *= shrink[half];
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = Products::exponential((s[n][e] - peak[e / 2]) * steepness);
        sum[e / 2] += s[n][e];
      }
    }
  }

  template <int N, int M>
  __device__ void update(float (&s)[N][4], float (&acc)[M][4], int columns) {
    float shrink[2];
    weigh(s, shrink, columns);
    rescale(acc, shrink);
  }

  template <int M>
  __device__ static void rescale(float (&acc)[M][4], const float (&shrink)[2]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][e] *= shrink[e / 2];
    }
  }

  __device__ void finish() {
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
  }

  __device__ void store(float* row_max, float* row_sum, int row, int rows) const {
    if (lane_id() % 4) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + lane_row() + half * 8;
      if (r >= rows) continue;
      row_max[r] = sign * peak[half];
      row_sum[r] = sum[half];
    }
  }
};

// What the backward pass needs of a row: x is its peak, y the divisor of its weights, z + w the row
// sum of P dP.
using RowTerms = float4;

template <class Number>
__device__ __forceinline__ RowTerms row_terms(float peak, float divisor, Number delta) {
  const float high = static_cast<float>(delta);
  return make_float4(peak, divisor, high, static_cast<float>(delta - high));
}

template <class Products>
__device__ __forceinline__ float minus_delta(float dp, const RowTerms& terms) {
  // Without a wider type of its own, the sum has no low part.
  if constexpr (sizeof(typename Products::Wide) == sizeof(float)) return dp - terms.z;
  return dp - terms.z - terms.w;
}

// Images' row terms lie this far apart; what is no row has a divisor of 0, so that tiles need not
// ask where the rows end.
__host__ __device__ constexpr int padded_rows(int rows) { return round_up(rows, 2 * kBlockRows); }

template <class Products>
__device__ __forceinline__ float weight(float s, float factor, const RowTerms& terms) {
  return Products::over(Products::exponential((s - terms.x) * factor), terms.y);
}

}  // namespace cin_fast
