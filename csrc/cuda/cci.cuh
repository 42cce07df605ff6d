// cci: Y = |P_i - eta_i P_p| v_i and its gradients, P = softmax(scale x x^T), p the partner of
// image i: what its kernels share. docs/kernels.md explains the algorithm.
#pragma once

#include "host.cuh"

namespace cin_fast {
namespace cci {

// sign(m) x, where the sign of 0 is 0.
__device__ __forceinline__ float with_sign_of(float m, float x) {
  return m > 0.f ? x : m < 0.f ? -x : 0.f;
}

// W_own - eta W_other, the same bits whoever computes it.
__device__ __forceinline__ float contrast(float own, float eta, float other) {
  return fmaf(-eta, other, own);
}

// The images that a block works on together. The second of them has no block of its own; an image
// that is its own partner is both.
struct Pair {
  int first, second;

  __device__ Pair(const int64_t* partner, int image)
      : first(image), second(static_cast<int>(partner[image])) {}

  __device__ int64_t image(int which) const { return which == 0 ? first : second; }
  __device__ bool is_anothers() const { return second < first; }
  __device__ bool is_single() const { return second == first; }
};

template <class T>
struct StatisticsParameters {
  Batch<T> x;
  float *row_max, *row_sum;
  int channels;
  float factor;
};

template <class T>
struct ForwardParameters {
  Batch<T> x, v;
  const int64_t* partner;
  const float* eta;
  T* y;
  const float *row_max, *row_sum;
  int channels, columns;
  float factor;
};

template <class T>
struct BackwardParameters {
  Batch<T> dy, x, v;
  const int64_t* partner;
  const float *eta, *row_max, *row_sum;
  RowTerms* terms;
  // The gradient of eta, a share for each row.
  double* deta_rows;
  T *dx, *dv;
  int channels, positions, columns;
  float scale, factor;
};

// Peak and divisor of a lane's two rows of one image.
template <class Products>
__device__ void load_statistics(RowTerms (&terms)[2], const float* row_max, const float* row_sum,
                                int row, int rows) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + lane_row() + half * 8;
    const bool exists = r < rows;
    terms[half] = make_float4(exists ? row_max[r] : 0.f,
                              Products::divisor(exists ? row_sum[r] : 1.f), 0.f, 0.f);
  }
}

// What a row needs in the sweep for gradients, and its share of eta's, from the sums of its quad;
// delta is not yet divided by the row's sum.
template <class Products, class Number>
__device__ void store_terms(const BackwardParameters<typename Products::Element>& p, int64_t image,
                            int row, const RowTerms& statistics, Number delta, Number deta) {
  if (lane_id() % 4) return;
  const int rows = p.channels;
  RowTerms& terms = p.terms[image * padded_rows(rows) + row];
  if (row < rows) {
    const int64_t i = image * rows + row;
    terms = row_terms(statistics.x, statistics.y, delta / p.row_sum[i]);
    p.deta_rows[i] = static_cast<double>(deta);
  } else {
    terms = make_float4(0.f, 0.f, 0.f, 0.f);
  }
}

// Elements of x x^T to weights; none where a column does not exist.
template <class Products, int N>
__device__ void to_weights(float (&s)[N][4], const RowTerms (&terms)[2], float factor,
                           int columns) {
  mask(s, factor, columns);
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = weight<Products>(s[n][e], factor, terms[e / 2]);
  }
}

constexpr int kStreamWidth = 32;
constexpr int kBlockThreads = 2 * kGroupThreads;

// Two groups of four warps share a block, one for each image. Thread t of either group holds the
// same elements of a tile.
__device__ __forceinline__ int group_id() { return threadIdx.x / kGroupThreads; }

// Hands a thread's elements to its counterpart in the other group and returns with theirs.
template <int kTiles>
struct Exchange {
  static constexpr int kElements = kTiles * 4 * kBlockThreads;

  float* buffer;

  __device__ explicit Exchange(SharedMemory& shared) : buffer(shared.take<float>(kElements)) {}

  __device__ void give(const float (&own)[kTiles][4]) {
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i)
      buffer[i * kBlockThreads + threadIdx.x] = own[i / 4][i % 4];
  }

  // After a barrier.
  __device__ void take(float (&other)[kTiles][4]) const {
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i)
      other[i / 4][i % 4] = buffer[i * kBlockThreads + (threadIdx.x ^ kGroupThreads)];
  }
};

// Where is_wgmma(); backward, one where v is thin, one where v = x.
template <class T>
cudaError_t wgmma_forward(const Context& context, const Shape& shape, const CciForward& arguments,
                          const StatisticsParameters<T>& statistics,
                          const ForwardParameters<T>& parameters);
template <class T>
cudaError_t wgmma_backward(const Context& context, const Shape& shape, const CciBackward& arguments,
                           const BackwardParameters<T>& parameters);
template <class T>
cudaError_t wgmma_tied_backward(const Context& context, const Shape& shape,
                                const CciBackward& arguments,
                                const BackwardParameters<T>& parameters);

}  // namespace cci
}  // namespace cin_fast
