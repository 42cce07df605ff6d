// Threads as fibers, blocks one after another, barriers, and what the tests call.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "harness.h"
#include "machine.h"

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

bool same(Site a, Site b) { return a.line == b.line && !strcmp(a.file, b.file); }

void to_scheduler() { emulation_switch(&machine.current->stack_pointer, machine.stack_pointer); }

namespace {

constexpr int kPlainSharedBytes = 49152;

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
  check_wgmma_finished(*fiber);
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
  fiber->phases.clear();
  fiber->committed.clear();
  fiber->known = {};
  fiber->proxy_fences = 0;
  fiber->wgmma_fenced = false;
  fiber->may_use_global = !machine.early;
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

std::string deadlock(const Block& block) {
  char text[300];
  snprintf(text, sizeof text, "deadlock: %u of %zu threads exited", block.done,
           block.fibers.size());
  std::string message = text;
  for (const Fiber* fiber : block.fibers) {
    if (fiber->state == State::kDone) continue;
    const bool at_mbarrier = fiber->state == State::kAtMbarrier;
    snprintf(text, sizeof text, "; thread %u waits at %s (%s:%d)", fiber->id,
             at_mbarrier                              ? "an mbarrier"
             : fiber->state == State::kAtBarrier      ? "a barrier"
             : fiber->state == State::kAtNamedBarrier ? "a named barrier"
                                                      : "a collective of its warp or warp group",
             base_name(fiber->site.file), fiber->site.line);
    message += text;
    if (at_mbarrier) return message + describe(block.barriers[fiber->barrier]);
    return message;
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
          const State before = order[i]->state;
          if (before != State::kReady && before != State::kAtMbarrier) continue;
          resume(order[i]);
          if (!machine.error.empty()) return;
          // One at an mbarrier only looks again.
          if (before == State::kAtMbarrier && order[i]->state == before) continue;
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

NamedBarrier& find_named_barrier(unsigned number, unsigned threads, Site site) {
  if (number < 1 || number > 15 || threads % 32)
    fail("named barrier at %s:%d: number %u for %u threads", base_name(site.file), site.line,
         number, threads);
  NamedBarrier& barrier = machine.block->named_barriers[number];
  const bool is_new = barrier.waiting.empty() && barrier.arrived.empty();
  if (!is_new && barrier.threads != threads)
    fail("divergence: the named barrier at %s:%d is for %u threads here, elsewhere for %u",
         base_name(site.file), site.line, threads, barrier.threads);
  barrier.threads = threads;
  if (is_new) barrier.site = site;
  return barrier;
}

// Lets the threads that wait go on, once all are there. What they did is then known to each other;
// nobody is told of those that did not wait.
bool open_if_complete(NamedBarrier& barrier) {
  if (barrier.waiting.size() + barrier.arrived.size() < barrier.threads) return false;
  Block& block = *machine.block;
  for (const auto* threads : {&barrier.waiting, &barrier.arrived}) {
    std::vector<unsigned> of_warp(block.warps.size());
    for (const Fiber* fiber : *threads) of_warp[fiber->id / 32]++;
    for (unsigned count : of_warp)
      if (count % 32 || count > 32)
        fail("named barrier at %s:%d: %s", base_name(barrier.site.file), barrier.site.line,
             count > 32 ? "a warp arrived twice" : "part of a warp");
    if (threads == &barrier.waiting)
      for (size_t i = 0; i < of_warp.size(); ++i) block.warps[i].epoch += of_warp[i] / 32;
  }
  share_knowledge(barrier.waiting);
  for (Fiber* fiber : barrier.waiting) fiber->state = State::kReady;
  barrier.waiting.clear();
  barrier.arrived.clear();
  return true;
}

void check_named_barriers() {
  for (const NamedBarrier& barrier : machine.block->named_barriers)
    if (!barrier.arrived.empty() && machine.error.empty())
      machine.error = std::string(machine.kernel) + ": the block ends, and nobody waited for " +
                      std::to_string(barrier.arrived.size()) +
                      " threads that arrived at a named barrier (" + base_name(barrier.site.file) +
                      ":" + std::to_string(barrier.site.line) + ")";
}

void run_block(uint32_t number, size_t shared_bytes) {
  Block block;
  block.number = number;
  block.limit = shared_bytes;
  block.slab.assign(shared_bytes + 64 * (kGapBytes + 256), char(0xff));
  machine.block = &block;
  blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
  const unsigned threads = blockDim.x;
  if (threads > 32 * kMaxWarps) fail("%u threads, more than are kept account of", threads);
  block.warps.resize((threads + 31) / 32);
  block.groups.resize(threads / kGroupThreads);
  while (machine.pool.size() < threads) machine.pool.emplace_back(new Fiber);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber* fiber = machine.pool[i].get();
    fiber->id = i;
    fiber->index = {i, 0, 0};
    start(fiber);
    block.fibers.push_back(fiber);
  }
  schedule(block);
  if (machine.error.empty()) check_copies_landed();
  check_named_barriers();
  machine.block = nullptr;
}

}  // namespace

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
    share_knowledge(block.fibers);
    for (Fiber* other : block.fibers) other->state = State::kReady;
  }
  to_scheduler();
}

void named_barrier(unsigned number, unsigned threads, Site site) {
  NamedBarrier& barrier = find_named_barrier(number, threads, site);
  if (!barrier.waiting.empty() && !same(barrier.site, site))
    fail("divergence: thread %u waits at the named barrier %s:%d, this one at %s:%d",
         barrier.waiting[0]->id, base_name(barrier.site.file), barrier.site.line,
         base_name(site.file), site.line);
  Fiber* fiber = machine.current;
  barrier.site = fiber->site = site;
  barrier.waiting.push_back(fiber);
  if (open_if_complete(barrier)) return;
  fiber->state = State::kAtNamedBarrier;
  to_scheduler();
}

void named_barrier_arrive(unsigned number, unsigned threads, Site site) {
  NamedBarrier& barrier = find_named_barrier(number, threads, site);
  barrier.arrived.push_back(machine.current);
  open_if_complete(barrier);
}

void grid_dependency_wait() { machine.current->may_use_global = true; }

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
            bool early, const std::function<void()>& body) {
  machine.kernel = name;
  machine.launched += std::string(name) + ":" + std::to_string(shared_bytes) + " ";
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
  machine.early = early;
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
