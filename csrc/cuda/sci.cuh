// What the kernels of sci share, whichever way their operands reach shared memory.
#pragma once

#include "host.cuh"

namespace cin_fast {
namespace sci {

template <class T>
struct ForwardParameters {
  Batch<T> x, v;
  T* y;
  float *row_max, *row_sum;
  int channels, columns;
  float factor;
};

template <class T>
struct TermsParameters {
  Batch<T> dy, x, v;
  const float *row_max, *row_sum;
  RowTerms* terms;
  int channels;
  float factor;
};

// What softmax_gradient takes off dP, delta_i = sum over j of P_ij dP_ij, for a lane's
// two rows. It equals
// dY_i . Y_i, but from a rounded Y that is too coarse: where one weight is nearly 1, dP - delta is
// a small difference of large numbers, and both have to come from the same product.
template <class Products>
struct RowSums {
  // Divided by the row's sum at the end, exactly as the weights are in effect.
  float factor, peak[2], sum[2];
  typename Products::Wide delta[2] = {};

  template <class T>
  __device__ RowSums(const TermsParameters<T>& p, int64_t image, int row, int rows)
      : factor(p.factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + lane_row() + half * 8;
      peak[half] = r < rows ? p.row_max[image * rows + r] : 0.f;
      sum[half] = r < rows ? p.row_sum[image * rows + r] : 1.f;
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

  template <class T>
  __device__ void store(const TermsParameters<T>& p, int64_t image, int row, int rows) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto total = quad_sum(delta[half]) / sum[half];
      const int r = row + lane_row() + half * 8;
      if (lane_id() % 4) continue;
      p.terms[image * padded_rows(rows) + r] =
          r < rows ? row_terms(peak[half], Products::divisor(sum[half]), total)
                   : make_float4(0.f, 0.f, 0.f, 0.f);
    }
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
cudaError_t resident_terms(const Context& context, const Shape& shape, bool tied,
                           const TermsParameters<T>& parameters);
template <class T>
cudaError_t resident_backward(const Context& context, const Shape& shape, bool tied,
                              const BackwardParameters<T>& parameters);

// Where is_wgmma().
template <class T>
cudaError_t wgmma_forward(const Context& context, const Shape& shape, const SciForward& arguments,
                          const ForwardParameters<T>& parameters);
template <class T>
cudaError_t wgmma_backward(const Context& context, const Shape& shape, const SciBackward& arguments,
                           const TermsParameters<T>& terms,
                           const BackwardParameters<T>& parameters);

}  // namespace sci
}  // namespace cin_fast
