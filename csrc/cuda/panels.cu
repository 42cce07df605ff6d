// How a tensor comes into panels.
#include "panels.cuh"

namespace cin_fast {
namespace {

constexpr int kWarps = 8, kRowsOfABlock = 8 * kWarps;

struct Source {
  const uint16_t* data;
  int64_t image, row, column;

  explicit Source(const View& view)
      : data(static_cast<const uint16_t*>(view.data)),
        image(view.strides[0]),
        row(view.strides[1]),
        column(view.strides[2]) {}
};

struct Sources {
  Source of[2];
};

// A warp takes eight rows, four lanes each: of a panel they write 256 bytes together. kWhole:
// pieces can be loaded as such.
template <bool kWhole, int kMostPanels>
__global__ void __launch_bounds__(32 * kWarps)
    repack_panels_kernel(const __grid_constant__ Sources sources, int rows, int columns, Panels to,
                         int row_blocks) {
  ptx::grid_dependency_launch();
  const Source& from = sources.of[blockIdx.y];
  const int image = blockIdx.x / row_blocks;
  const int row = blockIdx.x % row_blocks * kRowsOfABlock + threadIdx.x / 4;
  const int column = threadIdx.x % 4 * kPiece;
  if (row >= round_up(rows, to.turn)) return;
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
  const int turn = blockIdx.y * to.turn + row / to.turn * to.step;
  const int64_t at = static_cast<int64_t>(image) * to.panels * to.height + turn + row % to.turn;
  unsigned char* target = to.data + at * kPanelRow + piece_byte(row, column);
#pragma unroll
  for (int panel = 0; panel < kMostPanels; ++panel) {
    if (panel < to.panels) *reinterpret_cast<uint64_t*>(target) = pieces[panel];
    target += static_cast<int64_t>(to.height) * kPanelRow;
  }
}

}  // namespace

cudaError_t repack_panels(const Context& context, std::initializer_list<View> views, int columns,
                          const Panels& to) {
  const View &first = *views.begin(), &second = *(views.end() - 1);
  const int row_blocks = divide_up(round_up(to.rows, to.turn), kRowsOfABlock);
  const auto start = [&](auto kernel) {
    const dim3 grid(to.images * row_blocks, static_cast<unsigned>(views.size()));
    return launch(context, "repack_panels", kernel, grid, 32 * kWarps, 0,
                  Sources{{Source(first), Source(second)}}, to.rows, columns, to, row_blocks);
  };
  const bool whole =
      in_pieces<uint16_t>(first, columns, 8) && in_pieces<uint16_t>(second, columns, 8);
  if (to.panels == 1)
    return whole ? start(repack_panels_kernel<true, 1>) : start(repack_panels_kernel<false, 1>);
  constexpr int kMost = kWide / kPanelColumns;
  return whole ? start(repack_panels_kernel<true, kMost>)
               : start(repack_panels_kernel<false, kMost>);
}

}  // namespace cin_fast
