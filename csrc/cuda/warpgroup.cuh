// Tiles that bulk tensor copies write and wgmma reads, and how one warp group fills them while
// others use them. For sm_90a.
#pragma once

#include "host.cuh"

namespace cin_fast {

// A warp group that copies, and those that multiply, 64 rows each.
constexpr int kConsumers = 2;
constexpr int kConsumerRows = kConsumers * kBlockRows;
constexpr int kPipelineThreads = (1 + kConsumers) * kGroupThreads;
// The block has 65,536 registers: 128 threads with 24, 256 with 240.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

__device__ __forceinline__ bool is_producer() { return threadIdx.x < kGroupThreads; }
// Through a shuffle, the compiler learns that a number is the warp's, not the thread's, and keeps
// what follows from it out of the threads' registers.
__device__ __forceinline__ int of_warp(int number) { return __shfl_sync(~0u, number, 0); }
// The first of a consumer's rows among the block's.
__device__ __forceinline__ int consumer_row() {
  return (of_warp(threadIdx.x / kGroupThreads) - 1) * kBlockRows;
}

// The blocks of a launch: the first own kConsumerRows rows of an image. Those that would leave half
// of the multiprocessors idle in the last wave are halved: 64 rows each, whose columns the two
// consumers share.
struct RowBlocks {
  int per_image, whole, all;

  RowBlocks(const Context& context, const Shape& shape)
      : per_image(divide_up(shape.channels, kConsumerRows)), whole(shape.batch * per_image) {
    const int last_wave = whole % context.multiprocessors;
    // So that there are two tiles at least.
    if (shape.channels > kConsumerRows && 2 * last_wave <= context.multiprocessors)
      whole -= last_wave;
    all = whole + 2 * (shape.batch * per_image - whole);
  }
};

// The image and the first row of a block.
struct Place {
  // Unsigned, so that nothing extends its sign: that took a register.
  unsigned image;
  int row;
  bool is_half = false;

  __device__ Place(int row_blocks, int rows)
      : image(blockIdx.x / row_blocks), row(blockIdx.x % row_blocks * rows) {}

  __device__ explicit Place(const RowBlocks& blocks) {
    const int index = blockIdx.x, half = index - blocks.whole;
    is_half = half >= 0;
    const int block = is_half ? blocks.whole + half / 2 : index;
    image = of_warp(block / blocks.per_image);
    row = of_warp(block % blocks.per_image * kConsumerRows) + (is_half ? half % 2 * kBlockRows : 0);
  }
};

// A panel is 64 columns of a tile, in rows of 128 bytes. What is left of 208 columns, and a thin
// matrix, are 16 columns in rows of 32 bytes.
constexpr int kPanelColumns = 64, kRestColumns = 16;
// A bulk copy brings this many rows of a panel.
constexpr int kBoxRows = 64;

struct TileMaps {
  ptx::TensorMap panels, rest;
};

// Of an operator's tensors.
struct Maps {
  TileMaps x, v, dy;
};

template <class T>
cudaError_t encode_tile_maps(TileMaps* maps, const Batch<T>& batch, int images,
                             int box_rows = kBoxRows) {
  CIN_FAST_RETURN_IF_ERROR(encode_tensor_map(&maps->panels, batch.data, images, batch.rows,
                                             batch.columns, batch.pitch, box_rows, kPanelColumns,
                                             ptx::Swizzle::k128Bytes));
  return encode_tensor_map(&maps->rest, batch.data, images, batch.rows, batch.columns, batch.pitch,
                           box_rows, kRestColumns, ptx::Swizzle::k32Bytes);
}

// Tells wgmma where an operand starts and how far it is to its next parts, in bytes. A row of 16
// elements along the product's depth lies in one row of a panel: `stride` leads to the next 8 rows.
// Where the depth runs down the panel, `stride` leads to its next 8 rows and `leading` to the next
// panel.
__device__ __forceinline__ uint64_t operand(uint32_t base, int offset, ptx::Swizzle swizzle,
                                            int stride, int leading) {
  // Added up in this order, what differs between two operands of a tile is a constant.
  const uint32_t low = (base >> 4) + ((leading >> 4 << 16) + (offset >> 4));
  const uint32_t high = stride >> 4 | static_cast<uint32_t>(swizzle) << 30;
  return static_cast<uint64_t>(high) << 32 | low;
}

// kRows x kColumns 16-bit elements. Every panel starts on 1,024 bytes, where the swizzle does.
template <class T, int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kPanels = kColumns / kPanelColumns;
  static constexpr bool kHasRest = kColumns % kPanelColumns != 0;
  static_assert(kColumns % kPanelColumns == (kHasRest ? kRestColumns : 0), "whole panels");
  static constexpr int kPanelRow = 128, kRestRow = 32;
  static constexpr int kPanelBytes = kRows * kPanelRow;
  static constexpr int kBytes = kPanels * kPanelBytes + (kHasRest ? kRows * kRestRow : 0);

