// cci, backward: a sweep for the row sums that the gradients need, then one for the gradients. A
// pair of images is one block's work: each of its two groups collects its own image's gradients, so
// that nothing is scattered.
#include "cci.cuh"

namespace cin_fast {
namespace cci {
namespace {

constexpr int kBackwardWidth = 16;

// Both groups have the same to say of an image that is its own partner.
__device__ __forceinline__ bool stores(const Pair& pair) {
  return group_id() == 0 || !pair.is_single();
}

template <class Products>
constexpr size_t kTermsSharedBytes =
    shared_bytes({2 * Stream<Products, kStreamWidth>::kStage * sizeof(typename Products::Element),
                  2 * Stream<Products, kStreamWidth>::kStage * sizeof(typename Products::Element),
                  Exchange<kStreamWidth / 8>::kElements * sizeof(float)});

// delta_i = sum over j of P_ij dP_ij, and what each row gives to the gradient of eta.
template <class Products>
__global__ void __launch_bounds__(kBlockThreads)
    cci_terms_kernel(BackwardParameters<typename Products::Element> p, int row_blocks) {
  using T = typename Products::Element;
  constexpr int kAcross = kStreamWidth / 8;
  const Pair pair(p.partner, blockIdx.x / row_blocks);
  if (pair.is_anothers()) return;
  const int64_t own = pair.image(group_id()), other = pair.image(1 - group_id());
  const int row = blockIdx.x % row_blocks * kBlockRows;
  const Matrix<T> x = p.x.image(own), v = p.v.image(own), dy = p.dy.image(own);
  const float eta = p.eta[own], other_eta = p.eta[other];
  SharedMemory shared;
  Stream<Products, kStreamWidth> streams[2] = {Stream<Products, kStreamWidth>(shared),
                                               Stream<Products, kStreamWidth>(shared)};
  Exchange<kAcross> exchange(shared);
  Stream<Products, kStreamWidth> stream = group_id() == 0 ? streams[0] : streams[1];

  RowTerms terms[2];
  load_statistics<Products>(terms, p.row_max + own * x.rows, p.row_sum + own * x.rows, row, x.rows);
  typename Products::Wide delta[2] = {}, deta[2] = {};
  for (int column = 0; column < x.rows; column += kStreamWidth) {
    float powers[kAcross][4] = {}, dm[kAcross][4] = {}, weights[kAcross][4], others[kAcross][4];
    stream.product(powers, x, row, x, column);
    stream.product(dm, dy, row, v, column);
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const RowTerms& t = terms[e / 2];
        const bool exists = column + n * 8 + lane_column() + e % 2 < x.rows;
        powers[n][e] = exists ? Products::exponential((powers[n][e] - t.x) * p.factor) : 0.f;
        weights[n][e] = Products::over(powers[n][e], t.y);
      }
    }
    exchange.give(weights);
    __syncthreads();
    exchange.take(others);
    // All have taken the weights; now dM.
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dm[n][e] = with_sign_of(contrast(weights[n][e], eta, others[n][e]), dm[n][e]);
        deta[e / 2] -= dm[n][e] * others[n][e];
      }
    }
    exchange.give(dm);
    __syncthreads();
    exchange.take(others);
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        delta[e / 2] += powers[n][e] * (dm[n][e] - other_eta * others[n][e]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto total_delta = quad_sum(delta[half]);
    const auto total_deta = quad_sum(deta[half]);
    if (stores(pair))
      store_terms<Products>(p, own, row + lane_row() + half * 8, terms[half], total_delta,
                            total_deta);
  }
}

// One block an image, always in the same order. Terms of either sign cancel: hence double.
__global__ void __launch_bounds__(kGroupThreads)
    cci_deta_kernel(const double* deta_rows, int rows, float* deta) {
  const double* of_image = deta_rows + static_cast<int64_t>(blockIdx.x) * rows;
  double sum = 0.0;
  for (int r = threadIdx.x; r < rows; r += kGroupThreads) sum += of_image[r];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  SharedMemory shared;
  double* of_warps = shared.take<double>(kGroupThreads / 32);
  if (lane_id() == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0)
    deta[blockIdx.x] = static_cast<float>(of_warps[0] + of_warps[1] + of_warps[2] + of_warps[3]);
}

template <class Products, Values kValues>
struct BackwardTiles {
  using T = typename Products::Element;
  static constexpr int kColumns = kChunk<Products>;
  static constexpr int kPitch = kColumns + Products::kPad, kThinPitch = kThin + Products::kPad;
  static constexpr int kTile = kBackwardWidth * kPitch;
  static constexpr int kSecond = kValues == Values::kTied   ? kTile
                                 : kValues == Values::kThin ? kBackwardWidth * kThinPitch
                                                            : 0;
  static constexpr size_t kStages = 2 * Stream<Products, kBackwardWidth>::kStage * sizeof(T);
  static constexpr size_t kSharedBytes =
      shared_bytes({kStages, kStages, 2 * kTile * sizeof(T), 2 * kSecond * sizeof(T),
                    2 * Exchange<kBackwardWidth / 8>::kElements * sizeof(float)});
};

