// Fibers, collectives, cp.async and the shadow memory that judges every access.
//
// Kernels are compiled with -fsanitize=thread, so that each plain load and store calls __tsan_*:
// those hooks are defined here, and ThreadSanitizer itself is not linked.

#include "runtime.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "harness.h"

#if !defined(__x86_64__)
#error "the emulation switches fibers in x86-64 assembly"
#endif

extern "C" void emulation_switch(void** from, void* to);
asm(".text\n"
    ".globl emulation_switch\n"
    ".type emulation_switch,@function\n"
    "emulation_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGapBytes = 4096;
// Shadow memory has one entry for two bytes, the smallest scalar.
constexpr size_t kGranule = 2;
constexpr int kPlainSharedBytes = 49152;

enum class Reader : uint8_t { kNone, kThread, kWarp, kBlock };

struct Shadow {
  uint16_t writer, reader_id;
  bool written, in_flight;
  Reader reader;
  // Barriers of the block, and synchronisations of the warp, before the last write and read.
  uint32_t write_block, write_warp, read_block, read_warp;
};

struct SharedArray {
  char* begin;
  size_t bytes, offset;
  std::vector<Shadow> shadow;
};

struct Copy {
  char* destination;
  const char* source;
  int bytes;
  bool valid;
  Site site;
};

enum class State { kReady, kAtCollective, kAtBarrier, kDone };

struct Fiber {
  void* stack_pointer;
  char* stack = nullptr;
  unsigned id;
  uint3 index;
  State state;
  Site site;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
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

struct Block {
  std::vector<SharedArray> arrays;
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
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
  size_t conflicts = 0;
};

Machine machine;

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// Leaves the launch: the fiber is never resumed.
[[noreturn]] void fail(const char* format, ...) {
  char text[700];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  machine.error = std::string(machine.kernel) + ": ";
  if (machine.current) {
    char where[120];
    snprintf(where, sizeof where, "block (%u,%u,%u) thread %u: ", blockIdx.x, blockIdx.y,
             blockIdx.z, machine.current->id);
    machine.error += where;
  }
  machine.error += text;
  emulation_switch(&machine.current->stack_pointer, machine.stack_pointer);
  abort();
}

const char* name_of(Collective kind) {
  static const char* const names[] = {"__syncwarp",     "shuffle", "ldmatrix",
                                      "ldmatrix.trans", "mma",     "wgmma"};
  return names[int(kind)];
}

void to_scheduler() { emulation_switch(&machine.current->stack_pointer, machine.stack_pointer); }

void fiber_main() {
  (*machine.body)();
  Fiber* fiber = machine.current;
  for (const auto& group : fiber->groups)
    if (!group.empty())
      fail("exits with the cp.async of %s:%d in flight", base_name(group[0].site.file),
           group[0].site.line);
  if (!fiber->uncommitted.empty())
    fail("exits with an uncommitted cp.async of %s:%d", base_name(fiber->uncommitted[0].site.file),
         fiber->uncommitted[0].site.line);
  fiber->state = State::kDone;
  machine.block->done++;
  to_scheduler();
  abort();
}

void start(Fiber* fiber) {
  if (!fiber->stack)
    fiber->stack = static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  fiber->state = State::kReady;
  fiber->uncommitted.clear();
  fiber->groups.clear();
  void** top = reinterpret_cast<void**>(fiber->stack + kStackBytes) - 2;
  top[0] = reinterpret_cast<void*>(fiber_main);
  top[1] = nullptr;
  // The six registers that emulation_switch restores.
  fiber->stack_pointer = top - 6;
  memset(fiber->stack_pointer, 0, 6 * sizeof(void*));
}

void resume(Fiber* fiber) {
  machine.current = fiber;
  threadIdx = fiber->index;
  emulation_switch(&machine.stack_pointer, fiber->stack_pointer);
  machine.current = nullptr;
}

struct Access {
  const char* what;
  Site site;
  void* caller;
};

std::string describe(const Access& access) {
  char text[600];
  if (!access.caller) {
    snprintf(text, sizeof text, "%s at %s:%d", access.what, base_name(access.site.file),
             access.site.line);
    return text;
  }
  std::string place = "?";
  Dl_info info;
  if (dladdr(access.caller, &info)) {
    char command[600];
    snprintf(command, sizeof command, "addr2line -s -e '%s' %p 2>/dev/null", info.dli_fname,
             reinterpret_cast<void*>(static_cast<char*>(access.caller) - 1 -
                                     static_cast<char*>(info.dli_fbase)));
    if (FILE* pipe = popen(command, "r")) {
      if (fgets(text, sizeof text, pipe)) place = text;
      pclose(pipe);
    }
    while (!place.empty() && place.back() == '\n') place.pop_back();
  }
  return std::string(access.what) + " at " + place;
}

SharedArray* find_array(const void* address) {
  for (auto& array : machine.block->arrays)
    if (address >= array.begin && address < array.begin + array.bytes) return &array;
  return nullptr;
}

bool write_is_unordered(const Shadow& s, unsigned thread, bool by_warp, const Block& block) {
  if (!s.written || s.write_block != block.epoch) return false;
  if (s.writer == thread && !by_warp) return false;
  return !(s.writer / 32 == thread / 32 && s.write_warp < block.warps[thread / 32].epoch);
}

bool read_is_unordered(const Shadow& s, unsigned thread, const Block& block) {
  if (s.reader == Reader::kNone || s.read_block != block.epoch) return false;
  if (s.reader == Reader::kThread && s.reader_id == thread) return false;
  return !(s.reader != Reader::kBlock && s.reader_id / 32 == thread / 32 &&
           s.read_warp < block.warps[thread / 32].epoch);
}

void note_read(Shadow& s, unsigned thread, bool by_warp, const Block& block) {
  if (s.reader == Reader::kNone || s.read_block != block.epoch)
    s.reader = by_warp ? Reader::kWarp : Reader::kThread;
  else if (s.reader_id / 32 != thread / 32)
    s.reader = Reader::kBlock;
  else if (s.reader == Reader::kThread && (by_warp || s.reader_id != thread))
    s.reader = Reader::kWarp;
  s.reader_id = thread;
  s.read_block = block.epoch;
  s.read_warp = block.warps[thread / 32].epoch;
}

void access_shared(const void* address, size_t bytes, bool write, bool by_warp, const Access& a) {
  SharedArray* array = find_array(address);
  if (!array || static_cast<const char*>(address) + bytes > array->begin + array->bytes)
    fail("%s: %zu bytes outside the shared array%s", describe(a).c_str(), bytes,
         array ? " (over its end)" : "");
  const Block& block = *machine.block;
  const unsigned thread = machine.current->id;
  const int number = int(array - block.arrays.data());
  const size_t offset = static_cast<const char*>(address) - array->begin;
  for (size_t i = offset / kGranule; i < (offset + bytes + kGranule - 1) / kGranule; ++i) {
    Shadow& s = array->shadow[i];
    if (s.in_flight)
      fail("%s: shared array %d byte %zu has a cp.async in flight: a wait is missing",
           describe(a).c_str(), number, i * kGranule);
    if (!write && !s.written)
      fail("%s: shared array %d byte %zu is read but was never written", describe(a).c_str(),
           number, i * kGranule);
    if (write_is_unordered(s, thread, by_warp, block))
      fail("%s: race: shared array %d byte %zu was written by thread %u, no barrier between",
           describe(a).c_str(), number, i * kGranule, s.writer);
    if (!write) {
      note_read(s, thread, by_warp, block);
      continue;
    }
    if (read_is_unordered(s, thread, block))
      fail("%s: race: shared array %d byte %zu was read by thread %u, no barrier between",
           describe(a).c_str(), number, i * kGranule, s.reader_id);
    s.written = true;
    s.writer = thread;
    s.write_block = block.epoch;
    s.write_warp = block.warps[thread / 32].epoch;
    s.reader = Reader::kNone;
  }
}

void access_global(const void* address, size_t bytes, bool write, const Access& a) {
  const char* begin = static_cast<const char*>(address);
  for (Buffer& buffer : machine.buffers) {
    if (begin + bytes <= buffer.begin - buffer.guard ||
        begin >= buffer.begin + buffer.bytes + buffer.guard)
      continue;
    if (begin < buffer.begin || begin + bytes > buffer.begin + buffer.bytes)
      fail("%s: byte %td of a global buffer of %zu bytes", describe(a).c_str(),
           begin - buffer.begin, buffer.bytes);
    const uint32_t self = machine.block->number + 1;
    const size_t first = (begin - buffer.begin) / kGranule;
    for (size_t i = first; i < first + (bytes + kGranule - 1) / kGranule; ++i) {
      if (buffer.writer[i] && buffer.writer[i] != self)
        fail("%s: race: byte %zu of a global buffer was written by block %u in this launch",
             describe(a).c_str(), i * kGranule, buffer.writer[i] - 1);
      if (write) buffer.writer[i] = self;
    }
    return;
  }
}

void access(const void* address, size_t bytes, bool write, bool by_warp, const Access& a) {
  const Block& block = *machine.block;
  const char* p = static_cast<const char*>(address);
  if (p >= block.slab.data() && p < block.slab.data() + block.slab.size())
    access_shared(address, bytes, write, by_warp, a);
  else if (p < machine.current->stack || p >= machine.current->stack + kStackBytes)
    access_global(address, bytes, write, a);
}

void set_in_flight(const Copy& copy, bool in_flight) {
  SharedArray* array = find_array(copy.destination);
  const size_t first = (copy.destination - array->begin) / kGranule;
  for (size_t i = 0; i < copy.bytes / kGranule; ++i) array->shadow[first + i].in_flight = in_flight;
}

void run_ldmatrix(Meeting& meeting, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[8][8];
    unsigned uses[8] = {}, most = 0;
    for (int i = 0; i < 8; ++i) {
      const int lane = matrix * 8 + i;
      const char* row =
          static_cast<const char*>(static_cast<Ldmatrix*>(meeting.operands[lane])->row);
      const Access a{name_of(meeting.kind), meeting.site, nullptr};
      if (reinterpret_cast<uintptr_t>(row) & 15)
        fail("%s: the row of lane %d is not aligned to 16 bytes", describe(a).c_str(), lane);
      access(row, 16, false, true, a);
      memcpy(values[i], row, 16);
      const SharedArray* array = find_array(row);
      most = std::max(most, ++uses[(array->offset + (row - array->begin)) / 16 % 8]);
    }
    machine.conflicts += most - 1;
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint16_t low = transposed ? values[j][i] : values[i][j];
      const uint16_t high = transposed ? values[j + 1][i] : values[i][j + 1];
      static_cast<Ldmatrix*>(meeting.operands[lane])->registers[matrix] = low | uint32_t(high)
                                                                                    << 16;
    }
  }
}

