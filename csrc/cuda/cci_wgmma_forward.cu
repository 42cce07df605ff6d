// cci forward on sm_90a: 16-bit operands, at most 208 positions, v = x or at most 16 columns of v.
// A sweep for peaks and sums, unless sci has left them, then one for the results, of both images of
// a pair. Where v is thin, a block owns 128 rows of both: a warp group computes both images'
// weights for 64 of them, and nothing is traded. Where v = x, it owns 64 rows of both: a warp group
// collects one image's y, from that image's weights and those that the other trades for them.
#include "cci.cuh"
#include "warpgroup.cuh"

namespace cin_fast {
namespace cci {
namespace {

template <class T, int kColumns>
struct StatisticsTiles {
  static constexpr int kWidth = kConsumerRows, kStages = 3;
  using X = OwnFirst<T, kWidth, kColumns, kStages>;
  static constexpr size_t kSharedBytes = pipeline_bytes<kStages, X>();
};

template <class T, int kColumns>
__global__ void __launch_bounds__(kPipelineThreads, 1)
    cci_wgmma_statistics_kernel(const __grid_constant__ Maps maps, StatisticsParameters<T> p,
                                int row_blocks) {
#ifdef CIN_FAST_WGMMA
  follow();
  using Tiles = StatisticsTiles<T, kColumns>;
  constexpr int kWidth = Tiles::kWidth;
  const Place block(row_blocks, kConsumerRows);
  const int channels = p.channels;
  const Walk walk(divide_up(channels, kWidth), block.row / kWidth);
  SharedMemory shared;
  const typename Tiles::X x(shared, maps.x, block.image);
  const Ring<Tiles::kStages, true> ring(shared);
  if (is_producer()) return produce(ring, block.row, walk, x);

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const int own_row = consumer_row();
  RunningSoftmax<HalfProducts<T>> softmax(p.factor);
  for (int i = 0; i < walk.tiles; ++i) {
    float s[kWidth / 8][4], shrink[2];
    ring.wait(i);
    ptx::wgmma_fence();
    start_nt(s, x.rows_from(own_row), x[i]);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ring.release(i);
    softmax.weigh(s, shrink, channels - walk[i] * kWidth);
  }
  softmax.finish();
  const int64_t first = static_cast<int64_t>(block.image) * channels;
  softmax.store(p.row_max + first, p.row_sum + first, block.row + own_row, channels);
#endif
}

template <class T, int kColumns>
struct ForwardTiles {
  static constexpr int kWidth = 64, kStages = 2;
  using X = Both<Operand<T, kConsumerRows, kWidth, kColumns, kStages>>;
  using V = Both<Operand<T, 0, kWidth, kThin, kStages>>;
  static constexpr size_t kSharedBytes = pipeline_bytes<kStages, X, V>();
};

// |M| of both images, from their weights.
template <class T, int N>
__device__ __forceinline__ void pack_contrasts(uint32_t (&magnitudes)[2][N / 2][4],
                                               float (&weights)[2][N][4], const float (&eta)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float p[2] = {weights[0][n][e], weights[1][n][e]};
#pragma unroll
      for (int i = 0; i < 2; ++i) weights[i][n][e] = fabsf(contrast(p[i], eta[i], p[1 - i]));
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) pack<T>(magnitudes[i], weights[i]);
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kPipelineThreads, 1)
    cci_wgmma_forward_kernel(const __grid_constant__ Maps maps, ForwardParameters<T> p,
                             int row_blocks) {
#ifdef CIN_FAST_WGMMA
  follow();
  using Products = HalfProducts<T>;
  using Tiles = ForwardTiles<T, kColumns>;
  constexpr int kWidth = Tiles::kWidth, kStages = Tiles::kStages;
  const Place block(row_blocks, kConsumerRows);
  const Pair pair(p.partner, block.image);
  if (pair.is_anothers()) return;
  const int channels = p.channels, tiles = divide_up(channels, kWidth);
  SharedMemory shared;
  const typename Tiles::X x(shared, maps.x, pair.first, pair.second);
  const typename Tiles::V v(shared, maps.v, pair.first, pair.second);
  const Ring<kStages> ring(shared);
  if (is_producer()) return produce(ring, block.row, tiles, x, v);

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const int own_row = consumer_row(), row = block.row + own_row;
  const float eta[2] = {p.eta[pair.first], p.eta[pair.second]};
  RowTerms terms[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t first = pair.image(i) * channels;
    load_statistics<Products>(terms[i], p.row_max + first, p.row_sum + first, row, channels);
  }
  float y[2][kThin / 8][4] = {};
  ptx::mbarrier_wait(ring.rows_full, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    float weights[2][kWidth / 8][4];
    uint32_t magnitudes[2][kWidth / 16][4];
    ring.wait(tile);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i) start_nt(weights[i], x[i].rows_from(own_row), x[i][tile]);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 2; ++i)
      to_weights<Products>(weights[i], terms[i], p.factor, channels - tile * kWidth);
    pack_contrasts<T>(magnitudes, weights, eta);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i) start_nn(y[i], magnitudes[i], v[i][tile]);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ring.release(tile);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i == 1 && pair.is_single()) break;
    const int64_t first = pair.image(i) * channels * p.columns;
    store_tile<Products>(p.y + first, y[i], 1.f, 1.f, row, channels, 0, p.columns);
  }
#endif
}

template <class T, int kColumns>
struct TiedTiles {
  static constexpr int kWidth = 64, kStages = 2;
  using X = Both<Operand<T, kBlockRows, kWidth, kColumns, kStages>>;
  using Weights = Trade<float, kWidth / 2>;
  static constexpr size_t kSharedBytes = pipeline_bytes<kStages, X, Weights>();
};

