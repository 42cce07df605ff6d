// sci on sm_90a, for what sci_resident.cu serves elsewhere: 16-bit operands, at most 208 positions,
// v = x or at most 16 columns of v. A block owns 128 rows of one image. One warp group brings tiles
// of columns into shared memory by bulk tensor copies; two multiply them by wgmma, 64 rows each.
#include <type_traits>

#include "sci.cuh"
#include "warpgroup.cuh"

namespace cin_fast {
namespace sci {
namespace {

template <class T, int kColumns, bool kTied>
struct ForwardTiles {
  static constexpr int kWidth = kConsumerRows, kStages = 3, kValues = kTied ? kColumns : kThin;
  using X = OwnFirst<T, kWidth, kColumns, kStages>;
  using V = std::conditional_t<kTied, Operand<T, 0, kWidth, kThin, 0>,
                               OwnFirst<T, kWidth, kThin, kStages>>;
  static constexpr size_t kSharedBytes = pipeline_bytes<kStages, X, V>();
};

// Makes one result of a half block's two. False leaves the consumer nothing to do.
template <class Products, int M>
__device__ __forceinline__ bool merge(const Share& own, unsigned char* tiles,
                                      RunningSoftmax<Products>& softmax, float (&acc)[M][4]) {
  const Merger merger(tiles);
  merger.meet();
  if (own.is_second()) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      merger.at(half) = softmax.peak[half];
      merger.at(2 + half) = softmax.sum[half];
    }
    merger.give(4, acc);
  }
  merger.meet();
  if (own.is_second()) return false;
  const float peak[2] = {merger.at(0), merger.at(1)}, sum[2] = {merger.at(2), merger.at(3)};
  softmax.merge(peak, sum, [&](int half, float mine, float theirs) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i)
        acc[m][i] = acc[m][i] * mine + merger.at(4 + 4 * m + i) * theirs;
    }
  });
  return true;
}

// A consumer's sums over kSpan columns of every tile, from `column` on.
template <int kSpan, class T, int M, class Ring, class X, class Values>
__device__ __forceinline__ void sum_up(float (&acc)[M][4], RunningSoftmax<HalfProducts<T>>& softmax,
                                       const Ring& ring, const X& x, int row, const Values& values,
                                       int column, const Walk& walk, int channels) {
  constexpr int kWidth = X::Passing::kRows;
  const auto rows = x.rows_from(row);
  const Turns turns;
  float s[kSpan / 8][4], shrink[2];
  uint32_t weights[kSpan / 16][4];
  ring.wait(0);
  ptx::wgmma_fence();
  start_nt(s, rows, x[0], column);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  softmax.weigh(s, shrink, channels - walk[0] * kWidth - column);
  pack<T>(weights, s);
  // While a tile's weights are computed, those of the tile before are multiplied.
  for (int i = 1; i < walk.tiles; ++i) {
    ring.wait(i);
    turns.begin();
    ptx::wgmma_fence();
    start_nt(s, rows, x[i], column);
    ptx::wgmma_commit();
    start_nn(acc, weights, values[i - 1], column);
    ptx::wgmma_commit();
    turns.end();
    ptx::wgmma_wait<1>();
    softmax.weigh(s, shrink, channels - walk[i] * kWidth - column);
    ptx::wgmma_wait_behind<0>(softmax.sum[0] + softmax.sum[1]);
    ring.release(i - 1);
    softmax.rescale(acc, shrink);
    pack<T>(weights, s);
  }
  turns.leave();
  ptx::wgmma_fence();
  start_nn(acc, weights, values[walk.tiles - 1], column);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ring.release(walk.tiles - 1);
}

template <class T, int kColumns, bool kTied>
__global__ void __launch_bounds__(kPipelineThreads, 1)
    sci_wgmma_forward_kernel(const __grid_constant__ Maps maps, ForwardParameters<T> p,
                             RowBlocks blocks) {
#ifdef CIN_FAST_WGMMA
  follow();
  using Products = HalfProducts<T>;
  using Tiles = ForwardTiles<T, kColumns, kTied>;
  constexpr int kWidth = Tiles::kWidth;
  const Place block(blocks);
  const int channels = p.channels;
  const Walk walk(divide_up(channels, kWidth), block.row / kWidth);
  SharedMemory shared;
  const typename Tiles::X x(shared, maps.x, block.image);
  const typename Tiles::V v(shared, maps.v, block.image);
  const auto& values = either<kTied>(x, v);
  const Ring<Tiles::kStages, true> ring(shared);
  if (is_producer()) return produce(ring, block.row, walk, x, v);

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const Share own(block);
  RunningSoftmax<Products> softmax(p.factor);
  float acc[Tiles::kValues / 8][4] = {};
  if (block.is_half) {
    const int column = own.is_second() ? kWidth / 2 : 0;
    sum_up<kWidth / 2, T>(acc, softmax, ring, x, own.row, values, column, walk, channels);
    if (!merge(own, x.stages, softmax, acc)) return;
  } else {
    sum_up<kWidth, T>(acc, softmax, ring, x, own.row, values, 0, walk, channels);
  }
  softmax.finish();
  const int row = block.row + own.row;
  const int64_t first = static_cast<int64_t>(block.image) * channels;
  const float divisors[2] = {Products::divisor(softmax.sum[0]), Products::divisor(softmax.sum[1])};
  T* to = p.y + first * p.columns;
  if constexpr (kTied) {
    ring.wait_until_rows_are_free();
    store_rows<Products>(to, acc, divisors[0], divisors[1], x.rows_from(own.row), row, channels,
                         p.columns);
  } else {
    store_tile<Products>(to, acc, divisors[0], divisors[1], row, channels, 0, p.columns);
  }
  softmax.store(p.row_max + first, p.row_sum + first, row, channels);
#endif
}