void run_shuffle(Meeting& meeting) {
  for (int i = 0; i < 32; ++i) {
    if (!(meeting.mask >> i & 1)) continue;
    auto* operands = static_cast<Shuffle*>(meeting.operands[i]);
    if (!(meeting.mask >> (operands->source & 31) & 1))
      fail("shuffle at %s:%d: lane %d reads lane %d outside the mask", base_name(meeting.site.file),
           meeting.site.line, i, operands->source);
    operands->out = static_cast<Shuffle*>(meeting.operands[operands->source & 31])->in;
  }
}

void run_collective(Meeting& meeting, Warp& warp) {
  switch (meeting.kind) {
    case Collective::kShuffle:
      return run_shuffle(meeting);
    case Collective::kLdmatrix:
    case Collective::kLdmatrixTrans:
      return run_ldmatrix(meeting, meeting.kind == Collective::kLdmatrixTrans);
    case Collective::kMma: {
      auto* const* lanes = reinterpret_cast<Mma* const*>(meeting.operands);
      return lanes[0]->compute(lanes);
    }
    case Collective::kSyncWarp:
      warp.epoch++;
      return;
    case Collective::kWgmma:
      return;
  }
}

bool same(Site a, Site b) { return a.line == b.line && !strcmp(a.file, b.file); }