// |M| from a tile of one's own image's weights, and of those that the other warp group has.
template <int kElements, int N>
__device__ __forceinline__ void trade_contrasts(float (&weights)[N][4],
                                                const Trade<float, kElements>& trade, int tile,
                                                float eta) {
  static_assert(kElements == 4 * N, "one tile");
#pragma unroll
  for (int i = 0; i < kElements; ++i) trade.given(tile, i) = weights[i / 4][i % 4];
  trade.meet();
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    float& mine = weights[i / 4][i % 4];
    mine = fabsf(contrast(mine, eta, trade.taken(tile, i)));
  }
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kPipelineThreads, 1)
    cci_wgmma_tied_forward_kernel(const __grid_constant__ Maps maps, ForwardParameters<T> p,
                                  int row_blocks) {
#ifdef CIN_FAST_WGMMA
  follow();
  using Products = HalfProducts<T>;
  using Tiles = TiedTiles<T, kColumns>;
  constexpr int kWidth = Tiles::kWidth, kStages = Tiles::kStages;
  const Place block(row_blocks, kBlockRows);
  const Pair pair(p.partner, block.image);
  if (pair.is_anothers()) return;
  const int channels = p.channels, tiles = divide_up(channels, kWidth);
  SharedMemory shared;
  const typename Tiles::X x(shared, maps.x, pair.first, pair.second);
  const typename Tiles::Weights trade(shared);
  const Ring<kStages> ring(shared);
  if (is_producer()) return produce(ring, block.row, tiles, x);

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const int own = consumer_row() / kBlockRows;
  const auto own_x = x[own];
  const float eta = p.eta[pair.image(own)];
  RowTerms terms[2];
  const int64_t first = pair.image(own) * channels;
  load_statistics<Products>(terms, p.row_max + first, p.row_sum + first, block.row, channels);
  float acc[kColumns / 8][4] = {};
  float s[kWidth / 8][4];
  uint32_t weights[kWidth / 16][4];
  const auto weigh = [&](int tile) {
    to_weights<Products>(s, terms, p.factor, channels - tile * kWidth);
    trade_contrasts(s, trade, tile, eta);
  };
  ptx::mbarrier_wait(ring.rows_full, 0);
  ring.wait(0);
  ptx::wgmma_fence();
  start_nt(s, own_x.rows_from(0), own_x[0]);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  weigh(0);
  pack<T>(weights, s);
  // While a tile's weights are computed, those of the tile before are multiplied.
  for (int tile = 1; tile < tiles; ++tile) {
    ring.wait(tile);
    ptx::wgmma_fence();
    start_nt(s, own_x.rows_from(0), own_x[tile]);
    ptx::wgmma_commit();
    start_nn(acc, weights, own_x[tile - 1]);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    weigh(tile);
    ptx::wgmma_wait<0>();
    ring.release(tile - 1);
    pack<T>(weights, s);
  }
  ptx::wgmma_fence();
  start_nn(acc, weights, own_x[tiles - 1]);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  if (own == 1 && pair.is_single()) return;
  store_rows<Products>(p.y + first * p.columns, acc, 1.f, 1.f, own_x.rows_from(0), block.row,
                       channels, p.columns);
#endif
}

}  // namespace

template <class T>
cudaError_t wgmma_forward(const Context& context, const Shape& shape, const CciForward& a,
                          const StatisticsParameters<T>& statistics,
                          const ForwardParameters<T>& p) {
  Panels x, v;
  CIN_FAST_RETURN_IF_ERROR(own_panels(context, a.x, shape, shape.positions, &x));
  if (a.v.data) CIN_FAST_RETURN_IF_ERROR(own_panels(context, a.v, shape, p.columns, &v));
  return with_columns(shape, !a.v.data, [&]<int kColumns, bool kTied>() {
    Maps maps{};
    if (!a.after_sci) {
      using Statistics = StatisticsTiles<T, kColumns>;
      CIN_FAST_RETURN_IF_ERROR(Statistics::X::encode(&maps.x, x));
      CIN_FAST_RETURN_IF_ERROR(launch_row_blocks(
          context, shape, kConsumerRows, "cci_wgmma_statistics",
          cci_wgmma_statistics_kernel<T, kColumns>, Statistics::kSharedBytes, maps, statistics));
    }
    if constexpr (kTied) {
      using Tiles = TiedTiles<T, kColumns>;
      CIN_FAST_RETURN_IF_ERROR(Tiles::X::encode(&maps.x, x));
      return launch_row_blocks(context, shape, kBlockRows, "cci_wgmma_tied_forward",
                               cci_wgmma_tied_forward_kernel<T, kColumns>, Tiles::kSharedBytes,
                               maps, p);
    } else {
      using Tiles = ForwardTiles<T, kColumns>;
      CIN_FAST_RETURN_IF_ERROR(Tiles::X::encode(&maps.x, x));
      CIN_FAST_RETURN_IF_ERROR(Tiles::V::encode(&maps.v, v));
      return launch_row_blocks(context, shape, kConsumerRows, "cci_wgmma_forward",
                               cci_wgmma_forward_kernel<T, kColumns>, Tiles::kSharedBytes, maps, p);
    }
  });
}

template cudaError_t wgmma_forward(const Context&, const Shape&, const CciForward&,
                                   const StatisticsParameters<__nv_bfloat16>&,
                                   const ForwardParameters<__nv_bfloat16>&);
template cudaError_t wgmma_forward(const Context&, const Shape&, const CciForward&,
                                   const StatisticsParameters<__half>&,
                                   const ForwardParameters<__half>&);

}  // namespace cci
}  // namespace cin_fast
