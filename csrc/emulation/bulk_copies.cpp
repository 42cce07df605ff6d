// mbarriers and bulk tensor copies. A copy lands when somebody waits for its barrier, never before.
#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace emulation {
namespace {

// The thread as the source of what its warp did, for those it meets.
Knowledge knowledge_of(const Fiber& fiber) {
  Knowledge known = fiber.known;
  Progress& own = known[fiber.id / 32];
  own.epoch = std::max(own.epoch, machine.block->warps[fiber.id / 32].epoch);
  return known;
}

unsigned find_barrier(const void* address, const char* what, Site site) {
  Block& block = *machine.block;
  const Fiber& self = *machine.current;
  for (unsigned i = 0; i < block.barriers.size(); ++i) {
    const Mbarrier& barrier = block.barriers[i];
    if (barrier.address != address) continue;
    if (barrier.initialised_by != self.id && barrier.initialised_at == block.epoch)
      fail("%s at %s:%d: no barrier between it and the mbarrier_init of %s:%d", what,
           base_name(site.file), site.line, base_name(barrier.site.file), barrier.site.line);
    return i;
  }
  fail("%s at %s:%d: no mbarrier is at this address", what, base_name(site.file), site.line);
}

bool is_over(const Mbarrier& barrier, uint32_t parity) { return barrier.phase % 2 != parity; }

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.missing || barrier.transactions) return;
  barrier.phase++;
  barrier.missing = barrier.expected;
  merge(barrier.known, barrier.arriving);
}

void arrive(const void* address, long bytes, const char* what, Site site) {
  Mbarrier& barrier = machine.block->barriers[find_barrier(address, what, site)];
  if (!barrier.missing)
    fail("%s at %s:%d: more arrivals than the %d that the mbarrier expects in phase %u%s", what,
         base_name(site.file), site.line, barrier.expected, barrier.phase,
         describe(barrier).c_str());
  barrier.missing--;
  barrier.transactions += bytes;
  merge(barrier.arriving, knowledge_of(*machine.current));
  end_phase_if_complete(barrier);
}

size_t bytes_of(const TensorMap& map) {
  return map.group_bytes * size_t(map.groups) * map.box_turns * map.box_panels;
}

// One group of a box: from global memory, or zeros beyond the tensor's edges.
void land_group(const BulkCopy& copy, int panel, int box_turn, int group, char* to) {
  const TensorMap& map = copy.map;
  const int turn = copy.turn + box_turn;
  memset(to, 0, map.group_bytes);
  if (copy.image >= map.images || panel >= map.panels || turn < 0 || turn >= map.turns) return;
  const long first = (copy.image * long(map.panels) + panel) * map.height;
  const char* from = static_cast<const char*>(map.data) +
                     (first + turn * long(map.step) + group) * long(map.group_bytes);
  access(from, map.group_bytes, false, false, {"bulk copy", copy.site, nullptr});
  memcpy(to, from, map.group_bytes);
}

void land(BulkCopy& copy) {
  const TensorMap& map = copy.map;
  SharedArray& array = *find_array(copy.destination);
  char* to = copy.destination;
  for (int panel = 0; panel < map.box_panels; ++panel)
    for (int turn = 0; turn < map.box_turns; ++turn)
      for (int group = 0; group < map.groups; ++group, to += map.group_bytes)
        land_group(copy, panel, turn, group, to);
  set_in_flight(copy.destination, bytes_of(map), false);
  const size_t first = copy.destination - array.begin;
  for (size_t i = first / kGranule; i < (first + bytes_of(map)) / kGranule; ++i) {
    Shadow& s = array.shadow[i];
    s = Shadow{};
    s.written = true;
    // No ordinary store: check_piece_has_landed is the judge.
    s.write_block = ~0u;
  }
  copy.landed = true;
}

// Lets copies land until the phase that somebody waits for is over.
void land_until_over(unsigned number, uint32_t parity) {
  Block& block = *machine.block;
  Mbarrier& barrier = block.barriers[number];
  while (!is_over(barrier, parity) && !barrier.copies.empty()) {
    BulkCopy& copy = block.copies[barrier.copies.front() - 1];
    barrier.copies.pop_front();
    land(copy);
    barrier.transactions -= long(bytes_of(copy.map));
    end_phase_if_complete(barrier);
  }
}

}  // namespace

void merge(Knowledge& into, const Knowledge& from) {
  for (unsigned i = 0; i < kMaxWarps; ++i) {
    into[i].epoch = std::max(into[i].epoch, from[i].epoch);
    into[i].wgmma = std::max(into[i].wgmma, from[i].wgmma);
  }
}

std::string describe(const Mbarrier& barrier) {
  char text[200];
  snprintf(text, sizeof text,
           "; its phase %u misses %d of %d arrivals and %ld bytes of bulk copies, %zu copies are "
           "under way",
           barrier.phase, barrier.missing, barrier.expected, barrier.transactions,
           barrier.copies.size());
  return text;
}

