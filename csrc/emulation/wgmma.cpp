// What a warp group of four does together: wgmma and setmaxnreg. Operands come through descriptors,
// swizzled, as the PTX manual has its canonical layouts; a result returns to the registers at the
// wait, and until then they hold NaN.
#include <algorithm>

#include "machine.h"

namespace emulation {
namespace {

constexpr int kRows = 64, kDepth = 16;
constexpr uint32_t kPoison = ~0u;

struct Descriptor {
  uint32_t start, leading, stride;
  // 16-byte pieces in a row of the swizzle: 1 where there is none.
  uint32_t pieces;

  explicit Descriptor(uint64_t bits)
      : start(bits & 0x3fff), leading(bits >> 16 & 0x3fff), stride(bits >> 32 & 0x3fff) {
    constexpr uint32_t kPieces[] = {1, 8, 4, 2};
    pieces = kPieces[bits >> 62];
    start <<= 4;
    leading <<= 4;
    stride <<= 4;
  }

  // Where depth lies along a row: piece 0 or 1 of the sixteen elements of a row.
  uint32_t along(int row, int piece) const {
    const uint32_t step = pieces == 1 ? leading : 16;
    return swizzled(start + row / 8 * stride + row % 8 * 16 * pieces + piece * step);
  }

  // Where it runs down the rows: eight neighbours, from `column` on.
  uint32_t down(int depth, int column) const {
    const uint32_t piece = column / 8;
    if (pieces == 1) return start + depth % 8 * 16 + depth / 8 * leading + piece * stride;
    return swizzled(start + depth / 8 * stride + depth % 8 * 16 * pieces + piece % pieces * 16 +
                    piece / pieces * leading);
  }

  uint32_t swizzled(uint32_t address) const { return address ^ (address >> 7 & (pieces - 1)) << 4; }
};

// Eight elements of shared memory, as the group's wgmma number `wgmma` reads them.
void read(uint32_t address, const Wgmma& product, unsigned group, const Access& a, float* to) {
  SharedArray* array = find_array(address & 0x3ffff);
  if (!array)
    fail("%s: shared address %u is outside the shared arrays", describe(a).c_str(), address);
  const size_t offset = address - array->offset;
  check_read_by_group(*array, offset, group, a);
  array->pieces[offset / kPiece].readers[group] = machine.block->groups[group].issued;
  uint16_t bits[8];
  memcpy(bits, array->begin + offset, sizeof bits);
  for (int i = 0; i < 8; ++i) to[i] = product.widen(bits[i]);
}

struct Operands {
  float a[kRows][kDepth];
  std::vector<float> b;
};

void read_left(Operands& o, void* const* products, unsigned group, const Access& a) {
  const auto& first = *static_cast<const Wgmma*>(products[0]);
  if (!first.a_registers) {
    const Descriptor descriptor(first.a);
    for (int row = 0; row < kRows; ++row)
      for (int piece = 0; piece < 2; ++piece)
        read(descriptor.along(row, piece), first, group, a, &o.a[row][piece * 8]);
    return;
  }
  for (unsigned thread = 0; thread < kGroupThreads; ++thread) {
    const uint32_t* registers = static_cast<const Wgmma*>(products[thread])->a_registers;
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* to = &o.a[row + i % 2 * 8][column + i / 2 * 8];
      to[0] = first.widen(uint16_t(registers[i]));
      to[1] = first.widen(uint16_t(registers[i] >> 16));
    }
  }
}

void read_right(Operands& o, const Wgmma& product, unsigned group, const Access& a) {
  const Descriptor descriptor(product.b);
  o.b.resize(kDepth * product.columns);
  float eight[8];
  if (product.b_down) {
    for (int depth = 0; depth < kDepth; ++depth)
      for (int column = 0; column < product.columns; column += 8)
        read(descriptor.down(depth, column), product, group, a,
             &o.b[depth * product.columns + column]);
    return;
  }
  for (int column = 0; column < product.columns; ++column) {
    for (int piece = 0; piece < 2; ++piece) {
      read(descriptor.along(column, piece), product, group, a, eight);
      for (int i = 0; i < 8; ++i) o.b[(piece * 8 + i) * product.columns + column] = eight[i];
    }
  }
}

// Where thread's register `i` lies in the 64 x columns result.
size_t element(unsigned thread, int i, int columns) {
  const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
  return size_t(row) * columns + i / 4 * 8 + thread % 4 * 2 + i % 2;
}

Accumulators& find_accumulators(WarpGroup& group, Site site) {
  const auto& first = *static_cast<const Wgmma*>(group.operands[0]);
  for (Accumulators& sums : group.accumulators) {
    if (sums.registers[0] != first.d) continue;
    if (sums.threads || sums.columns != first.columns)
      fail("wgmma at %s:%d: its accumulators are those of the one at %s:%d, not finished",
           base_name(site.file), site.line, base_name(sums.site.file), sums.site.line);
    return sums;
  }
  Accumulators& sums = group.accumulators.emplace_back();
  sums.columns = first.columns;
  sums.values.resize(size_t(kRows) * first.columns);
  for (unsigned thread = 0; thread < kGroupThreads; ++thread) {
    sums.registers[thread] = static_cast<const Wgmma*>(group.operands[thread])->d;
    sums.returned[thread] = false;
    for (int i = 0; i < first.columns / 2; ++i) {
      if (first.accumulate)
        sums.values[element(thread, i, first.columns)] = sums.registers[thread][i];
      memcpy(&sums.registers[thread][i], &kPoison, 4);
    }
  }
  return sums;
}

void multiply(Accumulators& sums, const Operands& o, bool accumulate) {
  if (!accumulate) std::fill(sums.values.begin(), sums.values.end(), 0.f);
  for (int row = 0; row < kRows; ++row) {
    float* to = &sums.values[size_t(row) * sums.columns];
    for (int k = 0; k < kDepth; ++k) {
      const float a = o.a[row][k];
      const float* b = &o.b[size_t(k) * sums.columns];
      for (int column = 0; column < sums.columns; ++column) to[column] += a * b[column];
    }
  }
}

void run_wgmma(unsigned number) {
  WarpGroup& group = machine.block->groups[number];
  const auto& first = *static_cast<const Wgmma*>(group.operands[0]);
  const Access a{"wgmma", group.site, nullptr};
  for (unsigned i = 0; i < kGroupThreads; ++i) {
    const auto& other = *static_cast<const Wgmma*>(group.operands[i]);
    const Fiber& fiber = *machine.block->fibers[number * kGroupThreads + i];
    if (other.a != first.a || other.b != first.b || other.columns != first.columns ||
        other.accumulate != first.accumulate)
      fail("%s: threads of the warp group disagree on its operands", describe(a).c_str());
    if (!fiber.wgmma_fenced)
      fail("%s: registers may have changed since the last wgmma_fence", describe(a).c_str());
  }
  group.issued++;
  group.sites.push_back(group.site);
  Operands operands;
  read_left(operands, group.operands, number, a);
  read_right(operands, first, number, a);
  Accumulators& sums = find_accumulators(group, group.site);
  multiply(sums, operands, first.accumulate);
  sums.group = machine.current->committed.size();
  sums.site = group.site;
}

// All threads of the group meet; the last to come runs the operation.
void meet(Collective kind, void* operands, Site site) {
  Block& block = *machine.block;
  Fiber* fiber = machine.current;
  const unsigned number = fiber->id / kGroupThreads;
  if (number >= block.groups.size())
    fail("%s at %s:%d: the thread is in no whole warp group", name_of(kind), base_name(site.file),
         site.line);
  WarpGroup& group = block.groups[number];
  if (group.arrived && (group.kind != kind || !same(group.site, site)))
    fail("divergence: this thread is at %s %s:%d, others of its warp group wait at %s %s:%d",
         name_of(kind), base_name(site.file), site.line, name_of(group.kind),
         base_name(group.site.file), group.site.line);
  group.kind = kind;
  group.site = site;
  group.operands[fiber->id % kGroupThreads] = operands;
  if (++group.arrived < kGroupThreads) {
    fiber->state = State::kAtCollective;
    fiber->site = site;
    const uint64_t generation = group.generation;
    do to_scheduler();
    while (group.generation == generation);
    return;
  }
  if (kind == Collective::kWgmma) run_wgmma(number);
  group.arrived = 0;
  group.generation++;
  for (unsigned i = 0; i < kGroupThreads; ++i)
    block.fibers[number * kGroupThreads + i]->state = State::kReady;
}

// Gives a thread its part of a finished result.
void give_back(Accumulators& sums, unsigned thread) {
  for (int i = 0; i < sums.columns / 2; ++i) {
    uint32_t bits;
    memcpy(&bits, &sums.registers[thread][i], 4);
    if (bits != kPoison)
      fail("an accumulator of the wgmma at %s:%d was written before its wait",
           base_name(sums.site.file), sums.site.line);
    sums.registers[thread][i] = sums.values[element(thread, i, sums.columns)];
  }
  sums.returned[thread] = true;
  sums.threads++;
}

}  // namespace

