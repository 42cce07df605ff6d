// cci backward on sm_90a, for what cci_wgmma_forward.cu serves. The sweep for row sums is built as
// the forward pass: 128 rows of both images of a pair, nothing traded. In the sweep for gradients a
// block owns 64 rows of both, and each warp group collects one image's gradients; for half of a
// tile's columns it computes what both images' gradients sum up, and trades the other image's.
#include "cci.cuh"
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

// Of a lane's two rows in both images: delta_i = sum over j of P_ij dP_ij, not yet divided by the
// row's sum, and what each row gives to the gradient of eta.
template <class Products>
struct PairSums {
  float eta[2], factor;
  RowTerms statistics[2][2];
  float delta[2][2] = {}, deta[2][2] = {};

  // From both images' tiles of x x^T and of dY v^T, of which `columns` columns exist.
  template <int N>
  __device__ void add(const float (&s)[2][N][4], const float (&dy_v)[2][N][4], int columns) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool exists = n * 8 + lane_column() + e % 2 < columns;
        float power[2], weight[2], dm[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const RowTerms& row = statistics[i][e / 2];
          const float exponent = (s[i][n][e] - row.x) * factor;
          power[i] = Products::exponential(exists ? exponent : -INFINITY);
          weight[i] = Products::over(power[i], row.y);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          dm[i] = with_sign_of(contrast(weight[i], eta[i], weight[1 - i]), dy_v[i][n][e]);
          deta[i][e / 2] -= dm[i] * weight[1 - i];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) delta[i][e / 2] += power[i] * (dm[i] - eta[1 - i] * dm[1 - i]);
      }
    }
  }
};

template <class T, int kColumns>
__global__ void __launch_bounds__(kPipelineThreads, 1)
    cci_wgmma_terms_kernel(const __grid_constant__ Maps maps, BackwardParameters<T> p,
                           int row_blocks) {
#ifdef CIN_FAST_WGMMA
  using Products = HalfProducts<T>;
  using Tiles = TermsTiles<T, kColumns>;
  constexpr int kWidth = Tiles::kWidth, kStages = Tiles::kStages;
  const Place block(row_blocks, kConsumerRows);
  const Pair pair(p.partner, block.image);
  if (pair.is_anothers()) return;
  const int channels = p.x.rows, tiles = divide_up(channels, kWidth);
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
      start_nt(s[i], x[i].rows, own_row, x[i][tile]);
      start_nt(dy_v[i], dy[i].rows, own_row, v[i][tile]);
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
  using Thin = Both<Operand<T, kBlockRows, kWidth, kThin, kStages>>;
  // dS and |M|, packed.
  using Weights = Trade<uint32_t, 2 * kHalf / 4>;
  static constexpr size_t kSharedBytes = pipeline_bytes<kStages, X, Thin, Thin, Weights>();
};

