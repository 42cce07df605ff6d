// sci where 16-bit operands fit into shared memory: at most 208 positions (14 x 14 = 196 and 7 x 7
// = 49 among them), v = x or at most 16 columns of v. The rows of a block are loaded once, and
// while one tile of columns is multiplied the next is on its way. Where v = x, the tile that gave
// x x^T is also the tile of v.
#include <algorithm>

#include "sci.cuh"

namespace cin_fast {
namespace sci {
namespace {

// One operand: the block's rows, if it has any use for them, and two tiles of columns.
template <class T, int kWidth, int kColumns>
struct Operand {
  static constexpr int kPitch = kColumns + HalfProducts<T>::kPad;
  static constexpr size_t kRowBytes = kBlockRows * kPitch * sizeof(T);
  static constexpr size_t kTileBytes = 2 * kWidth * kPitch * sizeof(T);

  Matrix<T> from;
  T *rows, *tiles;

  __device__ Operand(SharedMemory& shared, const Matrix<T>& matrix, bool has_rows = true,
                     bool has_tiles = true)
      : from(matrix),
        rows(has_rows ? shared.take<T>(kBlockRows * kPitch) : nullptr),
        tiles(has_tiles ? shared.take<T>(2 * kWidth * kPitch) : nullptr) {}

  __device__ void load_rows(int row) const {
    load_tile<kBlockRows, kColumns>(rows, kPitch, from, row, 0, threadIdx.x, kGroupThreads);
  }

  __device__ void load(int column) const {
    load_tile<kWidth, kColumns>(tile(column), kPitch, from, column, 0, threadIdx.x, kGroupThreads);
  }

  __device__ T* tile(int column) const { return tiles + column / kWidth % 2 * kWidth * kPitch; }