// Rows of x, then as many of dY, where both are stacked.
constexpr int kStackedTurn = 64;
template <bool kTied>
constexpr int kTurn = kTied ? kStackedTurn : kGroupRows;

template <class T, int kColumns, bool kTied>
struct TermsTiles {
  static constexpr int kWidth = kConsumerRows, kStages = kTied ? 2 : 3;
  static constexpr int kValues = kTied ? kColumns : kThin;
  // Three stages leave no room for rows of v.
  using X = std::conditional_t<kTied, OwnFirst<T, kWidth, kColumns, kStages, kTurn<kTied>>,
                               Operand<T, kConsumerRows, kWidth, kColumns, kStages>>;
  using V = Operand<T, 0, kWidth, kThin, kTied ? 0 : kStages>;
  using Dy = Operand<T, kConsumerRows, kWidth, kValues, 0, kWidth, kTurn<kTied>>;
  using Both = Stacked<T, kWidth, kColumns, 0>;
  static constexpr size_t kSharedBytes = pipeline_bytes<kStages, X, V, Dy>();
};

// A consumer's row sums over kSpan columns of every tile, from `column` on.
template <int kSpan, class T, class Ring, class X, class Dy, class Values>
__device__ __forceinline__ void sum_up(RowSums<HalfProducts<T>>& sums, const Ring& ring, const X& x,
                                       const Dy& dy, int row, const Values& values, int column,
                                       const Walk& walk, int channels) {
  constexpr int kWidth = X::Passing::kRows;
  const auto x_rows = x.rows_from(row);
  const auto dy_rows = dy.rows_from(row);
  const Turns turns;
  for (int i = 0; i < walk.tiles; ++i) {
    float s[kSpan / 8][4], dp[kSpan / 8][4];
    ring.wait(i);
    turns.begin();
    ptx::wgmma_fence();
    start_nt(s, x_rows, x[i], column);
    start_nt(dp, dy_rows, values[i], column);
    ptx::wgmma_commit();
    turns.end();
    ptx::wgmma_wait<0>();
    ring.release(i);
    sums.add(s, dp, channels - walk[i] * kWidth - column);
  }
  turns.leave();
}

template <class T, int kColumns, bool kTied>
__global__ void __launch_bounds__(kPipelineThreads, 1)
    sci_wgmma_terms_kernel(const __grid_constant__ Maps maps, TermsParameters<T> p,
                           RowBlocks blocks) {
#ifdef CIN_FAST_WGMMA
  follow();
  using Tiles = TermsTiles<T, kColumns, kTied>;
  constexpr int kWidth = Tiles::kWidth;
  const Place block(blocks);
  const int channels = p.channels;
  const Walk walk(divide_up(channels, kWidth), kTied ? block.row / kWidth : 0);
  SharedMemory shared;
  const typename Tiles::X x(shared, maps.x, block.image);
  const typename Tiles::V v(shared, maps.v, block.image);
  const typename Tiles::Dy dy(shared, maps.dy, block.image);
  const auto& values = either<kTied>(x, v);
  const Ring<Tiles::kStages, kTied> ring(shared);
  if (is_producer()) return produce(ring, block.row, walk, x, v, dy);

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const Share own(block);
  const int row = block.row + own.row;
  RowSums<HalfProducts<T>> sums(p, block.image, row, channels);
  ptx::mbarrier_wait(ring.rows_full, 0);
  if (!block.is_half) {
    sum_up<kWidth, T>(sums, ring, x, dy, own.row, values, 0, walk, channels);
  } else {
    const int column = own.is_second() ? kWidth / 2 : 0;
    sum_up<kWidth / 2, T>(sums, ring, x, dy, own.row, values, column, walk, channels);
    const Merger merger(x.stages);
    merger.meet();
    if (own.is_second()) {
      merger.at(0) = sums.delta[0];
      merger.at(1) = sums.delta[1];
    }
    merger.meet();
    if (own.is_second()) return;
    sums.delta[0] += merger.at(0);
    sums.delta[1] += merger.at(1);
  }
  sums.store(p, block.image, row, channels);
#endif
}

