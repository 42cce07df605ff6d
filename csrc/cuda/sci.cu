// sci: Y = softmax(scale x x^T) v and its gradients. docs/kernels.md explains the algorithm.
//
// A block owns 64 rows i of one image and passes over the columns j of x x^T, tile by tile; no
// part of x x^T leaves the chip. Per element of a tile, forward: 2 L operations for x x^T, 1
// exponential, 2 K operations for the result. Backward, in one pass: 2 L for x x^T, 4 K for
// dY v^T and its mirror image, 2 exponentials, 2 L for dx, 2 K for dv.
#include "host.cuh"

namespace cin_fast {
namespace {

template <class T>
struct ForwardParameters {
  Batch<T> x, v;
  T* y;
  float *row_max, *row_sum;
  int columns;
  float factor;
};

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
  store_tile<Products>(p.y + image * x.rows * p.columns, acc, Products::divisor(softmax.sum[0]),
                       Products::divisor(softmax.sum[1]), row, x.rows, chunk, p.columns);
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

template <class T>
struct TermsParameters {
  Batch<T> dy, x, v;
  const float *row_max, *row_sum;
  RowTerms* terms;
  float factor;
};

constexpr int kTermsWidth = 32;

// What softmax_gradient takes off dP, delta_i = sum over j of P_ij dP_ij, for 64 rows. It equals
// dY_i . Y_i, but from a rounded Y that is too coarse: where one weight is nearly 1, dP - delta is
// a small difference of large numbers, and both have to come from the same product.
template <class Products>
__global__ void __launch_bounds__(kGroupThreads)
    sci_terms_kernel(TermsParameters<typename Products::Element> p, int row_blocks) {
  using T = typename Products::Element;
  constexpr int kWidth = kTermsWidth;
  const int64_t image = blockIdx.x / row_blocks;
  const int row = blockIdx.x % row_blocks * kBlockRows;
  const Matrix<T> x = p.x.image(image), v = p.v.image(image), dy = p.dy.image(image);
  SharedMemory shared;
  Stream<Products, kWidth> stream(shared);

  // Divided by the row's sum at the end, exactly as the weights are in effect.
  float peak[2], sum[2];
  typename Products::Wide delta[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + lane_row() + half * 8;
    peak[half] = r < x.rows ? p.row_max[image * x.rows + r] : 0.f;
    sum[half] = r < x.rows ? p.row_sum[image * x.rows + r] : 1.f;
  }
  for (int column = 0; column < x.rows; column += kWidth) {
    float s[kWidth / 8][4] = {}, dp[kWidth / 8][4] = {};
    stream.product(s, x, row, x, column);
    stream.product(dp, dy, row, v, column);
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (column + n * 8 + lane_column() + e % 2 < x.rows)
          delta[e / 2] += Products::exponential((s[n][e] - peak[e / 2]) * p.factor) * dp[n][e];
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto total = quad_sum(delta[half]) / sum[half];
    const int r = row + lane_row() + half * 8;
    if (r < x.rows && lane_id() % 4 == 0)
      p.terms[image * x.rows + r] = row_terms(peak[half], Products::divisor(sum[half]), total);
  }
}

template <class T>
struct BackwardParameters {
  Batch<T> dy, x, v;
  const RowTerms* terms;
  T *dx, *dv;
  int positions, columns;
  float scale, factor;
};

constexpr int kBackwardWidth = 32;

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

// P_ji and scale (dS_ij + dS_ji) of a tile, from x x^T, dY v^T and its mirror image; both stay in
// the arrays of the first two.
template <class Products, int N>
__device__ void softmax_gradient(float (&s)[N][4], float (&dp)[N][4],
                                 const float (&dp_mirrored)[N][4], const RowTerms (&rows)[2],
                                 const RowTerms* terms, int column, int channels, float scale,
                                 float factor) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const RowTerms of_column = load_terms(terms, column + n * 8 + lane_column() + e, channels);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 2 * half + e;
        const float p = of_column.y > 0.f ? weight<Products>(s[n][i], factor, rows[half]) : 0.f;
        const float p_mirrored =
            of_column.y > 0.f ? weight<Products>(s[n][i], factor, of_column) : 0.f;
        dp[n][i] = scale * (p * (dp[n][i] - rows[half].z - rows[half].w) +
                            p_mirrored * (dp_mirrored[n][i] - of_column.z - of_column.w));
        s[n][i] = p_mirrored;
      }
    }
  }
}

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
  const RowTerms* terms = p.terms + image * x.rows;
  const RowTerms of_rows[2] = {load_terms(terms, row + lane_row(), x.rows),
                               load_terms(terms, row + lane_row() + 8, x.rows)};
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
    softmax_gradient<Products>(s, dp, dp_mirrored, of_rows, terms, column, x.rows, p.scale,
                               p.factor);
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