  unsigned char* data;

  __device__ unsigned char* rest() const { return data + kPanels * kPanelBytes; }

  // Starts the copy of a matrix's rows, `row` and on, to kCount rows of the tile, `at` and on.
  template <int kCount = kRows, int kBox = kBoxRows>
  __device__ void load(const TileMaps& maps, uint64_t* barrier, int row, int image,
                       int at = 0) const {
    static_assert(kCount % kBox == 0 && kBox % 8 == 0, "whole boxes, and turns of the swizzle");
    for (int r = 0; r < kCount; r += kBox) {
      for (int panel = 0; panel < kPanels; ++panel)
        ptx::bulk_copy_3d(data + panel * kPanelBytes + (at + r) * kPanelRow, &maps.panels, barrier,
                          panel * kPanelColumns, row + r, image);
      if (kHasRest)
        ptx::bulk_copy_3d(rest() + (at + r) * kRestRow, &maps.rest, barrier,
                          kPanels * kPanelColumns, row + r, image);
    }
  }

  // Columns 16 step to 16 step + 15 of the rows from `row` on, as depth of a product.
  __device__ uint64_t along_rows(int row, int step) const {
    const uint32_t base = ptx::shared_address(data);
    const int panel = step / 4;
    if (panel == kPanels)
      return operand(base, kPanels * kPanelBytes + row * kRestRow, ptx::Swizzle::k32Bytes,
                     8 * kRestRow, 16);
    return operand(base, panel * kPanelBytes + row * kPanelRow + step % 4 * 32,
                   ptx::Swizzle::k128Bytes, 8 * kPanelRow, 16);
  }

  // Rows `row` to `row` + 15 as depth: of the panels' columns, and of the rest's.
  __device__ uint64_t down_panels(int row) const {
    return operand(ptx::shared_address(data), row * kPanelRow, ptx::Swizzle::k128Bytes,
                   8 * kPanelRow, kPanelBytes);
  }
  __device__ uint64_t down_rest(int row) const {
    return operand(ptx::shared_address(data), kPanels * kPanelBytes + row * kRestRow,
                   ptx::Swizzle::k32Bytes, 8 * kRestRow, 16);
  }
};

// s (64 x 8 N) = 64 of `rows`, from `row` on, times 8 N of `columns`, from `column` on, transposed.
// Ends when wgmma_wait says so.
template <int N, class T, int kRows, int kWidth, int kColumns>
__device__ __forceinline__ void start_nt(float (*s)[4], const Tile<T, kRows, kColumns>& rows,
                                         int row, const Tile<T, kWidth, kColumns>& columns,
                                         int column = 0) {
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step)
    ptx::wgmma_ss<T, 8 * N>(s, rows.along_rows(row, step), columns.along_rows(column, step),
                            step > 0);
}

template <int N, class... Operands>
__device__ __forceinline__ void start_nt(float (&s)[N][4], const Operands&... operands) {
  start_nt<N>(&s[0], operands...);
}