template <class T, int kColumns, bool kTied>
struct BackwardTiles {
  static constexpr int kWidth = 64, kStages = 2, kPassing = kTied ? 0 : kStages;
  static_assert(!kTied || kWidth == kStackedTurn, "a tile of both is a turn of either");
  using X = Operand<T, kConsumerRows, kWidth, kColumns, kPassing, kWidth, kTurn<kTied>>;
  using V = Operand<T, kTied ? 0 : kConsumerRows, kWidth, kThin, kPassing>;
  using Dy =
      Operand<T, kConsumerRows, kWidth, kTied ? kColumns : kThin, kPassing, kWidth, kTurn<kTied>>;
  using Both = Stacked<T, kWidth, kColumns, kTied ? kStages : 0>;
  using Terms = PassingTerms<kWidth, kStages>;
  static constexpr size_t kSharedBytes = pipeline_bytes<kStages, X, V, Dy, Both, Terms>();
};

template <class T, int kColumns, bool kTied>
__global__ void __launch_bounds__(kPipelineThreads, 1)
    sci_wgmma_backward_kernel(const __grid_constant__ Maps maps, BackwardParameters<T> p,
                              RowBlocks blocks) {
#ifdef CIN_FAST_WGMMA
  follow();
  using Products = HalfProducts<T>;
  using Tiles = BackwardTiles<T, kColumns, kTied>;
  constexpr int kWidth = Tiles::kWidth, kStages = Tiles::kStages;
  const Place block(blocks);
  const int channels = p.channels, tiles = divide_up(channels, kWidth);
  const RowTerms* terms = p.terms + static_cast<int64_t>(block.image) * padded_rows(channels);
  SharedMemory shared;
  const typename Tiles::X x(shared, maps.x, block.image);
  const typename Tiles::V v(shared, maps.v, block.image);
  const typename Tiles::Dy dy(shared, maps.dy, block.image);
  const typename Tiles::Both both(shared, maps.both, block.image);
  const typename Tiles::Terms of_columns(shared, terms);
  const Ring<kStages> ring(shared);
  if (is_producer()) return produce(ring, block.row, tiles, x, v, dy, both, of_columns);

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const Share own(block);
  const int row = block.row + own.row;
  const int64_t first = static_cast<int64_t>(block.image) * channels;
  const RowTerms of_rows[2] = {terms[row + lane_row()], terms[row + lane_row() + 8]};
  const auto x_rows = x.rows_from(own.row);
  const auto v_rows = v.rows_from(own.row);
  const auto dy_rows = dy.rows_from(own.row);
  float acc[kColumns / 8][4] = {}, thin[kThin / 8][4] = {};
  // A turn is a tile's second products and the next tile's first. Where v = x they cost more than
  // they gain; of an odd number of tiles the consumers of a half block have different numbers.
  const Turns turns(!kTied && (!block.is_half || tiles % 2 == 0));
  ptx::mbarrier_wait(ring.rows_full, 0);
  turns.begin();
  for (int tile = own.begin(ring); tile < tiles; tile = own.after(ring, tile, tiles)) {
    // S, and the mirror image of dP below it.
    float s[kWidth / 4][4], dp[kWidth / 8][4];
    float (*const dp_mirrored)[4] = s + kWidth / 8;
    uint32_t ds[kWidth / 16][4], weights[kWidth / 16][4];
    ring.wait(tile);
    ptx::wgmma_fence();
    if constexpr (kTied) {
      start_nt(s, x_rows, both[tile]);
      start_nt(dp, dy_rows, both[tile]);
    } else {
      start_nt<kWidth / 8>(s, x_rows, x[tile]);
      start_nt(dp, dy_rows, v[tile]);
      start_nt<kWidth / 8>(dp_mirrored, v_rows, dy[tile]);
    }
    ptx::wgmma_commit();
    turns.end();
    ptx::wgmma_wait<0>();
    softmax_gradient<Products>(s, dp, dp_mirrored, of_rows, of_columns[tile], p.scale, p.factor);
    pack<T>(ds, dp);
    pack<T, kWidth / 8>(weights, s);
    turns.begin();
    ptx::wgmma_fence();
    if constexpr (kTied) {
      start_nn(acc, ds, both[tile]);
      start_nn(acc, weights, both[tile], kWidth);
    } else {
      start_nn(acc, ds, x[tile]);
      start_nn(thin, weights, dy[tile]);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    // All lanes have read their terms before one of them gives the tile back.
    __syncwarp();
    ring.release(tile);
  }
  turns.end();
  turns.leave();
  if (block.is_half) {
    const Merger merger(kTied ? both.stages : x.stages), thin_merger(v.stages);
    merger.meet();
    if (own.is_second()) {
      merger.give(0, acc);
      if constexpr (!kTied) thin_merger.give(0, thin);
    }
    merger.meet();
    if (own.is_second()) return;
    merger.add_to(acc, 0);
    if constexpr (!kTied) thin_merger.add_to(thin, 0);
  }
  store_rows<Products>(p.dx + first * p.positions, acc, 1.f, 1.f, x_rows, row, channels,
                       p.positions);
  if constexpr (!kTied)
    store_tile<Products>(p.dv + first * p.columns, thin, 1.f, 1.f, row, channels, 0, p.columns);
#endif
}

}  // namespace

