// How a tensor comes into panels.
#include "panels.cuh"

namespace cin_fast {
namespace {

// Four neighbours of a row.
constexpr int kPiece = 4;
constexpr int kMostPanels = kWide / kPanelColumns;
constexpr int kBlockWarps = 8, kWarpRows = 8, kBlockRowsOfPanels = kBlockWarps * kWarpRows;

struct Source {
  const uint16_t* data;
  int64_t image, row, column;
};

template <bool kWhole>
__device__ __forceinline__ uint64_t load_piece(const uint16_t* from, int64_t stride, int columns) {
  if constexpr (kWhole) return columns > 0 ? *reinterpret_cast<const uint64_t*>(from) : 0;
  uint64_t piece = 0;
#pragma unroll
  for (int i = 0; i < kPiece; ++i)
    if (i < columns) piece |= static_cast<uint64_t>(from[i * stride]) << 16 * i;
  return piece;
}

// A warp takes eight rows, four lanes each: of a panel they write 256 bytes together. kWhole:
// pieces can be loaded as such.
template <bool kWhole>
__global__ void __launch_bounds__(32 * kBlockWarps)
    repack_panels_kernel(Source from, int rows, int columns, Panels to, unsigned char* memory,
                         int row_blocks) {
  ptx::grid_dependency_launch();
  const int image = blockIdx.x / row_blocks;
  const int row = blockIdx.x % row_blocks * kBlockRowsOfPanels + threadIdx.x / 4;
  const int column = threadIdx.x % 4 * kPiece;
  const int padded = round_up(rows, to.turn);
  if (row >= padded) return;
  const uint16_t* source = from.data + image * from.image + row * from.row + column * from.column;
  // All loads stand before the first store: one after another they would wait for memory one
  // after another.
  uint64_t pieces[kMostPanels];
#pragma unroll
  for (int panel = 0; panel < kMostPanels; ++panel) {
    const int first = panel * kPanelColumns;
    pieces[panel] = row < rows ? load_piece<kWhole>(source + first * from.column, from.column,
                                                    columns - column - first)
                               : 0;
  }
  const int64_t at = row / to.turn * to.step + row % to.turn;
  // Two rows of four trade their 16-byte pieces: see wgmma's swizzle of 32 bytes.
  unsigned char* target = memory +
                          (static_cast<int64_t>(image) * to.panels * to.height + at) * kPanelRow +
                          (2 * column ^ row / 4 % 2 * 16);
#pragma unroll
  for (int panel = 0; panel < kMostPanels; ++panel) {
    if (panel < to.panels) *reinterpret_cast<uint64_t*>(target) = pieces[panel];
    target += static_cast<int64_t>(to.height) * kPanelRow;
  }
}

}  // namespace

cudaError_t repack_panels(const Context& context, const View& view, int columns, const Panels& to) {
  const Source from{static_cast<const uint16_t*>(view.data), view.strides[0], view.strides[1],
                    view.strides[2]};
  auto* memory = static_cast<unsigned char*>(const_cast<void*>(to.data));
  const int row_blocks = divide_up(round_up(to.rows, to.turn), kBlockRowsOfPanels);
  const auto start = [&](auto kernel) {
    return launch(context, "repack_panels", kernel, dim3(to.images * row_blocks), 32 * kBlockWarps,
                  0, from, to.rows, columns, to, memory, row_blocks);
  };
  return in_pieces<uint16_t>(view, columns, 8) ? start(repack_panels_kernel<true>)
                                               : start(repack_panels_kernel<false>);
}

}  // namespace cin_fast