Meeting* join(Warp& warp, Collective kind, uint32_t mask, Site site) {
  Meeting* free_slot = nullptr;
  for (Meeting& m : warp.meetings) {
    if (!m.arrived) {
      if (!free_slot) free_slot = &m;
      continue;
    }
    if (!(m.mask & mask)) continue;
    if (m.kind != kind || m.mask != mask || !same(m.site, site))
      fail("divergence: this lane is at %s %s:%d, lanes %08x of its warp wait at %s %s:%d",
           name_of(kind), base_name(site.file), site.line, m.arrived, name_of(m.kind),
           base_name(m.site.file), m.site.line);
    return &m;
  }
  if (!free_slot) fail("more than 8 partial-warp collectives in flight");
  free_slot->kind = kind;
  free_slot->mask = mask;
  free_slot->site = site;
  return free_slot;
}

std::string deadlock(const Block& block) {
  char text[300];
  snprintf(text, sizeof text, "deadlock: %u of %zu threads exited", block.done,
           block.fibers.size());
  std::string message = text;
  for (const Fiber* fiber : block.fibers) {
    if (fiber->state == State::kDone) continue;
    snprintf(text, sizeof text, "; thread %u waits at %s (%s:%d)", fiber->id,
             fiber->state == State::kAtBarrier ? "a barrier" : "a warp collective",
             base_name(fiber->site.file), fiber->site.line);
    return message + text;
  }
  return message;
}