template <class Products, Values kValues>
__global__ void __launch_bounds__(kBlockThreads)
    cci_backward_kernel(BackwardParameters<typename Products::Element> p, int row_blocks) {
  using Tiles = BackwardTiles<Products, kValues>;
  using T = typename Products::Element;
  using Tile = Stream<Products, kBackwardWidth>;
  constexpr int kAcross = kBackwardWidth / 8, kColumns = Tiles::kColumns;
  const Pair pair(p.partner, blockIdx.x / row_blocks);
  if (pair.is_anothers()) return;
  const int64_t own = pair.image(group_id()), other = pair.image(1 - group_id());
  const int row = blockIdx.x % row_blocks * kBlockRows;
  const int dx_chunks = divide_up(p.positions, kColumns);
  const bool for_dv = static_cast<int>(blockIdx.y) >= dx_chunks;
  const int chunk = (for_dv ? blockIdx.y - dx_chunks : blockIdx.y) * kColumns;
  const Matrix<T> x = p.x.image(own), v = p.v.image(own), dy = p.dy.image(own);
  const float eta = p.eta[own], other_eta = p.eta[other];
  const RowTerms* terms = p.terms + own * padded_rows(x.rows);
  const RowTerms of_rows[2] = {terms[row + lane_row()], terms[row + lane_row() + 8]};
  SharedMemory shared;
  Tile streams[2] = {Tile(shared), Tile(shared)};
  T* first = shared.take<T>(2 * Tiles::kTile) + group_id() * Tiles::kTile;
  T* second = shared.take<T>(2 * Tiles::kSecond) + group_id() * Tiles::kSecond;
  Exchange<2 * kAcross> exchange(shared);
  Tile stream = group_id() == 0 ? streams[0] : streams[1];

  float acc[kColumns / 8][4] = {}, thin[kThin / 8][4] = {};
  for (int column = 0; column < x.rows; column += kBackwardWidth) {
    if (for_dv)
      load_tile<kBackwardWidth, kColumns>(first, Tiles::kPitch, dy, column, chunk, group_thread(),
                                          kGroupThreads);
    else
      load_tile<kBackwardWidth, kColumns>(first, Tiles::kPitch, x, column, chunk, group_thread(),
                                          kGroupThreads);
    if constexpr (kValues == Values::kTied)
      load_tile<kBackwardWidth, kColumns>(second, Tiles::kPitch, dy, column, chunk, group_thread(),
                                          kGroupThreads);
    if constexpr (kValues == Values::kThin)
      load_tile<kBackwardWidth, kThin>(second, Tiles::kThinPitch, dy, column, 0, group_thread(),
                                       kGroupThreads);
    ptx::cp_async_commit();

    // The tile and its mirror image, one after the other: weights, then dM.
    float s[kAcross][4] = {}, straight[kAcross][4] = {}, mirrored[kAcross][4] = {};
    stream.product(s, x, row, x, column);
    if (!for_dv) {
      stream.product(straight, dy, row, v, column);
      stream.product(mirrored, v, row, dy, column);
    }
    float weights[2 * kAcross][4], others[2 * kAcross][4], dm[2 * kAcross][4];
    RowTerms of_columns[kAcross][2];
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const RowTerms t = terms[column + n * 8 + lane_column() + e];
        of_columns[n][e] = t;
#pragma unroll
        for (int i = e; i < 4; i += 2) {
          const bool exists = t.y > 0.f;
          weights[n][i] = exists ? weight<Products>(s[n][i], p.factor, of_rows[i / 2]) : 0.f;
          weights[kAcross + n][i] = exists ? weight<Products>(s[n][i], p.factor, t) : 0.f;
          dm[n][i] = straight[n][i];
          dm[kAcross + n][i] = mirrored[n][i];
        }
      }
    }
    exchange.give(weights);
    __syncthreads();
    exchange.take(others);
    // All have taken the weights; now dM.
    __syncthreads();
    // |M| of the mirror image: what a column's row of W gives to this row of dv.
    float magnitude[kAcross][4];