// acc (64 x kColumns) += p (64 x 16 N, packed) times 16 N rows of `values`, from `row` on. Ends
// when wgmma_wait says so.
template <class T, int N, int kWidth, int kColumns>
__device__ __forceinline__ void start_nn(float (&acc)[kColumns / 8][4], const uint32_t (&p)[N][4],
                                         const Tile<T, kWidth, kColumns>& values, int row = 0) {
  using Values = Tile<T, kWidth, kColumns>;
#pragma unroll
  for (int step = 0; step < N; ++step) {
    if constexpr (Values::kPanels > 0)
      ptx::wgmma_rs<T, Values::kPanels * kPanelColumns>(acc, p[step],
                                                        values.down_panels(row + step * 16));
    if constexpr (Values::kHasRest)
      ptx::wgmma_rs<T, kRestColumns>(acc + Values::kPanels * 8, p[step],
                                     values.down_rest(row + step * 16));
  }
}

// Sixteen rows of a tile for each warp of a group, as memory that it writes results to when the
// tile has served.
template <class T, int kRows, int kColumns>
struct WarpMemory {
  using Rows = Tile<T, kRows, kColumns>;
  static constexpr int kPanelBytes = 16 * Rows::kPanelRow, kRestBytes = 16 * Rows::kRestRow;

  unsigned char *panels, *rest;

  __device__ WarpMemory(const Rows& tile, int row)
      : panels(tile.data + (row + group_warp() * 16) * Rows::kPanelRow),
        rest(tile.rest() + (row + group_warp() * 16) * Rows::kRestRow) {}

  // A piece of up to 16 bytes, at a multiple of its size.
  template <class Piece>
  __device__ Piece& at(int byte) const {
    const int panel = byte / kPanelBytes, within = byte % kPanelBytes;
    return *reinterpret_cast<Piece*>(
        (panel == Rows::kPanels ? rest : panels + panel * Rows::kPanelBytes) + within);
  }
};

// acc (64 x 8 M), over a divisor for each of a thread's two rows, to rows `row` and on of a
// contiguous rows x columns matrix. On their way the numbers pass through the warp group's rows,
// from `own_row` on, of a tile that has served: a warp then stores its own rows as one piece of
// memory, 16 bytes a thread, instead of scattered pairs.
template <class Products, int M, class T, int kRows, int kColumns>
__device__ __forceinline__ void store_rows(T* to, const float (&acc)[M][4], float low_divisor,
                                           float high_divisor, const Tile<T, kRows, kColumns>& tile,
                                           int own_row, int row, int rows, int columns) {
  static_assert(8 * M == kColumns && sizeof(T) == 2, "they have room");
  const WarpMemory<T, kRows, kColumns> memory(tile, own_row);
  // All four warps have waited for the last wgmma that reads the tile.
  ptx::named_barrier<kGroupThreads>(1 + threadIdx.x / kGroupThreads);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float divisor = half ? high_divisor : low_divisor;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int column = m * 8 + lane_column();
      const int byte = 2 * ((lane_id() / 4 + half * 8) * columns + column);
      const float low = Products::over(acc[m][2 * half], divisor);
      const float high = Products::over(acc[m][2 * half + 1], divisor);
      if (columns % 2 == 0) {
        if (column < columns) memory.template at<uint32_t>(byte) = Products::pair(low, high);
      } else {
        if (column < columns) memory.template at<T>(byte) = narrow<T>(low);
        if (column + 1 < columns) memory.template at<T>(byte + 2) = narrow<T>(high);
      }
    }
  }
  __syncwarp();
  row += group_warp() * 16;
  const int count = min(16, rows - row) * columns;
  to += static_cast<int64_t>(row) * columns;
  const int whole = reinterpret_cast<uintptr_t>(to) % 16 == 0 ? count / 8 * 8 : 0;
  for (int i = 8 * lane_id(); i < whole; i += 8 * 32)
    *reinterpret_cast<float4*>(to + i) = memory.template at<float4>(2 * i);
  for (int i = whole + lane_id(); i < count; i += 32) to[i] = memory.template at<T>(2 * i);
}