std::vector<Fiber*> scheduling_order(const Block& block) {
  std::vector<Fiber*> order = block.fibers;
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order < 2) return order;
  std::mt19937 random(machine.order * 7919 + block.number);
  std::vector<unsigned> warps(block.warps.size());
  for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
  std::shuffle(warps.begin(), warps.end(), random);
  order.clear();
  for (unsigned warp : warps) {
    const size_t end = std::min<size_t>(block.fibers.size(), warp * 32 + 32);
    order.insert(order.end(), block.fibers.begin() + warp * 32, block.fibers.begin() + end);
    std::shuffle(order.end() - (end - warp * 32), order.end(), random);
  }
  return order;
}

// Runs each warp until it blocks, then the next, until all threads are done.
void schedule(Block& block) {
  const std::vector<Fiber*> order = scheduling_order(block);
  while (block.done < block.fibers.size()) {
    bool progress = false;
    for (size_t first = 0, end; first < order.size(); first = end) {
      end = first;
      while (end < order.size() && order[end]->id / 32 == order[first]->id / 32) ++end;
      for (bool again = true; again;) {
        again = false;
        for (size_t i = first; i < end; ++i) {
          if (order[i]->state != State::kReady) continue;
          resume(order[i]);
          if (!machine.error.empty()) return;
          again = progress = true;
        }
      }
    }
    if (!progress && block.done < block.fibers.size()) {
      machine.error = std::string(machine.kernel) + ": " + deadlock(block);
      return;
    }
  }
}

void run_block(uint32_t number, size_t shared_bytes) {
  Block block;
  block.number = number;
  block.limit = shared_bytes;
  block.slab.assign(shared_bytes + 64 * (kGapBytes + 256), char(0xff));
  machine.block = &block;
  blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
  const unsigned threads = blockDim.x;
  block.warps.resize((threads + 31) / 32);
  while (machine.pool.size() < threads) machine.pool.emplace_back(new Fiber);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber* fiber = machine.pool[i].get();
    fiber->id = i;
    fiber->index = {i, 0, 0};
    start(fiber);
    block.fibers.push_back(fiber);
  }
  schedule(block);
  machine.block = nullptr;
}

}  // namespace

