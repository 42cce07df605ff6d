// cci backward on sm_90a, for what cci_wgmma_forward.cu serves. The sweep for row sums is built as
// the forward pass: 128 rows of both images of a pair, nothing traded. In the sweep for gradients a
// block owns 64 rows of both, and each warp group collects one image's gradients; for half of a
// tile's columns it computes what both images' gradients sum up, and trades the other image's.
#include "cci_pairs.cuh"
#include "warpgroup.cuh"

namespace cin_fast {
namespace cci {
namespace {

template <class T, int kColumns>
struct TermsTiles {
  static constexpr int kWidth = 64, kStages = 2;
  using X = Both<Operand<T, kConsumerRows, kWidth, kColumns, kStages>>;
  using V = Both<Operand<T, 0, kWidth, kThin, kStages>>;
  using Dy = Both<Operand<T, kConsumerRows, kWidth, kThin, 0>>;
  static constexpr size_t kSharedBytes = pipeline_bytes<kStages, X, V, Dy>();
};

template <class T, int kColumns>
__global__ void __launch_bounds__(kPipelineThreads, 1)
    cci_wgmma_terms_kernel(const __grid_constant__ Maps maps, BackwardParameters<T> p,
                           int row_blocks) {
#ifdef CIN_FAST_WGMMA
  follow();
  using Products = HalfProducts<T>;
  using Tiles = TermsTiles<T, kColumns>;
  constexpr int kWidth = Tiles::kWidth, kStages = Tiles::kStages;
  const Place block(row_blocks, kConsumerRows);
  const Pair pair(p.partner, block.image);
  if (pair.is_anothers()) return;
  const int channels = p.channels, tiles = divide_up(channels, kWidth);
  SharedMemory shared;
  const typename Tiles::X x(shared, maps.x, pair.first, pair.second);
  const typename Tiles::V v(shared, maps.v, pair.first, pair.second);
  const typename Tiles::Dy dy(shared, maps.dy, pair.first, pair.second);
  const Ring<kStages> ring(shared);
  if (is_producer()) return produce(ring, block.row, tiles, x, v, dy);

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const int own_row = consumer_row(), row = block.row + own_row;
  PairSums<Products> sums{{p.eta[pair.first], p.eta[pair.second]}, p.factor};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t first = pair.image(i) * channels;
    load_statistics<Products>(sums.statistics[i], p.row_max + first, p.row_sum + first, row,
                              channels);
  }
  ptx::mbarrier_wait(ring.rows_full, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    float s[2][kWidth / 8][4], dy_v[2][kWidth / 8][4];
    ring.wait(tile);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      start_nt(s[i], x[i].rows_from(own_row), x[i][tile]);
      start_nt(dy_v[i], dy[i].rows_from(own_row), v[i][tile]);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ring.release(tile);
    sums.add(s, dy_v, channels - tile * kWidth);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i == 1 && pair.is_single()) break;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_terms<Products>(p, pair.image(i), row + lane_row() + half * 8, sums.statistics[i][half],
                            quad_sum(sums.delta[i][half]), quad_sum(sums.deta[i][half]));
  }
#endif
}

template <class T, int kColumns>
struct BackwardTiles {
  static constexpr int kWidth = 64, kHalf = kWidth / 2, kStages = 2;
  using X = Both<Operand<T, kBlockRows, kWidth, kColumns, kStages>>;
  using V = Both<Operand<T, kBlockRows, kWidth, kThin, kStages>>;
  using Dy = V;
  // dS and |M|, packed.
  using Weights = Trade<uint32_t, 2 * kHalf / 4>;
  static constexpr size_t kSharedBytes = pipeline_bytes<kStages, X, V, Dy, Weights>();
};

// Gives the other warp group both operands' elements, and takes its for their place.
template <int kElements, int N>
__device__ __forceinline__ void exchange(const Trade<uint32_t, kElements>& trade, int tile,
                                         uint32_t (&first)[N][4], uint32_t (&second)[N][4]) {
  static_assert(kElements == 8 * N, "two operands");
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) {
    trade.given(tile, i) = first[i / 4][i % 4];
    trade.given(tile, 4 * N + i) = second[i / 4][i % 4];
  }
  trade.meet();
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) {
    first[i / 4][i % 4] = trade.taken(tile, i);
    second[i / 4][i % 4] = trade.taken(tile, 4 * N + i);
  }
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kPipelineThreads, 1)
    cci_wgmma_backward_kernel(const __grid_constant__ Maps maps, BackwardParameters<T> p,
                              int row_blocks) {
#ifdef CIN_FAST_WGMMA
  follow();
  using Products = HalfProducts<T>;
  using Tiles = BackwardTiles<T, kColumns>;
  constexpr int kWidth = Tiles::kWidth, kHalf = Tiles::kHalf, kStages = Tiles::kStages;
  const Place block(row_blocks, kBlockRows);
  const Pair pair(p.partner, block.image);
  if (pair.is_anothers()) return;
  const int channels = p.channels, tiles = divide_up(channels, kWidth);
  SharedMemory shared;
  const typename Tiles::X x(shared, maps.x, pair.first, pair.second);
  const typename Tiles::V v(shared, maps.v, pair.first, pair.second);
  const typename Tiles::Dy dy(shared, maps.dy, pair.first, pair.second);
  const typename Tiles::Weights trade(shared);
  const Ring<kStages> ring(shared);
  if (is_producer()) return produce(ring, block.row, tiles, x, v, dy);

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  // From here on image 0 is this warp group's own, image 1 its partner.
  const int own = consumer_row() / kBlockRows, column = own * kHalf;
  const auto own_x = x[own], other_x = x[1 - own];
  const auto own_v = v[own], other_v = v[1 - own];
  const auto own_dy = dy[own], other_dy = dy[1 - own];
  const int64_t images[2] = {pair.image(own), pair.image(1 - own)};
  const PairRows<Products> rows(p, images[0], images[1], block.row);
  const RowTerms* terms[2] = {terms_of(p, images[0]), terms_of(p, images[1])};
  float acc[kColumns / 8][4] = {}, thin[kThin / 8][4] = {};
  ptx::mbarrier_wait(ring.rows_full, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    float s[2][kHalf / 8][4];
    uint32_t ds[2][kHalf / 16][4], magnitudes[2][kHalf / 16][4];
    ring.wait(tile);
    ptx::wgmma_fence();
    start_nt(s[0], own_x.rows_from(0), own_x[tile], column);
    start_nt(s[1], other_x.rows_from(0), other_x[tile], column);
    // By parts: four thin products of all columns would not fit into the registers.
#pragma unroll
    for (int part = 0; part < kHalf / 16; ++part) {
      float dm[2][2][4], dm_mirrored[2][2][4];
      const int at = column + part * 16, first = tile * kWidth + at;
      ptx::wgmma_fence();
      start_nt(dm[0], own_dy.rows_from(0), own_v[tile], at);
      start_nt(dm[1], other_dy.rows_from(0), other_v[tile], at);
      start_nt(dm_mirrored[0], own_v.rows_from(0), own_dy[tile], at);
      start_nt(dm_mirrored[1], other_v.rows_from(0), other_dy[tile], at);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      contrast_gradients<2>({s[0] + part * 2, s[1] + part * 2}, dm,
                            {dm_mirrored[0], dm_mirrored[1]}, rows,
                            {terms[0] + first, terms[1] + first});
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pack<T>(&ds[i][part], dm[i]);
        pack<T>(&magnitudes[i][part], dm_mirrored[i]);
      }
    }
    exchange(trade, tile, ds[1], magnitudes[1]);
    // Now [1] is the own image's, of the other half of the columns.
    ptx::wgmma_fence();
    start_nn(acc, ds[0], own_x[tile], column);
    start_nn(acc, ds[1], own_x[tile], kHalf - column);
    start_nn(thin, magnitudes[0], own_dy[tile], column);
    start_nn(thin, magnitudes[1], own_dy[tile], kHalf - column);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ring.release(tile);
  }
  if (own == 1 && pair.is_single()) return;
  const int64_t first = images[0] * channels;
  store_rows<Products>(p.dx + first * p.positions, acc, 1.f, 1.f, own_x.rows_from(0), block.row,
                       channels, p.positions);
  store_tile<Products>(p.dv + first * p.columns, thin, 1.f, 1.f, block.row, channels, 0, p.columns);
