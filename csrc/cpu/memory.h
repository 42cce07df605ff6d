// Large pieces of memory, and scratch memory.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <memory>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cin_fast {

constexpr size_t kHugePage = size_t{2} << 20;

// Few large pages are found sooner than many small ones, and are handed out by the system in one
// go. Only advice, so that a refusal is no error.
inline void ask_for_huge_pages(void* start, size_t bytes) {
#ifdef MADV_HUGEPAGE
  void* inside = start;
  if (std::align(kHugePage, kHugePage, inside, bytes))
    madvise(inside, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

// Floats handed out in pieces, each starting on a cache line. Packed operands are read at wide
// strides, hence the huge pages.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(at::empty({floats}, at::kFloat)), next_(memory_.data_ptr<float>()) {
    ask_for_huge_pages(next_, floats * sizeof(float));
  }
  float* take(int64_t floats) {
    float* piece = next_;
    next_ += padded(floats);
    return piece;
  }
  static int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

 private:
  at::Tensor memory_;
  float* next_;
};

}  // namespace cin_fast