  // s += these rows times the other's tile.
  template <int N>
  __device__ void product(float (&s)[N][4], const Operand& other, int column) const {
    HalfProducts<T>::nt(s, rows + group_warp() * 16 * kPitch, other.tile(column), kPitch,
                        divide_up(from.columns, HalfProducts<T>::kStep));
  }
};

// Starts the next tile's copies and waits for this one's.
template <class... Operands>
__device__ __forceinline__ void advance(int column, int width, int columns,
                                        const Operands&... operands) {
  if (column + width < columns) {
    (operands.load(column + width), ...);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
  } else {
    ptx::cp_async_wait<0>();
  }
  __syncthreads();
}

constexpr int kForwardWidth = 64, kBackwardWidth = 32;

template <class T, int kColumns, bool kTied>
constexpr size_t kForwardBytes =
    shared_bytes({Operand<T, kForwardWidth, kColumns>::kRowBytes,
                  Operand<T, kForwardWidth, kColumns>::kTileBytes,
                  kTied ? 0 : Operand<T, kForwardWidth, kThin>::kTileBytes});

template <class T, int kColumns, bool kTied>
__global__ void __launch_bounds__(kGroupThreads)
    sci_resident_forward_kernel(ForwardParameters<T> p, int row_blocks) {
  using Products = HalfProducts<T>;
  constexpr int kWidth = kForwardWidth, kValues = kTied ? kColumns : kThin;
  const int64_t image = blockIdx.x / row_blocks;
  const int row = blockIdx.x % row_blocks * kBlockRows;
  SharedMemory shared;
  const Operand<T, kWidth, kColumns> x(shared, p.x.image(image));
  const Operand<T, kWidth, kThin> v(shared, p.v.image(image), false, !kTied);
  const int channels = x.from.rows;

  x.load_rows(row);
  x.load(0);
  if constexpr (!kTied) v.load(0);
  ptx::cp_async_commit();
  RunningSoftmax<Products> softmax(p.factor);
  float acc[kValues / 8][4] = {};
  for (int column = 0; column < channels; column += kWidth) {
    float s[kWidth / 8][4] = {};
    if constexpr (kTied)
      advance(column, kWidth, channels, x);
    else
      advance(column, kWidth, channels, x, v);
    x.product(s, x, column);
    softmax.update(s, acc, channels - column);
    if constexpr (kTied)
      Products::nn(acc, s, x.tile(column), x.kPitch);
    else
      Products::nn(acc, s, v.tile(column), v.kPitch);
    // The next tile but one lands where this one lies.
    __syncthreads();
  }
  softmax.finish();
  store_result<Products>(p, image, acc, softmax, row, 0);
  softmax.store(p.row_max + image * channels, p.row_sum + image * channels, row, channels);
}

template <class T, int kColumns, bool kTied>
constexpr size_t kBackwardBytes =
    shared_bytes({Operand<T, kBackwardWidth, kColumns>::kRowBytes,
                  Operand<T, kBackwardWidth, kColumns>::kTileBytes, Operand < T, kBackwardWidth,
                  kTied ? kColumns : kThin > ::kRowBytes, Operand < T, kBackwardWidth,
                  kTied ? kColumns : kThin > ::kTileBytes,
                  kTied ? 0 : Operand<T, kBackwardWidth, kThin>::kRowBytes,
                  kTied ? 0 : Operand<T, kBackwardWidth, kThin>::kTileBytes});

template <class T, int kColumns, bool kTied>
__global__ void __launch_bounds__(kGroupThreads)
    sci_resident_backward_kernel(BackwardParameters<T> p, int row_blocks) {
  using Products = HalfProducts<T>;
  constexpr int kWidth = kBackwardWidth, kAcross = kWidth / 8, kValues = kTied ? kColumns : kThin;
  const int64_t image = blockIdx.x / row_blocks;
  const int row = blockIdx.x % row_blocks * kBlockRows;
  SharedMemory shared;
  const Operand<T, kWidth, kColumns> x(shared, p.x.image(image));
  const Operand<T, kWidth, kValues> dy(shared, p.dy.image(image));
  const Operand<T, kWidth, kThin> v(shared, p.v.image(image), !kTied, !kTied);
  const int channels = x.from.rows;
  const RowTerms* terms = p.terms + image * padded_rows(channels);
  const RowTerms of_rows[2] = {terms[row + lane_row()], terms[row + lane_row() + 8]};

  x.load_rows(row);
  dy.load_rows(row);
  x.load(0);
  dy.load(0);
  if constexpr (!kTied) {
    v.load_rows(row);
    v.load(0);
  }
  ptx::cp_async_commit();
  float acc[kColumns / 8][4] = {}, thin[kThin / 8][4] = {};
  for (int column = 0; column < channels; column += kWidth) {
    float s[kAcross][4] = {}, dp[kAcross][4] = {}, dp_mirrored[kAcross][4] = {};
    if constexpr (kTied)
      advance(column, kWidth, channels, x, dy);
    else
      advance(column, kWidth, channels, x, dy, v);
    x.product(s, x, column);
    if constexpr (kTied) {
      dy.product(dp, x, column);
      x.product(dp_mirrored, dy, column);
    } else {
      dy.product(dp, v, column);
      v.product(dp_mirrored, dy, column);
    }
    softmax_gradient<Products>(s, dp, dp_mirrored, of_rows, terms + column, p.scale, p.factor);
    Products::nn(acc, dp, x.tile(column), x.kPitch);
    if constexpr (kTied)
      Products::nn(acc, s, dy.tile(column), dy.kPitch);
    else
      Products::nn(thin, s, dy.tile(column), dy.kPitch);
    // The next tiles but one land where these lie.
    __syncthreads();
  }
  store_tile<Products>(p.dx + image * channels * p.positions, acc, 1.f, 1.f, row, channels, 0,
                       p.positions);
  if constexpr (!kTied)
    store_tile<Products>(p.dv + image * channels * p.columns, thin, 1.f, 1.f, row, channels, 0,
                         p.columns);
}

dim3 row_block_grid(const Shape& shape) {
  return dim3(shape.batch * divide_up(shape.channels, kBlockRows));
}

}  // namespace

bool is_resident(const Context& context, const Shape& shape, bool tied) {
  if (shape.positions > kWide || (!tied && shape.columns > kThin)) return false;
  using T = __nv_bfloat16;
  size_t needed = 0;
  with_columns(shape, tied, [&]<int kColumns, bool kTied>() {
    needed = std::max(kForwardBytes<T, kColumns, kTied>, kBackwardBytes<T, kColumns, kTied>);
    return cudaSuccess;
  });
  return needed <= static_cast<size_t>(context.shared_limit);
}

template <class T>
cudaError_t resident_forward(const Context& context, const Shape& shape, bool tied,
                             const ForwardParameters<T>& p) {
  return with_columns(shape, tied, [&]<int kColumns, bool kTied>() {
    return launch(context, "sci_resident_forward", sci_resident_forward_kernel<T, kColumns, kTied>,
                  row_block_grid(shape), kGroupThreads, kForwardBytes<T, kColumns, kTied>, p,
                  divide_up(shape.channels, kBlockRows));
  });
}

template <class T>
cudaError_t resident_backward(const Context& context, const Shape& shape, bool tied,
                              const BackwardParameters<T>& p) {
  return with_columns(shape, tied, [&]<int kColumns, bool kTied>() {
    return launch(context, "sci_resident_backward",
                  sci_resident_backward_kernel<T, kColumns, kTied>, row_block_grid(shape),
                  kGroupThreads, kBackwardBytes<T, kColumns, kTied>, p,
                  divide_up(shape.channels, kBlockRows));
  });
}

#define CIN_FAST_RESIDENT(T)                                                 \
  template cudaError_t resident_forward(const Context&, const Shape&, bool,  \
                                        const ForwardParameters<T>&);        \
  template cudaError_t resident_backward(const Context&, const Shape&, bool, \
                                         const BackwardParameters<T>&);
CIN_FAST_RESIDENT(__nv_bfloat16)
CIN_FAST_RESIDENT(__half)
#undef CIN_FAST_RESIDENT

}  // namespace sci
}  // namespace cin_fast
