// sci: Y = softmax(scale x x^T) v and its gradients. docs/kernels.md explains the algorithm.
//
// A block owns 64 rows i of one image and passes over the columns j of x x^T, tile by tile; no
// part of x x^T leaves the chip. Per element of a tile, forward: 2 L operations for x x^T, 1
// exponential, 2 K operations for the result. Backward, in one pass: 2 L for x x^T, 4 K for
// dY v^T and its mirror image, 2 exponentials, 2 L for dx, 2 K for dv.
#include <utility>

#include "sci.cuh"

namespace cin_fast {
namespace sci {
namespace {

constexpr int kSweepWidth = 32, kBackwardWidth = 32;

template <class Products, int kColumns>
struct ForwardTiles {
  using T = typename Products::Element;
  static constexpr int kWidth = sizeof(T) == 2 ? 64 : 32;
  static constexpr int kValuePitch = kColumns + Products::kPad;
  static constexpr size_t kSharedBytes = shared_bytes(
      {2 * Stream<Products, kWidth>::kStage * sizeof(T), kWidth * kValuePitch * sizeof(T)});
};

// Grid: row blocks of all images, chunks of v's columns.
template <class Products, int kColumns>
__global__ void __launch_bounds__(kGroupThreads)
    sci_forward_kernel(ForwardParameters<typename Products::Element> p, int row_blocks) {
  using Tiles = ForwardTiles<Products, kColumns>;
  using T = typename Products::Element;
  constexpr int kWidth = Tiles::kWidth, kValuePitch = Tiles::kValuePitch;
  const int64_t image = blockIdx.x / row_blocks;
  const int row = blockIdx.x % row_blocks * kBlockRows, chunk = blockIdx.y * kColumns;
  const Matrix<T> x = p.x.image(image), v = p.v.image(image);
  SharedMemory shared;
  Stream<Products, kWidth> stream(shared);
  T* values = shared.take<T>(kWidth * kValuePitch);

  RunningSoftmax<Products> softmax(p.factor);
  float acc[kColumns / 8][4] = {};
  for (int column = 0; column < x.rows; column += kWidth) {
    load_tile<kWidth, kColumns>(values, kValuePitch, v, column, chunk, threadIdx.x, kGroupThreads);
    ptx::cp_async_commit();
    float s[kWidth / 8][4] = {};
    stream.product(s, x, row, x, column);
    softmax.update(s, acc, x.rows - column);
    Products::nn(acc, s, values, kValuePitch);
    // The next tile of v lands where this one lies.
    __syncthreads();
  }
  softmax.finish();
  store_result<Products>(p, image, acc, softmax, row, chunk);
  if (blockIdx.y == 0)
    softmax.store(p.row_max + image * x.rows, p.row_sum + image * x.rows, row, x.rows);
}

template <class Products, int kColumns>
cudaError_t launch_forward(const Context& context, const Shape& shape,
                           const ForwardParameters<typename Products::Element>& parameters) {
  const int row_blocks = divide_up(shape.channels, kBlockRows);
  const dim3 grid(shape.batch * row_blocks, divide_up(parameters.columns, kColumns));
  return launch(context, "sci_forward", sci_forward_kernel<Products, kColumns>, grid, kGroupThreads,
                ForwardTiles<Products, kColumns>::kSharedBytes, parameters, row_blocks);
}

template <class Products>
__global__ void __launch_bounds__(kGroupThreads)
    sci_terms_kernel(TermsParameters<typename Products::Element> p, int row_blocks) {
  const int64_t image = blockIdx.x / row_blocks;
  const int row = blockIdx.x % row_blocks * kBlockRows;
  const Matrix<typename Products::Element> dy = p.dy.image(image);
  SharedMemory shared;
  Stream<Products, kBlockRows> stream(shared);
  float product[kBlockRows / 8][4] = {}, delta[2];
  stream.product(product, dy, row, p.y.image(image), row);
  stream.product(product, dy, row, p.y_rest.image(image), row);
  take_diagonal(delta, product);
  store_terms<Products>(p, image, row, delta);
}

template <class Products>
__global__ void __launch_bounds__(kGroupThreads)
    sci_sweep_kernel(SweepParameters<typename Products::Element> p, int row_blocks) {
  using T = typename Products::Element;
  constexpr int kWidth = kSweepWidth;
  const int64_t image = blockIdx.x / row_blocks;
  const int row = blockIdx.x % row_blocks * kBlockRows;
  const Matrix<T> x = p.x.image(image), v = p.v.image(image), dy = p.dy.image(image);
  SharedMemory shared;
  Stream<Products, kWidth> stream(shared);

  RowSums<Products> sums(p, image, row);
  for (int column = 0; column < x.rows; column += kWidth) {
    float s[kWidth / 8][4] = {}, dp[kWidth / 8][4] = {};
    stream.product(s, x, row, x, column);
    stream.product(dp, dy, row, v, column);
    sums.add(s, dp, x.rows - column);
  }
  sums.finish();
  store_terms<Products>(p, image, row, sums.delta);
}

template <class Products, Values kValues>
struct BackwardTiles {
  using T = typename Products::Element;
  static constexpr int kWidth = kChunk<Products>;
  static constexpr int kPitch = kWidth + Products::kPad, kThinPitch = kThin + Products::kPad;
  static constexpr int kTile = kBackwardWidth * kPitch;
  static constexpr int kSecond = kValues == Values::kTied   ? kTile
                                 : kValues == Values::kThin ? kBackwardWidth * kThinPitch
                                                            : 0;
  static constexpr size_t kSharedBytes =
      shared_bytes({2 * Stream<Products, kBackwardWidth>::kStage * sizeof(T), kTile * sizeof(T),
                    kSecond * sizeof(T)});
};

template <class Products, Values kValues>
__global__ void __launch_bounds__(kGroupThreads)
    sci_backward_kernel(BackwardParameters<typename Products::Element> p, int row_blocks) {
  using Tiles = BackwardTiles<Products, kValues>;
  using T = typename Products::Element;
  constexpr int kTilesAcross = kBackwardWidth / 8, kChunkWidth = Tiles::kWidth;
  const int64_t image = blockIdx.x / row_blocks;
  const int row = blockIdx.x % row_blocks * kBlockRows;
  const int dx_chunks = divide_up(p.positions, kChunkWidth);
  const bool for_dv = static_cast<int>(blockIdx.y) >= dx_chunks;
  const int chunk = (for_dv ? blockIdx.y - dx_chunks : blockIdx.y) * kChunkWidth;
  const Matrix<T> x = p.x.image(image), v = p.v.image(image), dy = p.dy.image(image);
  const RowTerms* terms = p.terms + image * padded_rows(x.rows);
  const RowTerms of_rows[2] = {terms[row + lane_row()], terms[row + lane_row() + 8]};
  SharedMemory shared;
  Stream<Products, kBackwardWidth> stream(shared);
  T* first = shared.take<T>(Tiles::kTile);
  T* second = shared.take<T>(Tiles::kSecond);

  float acc[kChunkWidth / 8][4] = {}, thin[kThin / 8][4] = {};
  for (int column = 0; column < x.rows; column += kBackwardWidth) {
    if (for_dv)
      load_tile<kBackwardWidth, kChunkWidth>(first, Tiles::kPitch, dy, column, chunk, threadIdx.x,
                                             kGroupThreads);
    else
      load_tile<kBackwardWidth, kChunkWidth>(first, Tiles::kPitch, x, column, chunk, threadIdx.x,
                                             kGroupThreads);
    if constexpr (kValues == Values::kTied)
      load_tile<kBackwardWidth, kChunkWidth>(second, Tiles::kPitch, dy, column, chunk, threadIdx.x,
                                             kGroupThreads);
    if constexpr (kValues == Values::kThin)
      load_tile<kBackwardWidth, kThin>(second, Tiles::kThinPitch, dy, column, 0, threadIdx.x,
                                       kGroupThreads);
    ptx::cp_async_commit();
    float s[kTilesAcross][4] = {}, dp[kTilesAcross][4] = {}, dp_mirrored[kTilesAcross][4] = {};
    stream.product(s, x, row, x, column);
    if (!for_dv) {
      stream.product(dp, dy, row, v, column);
      stream.product(dp_mirrored, v, row, dy, column);
    }
    softmax_gradient<Products>(s, dp, dp_mirrored, of_rows, terms + column, p.scale, p.factor);
    if (for_dv)
      Products::nn(acc, s, first, Tiles::kPitch);
    else
      Products::nn(acc, dp, first, Tiles::kPitch);
    if constexpr (kValues == Values::kTied) Products::nn(acc, s, second, Tiles::kPitch);
    if constexpr (kValues == Values::kThin) Products::nn(thin, s, second, Tiles::kThinPitch);
    // The next tiles land where these lie.
    __syncthreads();
  }
  if (for_dv)
    store_tile<Products>(p.dv + image * x.rows * p.columns, acc, 1.f, 1.f, row, x.rows, chunk,
                         p.columns);
  else
    store_tile<Products>(p.dx + image * x.rows * p.positions, acc, 1.f, 1.f, row, x.rows, chunk,
                         p.positions);
  if constexpr (kValues == Values::kThin)
    if (blockIdx.y == 0)
      store_tile<Products>(p.dv + image * x.rows * p.columns, thin, 1.f, 1.f, row, x.rows, 0,
                           p.columns);
}

template <class Products, Values kValues>
cudaError_t launch_backward(const Context& context, const Shape& shape,
                            const BackwardParameters<typename Products::Element>& parameters) {
  const int row_blocks = divide_up(shape.channels, kBlockRows);
  const int chunks =
      divide_up(parameters.positions, kChunk<Products>) +
      (kValues == Values::kOwn ? divide_up(parameters.columns, kChunk<Products>) : 0);
  return launch(context, "sci_backward", sci_backward_kernel<Products, kValues>,
                dim3(shape.batch * row_blocks, chunks), kGroupThreads,
                BackwardTiles<Products, kValues>::kSharedBytes, parameters, row_blocks);
}

// A block for every 64 rows, which meets tiles of kWidth columns.
template <class Products, int kWidth, class Parameters>
cudaError_t launch_row_sums(const Context& context, const Shape& shape, const char* name,
                            void (*kernel)(Parameters, int), const Parameters& p) {
  const int row_blocks = divide_up(shape.channels, kBlockRows);
  return launch(context, name, kernel, dim3(shape.batch * row_blocks), kGroupThreads,
                2 * Stream<Products, kWidth>::kStage * sizeof(typename Products::Element), p,
                row_blocks);
}

template <class Products>
cudaError_t forward(const Context& context, const Shape& shape, bool tied,
                    const ForwardParameters<typename Products::Element>& p) {
  if constexpr (sizeof(typename Products::Element) == 2) {
    if (is_resident(context, shape, tied)) return resident_forward(context, shape, tied, p);
  }
  return p.columns <= kThin ? launch_forward<Products, kThin>(context, shape, p)
                            : launch_forward<Products, kChunk<Products>>(context, shape, p);
}

template <class Products>
cudaError_t backward(const Context& context, const Shape& shape, bool tied,
                     const BackwardParameters<typename Products::Element>& p) {
  if constexpr (sizeof(typename Products::Element) == 2) {
    if (is_resident(context, shape, tied)) return resident_backward(context, shape, tied, p);
  }
  if (tied) return launch_backward<Products, Values::kTied>(context, shape, p);
  return p.columns <= kThin ? launch_backward<Products, Values::kThin>(context, shape, p)
                            : launch_backward<Products, Values::kOwn>(context, shape, p);
}

// Of y or its rest.
inline View contiguous_view(const void* data, const Shape& shape, int columns) {
  return {data, {static_cast<int64_t>(shape.channels) * columns, columns, 1}};
}

// The rows' terms, where warp groups do not make them.
template <class Products>
cudaError_t make_terms(const Context& context, const Shape& shape, const SciBackward& a,
                       const BackwardParameters<typename Products::Element>& p, RowTerms* terms) {
  using T = typename Products::Element;
  if constexpr (sizeof(T) == 2) {
    TermsParameters<T> own{p.dy, {}, {}, a.row_max, a.row_sum, terms, p.channels};
    for (const auto& [data, batch] : {std::pair{a.y, &own.y}, {a.y_rest, &own.y_rest}})
      CIN_FAST_RETURN_IF_ERROR(
          aligned_batch(context, contiguous_view(data, shape, p.columns), shape, p.columns, batch));
    return launch_row_sums<Products, kBlockRows>(context, shape, "sci_terms",
                                                 sci_terms_kernel<Products>, own);
  } else {
    const SweepParameters<T> own{p.dy, p.x, p.v, a.row_max, a.row_sum, terms, p.channels, p.factor};
    return launch_row_sums<Products, kSweepWidth>(context, shape, "sci_sweep",
                                                  sci_sweep_kernel<Products>, own);
  }
}

}  // namespace
}  // namespace sci

cudaError_t sci_forward(const Context& context, Dtype dtype, const Shape& shape, float scale,
                        const SciForward& a) {
  if (shape.batch == 0) return cudaSuccess;
  return with_products(context, dtype, [&](auto products) {
    using Products = decltype(products);
    using T = typename Products::Element;
    sci::ForwardParameters<T> p{};
    p.y = static_cast<T*>(a.y);
    p.y_rest = sizeof(T) == 2 ? static_cast<T*>(a.y_rest) : nullptr;
    p.row_max = a.row_max;
    p.row_sum = a.row_sum;
    p.factor = softmax_factor<Products>(scale);
    p.channels = shape.channels;
    p.columns = a.v.data ? shape.columns : shape.positions;
    if constexpr (sizeof(T) == 2)
      if (is_wgmma(context, shape, !a.v.data)) return sci::wgmma_forward(context, shape, a, p);
    CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.x, shape, shape.positions, &p.x));
    p.v = p.x;
    if (a.v.data) CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.v, shape, p.columns, &p.v));
    return sci::forward<Products>(context, shape, !a.v.data, p);
  });
}

