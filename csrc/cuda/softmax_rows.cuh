// A row of a C x C matrix that a library has multiplied, by one block: for the matmul backend.
//
// Such a row comes several times, but from memory once: 8 KB at C = 2048 stay in the first-level
// cache. C may be anything.
#pragma once

#include "host.cuh"

namespace cin_fast {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;

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
  for (int warp = 1; warp < kRowWarps; ++warp) number = both(number, memory[warp]);
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
  for (int column = threadIdx.x * kPiece; column < columns; column += kRowThreads * kPiece)
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

// Calls body<T, kPiece>() with the dtype's element, and pieces that rows of it can be read by.
template <class Body>
cudaError_t with_pieces(Dtype dtype, int columns, const Body& body) {
  return with_element(dtype, [&]<class T>() {
    return columns % 4 == 0 ? body.template operator()<T, 4>() : body.template operator()<T, 1>();
  });
}

}  // namespace cin_fast
