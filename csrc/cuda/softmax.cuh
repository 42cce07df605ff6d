// Rows of softmax(scale x x^T): a weight is base^(factor (s - peak)) / sum, where the base is that
// of the products' exponential(), factor = scale log_base(e), s is an element of x x^T, and peak is
// the s of its row's largest weight. Subtracting first makes the peak's own weight exactly 1.
#pragma once

#include <cfloat>

#include "tiles.cuh"

namespace cin_fast {

template <class Number>
__device__ __forceinline__ Number quad_sum(Number value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// An element of x x^T whose weight is 0.
__device__ __forceinline__ float nothing(float factor) {
  return factor < 0.f ? INFINITY : -INFINITY;
}

// Leaves nothing where a column does not exist. `columns` counts the tile's columns that do: one
// branch for all of them but in the last tile.
template <int N>
__device__ __forceinline__ void mask(float (&s)[N][4], float factor, int columns) {
  if (columns >= 8 * N) return;
  const int own_columns = columns - lane_column();
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = n * 8 + e % 2 < own_columns ? s[n][e] : nothing(factor);
  }
}

// Peak and sum of a lane's two rows, over the columns seen so far. The sum is the lane's own share
// until finish() adds up the four lanes of a row.
template <class Products>
struct RunningSoftmax {
  // The peak is the least element where the factor is negative.
  float factor, peak[2], sum[2] = {0.f, 0.f};

  __device__ explicit RunningSoftmax(float factor) : factor(factor) {
    // Finite, so that a tile without columns can be the first.
    peak[0] = peak[1] = factor < 0.f ? FLT_MAX : -FLT_MAX;
  }

  __device__ float further(float one, float other) const {
    return factor < 0.f ? fminf(one, other) : fmaxf(one, other);
  }

  // The furthest of two rows' elements and of `higher`. Even and odd columns are two chains of
  // instructions that do not wait for each other, and a branch chooses for all elements at once.
  template <int N>
  __device__ void find_peaks(float (&higher)[2], const float (&s)[N][4]) const {
    float odd[2] = {higher[0], higher[1]};
    const auto find = [&](auto further) {
#pragma unroll
      for (int i = 0; i < 4 * N; ++i) {
        float& found = (i % 2 ? odd : higher)[i % 4 / 2];
        found = further(found, s[i / 4][i % 4]);
      }
    };
    if (factor < 0.f)
      find([](float one, float other) { return fminf(one, other); });
    else
      find([](float one, float other) { return fmaxf(one, other); });
    higher[0] = further(higher[0], odd[0]);
    higher[1] = further(higher[1], odd[1]);
  }

  // Turns elements of x x^T into weights, not yet divided by their sum; `shrink` brings what was
  // accumulated before to the new peak. `columns` counts the tile's columns that exist.
  template <int N>
  __device__ void weigh(float (&s)[N][4], float (&shrink)[2], int columns) {
    mask(s, factor, columns);
    float higher[2] = {peak[0], peak[1]};
    find_peaks(higher, s);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Of the four lanes that share a row.
      higher[half] = further(higher[half], __shfl_xor_sync(~0u, higher[half], 1));
      higher[half] = further(higher[half], __shfl_xor_sync(~0u, higher[half], 2));
      shrink[half] = Products::exponential((peak[half] - higher[half]) * factor);
      peak[half] = higher[half];
      sum[half] *= shrink[half];
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = Products::exponential((s[n][e] - peak[e / 2]) * factor);
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
    // Peaks soon stay where they are.
    if (shrink[0] == 1.f && shrink[1] == 1.f) return;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][e] *= shrink[e / 2];
    }
  }

  // Takes in what was seen of other columns: `rescale_both(half, own, other)` brings both sides'
  // sums of a row to the common peak.
  template <class Rescale>
  __device__ void merge(const float (&other_peak)[2], const float (&other_sum)[2],
                        const Rescale& rescale_both) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float higher = further(peak[half], other_peak[half]);
      const float own = Products::exponential((peak[half] - higher) * factor);
      const float other = Products::exponential((other_peak[half] - higher) * factor);
      peak[half] = higher;
      sum[half] = sum[half] * own + other_sum[half] * other;
      rescale_both(half, own, other);
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
      row_max[r] = peak[half];
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
