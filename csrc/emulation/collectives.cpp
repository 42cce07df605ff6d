// What the lanes of a warp do together: shuffles, ldmatrix, mma.sync.
#include <algorithm>

#include "machine.h"

namespace emulation {
namespace {

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

std::vector<Fiber*> lanes(unsigned warp, uint32_t mask) {
  std::vector<Fiber*> result;
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1) result.push_back(machine.block->fibers[warp * 32 + i]);
  return result;
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
      return share_knowledge(lanes(machine.current->id / 32, meeting.mask));
    case Collective::kWgmma:
    case Collective::kSetmaxnreg:
      return;
  }
}

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

}  // namespace

const char* name_of(Collective kind) {
  static const char* const names[] = {"__syncwarp", "shuffle", "ldmatrix",  "ldmatrix.trans",
                                      "mma",        "wgmma",   "setmaxnreg"};
  return names[int(kind)];
}

int lane() { return machine.current->id & 31; }

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

}  // namespace emulation
