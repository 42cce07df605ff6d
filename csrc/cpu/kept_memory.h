// Memory for what is made and dropped at every call or step: scratch, a large gradient.
//
// The system hands out fresh pages slowly, a virtual machine's host more slowly still: pieces that
// were dropped are kept and handed out again.

#pragma once

#include <ATen/core/Tensor.h>

namespace cin_fast {

// A float32 tensor of unset contents. As torch::empty, NaN where deterministic algorithms are on.
at::Tensor kept_empty(at::IntArrayRef sizes);

}  // namespace cin_fast
