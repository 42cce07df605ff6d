// cci, forward: a sweep for peaks and sums, unless sci has left them, then one for the results. In
// the second a block owns the same rows of both images of a pair, and each of its two groups
// collects one image's y: it computes that image's part of a tile and trades it, in shared memory,
// for the other's.
#include "cci.cuh"

namespace cin_fast {
namespace cci {
namespace {

template <class Products>
__global__ void __launch_bounds__(kGroupThreads)
    cci_statistics_kernel(StatisticsParameters<typename Products::Element> p, int row_blocks) {
  using T = typename Products::Element;
  const int64_t image = blockIdx.x / row_blocks;
  const int row = blockIdx.x % row_blocks * kBlockRows;
  const Matrix<T> x = p.x.image(image);
  SharedMemory shared;
  Stream<Products, kStreamWidth> stream(shared);
  RunningSoftmax<Products> softmax(p.factor);
  for (int column = 0; column < x.rows; column += kStreamWidth) {
    float s[kStreamWidth / 8][4] = {}, nothing[1][4] = {};
    stream.product(s, x, row, x, column);
    softmax.update(s, nothing, x.rows - column);
  }
  softmax.finish();
  softmax.store(p.row_max + image * x.rows, p.row_sum + image * x.rows, row, x.rows);
}

template <class Products, int kColumns>
struct ForwardTiles {
  using T = typename Products::Element;
  static constexpr int kPitch = kColumns + Products::kPad;
  static constexpr size_t kStages = 2 * Stream<Products, kStreamWidth>::kStage * sizeof(T);
  static constexpr size_t kValues = kStreamWidth * kPitch * sizeof(T);
  static constexpr size_t kSharedBytes = shared_bytes(
      {kStages, kStages, kValues, kValues, Exchange<kStreamWidth / 8>::kElements * sizeof(float)});
};

// Grid: row blocks of all images, chunks of v's columns.
template <class Products, int kColumns>
__global__ void __launch_bounds__(kBlockThreads, 1)
    cci_forward_kernel(ForwardParameters<typename Products::Element> p, int row_blocks) {
  using Tiles = ForwardTiles<Products, kColumns>;
  using T = typename Products::Element;
  constexpr int kAcross = kStreamWidth / 8;
  const Pair pair(p.partner, blockIdx.x / row_blocks);
  if (pair.is_anothers()) return;
  const int row = blockIdx.x % row_blocks * kBlockRows, chunk = blockIdx.y * kColumns;
  const bool first = group_id() == 0;
  const int64_t own = first ? pair.first : pair.second;
  const float eta = p.eta[own];
  const Matrix<T> x = p.x.image(own), v = p.v.image(own);
  SharedMemory shared;
  Stream<Products, kStreamWidth> streams[2] = {Stream<Products, kStreamWidth>(shared),
                                               Stream<Products, kStreamWidth>(shared)};
  constexpr int kTileElements = kStreamWidth * Tiles::kPitch;
  T* const values = shared.take<T>(2 * kTileElements) + (first ? 0 : kTileElements);
  Exchange<kAcross> exchange(shared);
  Stream<Products, kStreamWidth> stream = first ? streams[0] : streams[1];

  RowTerms terms[2];
  load_statistics<Products>(terms, p.row_max + own * x.rows, p.row_sum + own * x.rows, row, x.rows);
  float acc[kColumns / 8][4] = {};
  for (int column = 0; column < x.rows; column += kStreamWidth) {
    load_tile<kStreamWidth, kColumns>(values, Tiles::kPitch, v, column, chunk, group_thread(),
                                      kGroupThreads);
    ptx::cp_async_commit();
    float weights[kAcross][4] = {}, others[kAcross][4];
    stream.product(weights, x, row, x, column);
    to_weights<Products>(weights, terms, p.factor, x.rows - column);
    exchange.give(weights);
    __syncthreads();
    exchange.take(others);
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[n][e] = fabsf(contrast(weights[n][e], eta, others[n][e]));
    }
    Products::nn(acc, weights, values, Tiles::kPitch);
    // The next tile of v and the next weights land where these lie.
    __syncthreads();
  }
  if (!first && pair.is_single()) return;
  store_tile<Products>(p.y + own * x.rows * p.columns, acc, 1.f, 1.f, row, x.rows, chunk,
                       p.columns);
}

template <class Products, int kColumns>
cudaError_t launch_forward(const Context& context, const Shape& shape,
                           const ForwardParameters<typename Products::Element>& parameters) {
  const int row_blocks = divide_up(shape.channels, kBlockRows);
  return launch(context, "cci_forward", cci_forward_kernel<Products, kColumns>,
                dim3(shape.batch * row_blocks, divide_up(parameters.columns, kColumns)),
                kBlockThreads, ForwardTiles<Products, kColumns>::kSharedBytes, parameters,
                row_blocks);
}

template <class Products>
cudaError_t launch_statistics(const Context& context, const Shape& shape,
                              const StatisticsParameters<typename Products::Element>& parameters) {
  using T = typename Products::Element;
  const int row_blocks = divide_up(shape.channels, kBlockRows);
  return launch(context, "cci_statistics", cci_statistics_kernel<Products>,
                dim3(shape.batch * row_blocks), kGroupThreads,
                2 * Stream<Products, kStreamWidth>::kStage * sizeof(T), parameters, row_blocks);
}

template <class Products>
cudaError_t forward(const Context& context, const Shape& shape, const CciForward& a,
                    const StatisticsParameters<typename Products::Element>& statistics,
                    const ForwardParameters<typename Products::Element>& p) {
  if (!a.after_sci)
    CIN_FAST_RETURN_IF_ERROR(launch_statistics<Products>(context, shape, statistics));
  return p.columns <= kThin ? launch_forward<Products, kThin>(context, shape, p)
                            : launch_forward<Products, kChunk<Products>>(context, shape, p);
}

}  // namespace
}  // namespace cci

cudaError_t cci_forward(const Context& context, Dtype dtype, const Shape& shape, float scale,
                        const CciForward& a) {
  if (shape.batch == 0) return cudaSuccess;
  return with_products(context, dtype, [&](auto products) {
    using Products = decltype(products);
    using T = typename Products::Element;
    cci::ForwardParameters<T> p{};
    p.partner = a.partner;
    p.eta = a.eta;
    p.y = static_cast<T*>(a.y);
    p.row_max = a.row_max;
    p.row_sum = a.row_sum;
    p.channels = shape.channels;
    p.columns = a.v.data ? shape.columns : shape.positions;
    p.factor = softmax_factor<Products>(scale);
    cci::StatisticsParameters<T> statistics{{}, a.row_max, a.row_sum, p.channels, p.factor};
    if constexpr (sizeof(T) == 2)
      if (is_wgmma(context, shape, !a.v.data))
        return cci::wgmma_forward(context, shape, a, statistics, p);
    CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.x, shape, shape.positions, &p.x));
    statistics.x = p.v = p.x;
    if (a.v.data) CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.v, shape, p.columns, &p.v));
    return cci::forward<Products>(context, shape, a, statistics, p);
  });
}

}  // namespace cin_fast
