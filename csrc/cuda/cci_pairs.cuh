// What a thread that holds the same elements of both images of a pair makes of them, in the
// backward pass.
#pragma once

#include "cci.cuh"

namespace cin_fast {
namespace cci {

// Of a lane's two rows in both images: delta_i = sum over j of P_ij dP_ij, not yet divided by the
// row's sum, and what each row gives to the gradient of eta.
template <class Products>
struct PairSums {
  float eta[2], factor;
  RowTerms statistics[2][2];
  float delta[2][2] = {}, deta[2][2] = {};

  // From both images' tiles of x x^T and of dY v^T, of which `columns` columns exist.
  template <int N>
  __device__ void add(float (&s)[2][N][4], const float (&dy_v)[2][N][4], int columns) {
    mask(s[0], factor, columns);
    mask(s[1], factor, columns);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float power[2], weight[2], dm[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const RowTerms& row = statistics[i][e / 2];
          power[i] = Products::exponential((s[i][n][e] - row.x) * factor);
          weight[i] = Products::over(power[i], row.y);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          dm[i] = with_sign_of(contrast(weight[i], eta[i], weight[1 - i]), dy_v[i][n][e]);
          deta[i][e / 2] -= dm[i] * weight[1 - i];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) delta[i][e / 2] += power[i] * (dm[i] - eta[1 - i] * dm[1 - i]);
      }
    }
  }
};

template <class T>
__device__ __forceinline__ const RowTerms* terms_of(const BackwardParameters<T>& p, int64_t image) {
  return p.terms + image * padded_rows(p.channels);
}

// A lane's two rows in the sweep for gradients. Of two images [0] is one's own.
template <class Products>
struct PairRows {
  float eta[2], scale, factor;
  RowTerms terms[2][2];

  template <class T>
  __device__ PairRows(const BackwardParameters<T>& p, int64_t own, int64_t other, int row)
      : eta{p.eta[own], p.eta[other]}, scale(p.scale), factor(p.factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + lane_row() + half * 8;
      terms[0][half] = terms_of(p, own)[r];
      terms[1][half] = terms_of(p, other)[r];
    }
  }

  // Of an element of either image: scale (dS_ij + dS_ji) and |M_ji|.
  struct Gradients {
    float ds[2], magnitude[2];
  };

  // From x x^T, dY v^T and its mirror image, in the first (0) or the second (1) of the rows.
  __device__ __forceinline__ Gradients gradients(int half, const RowTerms (&of_column)[2],
                                                 const float (&s)[2], const float (&dm)[2],
                                                 const float (&dm_mirrored)[2]) const {
    const bool exists = of_column[0].y > 0.f;
    float p[2], p_mirrored[2], d[2], d_mirrored[2];
    Gradients result;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowTerms& row = terms[i][half];
      // Chosen before the exponential, not around it: that would be a branch.
      const float exponent = (s[i] - row.x) * factor;
      // Of a column that does not exist s and the terms are 0.
      const float mirrored = (s[i] - of_column[i].x) * factor;
      p[i] = Products::over(Products::exponential(exists ? exponent : -INFINITY), row.y);
      p_mirrored[i] = Products::over(Products::exponential(mirrored), of_column[i].y);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float m = contrast(p_mirrored[i], eta[i], p_mirrored[1 - i]);
      d[i] = with_sign_of(contrast(p[i], eta[i], p[1 - i]), dm[i]);
      d_mirrored[i] = with_sign_of(m, dm_mirrored[i]);
      result.magnitude[i] = fabsf(m);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float dp = d[i] - eta[1 - i] * d[1 - i];
      const float dp_mirrored = d_mirrored[i] - eta[1 - i] * d_mirrored[1 - i];
      result.ds[i] = scale * (p[i] * minus_delta<Products>(dp, terms[i][half]) +
                              p_mirrored[i] * minus_delta<Products>(dp_mirrored, of_column[i]));
    }
    return result;
  }
};

// What 8 N columns of elements of x x^T give to the gradients of both images. It stays in the
// arrays of dY v^T and of its mirror image.
template <int N, class Products>
__device__ __forceinline__ void contrast_gradients(const float (*const (&s)[2])[4],
                                                   float (&dm)[2][N][4],
                                                   float (*const (&dm_mirrored)[2])[4],
                                                   const PairRows<Products>& rows,
                                                   const RowTerms* const (&of_columns)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // Holds the terms' loads back: moved up, all together, they would take registers and spill.
      __syncwarp();
      const int column = n * 8 + lane_column() + e;
      const RowTerms of_column[2] = {of_columns[0][column], of_columns[1][column]};
#pragma unroll
      for (int k = e; k < 4; k += 2) {
        const auto gradients =
            rows.gradients(k / 2, of_column, {s[0][n][k], s[1][n][k]}, {dm[0][n][k], dm[1][n][k]},
                           {dm_mirrored[0][n][k], dm_mirrored[1][n][k]});
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          dm[i][n][k] = gradients.ds[i];
          dm_mirrored[i][n][k] = gradients.magnitude[i];
        }
      }
    }
  }
}

}  // namespace cci
}  // namespace cin_fast