#pragma unroll
    for (int n = 0; n < 2 * kAcross; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float m = contrast(weights[n][e], eta, others[n][e]);
        dm[n][e] = with_sign_of(m, dm[n][e]);
        if (n >= kAcross) magnitude[n - kAcross][e] = fabsf(m);
      }
    }
    exchange.give(dm);
    __syncthreads();
    exchange.take(others);
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const RowTerms &r = of_rows[e / 2], &c = of_columns[n][e % 2];
        const float dp = dm[n][e] - other_eta * others[n][e];
        const float dp_mirrored = dm[kAcross + n][e] - other_eta * others[kAcross + n][e];
        s[n][e] = p.scale * (weights[n][e] * (dp - r.z - r.w) +
                             weights[kAcross + n][e] * (dp_mirrored - c.z - c.w));
      }
    }
    if (for_dv)
      Products::nn(acc, magnitude, first, Tiles::kPitch);
    else
      Products::nn(acc, s, first, Tiles::kPitch);
    if constexpr (kValues == Values::kTied) Products::nn(acc, magnitude, second, Tiles::kPitch);
    if constexpr (kValues == Values::kThin)
      Products::nn(thin, magnitude, second, Tiles::kThinPitch);
    // The next tiles land where these lie.
    __syncthreads();
  }
  if (!stores(pair)) return;
  if (for_dv)
    store_tile<Products>(p.dv + own * x.rows * p.columns, acc, 1.f, 1.f, row, x.rows, chunk,
                         p.columns);
  else
    store_tile<Products>(p.dx + own * x.rows * p.positions, acc, 1.f, 1.f, row, x.rows, chunk,
                         p.positions);
  if constexpr (kValues == Values::kThin)
    if (blockIdx.y == 0)
      store_tile<Products>(p.dv + own * x.rows * p.columns, thin, 1.f, 1.f, row, x.rows, 0,
                           p.columns);
}

template <class Products, Values kValues>
cudaError_t launch_backward(const Context& context, const Shape& shape,
                            const BackwardParameters<typename Products::Element>& parameters) {
  const int row_blocks = divide_up(shape.channels, kBlockRows);
  const int chunks =
      divide_up(parameters.positions, kChunk<Products>) +
      (kValues == Values::kOwn ? divide_up(parameters.columns, kChunk<Products>) : 0);
  return launch(context, "cci_backward", cci_backward_kernel<Products, kValues>,
                dim3(shape.batch * row_blocks, chunks), kBlockThreads,
                BackwardTiles<Products, kValues>::kSharedBytes, parameters, row_blocks);
}

template <class Products>
cudaError_t backward(const Context& context, const Shape& shape, const CciBackward& a,
                     BackwardParameters<typename Products::Element> p) {
  const bool tied = !a.v.data;
  if constexpr (sizeof(typename Products::Element) == 2)
    if (is_wgmma(context, shape, tied))
      return tied ? wgmma_tied_backward(context, shape, a, p)
                  : wgmma_backward(context, shape, a, p);
  CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.x, shape, shape.positions, &p.x));
  CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.dy, shape, p.columns, &p.dy));
  p.v = p.x;
  if (!tied) CIN_FAST_RETURN_IF_ERROR(aligned_batch(context, a.v, shape, p.columns, &p.v));
  const int row_blocks = divide_up(shape.channels, kBlockRows);
  CIN_FAST_RETURN_IF_ERROR(launch(context, "cci_terms", cci_terms_kernel<Products>,
                                  dim3(shape.batch * row_blocks), kBlockThreads,
                                  kTermsSharedBytes<Products>, p, row_blocks));
  if (tied) return launch_backward<Products, Values::kTied>(context, shape, p);
  return p.columns <= kThin ? launch_backward<Products, Values::kThin>(context, shape, p)
                            : launch_backward<Products, Values::kOwn>(context, shape, p);
}

}  // namespace
}  // namespace cci

cudaError_t cci_backward(const Context& context, Dtype dtype, const Shape& shape, float scale,
                         const CciBackward& a) {
  if (shape.batch == 0) return cudaSuccess;
  return with_products(context, dtype, [&](auto products) {
    using Products = decltype(products);
    using T = typename Products::Element;
    const size_t rows = static_cast<size_t>(shape.batch) * padded_rows(shape.channels);
    cci::BackwardParameters<T> p{};
    p.partner = a.partner;
    p.eta = a.eta;
    p.row_max = a.row_max;
    p.row_sum = a.row_sum;
    p.terms = static_cast<RowTerms*>(context.allocate(context.owner, rows * sizeof(RowTerms)));
    p.deta_rows = static_cast<double*>(context.allocate(context.owner, rows * sizeof(double)));
    p.dx = static_cast<T*>(a.dx);
    p.dv = static_cast<T*>(a.dv);
    p.channels = shape.channels;
    p.positions = shape.positions;
    p.columns = a.v.data ? shape.columns : shape.positions;
    p.scale = scale;
    p.factor = softmax_factor<Products>(scale);
    CIN_FAST_RETURN_IF_ERROR(cci::backward<Products>(context, shape, a, p));
    return launch(context, "cci_deta", cci::cci_deta_kernel, dim3(shape.batch), kGroupThreads, 128,
                  p.deta_rows, shape.channels, a.deta);
  });
}

}  // namespace cin_fast