// A product's result as the next one's left operand.
template <class T, int N>
__device__ __forceinline__ void pack(uint32_t (*packed)[4], const float (*p)[4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    packed[n / 2][n % 2 * 2] = HalfProducts<T>::pair(p[n][0], p[n][1]);
    packed[n / 2][n % 2 * 2 + 1] = HalfProducts<T>::pair(p[n][2], p[n][3]);
  }
}

template <class T, int N>
__device__ __forceinline__ void pack(uint32_t (*packed)[4], const float (&p)[N][4]) {
  pack<T, N>(packed, &p[0]);
}

// One operand in shared memory: the block's kRows rows of it, and kStages tiles of kWidth rows that
// pass by. Either may be none. The maps' boxes have kBox rows.
template <class T, int kRows, int kWidth, int kColumns, int kStages, int kBox = kBoxRows>
struct Operand {
  using Rows = Tile<T, kRows, kColumns>;
  using Passing = Tile<T, kWidth, kColumns>;
  static constexpr int kRowBytes = Rows::kBytes;
  static constexpr int kStageBytes = kStages > 0 ? Passing::kBytes : 0;
  static constexpr int kBytes = kRowBytes + kStages * kStageBytes;

  const TileMaps& maps;
  int image;
  Rows rows;
  unsigned char* stages;

  __device__ Operand(SharedMemory& shared, const TileMaps& maps, int image)
      : maps(maps),
        image(image),
        rows{shared.take<unsigned char>(kBytes)},
        stages(rows.data + kRowBytes) {}

  // `tile` counts on for ever.
  __device__ Passing operator[](int tile) const { return {stages + tile % kStages * kStageBytes}; }

  __device__ void load_rows(uint64_t* barrier, int row) const {
    rows.template load<kRows, kBox>(maps, barrier, row, image);
  }

  __device__ void load(uint64_t* barrier, int tile) const {
    if constexpr (kStages > 0)
      (*this)[tile].template load<kWidth, kBox>(maps, barrier, tile * kWidth, image);
  }
};

// Tiles of two operands that pass by as one, kWidth rows of either: kTurn of the first above kTurn
// of the second, and so on. One wgmma then multiplies a block's rows by both. May be none.
template <class T, int kWidth, int kColumns, int kStages, int kTurn = kWidth>
struct Stacked {
  using Passing = Tile<T, 2 * kWidth, kColumns>;
  static constexpr int kRowBytes = 0, kStageBytes = kStages > 0 ? Passing::kBytes : 0;
  static constexpr int kBytes = kStages * kStageBytes;

  // Of boxes of kTurn rows.
  const TileMaps &upper, &lower;
  int image;
  unsigned char* stages;

  __device__ Stacked(SharedMemory& shared, const TileMaps& upper, const TileMaps& lower, int image)
      : upper(upper), lower(lower), image(image), stages(shared.take<unsigned char>(kBytes)) {}

  __device__ Passing operator[](int tile) const { return {stages + tile % kStages * kStageBytes}; }

  __device__ void load_rows(uint64_t*, int) const {}

  __device__ void load(uint64_t* barrier, int tile) const {
    if constexpr (kStages > 0) {
      for (int r = 0; r < kWidth; r += kTurn) {
        const int row = tile * kWidth + r;
        (*this)[tile].template load<kTurn, kTurn>(upper, barrier, row, image, 2 * r);
        (*this)[tile].template load<kTurn, kTurn>(lower, barrier, row, image, 2 * r + kTurn);
      }
    }
  }
};

// The terms of an image's rows, kWidth of them with each tile.
template <int kWidth, int kStages>
struct PassingTerms {
  static constexpr int kRowBytes = 0, kStageBytes = kWidth * sizeof(RowTerms);
  static constexpr int kBytes = kStages * kStageBytes;

  const RowTerms* terms;
  RowTerms* stages;

  __device__ PassingTerms(SharedMemory& shared, const RowTerms* terms)
      : terms(terms), stages(shared.take<RowTerms>(kStages * kWidth)) {}

  __device__ const RowTerms* operator[](int tile) const { return stages + tile % kStages * kWidth; }

  __device__ void load_rows(uint64_t*, int) const {}

