// What the kernels of sci share, whichever way their operands reach shared memory.
#pragma once

#include "host.cuh"

namespace cin_fast {
namespace sci {

template <class T>
struct ForwardParameters {
  Batch<T> x, v;
  T *y, *y_rest;
  float *row_max, *row_sum;
  int channels, columns;
  float factor;
};

// Turns sums over their divisors into what rounding takes off them; the divisors become 1.
template <class T, class Products, int M>
__device__ __forceinline__ void keep_rest(float (&acc)[M][4], float (&divisors)[2]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float result = Products::over(acc[m][e], divisors[e / 2]);
      acc[m][e] = result - widen(narrow<T>(result));
    }
  }
  divisors[0] = divisors[1] = 1.f;
}

// Stores y, and its rest where that is asked for.
template <class Products, int M, class T>
__device__ __forceinline__ void store_result(const ForwardParameters<T>& p, int64_t image,
                                             float (&acc)[M][4],
                                             const RunningSoftmax<Products>& softmax, int row,
                                             int column) {
  float divisors[2] = {Products::divisor(softmax.sum[0]), Products::divisor(softmax.sum[1])};
  const int64_t first = image * p.channels * p.columns;
  store_tile<Products>(p.y + first, acc, divisors[0], divisors[1], row, p.channels, column,
                       p.columns);
  if (sizeof(T) > 2 || !p.y_rest) return;
  keep_rest<T, Products>(acc, divisors);
  store_tile<Products>(p.y_rest + first, acc, divisors[0], divisors[1], row, p.channels, column,
                       p.columns);
}

// What softmax_gradient takes off dP is delta_i = sum over j of P_ij dP_ij, which equals
// dY_i . Y_i. Where one weight is nearly 1, dP - delta is a small difference of large numbers, and
// both have to come from the same product, of as many digits.
//
// In 16 bits Y is kept as a rounded number and its rest. Of a row with one weight, the rounded Y is
// v's row: its product with dY, made as dP is, gives dP's very digits, and the rest adds nothing.
template <class T>
struct TermsParameters {
  Batch<T> dy, y, y_rest;
  const float *row_max, *row_sum;
  RowTerms* terms;
  int channels;
};

// In float32 a Y without a rest is too coarse: the sum over j takes a sweep of its own.
template <class T>
struct SweepParameters {
  Batch<T> dy, x, v;
  const float *row_max, *row_sum;
  RowTerms* terms;
  int channels;
  float factor;
};

// A lane's two rows of a 64 x 64 product's diagonal.
template <int N>
__device__ __forceinline__ void take_diagonal(float (&diagonal)[2], const float (&product)[N][4]) {
  static_assert(8 * N == kBlockRows, "square");
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane_row() + half * 8;
    float own = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * N; ++i)
      if (i / 2 * 8 + lane_column() + i % 2 == row) own = product[i / 2][2 * half + i % 2];
    diagonal[half] = quad_sum(own);
  }
}

// Stores a lane's two rows' terms, given their row sums of P dP.
template <class Products, class Parameters, class Number>
__device__ __forceinline__ void store_terms(const Parameters& p, int64_t image, int row,
                                            const Number (&delta)[2]) {
  if (lane_id() % 4) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + lane_row() + half * 8;
    const int64_t at = image * p.channels + r;
    p.terms[image * padded_rows(p.channels) + r] =
        r < p.channels ? row_terms(p.row_max[at], Products::divisor(p.row_sum[at]), delta[half])
                       : make_float4(0.f, 0.f, 0.f, 0.f);
  }
}

// delta of a lane's two rows.
template <class Products>
struct RowSums {
  // Divided by the row's sum at the end, exactly as the weights are in effect.
  float factor, peak[2], sum[2];
  typename Products::Wide delta[2] = {};

  template <class T>
  __device__ RowSums(const SweepParameters<T>& p, int64_t image, int row) : factor(p.factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + lane_row() + half * 8;
      peak[half] = r < p.channels ? p.row_max[image * p.channels + r] : 0.f;
      sum[half] = r < p.channels ? p.row_sum[image * p.channels + r] : 1.f;
    }
  }

  // From a tile of x x^T and of dY v^T, of which `columns` columns exist.
  template <int N>
  __device__ void add(float (&s)[N][4], const float (&dp)[N][4], int columns) {
    // Beside wide sums there are no registers for masked elements.
    constexpr bool kMasks = sizeof(typename Products::Wide) == sizeof(float);
    if constexpr (kMasks) mask(s, factor, columns);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (kMasks || n * 8 + lane_column() + e % 2 < columns)
          delta[e / 2] += Products::exponential((s[n][e] - peak[e / 2]) * factor) * dp[n][e];
      }
    }
  }

  // The lane's share becomes the row's.
  __device__ void finish() {
    delta[0] = quad_sum(delta[0]) / sum[0];
    delta[1] = quad_sum(delta[1]) / sum[1];
  }
};

template <class T>
struct BackwardParameters {
  Batch<T> dy, x, v;
  const RowTerms* terms;
  T *dx, *dv;
  int channels, positions, columns;
  float scale, factor;
};

// P_ji and scale (dS_ij + dS_ji) of a tile, from x x^T, dY v^T and its mirror image; both stay in
// the arrays of the first two.
template <class Products, int N>
__device__ __forceinline__ void softmax_gradient(float (*s)[4], float (&dp)[N][4],
                                                 const float (*dp_mirrored)[4],
                                                 const RowTerms (&rows)[2],
                                                 const RowTerms* of_columns, float scale,
                                                 float factor) {
  of_columns += lane_column();
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const RowTerms of_column = of_columns[n * 8 + e];
      const bool exists = of_column.y > 0.f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 2 * half + e;
        // Chosen before and after the exponential, not around it: that would be a branch.
        const float exponent = (s[n][i] - rows[half].x) * factor;
        const float p =
            Products::over(Products::exponential(exists ? exponent : -INFINITY), rows[half].y);
        const float mirrored = weight<Products>(s[n][i], factor, of_column);
        const float p_mirrored = exists ? mirrored : 0.f;
        dp[n][i] = scale * (p * minus_delta<Products>(dp[n][i], rows[half]) +
                            p_mirrored * minus_delta<Products>(dp_mirrored[n][i], of_column));
        s[n][i] = p_mirrored;
      }
    }
  }
}

// Operands that fit: rows stay in shared memory, whole tiles of columns are loaded one ahead.
// False leaves the work to the streaming kernels, which take any size.
bool is_resident(const Context& context, const Shape& shape, bool tied);
template <class T>
cudaError_t resident_forward(const Context& context, const Shape& shape, bool tied,
                             const ForwardParameters<T>& parameters);
template <class T>
cudaError_t resident_backward(const Context& context, const Shape& shape, bool tied,
                              const BackwardParameters<T>& parameters);

// Where is_wgmma().
template <class T>
cudaError_t wgmma_forward(const Context& context, const Shape& shape, const SciForward& arguments,
                          const ForwardParameters<T>& parameters);
template <class T>
cudaError_t wgmma_backward(const Context& context, const Shape& shape, const SciBackward& arguments,
                           RowTerms* terms, const BackwardParameters<T>& parameters);

}  // namespace sci
}  // namespace cin_fast
