#include "kept_memory.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cin_fast {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// The gradient of phi at C = 2048 and a few calls' scratch.
constexpr size_t kMostKept = size_t{512} << 20;

struct Piece {
  void* start;
  size_t bytes;
};

// Few large pages are found sooner than many small ones, at the wide strides that packed operands
// are read at, and are handed out by the system in one go. Only advice: a refusal is no error.
void ask_for_huge_pages(const Piece& piece) {
#ifdef MADV_HUGEPAGE
  madvise(piece.start, piece.bytes, MADV_HUGEPAGE);
#endif
}

class Keeper {
 public:
  // At least `bytes`, whole pages, and at most twice as many.
  Piece take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto fits = [&](const Piece& piece) {
      return piece.bytes >= bytes && piece.bytes <= 2 * bytes;
    };
    // What was dropped last is the likeliest to lie in a cache.
    const auto found = std::find_if(kept_.rbegin(), kept_.rend(), fits);
    if (found == kept_.rend()) return fresh(bytes);
    const Piece piece = *found;
    kept_.erase(std::next(found).base());
    kept_bytes_ -= piece.bytes;
    return piece;
  }

  void drop(Piece piece) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back(piece);
    kept_bytes_ += piece.bytes;
    while (kept_bytes_ > kMostKept) forget_oldest();
  }

  size_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = kept_bytes_;
    while (!kept_.empty()) forget_oldest();
    return bytes;
  }

 private:
  static Piece fresh(size_t bytes) {
    Piece piece{nullptr, bytes};
    TORCH_CHECK(posix_memalign(&piece.start, kHugePage, bytes) == 0, "no memory for ", bytes,
                " bytes of scratch or gradient");
    ask_for_huge_pages(piece);
    return piece;
  }

  void forget_oldest() {
    kept_bytes_ -= kept_.front().bytes;
    std::free(kept_.front().start);
    kept_.erase(kept_.begin());
  }

  std::mutex mutex_;
  // The one dropped last stands last.
  std::vector<Piece> kept_;
  size_t kept_bytes_ = 0;
};

// Never destroyed: tensors may be dropped after this file's statics.
Keeper& keeper() {
  static Keeper* const keeper = new Keeper;
  return *keeper;
}

// Gives back to the system what is kept, and returns how many bytes that was.
int64_t release_kept() { return static_cast<int64_t>(keeper().release()); }

}  // namespace

at::Tensor kept_empty(at::IntArrayRef sizes) {
  const size_t bytes = c10::multiply_integers(sizes) * sizeof(float);
  // Small pieces come from the allocator's own stock.
  if (bytes < kHugePage / 2) return at::empty(sizes, at::kFloat);
  const Piece piece = keeper().take((bytes + kHugePage - 1) / kHugePage * kHugePage);
  at::Tensor memory =
      at::from_blob(piece.start, sizes, [piece](void*) { keeper().drop(piece); }, at::kFloat);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
    memory.fill_(std::numeric_limits<float>::quiet_NaN());
  return memory;
}

TORCH_LIBRARY_IMPL(cin_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_release_kept", &release_kept);
}

}  // namespace cin_fast
