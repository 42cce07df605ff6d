// Shadow memory: every load and store is judged. Kernels are compiled with -fsanitize=thread, so
// that each plain one calls __tsan_*: those hooks are defined here, and ThreadSanitizer is not
// linked.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace emulation {
namespace {

// Whether a thread has learnt, through mbarriers, of what a warp did before it last synchronised.
bool heard_of(unsigned warp, uint32_t epoch, const Fiber& thread) {
  return thread.known[warp].epoch > epoch;
}

bool write_is_unordered(const Shadow& s, const Fiber& thread, bool by_warp, const Block& block) {
  if (!s.written || s.write_block != block.epoch) return false;
  if (s.writer == thread.id && !by_warp) return false;
  if (heard_of(s.writer / 32, s.write_warp, thread)) return false;
  return !(s.writer / 32 == thread.id / 32 && s.write_warp < block.warps[thread.id / 32].epoch);
}

bool read_is_unordered(const Shadow& s, const Fiber& thread, const Block& block) {
  if (s.reader == Reader::kNone || s.read_block != block.epoch) return false;
  if (s.reader == Reader::kThread && s.reader_id == thread.id) return false;
  for (unsigned warp = 0; warp < kMaxWarps; ++warp) {
    const bool same = warp == thread.id / 32 && s.read_warp[warp] < block.warps[warp].epoch;
    if (s.readers >> warp & 1 && !same && !heard_of(warp, s.read_warp[warp], thread)) return true;
  }
  return false;
}

void note_read(Shadow& s, unsigned thread, bool by_warp, const Block& block) {
  const unsigned warp = thread / 32;
  if (s.reader == Reader::kNone || s.read_block != block.epoch) {
    s.reader = by_warp ? Reader::kWarp : Reader::kThread;
    s.readers = 0;
  } else if (s.reader_id / 32 != warp) {
    s.reader = Reader::kBlock;
  } else if (s.reader == Reader::kThread && (by_warp || s.reader_id != thread)) {
    s.reader = Reader::kWarp;
  }
  s.reader_id = uint16_t(thread);
  s.read_block = block.epoch;
  s.readers |= 1u << warp;
  s.read_warp[warp] = block.warps[warp].epoch;
}

// Whether a thread knows that a warp group's wgmma has read its operands.
bool knows_finished(const Fiber& thread, unsigned group, uint32_t wgmma) {
  for (unsigned warp = group * kGroupWarps; warp < (group + 1) * kGroupWarps; ++warp)
    if (thread.known[warp].wgmma < wgmma) return false;
  return true;
}

// Whether a thread has waited for the phase that a bulk copy belongs to.
bool knows_landed(const Fiber& thread, const BulkCopy& copy) {
  return copy.barrier < thread.phases.size() && thread.phases[copy.barrier] > copy.phase;
}

void check_piece_is_written(const SharedArray& array, size_t piece, const Access& a) {
  const Block& block = *machine.block;
  const std::array<uint32_t, kMaxGroups>& readers = array.pieces[piece].readers;
  for (unsigned group = 0; group < block.groups.size(); ++group) {
    if (!readers[group] || knows_finished(*machine.current, group, readers[group])) continue;
    const Site site = block.groups[group].sites[readers[group] - 1];
    fail("%s: shared array %d byte %zu may still be read by the wgmma of warp group %u at %s:%d",
         describe(a).c_str(), int(&array - block.arrays.data()), piece* kPiece, group,
         base_name(site.file), site.line);
  }
}

void check_piece_has_landed(const SharedArray& array, size_t piece, const Fiber& thread,
                            const Access& a) {
  const Block& block = *machine.block;
  const uint32_t number = array.pieces[piece].copy;
  if (!number || knows_landed(thread, block.copies[number - 1])) return;
  fail("%s: shared array %d byte %zu: thread %u has not waited for the bulk copy of %s:%d",
       describe(a).c_str(), int(&array - block.arrays.data()), piece* kPiece, thread.id,
       base_name(block.copies[number - 1].site.file), block.copies[number - 1].site.line);
}

const char* in_flight_as(const SharedArray& array, size_t byte) {
  const uint32_t number = array.pieces[byte / kPiece].copy;
  return number && !machine.block->copies[number - 1].landed ? "a bulk copy" : "a cp.async";
}

void access_shared(const void* address, size_t bytes, bool write, bool by_warp, const Access& a) {
  SharedArray* array = find_array(address);
  if (!array || static_cast<const char*>(address) + bytes > array->begin + array->bytes)
    fail("%s: %zu bytes outside the shared array%s", describe(a).c_str(), bytes,
         array ? " (over its end)" : "");
  const Block& block = *machine.block;
  const Fiber& self = *machine.current;
  const unsigned thread = self.id;
  const int number = int(array - block.arrays.data());
  const size_t offset = static_cast<const char*>(address) - array->begin;
  for (size_t i = offset / kGranule; i < (offset + bytes + kGranule - 1) / kGranule; ++i) {
    Shadow& s = array->shadow[i];
    if (s.is_barrier)
      fail("%s: shared array %d byte %zu is part of an mbarrier", describe(a).c_str(), number,
           i * kGranule);
    if (s.in_flight)
      fail("%s: shared array %d byte %zu has %s in flight: a wait is missing", describe(a).c_str(),
           number, i * kGranule, in_flight_as(*array, i * kGranule));
    check_piece_has_landed(*array, i * kGranule / kPiece, self, a);
    if (write) check_piece_is_written(*array, i * kGranule / kPiece, a);
    if (!write && !s.written)
      fail("%s: shared array %d byte %zu is read but was never written", describe(a).c_str(),
           number, i * kGranule);
    if (write_is_unordered(s, self, by_warp, block))
      fail("%s: race: shared array %d byte %zu was written by thread %u, no barrier between",
           describe(a).c_str(), number, i * kGranule, s.writer);
    if (!write) {
      note_read(s, thread, by_warp, block);
      continue;
    }
    if (read_is_unordered(s, self, block))
      fail("%s: race: shared array %d byte %zu was read by thread %u, no barrier between",
           describe(a).c_str(), number, i * kGranule, s.reader_id);
    s.written = true;
    s.writer = thread;
    s.write_block = block.epoch;
    s.write_warp = block.warps[thread / 32].epoch;
    s.write_fences = self.proxy_fences;
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
    if (!machine.current->may_use_global)
      fail("%s: global memory, but no grid_dependency_wait before it", describe(a).c_str());
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

// Ordinary stores reach the copy engine and the tensor cores only behind the writer's fence.
void check_fenced(const SharedArray& array, size_t granule, const Access& a) {
  const Block& block = *machine.block;
  const Shadow& s = array.shadow[granule];
  if (!s.written || array.pieces[granule * kGranule / kPiece].copy) return;
  if (block.fibers[s.writer]->proxy_fences > s.write_fences) return;
  fail("%s: shared array %d byte %zu was stored by thread %u, no fence.proxy.async behind it",
       describe(a).c_str(), int(&array - block.arrays.data()), granule* kGranule, s.writer);
}

}  // namespace

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

SharedArray* find_array(uint32_t address) {
  for (auto& array : machine.block->arrays)
    if (address >= array.offset && address < array.offset + array.bytes) return &array;
  return nullptr;
}

void access(const void* address, size_t bytes, bool write, bool by_warp, const Access& a) {
  const Block& block = *machine.block;
  const char* p = static_cast<const char*>(address);
  if (p >= block.slab.data() && p < block.slab.data() + block.slab.size())
    access_shared(address, bytes, write, by_warp, a);
  else if (p < machine.current->stack || p >= machine.current->stack + kStackBytes)
    access_global(address, bytes, write, a);
}

void set_in_flight(const void* destination, size_t bytes, bool in_flight) {
  SharedArray* array = find_array(destination);
  const size_t first = (static_cast<const char*>(destination) - array->begin) / kGranule;
  for (size_t i = 0; i < bytes / kGranule; ++i) array->shadow[first + i].in_flight = in_flight;
}

void check_overwritten(SharedArray& array, size_t offset, size_t bytes, const Access& a) {
  const Block& block = *machine.block;
  const Fiber& self = *machine.current;
  const int number = int(&array - block.arrays.data());
  for (size_t i = offset / kGranule; i < (offset + bytes) / kGranule; ++i) {
    const Shadow& s = array.shadow[i];
    if (s.in_flight)
      fail("%s: shared array %d byte %zu has %s in flight", describe(a).c_str(), number,
           i * kGranule, in_flight_as(array, i * kGranule));
    if (write_is_unordered(s, self, false, block) || read_is_unordered(s, self, block))
      fail("%s: race: shared array %d byte %zu was used by thread %u, no barrier between",
           describe(a).c_str(), number, i * kGranule, s.written ? s.writer : s.reader_id);
    check_fenced(array, i, a);
  }
  for (size_t piece = offset / kPiece; piece < (offset + bytes) / kPiece; ++piece)
    check_piece_is_written(array, piece, a);
}

void check_read_by_group(SharedArray& array, size_t offset, unsigned group, const Access& a) {
  const Block& block = *machine.block;
  const int number = int(&array - block.arrays.data());
  for (size_t i = offset / kGranule; i < (offset + kPiece) / kGranule; ++i) {
    const Shadow& s = array.shadow[i];
    if (s.in_flight)
      fail("%s: shared array %d byte %zu has %s in flight: a wait is missing", describe(a).c_str(),
           number, i * kGranule, in_flight_as(array, i * kGranule));
    if (!s.written)
      fail("%s: shared array %d byte %zu is read but was never written", describe(a).c_str(),
           number, i * kGranule);
    if (write_is_unordered(s, *machine.current, true, block))
      fail("%s: race: shared array %d byte %zu was written by thread %u, no barrier between",
           describe(a).c_str(), number, i * kGranule, s.writer);
    check_fenced(array, i, a);
  }
  for (unsigned i = 0; i < kGroupThreads; ++i)
    check_piece_has_landed(array, offset / kPiece, *block.fibers[group * kGroupThreads + i], a);
}

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
  // Aligned as on the device: the swizzle looks at address bits up to 1,024.
  auto address = reinterpret_cast<uintptr_t>(block.slab.data()) + block.slab_used;
  address = (address + 1023) / 1024 * 1024 + block.used % 1024;
  char* begin = reinterpret_cast<char*>(address);
  block.slab_used = begin - block.slab.data() + bytes + kGapBytes;
  if (block.slab_used > block.slab.size()) fail("more shared arrays than the emulation expects");
  block.arrays.push_back({begin, bytes, block.used,
                          std::vector<Shadow>((bytes + kGranule - 1) / kGranule, Shadow{}),
                          std::vector<Piece>((bytes + kPiece - 1) / kPiece, Piece{})});
  block.used += (bytes + 127) / 128 * 128;
  return begin;
}

uint32_t shared_address(const void* address) {
  const SharedArray* array = find_array(address);
  if (!array) fail("an address outside the shared arrays is taken for one inside");
  return uint32_t(array->offset + (static_cast<const char*>(address) - array->begin));
}

}  // namespace emulation

using emulation::machine;

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
