// cci backward on sm_90a where v = x. A block owns 64 rows of both images of a pair. In the sweep
// for row sums the two warp groups take every second tile of columns, all of it of both images. In
// the sweep for gradients each computes, for half of a tile's columns, what both images' gradients
// sum up, collects one image's, and trades the other image's.
#include "cci_pairs.cuh"
#include "warpgroup.cuh"

namespace cin_fast {
namespace cci {
namespace {

// Rows of x, then as many of dY.
constexpr int kStackedTurn = 16;

template <class T, int kColumns>
struct TermsTiles {
  // A tile is one warp group's: while the one multiplies, the other's next tile comes.
  static constexpr int kWidth = 64, kStages = kConsumers, kReaders = 1;
  using X = Both<Operand<T, kBlockRows, kWidth, kColumns, kStages, kWidth, kStackedTurn>>;
  using Dy = Both<Operand<T, kBlockRows, kWidth, kColumns, 0, kWidth, kStackedTurn>>;
  using XDy = Both<Stacked<T, kWidth, kColumns, 0>>;
  // delta and what goes to eta's gradient, of a lane's two rows.
  using Sums = Trade<float, 4>;
  static constexpr size_t kSharedBytes = pipeline_bytes<kStages, X, Dy, Sums>();
};

template <class T, int kColumns>
__global__ void __launch_bounds__(kPipelineThreads, 1)
    cci_wgmma_tied_terms_kernel(const __grid_constant__ Maps maps, BackwardParameters<T> p,
                                int row_blocks) {
#ifdef CIN_FAST_WGMMA
  follow();
  using Products = HalfProducts<T>;
  using Tiles = TermsTiles<T, kColumns>;
  constexpr int kWidth = Tiles::kWidth, kStages = Tiles::kStages;
  const Place block(row_blocks, kBlockRows);
  const Pair pair(p.partner, block.image);
  if (pair.is_anothers()) return;
  const int channels = p.channels, tiles = divide_up(channels, kWidth);
  SharedMemory shared;
  const typename Tiles::X x(shared, maps.x, pair.first, pair.second);
  const typename Tiles::Dy dy(shared, maps.dy, pair.first, pair.second);
  const typename Tiles::Sums trade(shared);
  const Ring<kStages, false, Tiles::kReaders> ring(shared);
  if (is_producer()) return produce(ring, block.row, tiles, x, dy);

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const int own = consumer_row() / kBlockRows;
  PairSums<Products> sums{{p.eta[pair.first], p.eta[pair.second]}, p.factor};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t first = pair.image(i) * channels;
    load_statistics<Products>(sums.statistics[i], p.row_max + first, p.row_sum + first, block.row,
                              channels);
  }
  ptx::mbarrier_wait(ring.rows_full, 0);
  for (int tile = own; tile < tiles; tile += kConsumers) {
    float s[2][kWidth / 8][4], dy_x[2][kWidth / 8][4];
    ring.wait(tile);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      start_nt(s[i], x[i].rows_from(0), x[i][tile]);
      start_nt(dy_x[i], dy[i].rows_from(0), x[i][tile]);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ring.release(tile);
    sums.add(s, dy_x, channels - tile * kWidth);
  }
  // Each warp group adds up and stores one image's.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i == own) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      trade.given(0, half) = sums.delta[i][half];
      trade.given(0, 2 + half) = sums.deta[i][half];
    }
  }
  trade.meet();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i != own || (i == 1 && pair.is_single())) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_terms<Products>(p, pair.image(i), block.row + lane_row() + half * 8,
                            sums.statistics[i][half],
                            quad_sum(sums.delta[i][half] + trade.taken(0, half)),
                            quad_sum(sums.deta[i][half] + trade.taken(0, 2 + half)));
  }
#endif
}

template <class T, int kColumns>
struct BackwardTiles {
  static constexpr int kWidth = 32, kHalf = kWidth / 2, kStages = 2;
  static_assert(kHalf == kStackedTurn, "a consumer's columns are a turn");
  using X = Both<Operand<T, kBlockRows, kWidth, kColumns, 0, kBlockRows, kStackedTurn>>;
  using Dy = X;
  using XDy = Both<Stacked<T, kWidth, kColumns, kStages>>;
  using Terms = PassingTerms<kWidth, kStages>;
  // dS and |M|, packed.
  using Weights = Trade<uint32_t, 8>;
  static constexpr size_t kSharedBytes =
      pipeline_bytes<kStages, X, Dy, XDy, Terms, Terms, Weights>();
};

// One image's weights as left operands: dS, which goes with rows of x, then |M|, with rows of dY.
template <class T, int N>
__device__ __forceinline__ void pack_gradients(uint32_t (&packed)[N][4], const float (&ds)[N][4],
                                               const float (*magnitudes)[4]) {
  pack<T>(packed, ds);
  pack<T, N>(packed + N / 2, magnitudes);
}

template <int kElements, int N>
__device__ __forceinline__ void give(const Trade<uint32_t, kElements>& trade, int tile,
                                     const uint32_t (&packed)[N][4]) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) trade.given(tile, i) = packed[i / 4][i % 4];
}

