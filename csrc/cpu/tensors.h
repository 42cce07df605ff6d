// What the operators do with tensors before and after the kernels.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>

#include "kernels.h"

namespace cin_fast {

// cols: of v.
struct Shape {
  int64_t images, channels, depth, cols;
};

// float32, contiguous.
inline at::Tensor wide(const at::Tensor& t) { return t.to(at::kFloat).contiguous(); }

// As the kernels' elements, contiguous.
inline at::Tensor elements(const Kernels& isa, const at::Tensor& t) {
  return t.to(isa.pack == 2 ? at::kBFloat16 : at::kFloat).contiguous();
}

// Which rows hold rows' largest weights, made numbers of rows that there are: saved tensors come
// back from others' hands, and what is read at these must be memory of x.
inline void copy_argmax(const float* from, int64_t rows, int64_t channels, float* to) {
  const float last = static_cast<float>(channels - 1);
  for (int64_t r = 0; r < rows; r++) to[r] = from[r] >= 0 ? std::min(from[r], last) : 0.0f;
}

inline const Kernels& kernels_for(const at::Tensor& x) {
  // Among fewer channels the rounding of single weights to bfloat16 shows in the result.
  constexpr int64_t kFewChannels = 16;
  return kernels(x.scalar_type() == at::kBFloat16 && x.size(1) >= kFewChannels);
}

// So few that the exact sum of P dP is worth a sweep: a float32 result is too coarse for dY . Y.
inline bool has_few_channels(const at::Tensor& x) { return x.size(1) <= 256; }

// Whether results of x's kind, without a rest, are too coarse for it.
inline bool is_coarse(const at::Tensor& x) {
  return x.scalar_type() != at::kFloat || has_few_channels(x);
}

inline void check_features(const char* name, const at::Tensor& x,
                           const std::optional<at::Tensor>& v) {
  const auto type = x.scalar_type();
  TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && x.size(2) > 0, name,
              ": x: expected (B, C, L), found ", x.sizes());
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name,
              ": x: expected float32, bfloat16 or float16, found ", type);
  if (!v) return;
  TORCH_CHECK(v->dim() == 3 && v->size(0) == x.size(0) && v->size(1) == x.size(1) && v->size(2) > 0,
              name, ": v: expected (B, C, K) to go with x, found ", v->sizes());
  TORCH_CHECK(v->scalar_type() == type, name, ": v: expected x's dtype, found ", v->scalar_type());
}

// That t, an output of the forward pass or its gradient, has this shape.
inline void check_shape(const char* name, const char* what, const at::Tensor& t,
                        at::IntArrayRef expected) {
  TORCH_CHECK(t.sizes() == expected, name, ": ", what, ": expected ", expected, ", found ",
              t.sizes());
}

inline void check_statistics(const char* name, const at::Tensor& x, const at::Tensor& row_max,
                             const at::Tensor& row_sum) {
  check_shape(name, "row_max", row_max, x.sizes().slice(0, 2));
  check_shape(name, "row_sum", row_sum, x.sizes().slice(0, 2));
}

}  // namespace cin_fast
