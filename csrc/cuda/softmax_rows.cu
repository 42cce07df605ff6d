// What the matmul backend does to C x C matrices that a library has multiplied: weights from
// logits, and the gradient that passes through them.
//
// A block has a row. It comes three times, but from memory once: 8 KB at C = 2048 stay in the
// first-level cache. Without bounds on C, that is as fast as to read it.
#include "host.cuh"

namespace cin_fast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// The end that softmax reaches for: the largest of scale s.
struct Further {
  float scale;
  __device__ float operator()(float a, float b) const { return scale * a < scale * b ? b : a; }
};

// All threads' numbers as one, in the same order for every thread. Each call has memory of its own.
template <class Operation>
__device__ float reduce(float number, float* memory, const Operation& both) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    number = both(number, __shfl_xor_sync(~0u, number, distance));
  if (lane_id() == 0) memory[threadIdx.x / 32] = number;
  __syncthreads();
  number = memory[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) number = both(number, memory[warp]);
  return number;
}

// kPiece neighbours of a row.
template <class T, int kPiece>
struct alignas(kPiece * sizeof(T)) Piece {
  T of[kPiece];
};

// Calls body(first column) for each of a thread's pieces.
template <int kPiece, class Body>
__device__ void for_each_piece(int columns, const Body& body) {
  for (int column = threadIdx.x * kPiece; column < columns; column += kThreads * kPiece)
    body(column);
}

template <int kPiece>
__device__ Piece<float, kPiece> load(const float* from) {
  return *reinterpret_cast<const Piece<float, kPiece>*>(from);
}

template <class T, int kPiece>
__device__ void store(T* to, const Piece<T, kPiece>& piece) {
  *reinterpret_cast<Piece<T, kPiece>*>(to) = piece;
}

template <int kPiece>
__device__ float row_peak(const float* logits, int columns, float scale, float* memory) {
  // Every row has a first element.
  float peak = logits[0];
  const Further further{scale};
  for_each_piece<kPiece>(columns, [&](int column) {
    const auto s = load<kPiece>(logits + column);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) peak = further(peak, s.of[i]);
  });
  return reduce(peak, memory, further);
}

// weights may be the logits.
template <class T, int kPiece>
__global__ void __launch_bounds__(kThreads)
    softmax_rows_kernel(const float* logits, int columns, float scale, T* weights) {
  logits += static_cast<int64_t>(blockIdx.x) * columns;
  weights += static_cast<int64_t>(blockIdx.x) * columns;
  SharedMemory shared;
  float* memory = shared.take<float>(2 * kWarps);
  const float peak = row_peak<kPiece>(logits, columns, scale, memory);
  float sum = 0;
  for_each_piece<kPiece>(columns, [&](int column) {
    const auto s = load<kPiece>(logits + column);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) sum += expf(scale * (s.of[i] - peak));
  });
  const float share = 1.f / reduce(sum, memory + kWarps, Sum{});
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
__global__ void __launch_bounds__(kThreads)
    softmax_rows_backward_kernel(const float* logits, const float* dp, int columns, float scale,
                                 T* weights, T* ds) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * columns;
  logits += first, dp += first, weights += first, ds += first;
  SharedMemory shared;
  float* memory = shared.take<float>(3 * kWarps);
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
  const float share = 1.f / reduce(sum, memory + kWarps, Sum{});
  const float delta = reduce(weighed, memory + 2 * kWarps, Sum{}) * share;
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

// Calls body<T, kPiece>() with the dtype's element, and pieces that rows of it can be read by.
template <class Body>
cudaError_t with_pieces(Dtype dtype, int columns, const Body& body) {
  return with_element(dtype, [&]<class T>() {
    return columns % 4 == 0 ? body.template operator()<T, 4>() : body.template operator()<T, 1>();
  });
}

}  // namespace

cudaError_t softmax_rows(const Context& context, Dtype dtype, const Rows& rows, float scale,
                         const float* logits, void* weights) {
  if (rows.count == 0 || rows.columns == 0) return cudaSuccess;
  return with_pieces(dtype, rows.columns, [&]<class T, int kPiece>() {
    return launch(context, "softmax_rows", softmax_rows_kernel<T, kPiece>, dim3(rows.count),
                  kThreads, shared_bytes({2 * kWarps * sizeof(float)}), logits, rows.columns, scale,
                  static_cast<T*>(weights));
  });
}

cudaError_t softmax_rows_backward(const Context& context, Dtype dtype, const Rows& rows,
                                  float scale, const float* logits, const float* dp, void* weights,
                                  void* ds) {
  if (rows.count == 0 || rows.columns == 0) return cudaSuccess;
  return with_pieces(dtype, rows.columns, [&]<class T, int kPiece>() {
    return launch(context, "softmax_rows_backward", softmax_rows_backward_kernel<T, kPiece>,
                  dim3(rows.count), kThreads, shared_bytes({3 * kWarps * sizeof(float)}), logits,
                  dp, rows.columns, scale, static_cast<T*>(weights), static_cast<T*>(ds));
  });
}

}  // namespace cin_fast
