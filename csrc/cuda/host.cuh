// Host code that both operators share: launches, repacked operands, the row terms.
#pragma once

#include "operators.h"
#include "softmax.cuh"

#define CIN_FAST_RETURN_IF_ERROR(expression)  \
  do {                                        \
    const cudaError_t error_ = (expression);  \
    if (error_ != cudaSuccess) return error_; \
  } while (false)

namespace cin_fast {

// Launches, after asking for shared memory beyond what every kernel may have, and checks. What is
// launched early touches no global memory before its ptx::grid_dependency_wait().
template <bool kEarly = false, class... Parameters, class... Arguments>
cudaError_t launch(const Context& context, const char* name, void (*kernel)(Parameters...),
                   dim3 grid, int threads, size_t shared_bytes, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024)
    CIN_FAST_RETURN_IF_ERROR(cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  launch_kernel(kernel, name, grid, threads, shared_bytes, context.stream, kEarly, arguments...);
  return cudaGetLastError();
}

// The bytes that SharedMemory hands out for the given pieces.
constexpr size_t shared_bytes(std::initializer_list<size_t> pieces) {
  size_t total = 0;
  for (const size_t bytes : pieces) total += (bytes + 127) / 128 * 128;
  return total;
}

// Images one after another, each a Matrix.
template <class T>
struct Batch {
  const T* data;
  int rows, columns;
  int64_t pitch;

  __host__ __device__ Matrix<T> image(int64_t i) const {
    return {data + i * rows * pitch, rows, columns, pitch};
  }
};

// Warps of a block of repack_kernel, and the rows that they copy.
constexpr int kRepackWarps = 8, kRepackRows = 64;
// Bytes on which the rows of copies start: 128 bytes of one are then four of the second-level
// cache's sectors, where a start on 16 bytes would make them five.
constexpr int kRowAlignment = 32;

// To rows of `width` elements, zeros beyond `columns`, by pieces that neither the source's rows nor
// its columns break. A warp takes every kRepackWarps-th row of the block's, all of them at once.
template <class T, class Piece>
__global__ void __launch_bounds__(32 * kRepackWarps)
    repack_kernel(const T* from, int64_t image_stride, int64_t row_stride, int64_t column_stride,
                  int rows, int columns, int width, int pitch, T* to, int row_blocks) {
  ptx::grid_dependency_launch();
  constexpr int kElements = sizeof(Piece) / sizeof(T), kBatch = kRepackRows / kRepackWarps;
  const int image = blockIdx.x / row_blocks;
  const int first = blockIdx.x % row_blocks * kRepackRows + threadIdx.x / 32;
  from += image * image_stride + first * row_stride;
  to += (static_cast<int64_t>(image) * rows + first) * pitch;
  const int64_t step = kRepackWarps * row_stride;
  for (int column = lane_id() * kElements; column < width; column += 32 * kElements) {
    // All loads stand before the first store: one after another they would wait for memory one
    // after another.
    Piece batch[kBatch] = {};
    const T* source = from + column * column_stride;
#pragma unroll
    for (int i = 0; i < kBatch; ++i, source += step) {
      if (first + i * kRepackWarps < rows && column < columns)
        batch[i] = *reinterpret_cast<const Piece*>(source);
    }
    T* target = to + column;
#pragma unroll
    for (int i = 0; i < kBatch; ++i, target += kRepackWarps * pitch) {
      if (first + i * kRepackWarps < rows) *reinterpret_cast<Piece*>(target) = batch[i];
    }
  }
}

inline bool starts_on(const void* data, int bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

// Whether pieces of that many bytes start where they have to, and end where rows do.
template <class T>
bool in_pieces(const View& view, int columns, int bytes) {
  const int elements = bytes / static_cast<int>(sizeof(T));
  return starts_on(view.data, bytes) && columns % elements == 0 &&
         view.strides[0] % elements == 0 && view.strides[1] % elements == 0 && view.strides[2] == 1;
}

template <class Piece, class T>
cudaError_t repack(const Context& context, const View& view, const Shape& shape, int columns,
                   const Batch<T>& to) {
  const int row_blocks = divide_up(shape.channels, kRepackRows);
  return launch(context, "repack", repack_kernel<T, Piece>, dim3(shape.batch * row_blocks),
                32 * kRepackWarps, 0, static_cast<const T*>(view.data), view.strides[0],
                view.strides[1], view.strides[2], shape.channels, columns, to.columns,
                static_cast<int>(to.pitch), const_cast<T*>(to.data), row_blocks);
}

// The tensor as tiles can be copied from it: as it stands if its rows start on 16 bytes, or else a
// copy whose rows do.
template <class T>
cudaError_t aligned_batch(const Context& context, const View& view, const Shape& shape, int columns,
                          Batch<T>* result) {
  constexpr int kElements = 16 / sizeof(T);
  if (in_pieces<T>(view, columns, 16) && view.strides[1] >= columns &&
      view.strides[0] == shape.channels * view.strides[1]) {
    *result = {static_cast<const T*>(view.data), shape.channels, columns, view.strides[1]};
    return cudaSuccess;
  }
  const int pitch = round_up(columns, kRowAlignment / static_cast<int>(sizeof(T)));
  const int64_t count = static_cast<int64_t>(shape.batch) * shape.channels * pitch;
  T* copy = static_cast<T*>(context.allocate(context.owner, count * sizeof(T)));
  *result = {copy, shape.channels, round_up(columns, kElements), pitch};
  if (in_pieces<T>(view, columns, 8))
    return repack<uint64_t>(context, view, shape, columns, *result);
  return repack<T>(context, view, shape, columns, *result);
}

// Columns of x that fit into shared memory, rows and tiles: 14 x 14 = 196 and 7 x 7 = 49 among
// them.
constexpr int kNarrow = 64, kWide = 208;

// Whether 16-bit operands take warp groups, where this was compiled for sm_90a.
inline bool is_wgmma(const Context& context, const Shape& shape, bool tied) {
#ifdef CIN_FAST_SM90A
  return context.capability == 90 && shape.positions <= kWide && (tied || shape.columns <= kThin);
#else
  return false;
#endif
}

// Calls body<kColumns, kTied>() for the narrowest operands that hold the shape.
template <class Body>
cudaError_t with_columns(const Shape& shape, bool tied, const Body& body) {
  if (shape.positions <= kNarrow)
    return tied ? body.template operator()<kNarrow, true>()
                : body.template operator()<kNarrow, false>();
  return tied ? body.template operator()<kWide, true>() : body.template operator()<kWide, false>();
}

// scale log_base(e), but not 0: of a sharply negative number times 0 no weight could be made.
template <class Products>
float softmax_factor(float scale) {
  const float factor = scale * Products::kUnit;
  return fabsf(factor) < 1e-30f ? 1e-30f : factor;
}

// Calls body<T>() with the dtype's element.
template <class Body>
cudaError_t with_element(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kBfloat16:
      return body.template operator()<__nv_bfloat16>();
    case Dtype::kFloat16:
      return body.template operator()<__half>();
    case Dtype::kFloat32:
      break;
  }
  return body.template operator()<float>();
}

// Calls body<Products>() with the products that the dtype and the context ask for.
template <class Body>
cudaError_t with_products(const Context& context, Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kBfloat16:
      return body(HalfProducts<__nv_bfloat16>{});
    case Dtype::kFloat16:
      return body(HalfProducts<__half>{});
    case Dtype::kFloat32:
      break;
  }
  return context.float32_products == Float32Products::kTf32 ? body(Tf32Products{})
                                                            : body(IeeeProducts{});
}

}  // namespace cin_fast
