// cp.async: a copy lands when its thread waits for it.
#include "machine.h"

namespace emulation {

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
  set_in_flight(destination, bytes, true);
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
      set_in_flight(copy.destination, copy.bytes, false);
      access(copy.destination, copy.bytes, true, false, {"cp.async", copy.site, nullptr});
    }
    fiber->groups.pop_front();
  }
}

}  // namespace emulation