void share_knowledge(const std::vector<Fiber*>& fibers) {
  Knowledge known{};
  std::vector<uint32_t> phases(machine.block->barriers.size());
  for (const Fiber* fiber : fibers) {
    merge(known, knowledge_of(*fiber));
    for (size_t i = 0; i < fiber->phases.size(); ++i)
      phases[i] = std::max(phases[i], fiber->phases[i]);
  }
  for (Fiber* fiber : fibers) {
    fiber->known = known;
    fiber->phases = phases;
  }
}

void check_copies_landed() {
  for (const BulkCopy& copy : machine.block->copies) {
    if (copy.landed) continue;
    machine.error = std::string(machine.kernel) + ": the block ends with the bulk copy of " +
                    base_name(copy.site.file) + ":" + std::to_string(copy.site.line) + " in flight";
    return;
  }
}

void mbarrier_init(const void* address, int arrivals, Site site) {
  Block& block = *machine.block;
  SharedArray* array = find_array(address);
  if (!array || reinterpret_cast<uintptr_t>(address) % 8)
    fail("mbarrier_init at %s:%d: not 8 aligned bytes of shared memory", base_name(site.file),
         site.line);
  const size_t first = (static_cast<const char*>(address) - array->begin) / kGranule;
  for (size_t i = first; i < first + 8 / kGranule; ++i) {
    if (array->shadow[i].is_barrier || array->shadow[i].written)
      fail("mbarrier_init at %s:%d: the memory is in use", base_name(site.file), site.line);
    array->shadow[i].is_barrier = true;
  }
  Mbarrier barrier{};
  barrier.address = address;
  barrier.expected = barrier.missing = arrivals;
  barrier.initialised_by = machine.current->id;
  barrier.initialised_at = block.epoch;
  barrier.site = site;
  block.barriers.push_back(barrier);
}

void fence_mbarrier_init() {
  for (Mbarrier& barrier : machine.block->barriers)
    if (barrier.initialised_by == machine.current->id) barrier.fenced = true;
}

void mbarrier_arrive(const void* address, Site site) {
  arrive(address, 0, "mbarrier_arrive", site);
}

void mbarrier_arrive_expect(const void* address, int bytes, Site site) {
  arrive(address, bytes, "mbarrier_arrive_expect", site);
}

void mbarrier_wait(const void* address, int parity, Site site) {
  Fiber& self = *machine.current;
  self.barrier = find_barrier(address, "mbarrier_wait", site);
  self.parity = uint32_t(parity);
  self.site = site;
  if (parity != 0 && parity != 1)
    fail("mbarrier_wait at %s:%d: parity %d", base_name(site.file), site.line, parity);
  const Block& block = *machine.block;
  const Mbarrier& barrier = block.barriers[self.barrier];
  for (;;) {
    land_until_over(self.barrier, self.parity);
    if (is_over(barrier, self.parity)) break;
    self.state = State::kAtMbarrier;
    to_scheduler();
  }
  self.state = State::kReady;
  merge(self.known, barrier.known);
  self.phases.resize(block.barriers.size());
  self.phases[self.barrier] = barrier.phase;
}

void bulk_copy(void* destination, const TensorMap& map, const void* barrier, int turn, int image,
               Site site) {
  Block& block = *machine.block;
  const Access a{"bulk copy", site, nullptr};
  SharedArray* array = find_array(destination);
  const size_t bytes = bytes_of(map);
  if (!array || static_cast<char*>(destination) + bytes > array->begin + array->bytes)
    fail("%s: %zu bytes outside the shared arrays", describe(a).c_str(), bytes);
  if (!machine.current->may_use_global)
    fail("%s: global memory, but no grid_dependency_wait before it", describe(a).c_str());
  const size_t offset = static_cast<char*>(destination) - array->begin;
  if ((array->offset + offset) % 128)
    fail("%s: the destination is not aligned to 128 bytes", describe(a).c_str());
  const unsigned number = find_barrier(barrier, a.what, site);
  if (!block.barriers[number].fenced)
    fail("%s: no fence_mbarrier_init after the mbarrier_init of %s:%d", describe(a).c_str(),
         base_name(block.barriers[number].site.file), block.barriers[number].site.line);
  check_overwritten(*array, offset, bytes, a);
  block.copies.push_back({map, static_cast<char*>(destination), turn, image, number,
                          block.barriers[number].phase, false, site});
  block.barriers[number].copies.push_back(uint32_t(block.copies.size()));
  // Nothing may be read before the wait: until then the bytes are NaN.
  memset(destination, 0xff, bytes);
  set_in_flight(destination, bytes, true);
  for (size_t piece = offset / kPiece; piece < (offset + bytes) / kPiece; ++piece)
    array->pieces[piece].copy = uint32_t(block.copies.size());
}

void fence_proxy_async() { machine.current->proxy_fences++; }

}  // namespace emulation
