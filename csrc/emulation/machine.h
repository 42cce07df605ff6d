// The state of a launch: threads as fibers, shared memory with its shadow. Private to this folder.
#pragma once

#include <array>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runtime.h"

namespace emulation {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGapBytes = 4096;
// Shadow memory has one entry for two bytes, the smallest scalar.
constexpr size_t kGranule = 2;
// And one for sixteen, the smallest part that the copy engine and the tensor cores touch.
constexpr size_t kPiece = 16;
constexpr unsigned kMaxWarps = 12, kGroupWarps = 4, kMaxGroups = kMaxWarps / kGroupWarps;
constexpr unsigned kGroupThreads = 32 * kGroupWarps;

enum class Reader : uint8_t { kNone, kThread, kWarp, kBlock };

struct Shadow {
  uint16_t writer, reader_id;
  bool written, in_flight, is_barrier;
  Reader reader;
  // The warps that have read it since it was written, a bit each.
  uint32_t readers;
  // Barriers of the block, and synchronisations of the warp, before the last write and read.
  uint32_t write_block, write_warp, read_block;
  std::array<uint32_t, kMaxWarps> read_warp;
  // Fences between the ordinary and the asynchronous proxy that the writer had executed before.
  uint32_t write_fences;
};

struct Piece {
  // The bulk copy that wrote it last, counted from 1.
  uint32_t copy;
  // The last wgmma of each warp group that reads it, counted from 1.
  std::array<uint32_t, kMaxGroups> readers;
};

struct SharedArray {
  char* begin;
  size_t bytes, offset;
  std::vector<Shadow> shadow;
  std::vector<Piece> pieces;
};

struct Copy {
  char* destination;
  const char* source;
  int bytes;
  bool valid;
  Site site;
};

// How far one has seen another warp go: its synchronisations, and its wgmma that are finished.
struct Progress {
  uint32_t epoch, wgmma;
};
using Knowledge = std::array<Progress, kMaxWarps>;

void merge(Knowledge& into, const Knowledge& from);

struct BulkCopy {
  TensorMap map;
  char* destination;
  int turn, image;
  unsigned barrier;
  uint32_t phase;
  bool landed;
  Site site;
};

struct Mbarrier {
  const void* address;
  int expected, missing;
  long transactions = 0;
  // Phases that are over.
  uint32_t phase = 0;
  // Who arrived brings what it knows to those who wait.
  Knowledge arriving{}, known{};
  std::deque<uint32_t> copies;
  unsigned initialised_by;
  uint32_t initialised_at;
  bool fenced = false;
  Site site;
};

enum class State { kReady, kAtCollective, kAtBarrier, kAtNamedBarrier, kAtMbarrier, kDone };

struct Fiber {
  void* stack_pointer;
  char* stack = nullptr;
  unsigned id;
  uint3 index;
  State state;
  Site site;
  // cp.async of this thread.
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
  // What it waits for, and what it has seen of each mbarrier and each warp.
  unsigned barrier;
  uint32_t parity;
  std::vector<uint32_t> phases;
  Knowledge known;
  uint32_t proxy_fences;
  bool wgmma_fenced;
  // Of each committed group, the last wgmma in it.
  std::vector<uint32_t> committed;
  // Whether the kernel before this one has ended for it.
  bool may_use_global;
};

struct Meeting {
  uint32_t arrived = 0, mask = 0;
  Collective kind{};
  Site site{};
  void* operands[32];
  uint64_t generation = 0;
};

struct Warp {
  uint32_t epoch = 0;
  // Collectives of disjoint lane masks may be under way together.
  Meeting meetings[8];
};

// Accumulators that wait for the tensor cores.
struct Accumulators {
  float* registers[kGroupThreads];
  bool returned[kGroupThreads];
  unsigned threads = 0;
  int columns;
  std::vector<float> values;
  // The commit group of the last wgmma into them.
  size_t group;
  Site site;
};

struct WarpGroup {
  unsigned arrived = 0;
  Collective kind{};
  Site site{};
  void* operands[kGroupThreads];
  uint64_t generation = 0;
  uint32_t issued = 0;
  std::vector<Site> sites;
  std::list<Accumulators> accumulators;
  int registers = 0;
};

// Those who wait at a barrier for part of the block.
struct NamedBarrier {
  // Those that wait, and those that arrived without waiting.
  std::vector<Fiber*> waiting, arrived;
  unsigned threads;
  Site site;
};

struct Block {
  std::vector<SharedArray> arrays;
  std::vector<Warp> warps;
  std::vector<WarpGroup> groups;
  std::vector<Fiber*> fibers;
  std::vector<Mbarrier> barriers;
  std::array<NamedBarrier, 16> named_barriers;
  std::vector<BulkCopy> copies;
  size_t used = 0, limit = 0;
  uint32_t epoch = 0, number = 0;
  unsigned waiting = 0, done = 0;
  std::vector<char> slab;
  size_t slab_used = kGapBytes;
};

struct Buffer {
  const char* begin;
  size_t bytes, guard;
  // Which block wrote each granule in this launch, plus one.
  std::vector<uint32_t> writer;
};

struct Machine {
  Block* block = nullptr;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  const char* kernel = "";
  void* stack_pointer;
  std::vector<std::unique_ptr<Fiber>> pool;
  std::map<const void*, int> shared_limits;
  std::vector<Buffer> buffers;
  std::string error, launched;
  int code = 0, order = 0, shared_limit = 0;
  bool early = false;
  size_t conflicts = 0;
};

extern Machine machine;

struct Access {
  const char* what;
  Site site;
  void* caller;
};

// scheduler.cpp
[[noreturn]] void fail(const char* format, ...);
void to_scheduler();
const char* base_name(const char* path);
bool same(Site a, Site b);

// memory.cpp
std::string describe(const Access& access);
SharedArray* find_array(const void* address);
// By the address that shared_address() gave.
SharedArray* find_array(uint32_t address);
void access(const void* address, size_t bytes, bool write, bool by_warp, const Access& a);
void set_in_flight(const void* destination, size_t bytes, bool in_flight);
// What a bulk copy is about to overwrite, and what a wgmma is about to read.
void check_overwritten(SharedArray& array, size_t offset, size_t bytes, const Access& a);
void check_read_by_group(SharedArray& array, size_t offset, unsigned group, const Access& a);

// collectives.cpp
const char* name_of(Collective kind);

// bulk_copies.cpp
std::string describe(const Mbarrier& barrier);
// What one of them knows of others' warps and of phases, all know from now on.
void share_knowledge(const std::vector<Fiber*>& fibers);
void check_copies_landed();

// wgmma.cpp
void check_wgmma_finished(const Fiber& fiber);

}  // namespace emulation