void wgmma(const Wgmma& product, Site site) {
  meet(Collective::kWgmma, const_cast<Wgmma*>(&product), site);
}

void wgmma_fence() { machine.current->wgmma_fenced = true; }

void wgmma_commit() {
  Fiber& self = *machine.current;
  self.committed.push_back(machine.block->groups[self.id / kGroupThreads].issued);
}

void wgmma_wait(int pending) {
  Fiber& self = *machine.current;
  if (int(self.committed.size()) <= pending) return;
  const size_t finished = self.committed.size() - pending;
  WarpGroup& group = machine.block->groups[self.id / kGroupThreads];
  const unsigned thread = self.id % kGroupThreads;
  for (auto sums = group.accumulators.begin(); sums != group.accumulators.end();) {
    if (sums->group < finished && !sums->returned[thread]) give_back(*sums, thread);
    sums = sums->threads == kGroupThreads ? group.accumulators.erase(sums) : std::next(sums);
  }
  self.known[self.id / 32].wgmma = self.committed[finished - 1];
  self.wgmma_fenced = false;
}

void check_wgmma_finished(const Fiber& fiber) {
  if (fiber.id / kGroupThreads >= machine.block->groups.size()) return;
  for (const Accumulators& sums : machine.block->groups[fiber.id / kGroupThreads].accumulators)
    if (!sums.returned[fiber.id % kGroupThreads])
      fail("exits with the wgmma of %s:%d in flight", base_name(sums.site.file), sums.site.line);
}

void setmaxnreg(int registers, Site site) {
  Block& block = *machine.block;
  meet(Collective::kSetmaxnreg, nullptr, site);
  block.groups[machine.current->id / kGroupThreads].registers = registers;
  int threads = 0, total = 0;
  for (const WarpGroup& group : block.groups) {
    if (!group.registers) return;
    threads += kGroupThreads;
    total += group.registers * kGroupThreads;
  }
  // A thread starts with as many as fit, in eights: what does not divide is nobody's to share out.
  const int registers_of_block = 65536 / threads / 8 * 8 * threads;
  if (total > registers_of_block)
    fail("setmaxnreg at %s:%d: %d registers for %d threads, the block has %d of the chip's 65536",
         base_name(site.file), site.line, total, threads, registers_of_block);
}

}  // namespace emulation
