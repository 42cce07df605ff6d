// Tiles as bulk tensor copies write them and wgmma reads them, products of them, and the way of a
// result from registers to global memory. For sm_90a.
#pragma once

#include "panels.cuh"

namespace cin_fast {

// Of an operator's tensors; `both` of x and dY stacked.
struct Maps {
  ptx::TensorMap x, v, dy, both;
};

// Tells wgmma where an operand starts. Where the product's depth lies along the rows of a panel,
// the next 8 rows follow; where it runs down them, `leading` bytes lead to the next panel.
__device__ __forceinline__ uint64_t operand(uint32_t base, int offset, int leading) {
  constexpr uint32_t kStride = 8 * kPanelRow;
  // Added up in this order, what differs between two operands of a tile is a constant.
  const uint32_t low = (base >> 4) + ((leading >> 4 << 16) + (offset >> 4));
  const uint32_t high = kStride >> 4 | ptx::kSwizzle32Bytes << 30;
  return static_cast<uint64_t>(high) << 32 | low;
}

// kRows x kColumns 16-bit elements, in panels as they lie in global memory. It starts on 256 bytes,
// where the swizzle does.
template <class T, int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kPanels = kColumns / kPanelColumns;
  static_assert(kColumns % kPanelColumns == 0 && kRows % 8 == 0, "whole panels, whole swizzles");
  static constexpr int kPanelBytes = kRows * kPanelRow, kBytes = kPanels * kPanelBytes;

  unsigned char* data;

  // Starts the copy of an image's rows from the given turn on; the map's box is a tile.
  __device__ void load(const ptx::TensorMap& map, uint64_t* barrier, int turn, int image) const {
    ptx::bulk_copy_5d(data, &map, barrier, turn, image);
  }

  // Columns 16 step to 16 step + 15 of the rows from `row` on, as depth of a product.
  __device__ uint64_t along_rows(int row, int step) const {
    return operand(ptx::shared_address(data), step * kPanelBytes + row * kPanelRow, 16);
  }

  // Rows `row` to `row` + 15 of all columns, as depth.
  __device__ uint64_t down_panels(int row) const {
    return operand(ptx::shared_address(data), row * kPanelRow, kPanelBytes);
  }
};

// s (64 x 8 N) = the first 64 of `rows` times 8 N of `columns`, from `column` on, transposed; or +=
// that. Ends when wgmma_wait says so.
template <int N, class T, int kRows, int kWidth, int kColumns>
__device__ __forceinline__ void start_nt(float (*s)[4], const Tile<T, kRows, kColumns>& rows,
                                         const Tile<T, kWidth, kColumns>& columns, int column = 0,
                                         bool add = false) {
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step)
    ptx::wgmma_ss<T, 8 * N>(s, rows.along_rows(0, step), columns.along_rows(column, step),
                            add || step > 0);
}

template <int N, class... Operands>
__device__ __forceinline__ void start_nt(float (&s)[N][4], const Operands&... operands) {
  start_nt<N>(&s[0], operands...);
}

// acc (64 x kColumns) += p (64 x 16 N, packed) times 16 N rows of `values`, from `row` on. Ends
// when wgmma_wait says so.
template <class T, int N, int kWidth, int kColumns>
__device__ __forceinline__ void start_nn(float (&acc)[kColumns / 8][4], const uint32_t (&p)[N][4],
                                         const Tile<T, kWidth, kColumns>& values, int row = 0) {
#pragma unroll
  for (int step = 0; step < N; ++step)
    ptx::wgmma_rs<T, kColumns>(acc, p[step], values.down_panels(row + step * 16));
}

// Sixteen rows of a tile for each warp of a group, as memory that it writes results to when the
// tile has served.
template <class T, int kRows, int kColumns>
struct WarpMemory {
  using Rows = Tile<T, kRows, kColumns>;
  static constexpr int kPieceBytes = 16 * kPanelRow;

  unsigned char* first;

  __device__ explicit WarpMemory(const Rows& tile)
      : first(tile.data + group_warp() * 16 * kPanelRow) {}

  // Up to 16 bytes, at a multiple of their number.
  template <class Piece>
  __device__ Piece& at(int byte) const {
    return *reinterpret_cast<Piece*>(first + byte +
                                     byte / kPieceBytes * (Rows::kPanelBytes - kPieceBytes));
  }

  // acc (64 x 8 M), over a divisor for each of a thread's two rows, as rows of `columns` numbers
  // one after another.
  template <class Products, int M>
  __device__ __forceinline__ void write(const float (&acc)[M][4], float low_divisor,
                                        float high_divisor, int columns) const {
    static_assert(8 * M == kColumns && sizeof(T) == 2, "they have room");
    const bool in_pairs = columns % 2 == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float divisor = half ? high_divisor : low_divisor;
      const int first = (lane_id() / 4 + half * 8) * columns + lane_column();
      // Columns from lane_column() on.
      const int own_columns = columns - lane_column();
      if (in_pairs) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const uint32_t pair = Products::pair(Products::over(acc[m][2 * half], divisor),
                                               Products::over(acc[m][2 * half + 1], divisor));
          if (8 * m < own_columns) at<uint32_t>(2 * (first + 8 * m)) = pair;
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2 * M; ++i) {
          const int column = i / 2 * 8 + i % 2;
          const float number = Products::over(acc[i / 2][2 * half + i % 2], divisor);
          if (column < own_columns) at<T>(2 * (first + column)) = narrow<T>(number);
        }
      }
    }
  }
};

// acc (64 x 8 M), over a divisor for each of a thread's two rows, to rows `row` and on of a
// contiguous rows x columns matrix. On their way the numbers pass through the first 64 rows of a
// tile that has served: a warp then stores its own rows as one piece of memory, 16 bytes a thread,
// instead of scattered pairs.
template <class Products, int M, class T, int kRows, int kColumns>
__device__ __forceinline__ void store_rows(T* to, const float (&acc)[M][4], float low_divisor,
                                           float high_divisor, const Tile<T, kRows, kColumns>& tile,
                                           int row, int rows, int columns) {
  const WarpMemory<T, kRows, kColumns> memory(tile);
  // All four warps have waited for the last wgmma that reads the tile.
  ptx::named_barrier<kGroupThreads>(1 + threadIdx.x / kGroupThreads);
  memory.template write<Products>(acc, low_divisor, high_divisor, columns);
  __syncwarp();
  row += group_warp() * 16;
  const int count = min(16, rows - row) * columns;
  to += static_cast<int64_t>(row) * columns;
  const int whole = reinterpret_cast<uintptr_t>(to) % 16 == 0 ? count / 8 * 8 : 0;
#pragma unroll 4
  for (int i = 8 * lane_id(); i < whole; i += 8 * 32)
    *reinterpret_cast<float4*>(to + i) = memory.template at<float4>(2 * i);
  for (int i = whole + lane_id(); i < count; i += 32) to[i] = memory.template at<T>(2 * i);
}

// A product's result as the next one's left operand.
template <class T, int N>
__device__ __forceinline__ void pack(uint32_t (*packed)[4], const float (*p)[4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    packed[n / 2][n % 2 * 2] = HalfProducts<T>::pair(p[n][0], p[n][1]);
    packed[n / 2][n % 2 * 2 + 1] = HalfProducts<T>::pair(p[n][2], p[n][3]);
  }
}

template <class T, int N>
__device__ __forceinline__ void pack(uint32_t (*packed)[4], const float (&p)[N][4]) {
  pack<T, N>(packed, &p[0]);
}

}  // namespace cin_fast
