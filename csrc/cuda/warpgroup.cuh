// How one warp group fills tiles while others multiply them: who has which rows, the ring between
// them, and how halves of a block meet. For sm_90a.
#pragma once

#include "wgmma_tiles.cuh"

namespace cin_fast {

// A warp group that copies, and those that multiply, 64 rows each.
constexpr int kConsumers = 2;
constexpr int kConsumerRows = kConsumers * kBlockRows;
constexpr int kPipelineThreads = (1 + kConsumers) * kGroupThreads;
// The block starts with 168 registers a thread: as many as it may share out.
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

// The image and the first row of a block; of a half block, the whole one's, and its own among them.
struct Place {
  // Unsigned, so that nothing extends its sign: that took a register.
  unsigned image;
  int row, half_row = 0;
  bool is_half = false;

  __device__ Place(int row_blocks, int rows)
      : image(blockIdx.x / row_blocks), row(blockIdx.x % row_blocks * rows) {}

  __device__ explicit Place(const RowBlocks& blocks) {
    const int index = blockIdx.x, half = index - blocks.whole;
    is_half = half >= 0;
    const int block = is_half ? blocks.whole + half / 2 : index;
    image = of_warp(block / blocks.per_image);
    row = of_warp(block % blocks.per_image * kConsumerRows);
    half_row = is_half ? of_warp(half % 2 * kBlockRows) : 0;
  }
};

// The tiles of columns in the order in which a block meets them: from its `own` on, and around.
struct Walk {
  int tiles, own;

  __device__ Walk(int tiles, int own = 0) : tiles(tiles), own(own) {}

  __device__ int operator[](int i) const {
    const int tile = own + i;
    return tile < tiles ? tile : tile - tiles;
  }
};

// One operand in shared memory: the block's kRows rows of it, in tiles of kBox, and kStages tiles
// of kWidth rows that pass by. Either may be none. In panels its rows come in turns of kTurn.
template <class T, int kRows, int kWidth, int kColumns, int kStages, int kBox = kWidth,
          int kTurn = kGroupRows>
struct Operand {
  using Rows = Tile<T, kBox, kColumns>;
  using Passing = Tile<T, kWidth, kColumns>;
  static_assert(kRows % kBox == 0 && (kStages == 0 || kBox == kWidth), "a copy is a tile");
  static constexpr int kRowBytes = kRows / kBox * Rows::kBytes;
  static constexpr int kStageBytes = kStages > 0 ? Passing::kBytes : 0;
  static constexpr int kBytes = kRowBytes + kStages * kStageBytes;

  const ptx::TensorMap& map;
  int image;
  unsigned char *rows, *stages;

  __device__ Operand(SharedMemory& shared, const ptx::TensorMap& map, int image)
      : map(map),
        image(image),
        rows(shared.take<unsigned char>(kBytes)),
        stages(rows + kRowBytes) {}

  static cudaError_t encode(ptx::TensorMap* map, const Panels& panels) {
    return kBytes > 0 ? encode_map(map, panels, kBox, kColumns / kPanelColumns) : cudaSuccess;
  }

  // A tile that begins with that row of the block's.
  __device__ Rows rows_from(int row) const {
    return {rows + row / kBox * Rows::kBytes + row % kBox * kPanelRow};
  }

  // The i-th tile of the block's walk.
  __device__ Passing operator[](int i) const { return {stages + i % kStages * kStageBytes}; }

  __device__ void load_rows(uint64_t* barrier, int row) const {
    for (int r = 0; r < kRows; r += kBox) rows_from(r).load(map, barrier, (row + r) / kTurn, image);
  }

  __device__ void load(uint64_t* barrier, int i, int tile) const {
    if constexpr (kStages > 0) (*this)[i].load(map, barrier, tile * kWidth / kTurn, image);
  }
};

// One whose rows are the first tile of the block's walk: nothing waits for a copy of them.
template <class T, int kWidth, int kColumns, int kStages, int kTurn = kGroupRows>
struct OwnFirst : Operand<T, kWidth, kWidth, kColumns, kStages, kWidth, kTurn> {
  using Base = Operand<T, kWidth, kWidth, kColumns, kStages, kWidth, kTurn>;
  using Base::Base;

  // The rows lie in front of the stages.
  __device__ typename Base::Passing operator[](int i) const {
    return {this->stages + (i == 0 ? -1 : (i - 1) % kStages) * Base::kStageBytes};
  }

  __device__ void load(uint64_t* barrier, int i, int tile) const {
    (*this)[i].load(this->map, barrier, tile * kWidth / kTurn, this->image);
  }
};

// Tiles of two operands that pass by as one, kWidth rows of either, stacked in turns. One wgmma
// then multiplies a block's rows by both. May be none.
template <class T, int kWidth, int kColumns, int kStages>
using Stacked = Operand<T, 0, 2 * kWidth, kColumns, kStages>;

// The terms of an image's rows, kWidth of them with each tile.
template <int kWidth, int kStages>
struct PassingTerms {
  static constexpr int kRowBytes = 0, kStageBytes = kWidth * sizeof(RowTerms);
  static constexpr int kBytes = kStages * kStageBytes;

  const RowTerms* terms;
  RowTerms* stages;

  __device__ PassingTerms(SharedMemory& shared, const RowTerms* terms)
      : terms(terms), stages(shared.take<RowTerms>(kStages * kWidth)) {}

  __device__ const RowTerms* operator[](int i) const { return stages + i % kStages * kWidth; }

  __device__ void load_rows(uint64_t*, int) const {}

