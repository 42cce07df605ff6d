// Operands as warp groups copy and multiply them: panels of 16 columns, one after another, rows of
// 32 bytes. A panel is laid out, swizzled, as wgmma reads it from shared memory, so a tile is one
// bulk tensor copy of whole kilobytes, and one wgmma may be as wide as all of its panels together.
#pragma once

#include "host.cuh"

namespace cin_fast {

constexpr int kPanelColumns = 16, kPanelRow = 2 * kPanelColumns;
// The narrowest piece of a panel that a bulk copy takes.
constexpr int kGroupRows = 16;

// A 16-bit operand in panels, each `height` rows. Its own rows come in turns of `turn`, `step` rows
// apart: between them may be another operand's.
struct Panels {
  unsigned char* data;
  int images, rows, panels, turn, step, height;
};

// Four neighbours of a row: what a thread moves at once into a panel.
constexpr int kPiece = 4;

// Of `columns` that exist; kWhole: it can be loaded as such.
template <bool kWhole>
__device__ __forceinline__ uint64_t load_piece(const uint16_t* from, int64_t stride, int columns) {
  if constexpr (kWhole) return columns > 0 ? *reinterpret_cast<const uint64_t*>(from) : 0;
  uint64_t piece = 0;
#pragma unroll
  for (int i = 0; i < kPiece; ++i)
    if (i < columns) piece |= static_cast<uint64_t>(from[i * stride]) << 16 * i;
  return piece;
}

// Where the piece of a panel at that column of it lies, behind the row's start. Of eight rows the
// last four have their 16-byte pieces the other way round: wgmma's swizzle.
__device__ __forceinline__ int piece_byte(int row, int column) {
  return 2 * column ^ row / 4 % 2 * 16;
}

// Copies a tensor into panels, or two of the same shape, the second a turn behind the first. Rows
// and columns beyond the tensor's become zeros.
cudaError_t repack_panels(const Context& context, std::initializer_list<View> views, int columns,
                          const Panels& to);

// Of boxes of box_rows x (16 box_panels), zeros beyond the operand's edges.
inline cudaError_t encode_map(ptx::TensorMap* map, const Panels& panels, int box_rows,
                              int box_panels) {
  return encode_tensor_map(
      map, panels.data,
      {panels.images, panels.panels, divide_up(panels.rows, panels.turn), panels.turn / kGroupRows},
      {panels.height / kGroupRows, panels.step / kGroupRows}, box_rows / panels.turn, box_panels);
}

inline unsigned char* allocate_panels(const Context& context, int images, int panels, int height) {
  const size_t bytes = static_cast<size_t>(images) * panels * height * kPanelRow;
  return static_cast<unsigned char*>(context.allocate(context.owner, bytes));
}

// The tensor in panels of its own, in the context's memory.
inline cudaError_t own_panels(const Context& context, const View& view, const Shape& shape,
                              int columns, Panels* result) {
  const int height = round_up(shape.channels, kGroupRows),
            panels = divide_up(columns, kPanelColumns);
  *result = {allocate_panels(context, shape.batch, panels, height),
             shape.batch,
             shape.channels,
             panels,
             kGroupRows,
             kGroupRows,
             height};
  return repack_panels(context, {view}, columns, *result);
}

// Two tensors of one shape, `turn` rows of either in turns: each alone, and both as one operand of
// twice the rows.
struct StackedPanels {
  Panels first, second, both;
};

inline cudaError_t stacked_panels(const Context& context, const View& first, const View& second,
                                  const Shape& shape, int columns, int turn,
                                  StackedPanels* result) {
  const int height = 2 * round_up(shape.channels, turn), panels = divide_up(columns, kPanelColumns);
  unsigned char* memory = allocate_panels(context, shape.batch, panels, height);
  result->first = {memory, shape.batch, shape.channels, panels, turn, 2 * turn, height};
  result->second = result->first;
  result->second.data = memory + turn * kPanelRow;
  result->both = {memory, shape.batch, height, panels, kGroupRows, kGroupRows, height};
  return repack_panels(context, {first, second}, columns, result->first);
}

}  // namespace cin_fast