template <class Products>
cudaError_t launch_terms(const Context& context, const Shape& shape, const SciBackward& a,
                         BackwardParameters<typename Products::Element>& p) {
  using T = typename Products::Element;
  const int64_t rows = static_cast<int64_t>(shape.batch) * shape.channels;
  auto* terms = static_cast<RowTerms*>(context.allocate(context.owner, rows * sizeof(RowTerms)));
  p.terms = terms;
  const int row_blocks = divide_up(shape.channels, kBlockRows);
  return launch(context, "sci_terms", sci_terms_kernel<Products>, dim3(shape.batch * row_blocks),
                kGroupThreads, 2 * Stream<Products, kTermsWidth>::kStage * sizeof(T),
                TermsParameters<T>{p.dy, p.x, p.v, a.row_max, a.row_sum, terms, p.factor},
                row_blocks);
}

}  // namespace

cudaError_t sci_forward(const Context& context, Dtype dtype, const Shape& shape, float scale,
                        const SciForward& a) {
  if (shape.batch == 0) return cudaSuccess;
  return with_products(context, dtype, [&](auto products) {
    using Products = decltype(products);
    using T = typename Products::Element;
    ForwardParameters<T> p{{},        {}, static_cast<T*>(a.y),           a.row_max,
                           a.row_sum, 0,  softmax_factor<Products>(scale)};
    CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.x, shape, shape.positions, &p.x));
    p.v = p.x;
    p.columns = a.v.data ? shape.columns : shape.positions;
    if (a.v.data) CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.v, shape, p.columns, &p.v));
    return p.columns <= kThin ? launch_forward<Products, kThin>(context, shape, p)
                              : launch_forward<Products, kChunk<Products>>(context, shape, p);
  });
}

cudaError_t sci_backward(const Context& context, Dtype dtype, const Shape& shape, float scale,
                         const SciBackward& a) {
  if (shape.batch == 0) return cudaSuccess;
  return with_products(context, dtype, [&](auto products) {
    using Products = decltype(products);
    using T = typename Products::Element;
    BackwardParameters<T> p{};
    p.dx = static_cast<T*>(a.dx);
    p.dv = static_cast<T*>(a.dv);
    p.positions = shape.positions;
    p.columns = a.v.data ? shape.columns : shape.positions;
    p.scale = scale;
    p.factor = softmax_factor<Products>(scale);
    CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.x, shape, shape.positions, &p.x));
    CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.dy, shape, p.columns, &p.dy));
    p.v = p.x;
    if (a.v.data) CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.v, shape, p.columns, &p.v));
    CIN_FAST_RETURN_IF_ERROR(launch_terms<Products>(context, shape, a, p));
    if (!a.v.data) return launch_backward<Products, Values::kTied>(context, shape, p);
    return p.columns <= kThin ? launch_backward<Products, Values::kThin>(context, shape, p)
                              : launch_backward<Products, Values::kOwn>(context, shape, p);
  });
}

}  // namespace cin_fast
