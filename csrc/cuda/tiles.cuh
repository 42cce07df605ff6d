// Matrices in global memory, their tiles in shared memory, and how a tile of x x^T comes about.
#pragma once

#include <cstdint>

#include "products.cuh"

namespace cin_fast {

// A block's rows are shared out among four warps, sixteen to each.
constexpr int kBlockRows = 64;
constexpr int kGroupThreads = 128;

// Columns of v, or of a gradient, that a block accumulates: all of a thin v, or a chunk.
constexpr int kThin = 16;
template <class Products>
constexpr int kChunk = sizeof(typename Products::Element) == 2 ? 208 : 112;

// What a block of the backward pass collects: chunks of dx come first in the grid, then chunks of
// dv. Where v = x, dv is part of dx; where v is thin, the first chunk of dx brings all of dv with
// it.
enum class Values { kOwn, kThin, kTied };

// Rows start on 16 bytes. What lies between the last column and the pitch is zero.
template <class T>
struct Matrix {
  const T* data;
  int rows, columns;
  int64_t pitch;
};

__host__ __device__ constexpr int divide_up(int value, int by) { return (value + by - 1) / by; }
__host__ __device__ constexpr int round_up(int value, int to) { return divide_up(value, to) * to; }

__device__ __forceinline__ int group_thread() { return threadIdx.x % kGroupThreads; }
__device__ __forceinline__ int group_warp() { return group_thread() / 32; }
// The first of the two rows, of its warp's sixteen, that a lane holds; the other is 8 further down.
__device__ __forceinline__ int lane_row() { return group_warp() * 16 + lane_id() / 4; }
// The first of the two columns, of every eight, that a lane holds.
__device__ __forceinline__ int lane_column() { return lane_id() % 4 * 2; }

// Starts the copy of kRows x kColumns elements at (row, column); zeros outside the matrix.
template <int kRows, int kColumns, class T>
__device__ __forceinline__ void load_tile(T* tile, int pitch, const Matrix<T>& from, int row,
                                          int column, int thread, int threads) {
  constexpr int kElements = 16 / sizeof(T), kPieces = kColumns / kElements;
  // Unrolled, the addresses of later pieces would take registers from the sums.
#pragma unroll 1
  for (int i = thread; i < kRows * kPieces; i += threads) {
    const int r = i / kPieces, c = i % kPieces * kElements;
    const bool valid = row + r < from.rows && column + c < from.columns;
    const T* source = from.data + (valid ? (row + r) * from.pitch + column + c : 0);
    ptx::cp_async_16(tile + r * pitch + c, source, valid);
  }
}

// Any number of positions: panels of both operands pass through two stages of shared memory.
template <class Products, int kColumns>
struct Stream {
  using T = typename Products::Element;
  static constexpr int kPitch = Products::kPanel + Products::kPad;
  static constexpr int kStage = (kBlockRows + kColumns) * kPitch;

  T* stages;

  __device__ explicit Stream(SharedMemory& shared) : stages(shared.take<T>(2 * kStage)) {}

  // s += rows[row:] columns[column:]^T. All threads of the block call it together; on return they
  // have met at a barrier behind which every earlier copy of theirs has landed.
  template <int N>
  __device__ void product(float (&s)[N][4], const Matrix<T>& rows, int row,
                          const Matrix<T>& columns, int column) {
    static_assert(N * 8 == kColumns, "one tile wide");
    const int panels = divide_up(rows.columns, Products::kPanel);
    load(0, rows, row, columns, column);
    for (int panel = 0; panel < panels; ++panel) {
      if (panel + 1 < panels) {
        load(panel + 1, rows, row, columns, column);
        ptx::cp_async_wait<1>();
      } else {
        ptx::cp_async_wait<0>();
      }
      __syncthreads();
      const T* stage = stages + panel % 2 * kStage;
      const int depth = min(Products::kPanel, rows.columns - panel * Products::kPanel);
      Products::nt(s, stage + group_warp() * 16 * kPitch, stage + kBlockRows * kPitch, kPitch,
                   divide_up(depth, Products::kStep));
      // The next panel but one lands where this one lies.
      __syncthreads();
    }
  }

  __device__ void load(int panel, const Matrix<T>& rows, int row, const Matrix<T>& columns,
                       int column) {
    T* stage = stages + panel % 2 * kStage;
    const int first = panel * Products::kPanel;
    load_tile<kBlockRows, Products::kPanel>(stage, kPitch, rows, row, first, group_thread(),
                                            kGroupThreads);
    load_tile<kColumns, Products::kPanel>(stage + kBlockRows * kPitch, kPitch, columns, column,
                                          first, group_thread(), kGroupThreads);
    ptx::cp_async_commit();
  }
};

// Two neighbours of a row of a contiguous matrix, those that exist.
template <class T>
__device__ __forceinline__ void store_pair(T* row, int column, int columns, float low, float high) {
  if (column < columns) row[column] = narrow<T>(low);
  if (column + 1 < columns) row[column + 1] = narrow<T>(high);
}

// acc (64 x 8 M, this thread's part), over a divisor for each of its two rows, to (row, column) of
// a contiguous rows x columns matrix.
template <class Products, int M, class T>
__device__ __forceinline__ void store_tile(T* to, const float (&acc)[M][4], float low_divisor,
                                           float high_divisor, int row, int rows, int column,
                                           int columns) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + lane_row() + half * 8;
    if (r >= rows) continue;
    const float divisor = half ? high_divisor : low_divisor;
    T* to_row = to + static_cast<int64_t>(r) * columns;
#pragma unroll
    for (int m = 0; m < M; ++m)
      store_pair(to_row, column + m * 8 + lane_column(), columns,
                 Products::over(acc[m][2 * half], divisor),
                 Products::over(acc[m][2 * half + 1], divisor));
  }
}

}  // namespace cin_fast