cudaError_t sci_backward(const Context& context, Dtype dtype, const Shape& shape, float scale,
                         const SciBackward& a) {
  if (shape.batch == 0) return cudaSuccess;
  return with_products(context, dtype, [&](auto products) {
    using Products = decltype(products);
    using T = typename Products::Element;
    const size_t rows = static_cast<size_t>(shape.batch) * padded_rows(shape.channels);
    auto* terms = static_cast<RowTerms*>(context.allocate(context.owner, rows * sizeof(RowTerms)));
    sci::BackwardParameters<T> p{};
    p.terms = terms;
    p.dx = static_cast<T*>(a.dx);
    p.dv = static_cast<T*>(a.dv);
    p.channels = shape.channels;
    p.positions = shape.positions;
    p.columns = a.v.data ? shape.columns : shape.positions;
    p.scale = scale;
    p.factor = softmax_factor<Products>(scale);
    if constexpr (sizeof(T) == 2)
      if (is_wgmma(context, shape, !a.v.data))
        return sci::wgmma_backward(context, shape, a, terms, p);
    CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.x, shape, shape.positions, &p.x));
    CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.dy, shape, p.columns, &p.dy));
    p.v = p.x;
    if (a.v.data) CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.v, shape, p.columns, &p.v));
    CIN_FAST_RETURN_IF_ERROR(sci::make_terms<Products>(context, shape, a, p, terms));
    return sci::backward<Products>(context, shape, !a.v.data, p);
  });
}

}  // namespace cin_fast
