// What the matmul backend does to C x C matrices that a library has multiplied: weights from
// logits, and the gradient that passes through them.
#include "softmax_rows.cuh"

namespace cin_fast {
namespace {

// weights may be the logits.
template <class T, int kPiece>
__global__ void __launch_bounds__(kRowThreads)
    softmax_rows_kernel(const float* logits, int columns, float scale, T* weights) {
  logits += static_cast<int64_t>(blockIdx.x) * columns;
  weights += static_cast<int64_t>(blockIdx.x) * columns;
  SharedMemory shared;
  float* memory = shared.take<float>(2 * kRowWarps);
  const float peak = row_peak<kPiece>(logits, columns, scale, memory);
  float sum = 0;
  for_each_piece<kPiece>(columns, [&](int column) {
    const auto s = load<kPiece>(logits + column);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) sum += expf(scale * (s.of[i] - peak));
  });
  const float share = 1.f / reduce(sum, memory + kRowWarps, Sum{});
  for_each_piece<kPiece>(columns, [&](int column) {
    const auto s = load<kPiece>(logits + column);
    Piece<T, kPiece> result;
#pragma unroll
    for (int i = 0; i < kPiece; ++i)
      result.of[i] = narrow<T>(expf(scale * (s.of[i] - peak)) * share);
    store(weights + column, result);
  });
}

// dS = scale P (dP - rowsum(P dP)). weights may be the logits, ds may be dp.
template <class T, int kPiece>
__global__ void __launch_bounds__(kRowThreads)
    softmax_rows_backward_kernel(const float* logits, const float* dp, int columns, float scale,
                                 T* weights, T* ds) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * columns;
  logits += first, dp += first, weights += first, ds += first;
  SharedMemory shared;
  float* memory = shared.take<float>(3 * kRowWarps);
  const float peak = row_peak<kPiece>(logits, columns, scale, memory);
  float sum = 0, weighed = 0;
  for_each_piece<kPiece>(columns, [&](int column) {
    const auto s = load<kPiece>(logits + column), d = load<kPiece>(dp + column);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const float p = expf(scale * (s.of[i] - peak));
      sum += p;
      weighed += p * d.of[i];
    }
  });
  const float share = 1.f / reduce(sum, memory + kRowWarps, Sum{});
  const float delta = reduce(weighed, memory + 2 * kRowWarps, Sum{}) * share;
  for_each_piece<kPiece>(columns, [&](int column) {
    const auto s = load<kPiece>(logits + column), d = load<kPiece>(dp + column);
    Piece<T, kPiece> weight, gradient;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const float p = expf(scale * (s.of[i] - peak)) * share;
      weight.of[i] = narrow<T>(p);
      gradient.of[i] = narrow<T>(scale * p * (d.of[i] - delta));
    }
    store(weights + column, weight);
    store(ds + column, gradient);
  });
}

}  // namespace

cudaError_t softmax_rows(const Context& context, Dtype dtype, const Rows& rows, float scale,
                         const float* logits, void* weights) {
  if (rows.count == 0 || rows.columns == 0) return cudaSuccess;
  return with_pieces(dtype, rows.columns, [&]<class T, int kPiece>() {
    return launch(context, "softmax_rows", softmax_rows_kernel<T, kPiece>, dim3(rows.count),
                  kRowThreads, shared_bytes({2 * kRowWarps * sizeof(float)}), logits, rows.columns,
                  scale, static_cast<T*>(weights));
  });
}

cudaError_t softmax_rows_backward(const Context& context, Dtype dtype, const Rows& rows,
                                  float scale, const float* logits, const float* dp, void* weights,
                                  void* ds) {
  if (rows.count == 0 || rows.columns == 0) return cudaSuccess;
  return with_pieces(dtype, rows.columns, [&]<class T, int kPiece>() {
    return launch(context, "softmax_rows_backward", softmax_rows_backward_kernel<T, kPiece>,
                  dim3(rows.count), kRowThreads, shared_bytes({3 * kRowWarps * sizeof(float)}),
                  logits, dp, rows.columns, scale, static_cast<T*>(weights), static_cast<T*>(ds));
  });
}

}  // namespace cin_fast