// Behind a meeting.
template <int kElements, int N>
__device__ __forceinline__ void take(uint32_t (&packed)[N][4],
                                     const Trade<uint32_t, kElements>& trade, int tile) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) packed[i / 4][i % 4] = trade.taken(tile, i);
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kPipelineThreads, 1)
    cci_wgmma_tied_backward_kernel(const __grid_constant__ Maps maps, BackwardParameters<T> p,
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
  const typename Tiles::Dy dy(shared, maps.dy, pair.first, pair.second);
  const typename Tiles::XDy x_dy(shared, maps.both, pair.first, pair.second);
  const typename Tiles::Terms first_terms(shared, terms_of(p, pair.first));
  const typename Tiles::Terms second_terms(shared, terms_of(p, pair.second));
  const typename Tiles::Weights trade(shared);
  const Ring<kStages> ring(shared);
  if (is_producer()) return produce(ring, block.row, tiles, x, dy, x_dy, first_terms, second_terms);

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  // From here on image 0 is this warp group's own, image 1 its partner.
  const int own = consumer_row() / kBlockRows;
  const auto own_x = x[own].rows_from(0), other_x = x[1 - own].rows_from(0);
  const auto own_dy = dy[own].rows_from(0), other_dy = dy[1 - own].rows_from(0);
  const auto own_tiles = x_dy[own], other_tiles = x_dy[1 - own];
  const auto own_terms = own == 0 ? first_terms : second_terms;
  const auto other_terms = own == 0 ? second_terms : first_terms;
  const PairRows<Products> rows(p, pair.image(own), pair.image(1 - own), block.row);
  // Of a tile's columns, and where their rows of x lie in it; those of dY follow.
  const int column = own * kHalf, mine = own * kWidth, theirs = kWidth - mine;
  float acc[kColumns / 8][4] = {};
  uint32_t weights[2][kHalf / 8][4] = {};
  const auto start_sums = [&](int tile) {
    start_nn(acc, weights[0], own_tiles[tile], mine);
    start_nn(acc, weights[1], own_tiles[tile], theirs);
    ptx::wgmma_commit();
  };
  ptx::mbarrier_wait(ring.rows_full, 0);
  // While a tile's weights are computed, those of the tile before are multiplied: first, none.
  for (int tile = 0; tile < tiles; ++tile) {
    // S, and the mirror image of dP below it.
    float s[2][kHalf / 4][4], dm[2][kHalf / 8][4];
    float (*const dm_mirrored[2])[4] = {s[0] + kHalf / 8, s[1] + kHalf / 8};
    uint32_t for_partner[kHalf / 8][4];
    ring.wait(tile);
    ptx::wgmma_fence();
    start_nt(s[0], own_x, own_tiles[tile], mine);
    start_nt(s[1], other_x, other_tiles[tile], mine);
    start_nt(dm[0], own_dy, own_tiles[tile], mine);
    start_nt(dm[1], other_dy, other_tiles[tile], mine);
    ptx::wgmma_commit();
    start_sums(tile > 0 ? tile - 1 : 0);
    ptx::wgmma_wait<1>();
    contrast_gradients<kHalf / 8>({s[0], s[1]}, dm, dm_mirrored, rows,
                                  {own_terms[tile] + column, other_terms[tile] + column});
    pack_gradients<T>(for_partner, dm[1], dm_mirrored[1]);
    give(trade, tile, for_partner);
    ptx::wgmma_wait<0>();
    if (tile > 0) ring.release(tile - 1);
    pack_gradients<T>(weights[0], dm[0], dm_mirrored[0]);
    trade.meet();
    take(weights[1], trade, tile);
  }
  ptx::wgmma_fence();
  start_sums(tiles - 1);
  ptx::wgmma_wait<0>();
  if (own == 1 && pair.is_single()) return;
  store_rows<Products>(p.dx + pair.image(own) * channels * p.positions, acc, 1.f, 1.f, own_x,
                       block.row, channels, p.positions);
#endif
}

}  // namespace

template <class T>
cudaError_t wgmma_tied_backward(const Context& context, const Shape& shape, const CciBackward& a,
                                const BackwardParameters<T>& p) {
  StackedPanels x_dy;
  CIN_FAST_RETURN_IF_ERROR(
      stacked_panels(context, a.x, a.dy, shape, shape.positions, kStackedTurn, &x_dy));
  return with_columns(shape, true, [&]<int kColumns, bool>() {
    const auto start = [&]<class Tiles>(const char* name, auto kernel) {
      Maps maps{};
      CIN_FAST_RETURN_IF_ERROR(Tiles::X::encode(&maps.x, x_dy.first));
      CIN_FAST_RETURN_IF_ERROR(Tiles::Dy::encode(&maps.dy, x_dy.second));
      CIN_FAST_RETURN_IF_ERROR(Tiles::XDy::encode(&maps.both, x_dy.both));
      return launch_row_blocks(context, shape, kBlockRows, name, kernel, Tiles::kSharedBytes, maps,
                               p);
    };
    CIN_FAST_RETURN_IF_ERROR((start.template operator()<TermsTiles<T, kColumns>>(
        "cci_wgmma_tied_terms", cci_wgmma_tied_terms_kernel<T, kColumns>)));
    return start.template operator()<BackwardTiles<T, kColumns>>(
        "cci_wgmma_tied_backward", cci_wgmma_tied_backward_kernel<T, kColumns>);
  });
}

template cudaError_t wgmma_tied_backward(const Context&, const Shape&, const CciBackward&,
                                         const BackwardParameters<__nv_bfloat16>&);
template cudaError_t wgmma_tied_backward(const Context&, const Shape&, const CciBackward&,
                                         const BackwardParameters<__half>&);

}  // namespace cci
}  // namespace cin_fast