  __device__ void load(uint64_t* barrier, int tile) const {
    ptx::bulk_copy(stages + tile % kStages * kWidth, terms + tile * kWidth, kStageBytes, barrier);
  }
};

// The operand whose tiles are the values: where v = x, x itself.
template <bool kTied, class X, class V>
__device__ __forceinline__ const auto& values_of(const X& x, const V& v) {
  if constexpr (kTied)
    return x;
  else
    return v;
}

// The same operand of two images.
template <class Single>
struct Both {
  static constexpr int kRowBytes = 2 * Single::kRowBytes, kStageBytes = 2 * Single::kStageBytes;
  static constexpr int kBytes = 2 * Single::kBytes;

  Single first, second;

  __device__ Both(SharedMemory& shared, const TileMaps& maps, int first_image, int second_image)
      : first(shared, maps, first_image), second(shared, maps, second_image) {}
  __device__ Both(SharedMemory& shared, const TileMaps& upper, const TileMaps& lower,
                  int first_image, int second_image)
      : first(shared, upper, lower, first_image), second(shared, upper, lower, second_image) {}

  __device__ Single operator[](int which) const { return which == 0 ? first : second; }

  __device__ void load_rows(uint64_t* barrier, int row) const {
    first.load_rows(barrier, row);
    second.load_rows(barrier, row);
  }

  __device__ void load(uint64_t* barrier, int tile) const {
    first.load(barrier, tile);
    second.load(barrier, tile);
  }
};

// What the block's warp groups tell each other: that its rows have come, and for each of kStages
// sets of tiles, which pass from the producer to kReaders of the consumers and back, that it is
// full or empty.
template <int kStages, int kReaders = kConsumers>
struct Ring {
  static constexpr int kBarriers = 1 + 2 * kStages;

  uint64_t* rows_full;

  // All threads of the block meet.
  __device__ explicit Ring(SharedMemory& shared) : rows_full(shared.take<uint64_t>(kBarriers)) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(rows_full, 1);
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(full(stage), 1);
        ptx::mbarrier_init(empty(stage), kReaders * kGroupThreads / 32);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }

  __device__ uint64_t* full(int tile) const { return rows_full + 1 + tile % kStages; }
  __device__ uint64_t* empty(int tile) const { return full(tile) + kStages; }

  // By the producer: waits until the consumers are done with what lay there, then expects bytes.
  __device__ void refill(int tile, int bytes) const {
    ptx::mbarrier_wait(empty(tile), (tile / kStages + 1) % 2);
    ptx::mbarrier_arrive_expect(full(tile), bytes);
  }

  __device__ void wait(int tile) const { ptx::mbarrier_wait(full(tile), tile / kStages % 2); }

  // A tile that is not this consumer's. It has to be full first: a consumer that gave it back a
  // round ahead of the other would be counted twice.
  __device__ void pass(int tile) const {
    wait(tile);
    release(tile);
  }

  // By every warp of every reader, once its wgmma on the tiles are finished.
  __device__ void release(int tile) const {
    if (lane_id() == 0) ptx::mbarrier_arrive(empty(tile));
  }
};

// What a consumer does of a block: its rows, from `row` on among the block's, by all columns; or,
// of a half block, all rows by half of the columns: of each tile, or of every other tile.
struct Share {
  bool is_half;
  int row;

  __device__ explicit Share(const Place& block)
      : is_half(block.is_half), row(block.is_half ? 0 : consumer_row()) {}

  // Not kept, as it would take a register from the loops.
  __device__ bool is_second() const { return is_half && consumer_row() > 0; }

  // The first of its tiles, and the one after a tile. The other's are given back on the way.
  template <int kStages>
  __device__ int begin(const Ring<kStages>& ring) const {
    if (!is_second()) return 0;
    ring.pass(0);
    return 1;
  }
  template <int kStages>
  __device__ int after(const Ring<kStages>& ring, int tile, int tiles) const {
    if (!is_half) return tile + 1;
    if (tile + 1 < tiles) ring.pass(tile + 1);
    return tile + 2;
  }
};

