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
  if constexpr (kTied) {
    float divisors[2] = {Products::divisor(softmax.sum[0]), Products::divisor(softmax.sum[1])};
    const auto store = [&](T* to) {
      store_rows<Products>(to + first * p.columns, acc, divisors[0], divisors[1],
                           x.rows_from(own.row), row, channels, p.columns);
    };
    ring.wait_until_rows_are_free();
    store(p.y);
    if (p.y_rest) {
      keep_rest<T, Products>(acc, divisors);
      store(p.y_rest);
    }
  } else {
    store_result<Products>(p, block.image, acc, softmax, row, 0);
  }
  softmax.store(p.row_max + first, p.row_sum + first, row, channels);
#endif
}

// Rows of x, then as many of dY, where both are stacked.
constexpr int kStackedTurn = 64;
template <bool kTied>
constexpr int kTurn = kTied ? kStackedTurn : kGroupRows;

// As many columns as v has, thin or not.
template <class T, int kColumns>
struct TermsTiles {
  using Dy = Operand<T, kBlockRows, kBlockRows, kColumns, 0, kBlockRows, kTurn<(kColumns > kThin)>>;
  using Result = Tile<T, kBlockRows, kColumns>;
  static constexpr size_t kSharedBytes =
      pipeline_bytes<0, Dy>() + shared_bytes({Result::kBytes, Result::kBytes});
};

// Rows of a contiguous matrix, from `row` on, as a tile; zeros beyond its edges. kWhole: they are
// whole pieces.
template <bool kWhole, class T, int kRows, int kColumns>
__device__ __forceinline__ void fill(const Tile<T, kRows, kColumns>& tile, const Matrix<T>& from,
                                     int row) {
  using Rows = Tile<T, kRows, kColumns>;
  const int column = threadIdx.x % 4 * kPiece;
  for (int r = threadIdx.x / 4; r < kRows; r += kGroupThreads / 4) {
    const bool exists = row + r < from.rows;
    const auto* source = reinterpret_cast<const uint16_t*>(from.data) +
                         (exists ? (row + r) * from.pitch + column : 0);
    uint64_t pieces[Rows::kPanels];
#pragma unroll
    for (int panel = 0; panel < Rows::kPanels; ++panel) {
      const int first = panel * kPanelColumns;
      pieces[panel] =
          exists ? load_piece<kWhole>(source + first, 1, from.columns - column - first) : 0;
    }
    unsigned char* target = tile.data + r * kPanelRow + piece_byte(r, column);
#pragma unroll
    for (int panel = 0; panel < Rows::kPanels; ++panel)
      *reinterpret_cast<uint64_t*>(target + panel * Rows::kPanelBytes) = pieces[panel];
  }
}

// A block of one warp group for every 64 rows: dY . Y, as wgmma makes dP.
template <class T, int kColumns>
__global__ void __launch_bounds__(kGroupThreads)
    sci_wgmma_terms_kernel(const __grid_constant__ Maps maps, TermsParameters<T> p, int row_blocks,
                           bool whole) {
#ifdef CIN_FAST_WGMMA
  follow();
  using Tiles = TermsTiles<T, kColumns>;
  const Place block(row_blocks, kBlockRows);
  SharedMemory shared;
  const typename Tiles::Dy dy(shared, maps.dy, block.image);
  const typename Tiles::Result y{shared.take<unsigned char>(Tiles::Result::kBytes)};
  const typename Tiles::Result rest{shared.take<unsigned char>(Tiles::Result::kBytes)};
  const Ring<0> ring(shared);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(ring.rows_full, Tiles::Dy::kRowBytes);
    dy.load_rows(ring.rows_full, block.row);
  }
  const Matrix<T> of_y = p.y.image(block.image), of_rest = p.y_rest.image(block.image);
  if (whole) {
    fill<true>(y, of_y, block.row);
    fill<true>(rest, of_rest, block.row);
  } else {
    fill<false>(y, of_y, block.row);
    fill<false>(rest, of_rest, block.row);
  }
  ptx::fence_proxy_async();
  __syncthreads();
  ptx::mbarrier_wait(ring.rows_full, 0);
  float product[kBlockRows / 8][4], delta[2];
  ptx::wgmma_fence();
  start_nt(product, dy.rows_from(0), y);
  start_nt(product, dy.rows_from(0), rest, 0, true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  take_diagonal(delta, product);
  store_terms<HalfProducts<T>>(p, block.image, block.row, delta);
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
                           RowTerms* terms, const BackwardParameters<T>& p) {
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
  const auto result = [&](const void* data) {
    return Batch<T>{static_cast<const T*>(data), shape.channels, p.columns, p.columns};
  };
  const TermsParameters<T> for_terms{{},        result(a.y), result(a.y_rest), a.row_max,
                                     a.row_sum, terms,       p.channels};
  const bool whole = p.columns % kPiece == 0 && starts_on(a.y, 8) && starts_on(a.y_rest, 8);
  return with_columns(shape, tied, [&]<int kColumns, bool kTied>() {
    constexpr int kValues = kTied ? kColumns : kThin;
    using Terms = TermsTiles<T, kValues>;
    using Tiles = BackwardTiles<T, kColumns, kTied>;
    Maps maps{};
    CIN_FAST_RETURN_IF_ERROR(Terms::Dy::encode(&maps.dy, dy));
    // All rows that the next kernel's blocks read terms of.
    const int row_blocks = padded_rows(shape.channels) / kBlockRows;
    CIN_FAST_RETURN_IF_ERROR(launch<true>(context, "sci_wgmma_terms",
                                          sci_wgmma_terms_kernel<T, kValues>,
                                          dim3(shape.batch * row_blocks), kGroupThreads,
                                          Terms::kSharedBytes, maps, for_terms, row_blocks, whole));
    CIN_FAST_RETURN_IF_ERROR(Tiles::X::encode(&maps.x, x));
    CIN_FAST_RETURN_IF_ERROR(Tiles::V::encode(&maps.v, v));
    CIN_FAST_RETURN_IF_ERROR(Tiles::Dy::encode(&maps.dy, dy));
    CIN_FAST_RETURN_IF_ERROR(Tiles::Both::encode(&maps.both, x_dy.both));
    return launch_balanced(context, shape, "sci_wgmma_backward",
                           sci_wgmma_backward_kernel<T, kColumns, kTied>, Tiles::kSharedBytes, maps,
                           p);
  });
}

#define CIN_FAST_WGMMA_SCI(T)                                                                      \
  template cudaError_t wgmma_forward(const Context&, const Shape&, const SciForward&,              \
                                     const ForwardParameters<T>&);                                 \
  template cudaError_t wgmma_backward(const Context&, const Shape&, const SciBackward&, RowTerms*, \
                                      const BackwardParameters<T>&);
CIN_FAST_WGMMA_SCI(__nv_bfloat16)
CIN_FAST_WGMMA_SCI(__half)
#undef CIN_FAST_WGMMA_SCI

}  // namespace sci
}  // namespace cin_fast
