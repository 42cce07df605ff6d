#include "kept_memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <mutex>
#include <utility>

#include "memory.h"

namespace cin_fast {
namespace {

struct Piece {
  void* start = nullptr;
  size_t bytes = 0;
};

class Keeper {
 public:
  Piece take(size_t bytes) {
    const Piece kept = exchange({});
    if (kept.bytes == bytes) return kept;
    std::free(kept.start);
    void* start = std::aligned_alloc(kHugePage, bytes);
    TORCH_CHECK(start, "no memory for a gradient of ", bytes, " bytes");
    ask_for_huge_pages(start, bytes);
    return {start, bytes};
  }

  void drop(Piece piece) { std::free(exchange(piece).start); }

 private:
  Piece exchange(Piece piece) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(kept_, piece);
  }

  std::mutex mutex_;
  Piece kept_;
};

// Never destroyed: tensors may be dropped after this file's statics.
Keeper& keeper() {
  static Keeper* const keeper = new Keeper;
  return *keeper;
}

}  // namespace

at::Tensor kept_empty(at::IntArrayRef sizes) {
  const size_t bytes = c10::multiply_integers(sizes) * sizeof(float);
  // Small pieces come from the allocator's own stock.
  if (bytes < 2 * kHugePage) return at::empty(sizes, at::kFloat);
  const size_t whole_pages = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const Piece piece = keeper().take(whole_pages);
  return at::from_blob(piece.start, sizes, [piece](void*) { keeper().drop(piece); }, at::kFloat);
}

}  // namespace cin_fast