// Where the consumers of a half block, each with its sums over half of the columns, become one: the
// second hands its numbers over, in memory that tiles have lain in, and is done.
struct Merger {
  static constexpr int kThreads = kConsumers * kGroupThreads;

  float* numbers;

  __device__ explicit Merger(unsigned char* tiles)
      : numbers(reinterpret_cast<float*>(tiles) + group_thread()) {}

  // The i-th number of a thread, and of the other consumer's same thread.
  __device__ float& at(int i) const { return numbers[i * kGroupThreads]; }

  template <int M>
  __device__ void give(int first, const float (&sums)[M][4]) const {
#pragma unroll
    for (int i = 0; i < 4 * M; ++i) at(first + i) = sums[i / 4][i % 4];
  }

  template <int M>
  __device__ void add_to(float (&sums)[M][4], int first) const {
#pragma unroll
    for (int i = 0; i < 4 * M; ++i) sums[i / 4][i % 4] += at(first + i);
  }

  // Before numbers are given, so that nobody multiplies tiles any more, and before they are taken.
  __device__ static void meet() { ptx::named_barrier<kThreads>(1); }
};

// Through shared memory the two consumers hand each other kElements of every thread: thread t of
// either gets those of the other's. Two buffers in turn, so that one meeting a tile is enough.
template <class Element, int kElements>
struct Trade {
  static constexpr int kThreads = kConsumers * kGroupThreads;
  static constexpr int kBytes = 2 * kElements * kThreads * sizeof(Element);

  Element* buffers;

  __device__ explicit Trade(SharedMemory& shared)
      : buffers(shared.take<Element>(2 * kElements * kThreads)) {}

  __device__ Element& given(int tile, int i) const { return at(tile, i, thread()); }
  // Behind meet().
  __device__ const Element& taken(int tile, int i) const {
    return at(tile, i, thread() ^ kGroupThreads);
  }
  __device__ static void meet() { ptx::named_barrier<kThreads>(1); }

 private:
  __device__ static int thread() { return threadIdx.x - kGroupThreads; }
  __device__ Element& at(int tile, int i, int thread) const {
    return buffers[(tile % 2 * kElements + i) * kThreads + thread];
  }
};

template <int kStages, class... Operands>
constexpr size_t pipeline_bytes() {
  return shared_bytes({Ring<kStages>::kBarriers * sizeof(uint64_t), size_t{Operands::kBytes}...});
}

// The producer's work: one thread brings the block's rows, from `row` on, then tile after tile.
template <int kStages, int kReaders, class... Operands>
__device__ __forceinline__ void produce(const Ring<kStages, kReaders>& ring, int row, int tiles,
                                        const Operands&... operands) {
  ptx::setmaxnreg_dec<kProducerRegisters>();
  if (threadIdx.x > 0) return;
  ptx::mbarrier_arrive_expect(ring.rows_full, (Operands::kRowBytes + ...));
  (operands.load_rows(ring.rows_full, row), ...);
  for (int tile = 0; tile < tiles; ++tile) {
    ring.refill(tile, (Operands::kStageBytes + ...));
    (operands.load(ring.full(tile), tile), ...);
  }
}

template <class... Parameters, class P>
cudaError_t launch_balanced(const Context& context, const Shape& shape, const char* name,
                            void (*kernel)(Parameters...), size_t shared_bytes, const Maps& maps,
                            const P& p) {
  const RowBlocks blocks(context, shape);
  return launch(context, name, kernel, dim3(blocks.all), kPipelineThreads, shared_bytes, maps, p,
                blocks);
}

// A block for every `rows` rows of every image.
template <class... Parameters, class P>
cudaError_t launch_row_blocks(const Context& context, const Shape& shape, int rows,
                              const char* name, void (*kernel)(Parameters...), size_t shared_bytes,
                              const Maps& maps, const P& p) {
  const int row_blocks = divide_up(shape.channels, rows);
  return launch(context, name, kernel, dim3(shape.batch * row_blocks), kPipelineThreads,
                shared_bytes, maps, p, row_blocks);
}

}  // namespace cin_fast