int lane() { return machine.current->id & 31; }

void check_access(const void* address, size_t bytes, bool write, const char* what, Site site) {
  access(address, bytes, write, false, {what, site, nullptr});
}

void* shared_memory(unsigned index, size_t bytes) {
  Block& block = *machine.block;
  if (index < block.arrays.size()) {
    if (block.arrays[index].bytes != bytes)
      fail("shared array %u: threads disagree on its size (%zu, %zu)", index, bytes,
           block.arrays[index].bytes);
    return block.arrays[index].begin;
  }
  if (block.used + bytes > block.limit)
    fail("shared array %u: %zu bytes are needed, the launch gave %zu", index, block.used + bytes,
         block.limit);
  // Aligned as on the device, where the swizzle looks at address bits up to 1,024.
  auto address = reinterpret_cast<uintptr_t>(block.slab.data()) + block.slab_used;
  address = (address + 1023) / 1024 * 1024;
  char* begin = reinterpret_cast<char*>(address);
  block.slab_used = begin - block.slab.data() + bytes + kGapBytes;
  if (block.slab_used > block.slab.size()) fail("more shared arrays than the emulation expects");
  block.arrays.push_back(
      {begin, bytes, block.used, std::vector<Shadow>((bytes + kGranule - 1) / kGranule, Shadow{})});
  block.used += (bytes + 127) / 128 * 128;
  return begin;
}

void cp_async(void* destination, const void* source, int bytes, bool valid, Site site) {
  const Access a{"cp.async", site, nullptr};
  if ((reinterpret_cast<uintptr_t>(destination) | reinterpret_cast<uintptr_t>(source)) % bytes)
    fail("%s: addresses are not aligned to %d bytes", describe(a).c_str(), bytes);
  if (!find_array(destination)) fail("%s: outside the shared arrays", describe(a).c_str());
  access(destination, bytes, true, false, a);
  if (valid) access(source, bytes, false, false, a);
  // Nothing may be read before the wait: until then the bytes are NaN.
  memset(destination, 0xff, bytes);
  Copy copy{static_cast<char*>(destination), static_cast<const char*>(source), bytes, valid, site};
  set_in_flight(copy, true);
  machine.current->uncommitted.push_back(copy);
}

void cp_async_commit() {
  machine.current->groups.push_back(std::move(machine.current->uncommitted));
  machine.current->uncommitted.clear();
}

void cp_async_wait(int pending) {
  Fiber* fiber = machine.current;
  while (int(fiber->groups.size()) > pending) {
    for (const Copy& copy : fiber->groups.front()) {
      if (copy.valid)
        memcpy(copy.destination, copy.source, copy.bytes);
      else
        memset(copy.destination, 0, copy.bytes);
      set_in_flight(copy, false);
      access(copy.destination, copy.bytes, true, false, {"cp.async", copy.site, nullptr});
    }
    fiber->groups.pop_front();
  }
}

void barrier(Site site) {
  Block& block = *machine.block;
  Fiber* fiber = machine.current;
  fiber->site = site;
  fiber->state = State::kAtBarrier;
  if (block.done)
    fail("barrier at %s:%d: %u threads of the block have exited", base_name(site.file), site.line,
         block.done);
  for (const Fiber* other : block.fibers)
    if (other->state == State::kAtBarrier && !same(other->site, site))
      fail("divergence: thread %u waits at the barrier %s:%d, this one at %s:%d", other->id,
           base_name(other->site.file), other->site.line, base_name(site.file), site.line);
  if (++block.waiting == block.fibers.size()) {
    block.waiting = 0;
    block.epoch++;
    for (Warp& warp : block.warps) warp.epoch++;
    for (Fiber* other : block.fibers) other->state = State::kReady;
  }
  to_scheduler();
}