  __device__ void load(uint64_t* barrier, int i, int tile) const {
    ptx::bulk_copy(stages + i % kStages * kWidth, terms + tile * kWidth, kStageBytes, barrier);
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

  __device__ Both(SharedMemory& shared, const ptx::TensorMap& map, int first_image,
                  int second_image)
      : first(shared, map, first_image), second(shared, map, second_image) {}

  static cudaError_t encode(ptx::TensorMap* map, const Panels& panels) {
    return Single::encode(map, panels);
  }

  __device__ Single operator[](int which) const { return which == 0 ? first : second; }

  __device__ void load_rows(uint64_t* barrier, int row) const {
    first.load_rows(barrier, row);
    second.load_rows(barrier, row);
  }

  __device__ void load(uint64_t* barrier, int i, int tile) const {
    first.load(barrier, i, tile);
    second.load(barrier, i, tile);
  }
};

// What the block's warp groups tell each other: that its rows have come, and for each of kStages
// sets of tiles, which pass from the producer to kReaders of the consumers and back, that it is
// full or empty. Where the rows are the first tile they are never refilled.
template <int kStages, bool kOwnFirst = false, int kReaders = kConsumers>
struct Ring {
  // The rows', then the stages'.
  static constexpr int kSlots = 1 + kStages, kBarriers = 2 * kSlots;
  // The first tile that the producer brings.
  static constexpr int kFirst = kOwnFirst ? 1 : 0;

  uint64_t* rows_full;

  // All threads of the block meet.
  __device__ explicit Ring(SharedMemory& shared) : rows_full(shared.take<uint64_t>(kBarriers)) {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < kSlots; ++slot) {
        ptx::mbarrier_init(rows_full + slot, 1);
        ptx::mbarrier_init(rows_full + kSlots + slot, kReaders * kGroupThreads / 32);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }

  __device__ uint64_t* full(int i) const {
    return rows_full + (i < kFirst ? 0 : 1 + (i - kFirst) % kStages);
  }
  __device__ uint64_t* empty(int i) const { return full(i) + kSlots; }
  // How often the slot of a tile was used before.
  __device__ static int round(int i) { return i < kFirst ? 0 : (i - kFirst) / kStages; }

  // By the producer: waits until the consumers are done with what lay there, then expects bytes.
  __device__ void refill(int i, int bytes) const {
    ptx::mbarrier_wait(empty(i), (round(i) + 1) % 2);
    ptx::mbarrier_arrive_expect(full(i), bytes);
  }

  __device__ void wait(int i) const { ptx::mbarrier_wait(full(i), round(i) % 2); }

  // A tile that is not this consumer's. It has to be full first: a consumer that gave it back a
  // round ahead of the other would be counted twice.
  __device__ void pass(int i) const {
    wait(i);
    release(i);
  }

  // By every warp of every reader, once its wgmma on the tiles are finished.
  __device__ void release(int i) const {
    if (lane_id() == 0) ptx::mbarrier_arrive(empty(i));
  }

  // By a consumer that needs the memory of rows which were a tile: waits until all have read it.
  __device__ void wait_until_rows_are_free() const {
    if constexpr (kOwnFirst) ptx::mbarrier_wait(empty(0), 0);
  }
};

// The consumers' turns at the tensor cores: while one computes on what its products gave, the
// other's run. Both begin and end equally often; at last both leave. Where they are not taken,
// nobody waits.
struct Turns {
  static constexpr int kThreads = kConsumers * kGroupThreads;

  // The named barriers where they wait, this consumer at its own.
  static constexpr int kFirst = 4, kSecond = 5;
  int own;
  bool are_taken;

  __device__ explicit Turns(bool are_taken = true)
      : own(kFirst + consumer_row() / kBlockRows), are_taken(are_taken) {
    if (is_second()) end();
  }

  __device__ bool is_second() const { return own == kSecond; }
  __device__ void begin() const {
    if (are_taken) ptx::named_barrier<kThreads>(own);
  }
  __device__ void end() const {
    if (are_taken) ptx::named_barrier_arrive<kThreads>(kFirst + kSecond - own);
  }
  // The first takes the turn that the second gave it last.
  __device__ void leave() const {
    if (!is_second()) begin();
  }
};

// What a consumer does of a block: its rows, from `row` on among the block's, by all columns; or,
// of a half block, all rows by half of the columns: of each tile, or of every other tile.
struct Share {
  bool is_half;
  int row;

  __device__ explicit Share(const Place& block)
      : is_half(block.is_half), row(block.is_half ? block.half_row : consumer_row()) {}

  // Not kept, as it would take a register from the loops.
  __device__ bool is_second() const { return is_half && consumer_row() > 0; }

  // The first of its tiles, and the one after a tile. The other's are given back on the way.
  template <class Ring>
  __device__ int begin(const Ring& ring) const {
    if (!is_second()) return 0;
    ring.pass(0);
    return 1;
  }
  template <class Ring>
  __device__ int after(const Ring& ring, int tile, int tiles) const {
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
template <class Ring, class... Operands>
__device__ __forceinline__ void produce(const Ring& ring, int row, const Walk& walk,
                                        const Operands&... operands) {
  ptx::setmaxnreg_dec<kProducerRegisters>();
  if (threadIdx.x > 0) return;
  ptx::mbarrier_arrive_expect(ring.rows_full, (Operands::kRowBytes + ...));
  (operands.load_rows(ring.rows_full, row), ...);
  for (int i = Ring::kFirst; i < walk.tiles; ++i) {
    ring.refill(i, (Operands::kStageBytes + ...));
    (operands.load(ring.full(i), i, walk[i]), ...);
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
