// Scratch memory.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "kept_memory.h"

namespace cin_fast {

// Floats handed out in pieces, each starting on a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(kept_empty({floats})), next_(memory_.mutable_data_ptr<float>()) {}
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