#endif
}

}  // namespace

template <class T>
cudaError_t wgmma_backward(const Context& context, const Shape& shape, const CciBackward& a,
                           const BackwardParameters<T>& p) {
  Panels x, v, dy;
  CIN_FAST_RETURN_IF_ERROR(own_panels(context, a.x, shape, shape.positions, &x));
  CIN_FAST_RETURN_IF_ERROR(own_panels(context, a.v, shape, p.columns, &v));
  CIN_FAST_RETURN_IF_ERROR(own_panels(context, a.dy, shape, p.columns, &dy));
  return with_columns(shape, false, [&]<int kColumns, bool>() {
    const auto start = [&]<class Tiles>(const char* name, int rows, auto kernel) {
      Maps maps{};
      CIN_FAST_RETURN_IF_ERROR(Tiles::X::encode(&maps.x, x));
      CIN_FAST_RETURN_IF_ERROR(Tiles::V::encode(&maps.v, v));
      CIN_FAST_RETURN_IF_ERROR(Tiles::Dy::encode(&maps.dy, dy));
      return launch_row_blocks(context, shape, rows, name, kernel, Tiles::kSharedBytes, maps, p);
    };
    CIN_FAST_RETURN_IF_ERROR((start.template operator()<TermsTiles<T, kColumns>>(
        "cci_wgmma_terms", kConsumerRows, cci_wgmma_terms_kernel<T, kColumns>)));
    return start.template operator()<BackwardTiles<T, kColumns>>(
        "cci_wgmma_backward", kBlockRows, cci_wgmma_backward_kernel<T, kColumns>);
  });
}

template cudaError_t wgmma_backward(const Context&, const Shape&, const CciBackward&,
                                    const BackwardParameters<__nv_bfloat16>&);
template cudaError_t wgmma_backward(const Context&, const Shape&, const CciBackward&,
                                    const BackwardParameters<__half>&);

}  // namespace cci
}  // namespace cin_fast
