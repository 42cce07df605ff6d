// How one warp group fills tiles while others multiply them: who has which rows, the ring between
// them, and how halves of a block meet. For sm_90a.
#pragma once

#include "wgmma_tiles.cuh"

namespace cin_fast {

// A warp group that copies, and those that multiply, 64 rows each.
constexpr int kConsumers = 2;
constexpr int kConsumerRows = kConsumers * kBlockRows;
constexpr int kPipelineThreads = (1 + kConsumers) * kGroupThreads;
// The block starts with 168 registers a thread: as many as it may share out. Where all threads of
// the producer copy, they need more.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kProducerRegistersByPieces = 40, kConsumerRegistersByPieces = 232;

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

// An operand that the whole producer brings, from rows that start on 8 bytes.
template <class T, int kRows, int kWidth, int kColumns, int kStages>
struct PieceOperand {
  using Rows = Tile<T, kRows, kColumns>;
  using Passing = Tile<T, kWidth, kColumns>;
  static constexpr int kBytes = Rows::kBytes + kStages * Passing::kBytes;

  Matrix<T> from;
  Rows rows;
  unsigned char* stages;

  __device__ PieceOperand(SharedMemory& shared, const Batch<T>& batch, int image)
      : from(batch.image(image)),
        rows{shared.take<unsigned char>(kBytes)},
        stages(rows.data + Rows::kBytes) {}

  __device__ Passing operator[](int tile) const {
    return {stages + tile % kStages * Passing::kBytes};
  }

  __device__ void load_rows(int row) const { rows.load_pieces(from, row); }
  __device__ void load(int tile) const { (*this)[tile].load_pieces(from, tile * kWidth); }
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

template <bool kFirst, class First, class Second>
__device__ __forceinline__ const auto& either(const First& first, const Second& second) {
  if constexpr (kFirst)
    return first;
  else
    return second;
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

  // All threads of the block meet. `writers` arrive at what is full: the thread that expects bytes,
  // or the producer's warps.
  __device__ explicit Ring(SharedMemory& shared, int writers = 1)
      : rows_full(shared.take<uint64_t>(kBarriers)) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(rows_full, writers);
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(full(stage), writers);
        ptx::mbarrier_init(empty(stage), kReaders * kGroupThreads / 32);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }

  __device__ uint64_t* full(int tile) const { return rows_full + 1 + tile % kStages; }
  __device__ uint64_t* empty(int tile) const { return full(tile) + kStages; }

  // By the producer: waits until the consumers are done with what lay there.
  __device__ void wait_empty(int tile) const {
    ptx::mbarrier_wait(empty(tile), (tile / kStages + 1) % 2);
  }

  // The same, then expects bytes.
  __device__ void refill(int tile, int bytes) const {
    wait_empty(tile);
    ptx::mbarrier_arrive_expect(full(tile), bytes);
  }

  // By every thread of the producer, once all but kPending groups of its copies have landed: what
  // the others brought is `barrier`'s.
  template <int kPending>
  __device__ static void publish(uint64_t* barrier) {
    ptx::cp_async_wait<kPending>();
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane_id() == 0) ptx::mbarrier_arrive(barrier);
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

// The same by all threads of the producer, of an operand in pieces.
template <int kStages, int kReaders, class X>
__device__ __forceinline__ void produce_pieces(const Ring<kStages, kReaders>& ring, int row,
                                               int tiles, const X& x) {
  ptx::setmaxnreg_dec<kProducerRegistersByPieces>();
  x.load_rows(row);
  ptx::cp_async_commit();
  // All stages are empty: their copies are under way together.
#pragma unroll 1
  for (int tile = 0; tile < kStages; ++tile) {
    if (tile < tiles) x.load(tile);
    ptx::cp_async_commit();
  }
  ring.template publish<kStages>(ring.rows_full);
  ring.template publish<kStages - 1>(ring.full(0));
  for (int tile = 1; tile < min(kStages, tiles); ++tile) ring.template publish<0>(ring.full(tile));
  for (int tile = kStages; tile < tiles; ++tile) {
    ring.wait_empty(tile);
    x.load(tile);
    ptx::cp_async_commit();
    ring.template publish<0>(ring.full(tile));
  }
}

// What every kernel here does first. All are launched early, so that they are in place when the one
// before them ends, the copy of an operand for one, and let the next be so.
__device__ __forceinline__ void follow() {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
}

template <class... Parameters, class P>
cudaError_t launch_balanced(const Context& context, const Shape& shape, const char* name,
                            void (*kernel)(Parameters...), size_t shared_bytes, const Maps& maps,
                            const P& p) {
  const RowBlocks blocks(context, shape);
  return launch<true>(context, name, kernel, dim3(blocks.all), kPipelineThreads, shared_bytes, maps,
                      p, blocks);
}

// A block for every `rows` rows of every image.
template <class... Parameters, class P>
cudaError_t launch_row_blocks(const Context& context, const Shape& shape, int rows,
                              const char* name, void (*kernel)(Parameters...), size_t shared_bytes,
                              const Maps& maps, const P& p) {
  const int row_blocks = divide_up(shape.channels, rows);
  return launch<true>(context, name, kernel, dim3(shape.batch * row_blocks), kPipelineThreads,
                      shared_bytes, maps, p, row_blocks);
}

}  // namespace cin_fast
