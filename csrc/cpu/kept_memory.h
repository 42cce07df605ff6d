// Memory for a large result that is made and dropped at every step, such as a gradient.
//
// The system hands out fresh pages slowly, a virtual machine's host more slowly still: what was
// dropped last is kept and handed out again. One piece is kept, whatever its size.

#pragma once

#include <ATen/core/Tensor.h>

namespace cin_fast {

// A float32 tensor of unset contents.
at::Tensor kept_empty(at::IntArrayRef sizes);

}  // namespace cin_fast