template <class T>
cudaError_t wgmma_forward(const Context& context, const Shape& shape, const SciForward& a,
                          const ForwardParameters<T>& p) {
  Panels x, v{};
  CIN_FAST_RETURN_IF_ERROR(own_panels(context, a.x, shape, shape.positions, &x));
  if (a.v.data) CIN_FAST_RETURN_IF_ERROR(own_panels(context, a.v, shape, p.columns, &v));
  return with_columns(shape, !a.v.data, [&]<int kColumns, bool kTied>() {
    using Tiles = ForwardTiles<T, kColumns, kTied>;
    Maps maps{};
    CIN_FAST_RETURN_IF_ERROR(Tiles::X::encode(&maps.x, x));
    CIN_FAST_RETURN_IF_ERROR(Tiles::V::encode(&maps.v, v));
    return launch_balanced(context, shape, "sci_wgmma_forward",
                           sci_wgmma_forward_kernel<T, kColumns, kTied>, Tiles::kSharedBytes, maps,
                           p);
  });
}

template <class T>
cudaError_t wgmma_backward(const Context& context, const Shape& shape, const SciBackward& a,
                           const TermsParameters<T>& terms, const BackwardParameters<T>& p) {
  StackedPanels x_dy{};
  Panels x, v{}, dy;
  const bool tied = !a.v.data;
  if (tied) {
    CIN_FAST_RETURN_IF_ERROR(
        stacked_panels(context, a.x, a.dy, shape, shape.positions, kStackedTurn, &x_dy));
    x = x_dy.first;
    dy = x_dy.second;
  } else {
    CIN_FAST_RETURN_IF_ERROR(own_panels(context, a.x, shape, shape.positions, &x));
    CIN_FAST_RETURN_IF_ERROR(own_panels(context, a.v, shape, p.columns, &v));
    CIN_FAST_RETURN_IF_ERROR(own_panels(context, a.dy, shape, p.columns, &dy));
  }
  return with_columns(shape, tied, [&]<int kColumns, bool kTied>() {
    const auto start = [&]<class Tiles>(const char* name, auto kernel, const auto& parameters) {
      Maps maps{};
      CIN_FAST_RETURN_IF_ERROR(Tiles::X::encode(&maps.x, x));
      CIN_FAST_RETURN_IF_ERROR(Tiles::V::encode(&maps.v, v));
      CIN_FAST_RETURN_IF_ERROR(Tiles::Dy::encode(&maps.dy, dy));
      CIN_FAST_RETURN_IF_ERROR(Tiles::Both::encode(&maps.both, x_dy.both));
      return launch_balanced(context, shape, name, kernel, Tiles::kSharedBytes, maps, parameters);
    };
    CIN_FAST_RETURN_IF_ERROR((start.template operator()<TermsTiles<T, kColumns, kTied>>(
        "sci_wgmma_terms", sci_wgmma_terms_kernel<T, kColumns, kTied>, terms)));
    return start.template operator()<BackwardTiles<T, kColumns, kTied>>(
        "sci_wgmma_backward", sci_wgmma_backward_kernel<T, kColumns, kTied>, p);
  });
}

#define CIN_FAST_WGMMA_SCI(T)                                                           \
  template cudaError_t wgmma_forward(const Context&, const Shape&, const SciForward&,   \
                                     const ForwardParameters<T>&);                      \
  template cudaError_t wgmma_backward(const Context&, const Shape&, const SciBackward&, \
                                      const TermsParameters<T>&, const BackwardParameters<T>&);
CIN_FAST_WGMMA_SCI(__nv_bfloat16)
CIN_FAST_WGMMA_SCI(__half)
#undef CIN_FAST_WGMMA_SCI

}  // namespace sci
}  // namespace cin_fast