void collective(Collective kind, uint32_t mask, void* operands, Site site) {
  Block& block = *machine.block;
  Fiber* fiber = machine.current;
  Warp& warp = block.warps[fiber->id / 32];
  const unsigned lane = fiber->id & 31;
  if (!(mask >> lane & 1))
    fail("%s at %s:%d: the calling lane is not in its mask %08x", name_of(kind),
         base_name(site.file), site.line, mask);
  Meeting& meeting = *join(warp, kind, mask, site);
  meeting.operands[lane] = operands;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived != mask) {
    fiber->state = State::kAtCollective;
    fiber->site = site;
    const uint64_t generation = meeting.generation;
    do to_scheduler();
    while (meeting.generation == generation);
    return;
  }
  run_collective(meeting, warp);
  meeting.arrived = 0;
  meeting.generation++;
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1) block.fibers[fiber->id / 32 * 32 + i]->state = State::kReady;
}

int set_shared_memory_limit(const void* kernel, int bytes) {
  if (bytes > machine.shared_limit) return 1;
  machine.shared_limits[kernel] = bytes;
  return 0;
}

int last_error() {
  const int code = machine.code;
  machine.code = 0;
  return code;
}

void launch(const void* kernel, const char* name, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body) {
  machine.kernel = name;
  machine.launched += std::string(name) + " ";
  const auto limit = machine.shared_limits.find(kernel);
  const size_t allowed =
      std::max(kPlainSharedBytes, limit == machine.shared_limits.end() ? 0 : limit->second);
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  if (!machine.error.empty() || shared_bytes > allowed || block.x > 1024 || block.x == 0 ||
      blocks == 0 || grid.y > 65535 || grid.z > 65535) {
    if (machine.error.empty())
      machine.error = std::string(name) +
                      ": the launch is refused: " + std::to_string(shared_bytes) +
                      " bytes of shared memory, " + std::to_string(block.x) + " threads, " +
                      std::to_string(blocks) + " blocks";
    machine.code = 1;
    return;
  }
  blockDim = block;
  gridDim = grid;
  machine.body = &body;
  for (Buffer& buffer : machine.buffers) std::fill(buffer.writer.begin(), buffer.writer.end(), 0);
  for (size_t i = 0; i < blocks && machine.error.empty(); ++i)
    run_block(uint32_t(machine.order == 1 ? blocks - 1 - i : i), shared_bytes);
  if (!machine.error.empty()) machine.code = 999;
}

}  // namespace emulation

using emulation::machine;

extern "C" const char* emulation_error() { return machine.error.c_str(); }

extern "C" const char* emulation_launched() { return machine.launched.c_str(); }

extern "C" long emulation_conflicts() { return long(machine.conflicts); }

extern "C" void emulation_reset(int order, int shared_limit) {
  machine.error.clear();
  machine.launched.clear();
  machine.code = 0;
  machine.order = order;
  machine.shared_limit = shared_limit;
  machine.conflicts = 0;
  machine.buffers.clear();
}

extern "C" void emulation_buffer(const void* begin, long bytes, long guard) {
  machine.buffers.push_back({static_cast<const char*>(begin), size_t(bytes), size_t(guard),
                             std::vector<uint32_t>((bytes + 1) / emulation::kGranule)});
}

namespace {

inline void hook(const void* address, size_t bytes, bool write, void* caller) {
  if (!machine.current) return;
  emulation::access(address, bytes, write, false,
                    {write ? "store" : "load", emulation::Site{}, caller});
}

}  // namespace

#define HOOK(bytes)                                        \
  extern "C" void __tsan_read##bytes(void* p) {            \
    hook(p, bytes, false, __builtin_return_address(0));    \
  }                                                        \
  extern "C" void __tsan_write##bytes(void* p) {           \
    hook(p, bytes, true, __builtin_return_address(0));     \
  }                                                        \
  extern "C" void __tsan_unaligned_read##bytes(void* p) {  \
    hook(p, bytes, false, __builtin_return_address(0));    \
  }                                                        \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { \
    hook(p, bytes, true, __builtin_return_address(0));     \
  }
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) {
  hook(p, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  hook(p, bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