// What elements of x x^T, from column tile `from` on, give to the gradients of both images: scale
// (dS_ij + dS_ji) and |M_ji|. They stay in the arrays of dY v^T and of its mirror image. Of two
// images [0] is one's own.
template <class Products, int M, int N>
__device__ __forceinline__ void contrast_gradient(
    float (&dm)[2][N][4], float (&dm_mirrored)[2][N][4], const float (&s)[2][M][4], int from,
    const RowTerms (&rows)[2][2], const RowTerms* const (&of_columns)[2], const float (&eta)[2],
    float scale, float factor) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // Holds the terms' loads back: moved up, all together, they would take registers and spill.
      __syncwarp();
      const int column = n * 8 + lane_column() + e;
      const RowTerms of_column[2] = {of_columns[0][column], of_columns[1][column]};
      const bool exists = of_column[0].y > 0.f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = 2 * half + e;
        float p[2], p_mirrored[2], d[2], d_mirrored[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const RowTerms& row = rows[i][half];
          // Chosen before the exponential, not around it: that would be a branch.
          const float exponent = (s[i][from + n][k] - row.x) * factor;
          const float mirrored = (s[i][from + n][k] - of_column[i].x) * factor;
          p[i] = Products::over(Products::exponential(exists ? exponent : -INFINITY), row.y);
          p_mirrored[i] =
              Products::over(Products::exponential(exists ? mirrored : -INFINITY), of_column[i].y);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float m = contrast(p_mirrored[i], eta[i], p_mirrored[1 - i]);
          d[i] = with_sign_of(contrast(p[i], eta[i], p[1 - i]), dm[i][n][k]);
          d_mirrored[i] = with_sign_of(m, dm_mirrored[i][n][k]);
          dm_mirrored[i][n][k] = fabsf(m);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float dp = d[i] - eta[1 - i] * d[1 - i];
          const float dp_mirrored = d_mirrored[i] - eta[1 - i] * d_mirrored[1 - i];
          dm[i][n][k] = scale * (p[i] * minus_delta<Products>(dp, rows[i][half]) +
                                 p_mirrored[i] * minus_delta<Products>(dp_mirrored, of_column[i]));
        }
      }
    }
  }
}

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
  using Products = HalfProducts<T>;
  using Tiles = BackwardTiles<T, kColumns>;
  constexpr int kWidth = Tiles::kWidth, kHalf = Tiles::kHalf, kStages = Tiles::kStages;
  const Place block(row_blocks, kBlockRows);
  const Pair pair(p.partner, block.image);
  if (pair.is_anothers()) return;
  const int channels = p.x.rows, tiles = divide_up(channels, kWidth);
  SharedMemory shared;
  const typename Tiles::X x(shared, maps.x, pair.first, pair.second);
  const typename Tiles::Thin v(shared, maps.v, pair.first, pair.second);
  const typename Tiles::Thin dy(shared, maps.dy, pair.first, pair.second);
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
  const float eta[2] = {p.eta[images[0]], p.eta[images[1]]};
  const RowTerms* terms[2];
  RowTerms of_rows[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    terms[i] = p.terms + images[i] * padded_rows(channels);
    of_rows[i][0] = terms[i][block.row + lane_row()];
    of_rows[i][1] = terms[i][block.row + lane_row() + 8];
  }
  float acc[kColumns / 8][4] = {}, thin[kThin / 8][4] = {};
  ptx::mbarrier_wait(ring.rows_full, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    float s[2][kHalf / 8][4];
    uint32_t ds[2][kHalf / 16][4], magnitudes[2][kHalf / 16][4];
    ring.wait(tile);
    ptx::wgmma_fence();
    start_nt(s[0], own_x.rows, 0, own_x[tile], column);
    start_nt(s[1], other_x.rows, 0, other_x[tile], column);
    // By parts: four thin products of all columns would not fit into the registers.
#pragma unroll
    for (int part = 0; part < kHalf / 16; ++part) {
      float dm[2][2][4], dm_mirrored[2][2][4];
      const int at = column + part * 16, first = tile * kWidth + at;
      ptx::wgmma_fence();
      start_nt(dm[0], own_dy.rows, 0, own_v[tile], at);
      start_nt(dm[1], other_dy.rows, 0, other_v[tile], at);
      start_nt(dm_mirrored[0], own_v.rows, 0, own_dy[tile], at);
      start_nt(dm_mirrored[1], other_v.rows, 0, other_dy[tile], at);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      contrast_gradient<Products>(dm, dm_mirrored, s, part * 2, of_rows,
                                  {terms[0] + first, terms[1] + first}, eta, p.scale, p.factor);
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
  store_rows<Products>(p.dx + first * p.positions, acc, 1.f, 1.f, own_x.rows, 0, block.row,
                       channels, p.positions);
  store_tile<Products>(p.dv + first * p.columns, thin, 1.f, 1.f, block.row, channels, 0, p.columns);
#endif
}

template <class T, int kColumns>
cudaError_t launch_backward(const Context& context, const Shape& shape, const Maps& maps,
                            const BackwardParameters<T>& p) {
  CIN_FAST_RETURN_IF_ERROR(launch_row_blocks(context, shape, kConsumerRows, "cci_wgmma_terms",
                                             cci_wgmma_terms_kernel<T, kColumns>,
                                             TermsTiles<T, kColumns>::kSharedBytes, maps, p));
  return launch_row_blocks(context, shape, kBlockRows, "cci_wgmma_backward",
                           cci_wgmma_backward_kernel<T, kColumns>,
                           BackwardTiles<T, kColumns>::kSharedBytes, maps, p);
}

}  // namespace

template <class T>
cudaError_t wgmma_backward(const Context& context, const Shape& shape,
                           const BackwardParameters<T>& p) {
  Maps maps{};
  CIN_FAST_RETURN_IF_ERROR(encode_tile_maps(&maps.x, p.x, shape.batch));
  CIN_FAST_RETURN_IF_ERROR(encode_tile_maps(&maps.v, p.v, shape.batch));
  CIN_FAST_RETURN_IF_ERROR(encode_tile_maps(&maps.dy, p.dy, shape.batch));
  return shape.positions <= kNarrow ? launch_backward<T, kNarrow>(context, shape, maps, p)
                                    : launch_backward<T, kWide>(context, shape, maps, p);
}

template cudaError_t wgmma_backward(const Context&, const Shape&,
                                    const BackwardParameters<__nv_bfloat16>&);
template cudaError_t wgmma_backward(const Context&, const Shape&,
                                    const BackwardParameters<__half>&);

}  // namespace cci
}  // namespace cin_fast
