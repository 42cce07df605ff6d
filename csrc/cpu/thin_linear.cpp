// a w^T and its gradients, for the pooled head's convolution weights: few rows a, a large w.
//
// A library product of this shape takes several times as long as reading w from memory does, and
// a fresh gradient of w costs more in page faults than in arithmetic.

#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "kept_memory.h"
#include "kernels.h"

namespace cin_fast {
namespace {

// Beyond this a general product is the faster one. Not known before a batch comes: an exported
// model serves any.
constexpr int64_t kMostRows = 32;
// Columns at a time: those of 8 rows of w and of a few of a stay in the first caches.
constexpr int64_t kChunk = 1024;
// Rows of w in a task, a multiple of what a kernel adds up at a time.
constexpr int64_t kTaskOutputs = 64;
// Rows of w whose share of da is a sum of its own: a long sum of short ones rounds less.
constexpr int64_t kPartOutputs = 256;

void check_matrix(const char* name, const char* what, const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 2 && t.scalar_type() == at::kFloat, name, ": ", what,
              ": expected a float32 matrix, found ", t.scalar_type(), " ", t.sizes());
}

template <typename Run>
void for_each_chunk(int64_t columns, Run run) {
  for (int64_t k = 0; k < columns; k += kChunk) run(k, std::min(kChunk, columns - k));
}

// run(first, count) for `total` in tasks of `size`.
template <typename Run>
void for_each_part(int64_t total, int64_t size, Run run) {
  for_each_task((total + size - 1) / size, [&](int64_t task, int64_t) {
    run(task * size, std::min(size, total - task * size));
  });
}

at::Tensor thin_linear(const at::Tensor& a_, const at::Tensor& w_) {
  check_matrix("cpu_thin_linear", "a", a_);
  check_matrix("cpu_thin_linear", "w", w_);
  TORCH_CHECK(a_.size(1) == w_.size(1), "cpu_thin_linear: a: expected ", w_.size(1),
              " columns as w has, found ", a_.size(1));
  const at::Tensor a = a_.contiguous(), w = w_.contiguous();
  const int64_t rows = a.size(0), outputs = w.size(0), depth = w.size(1);
  if (rows > kMostRows) return at::mm(a, w.t());
  at::Tensor y = at::zeros({rows, outputs}, a.options());
  const Kernels& isa = kernels(false);
  const float *left = a.const_data_ptr<float>(), *right = w.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  for_each_part(outputs, kTaskOutputs, [&](int64_t o, int64_t count) {
    for_each_chunk(depth, [&](int64_t k, int64_t here) {
      isa.thin_forward(left + k, right + o * depth + k, depth, rows, count, here, to + o, outputs);
    });
  });
  return y;
}

at::Tensor thin_linear_input(const at::Tensor& dy_, const at::Tensor& w_) {
  check_matrix("cpu_thin_linear_input", "dy", dy_);
  check_matrix("cpu_thin_linear_input", "w", w_);
  TORCH_CHECK(dy_.size(1) == w_.size(0), "cpu_thin_linear_input: dy: expected ", w_.size(0),
              " columns, found ", dy_.size(1));
  const at::Tensor dy = dy_.contiguous(), w = w_.contiguous();
  const int64_t rows = dy.size(0), outputs = w.size(0), depth = w.size(1);
  if (rows > kMostRows) return at::mm(dy, w);
  at::Tensor da = at::zeros({rows, depth}, dy.options());
  const Kernels& isa = kernels(false);
  const float *left = dy.const_data_ptr<float>(), *right = w.const_data_ptr<float>();
  float* to = da.mutable_data_ptr<float>();
  for_each_part(depth, kChunk, [&](int64_t k, int64_t here) {
    std::vector<float> part(rows * here);
    for (int64_t o = 0; o < outputs; o += kPartOutputs) {
      std::fill(part.begin(), part.end(), 0.0f);
      isa.thin_input(left + o, outputs, right + o * depth + k, depth, rows,
                     std::min(kPartOutputs, outputs - o), here, part.data(), here);
      for (int64_t b = 0; b < rows; b++)
        for (int64_t n = 0; n < here; n++) to[b * depth + k + n] += part[b * here + n];
    }
  });
  return da;
}

at::Tensor thin_linear_weight(const at::Tensor& dy_, const at::Tensor& a_) {
  check_matrix("cpu_thin_linear_weight", "dy", dy_);
  check_matrix("cpu_thin_linear_weight", "a", a_);
  TORCH_CHECK(dy_.size(0) == a_.size(0), "cpu_thin_linear_weight: dy: expected ", a_.size(0),
              " rows as a has, found ", dy_.size(0));
  const at::Tensor dy = dy_.contiguous(), a = a_.contiguous();
  const int64_t rows = a.size(0), outputs = dy.size(1), depth = a.size(1);
  at::Tensor dw = kept_empty({outputs, depth});
  if (rows > kMostRows) return at::mm_out(dw, dy.t(), a);
  const Kernels& isa = kernels(false);
  const float *left = dy.const_data_ptr<float>(), *right = a.const_data_ptr<float>();
  float* to = dw.mutable_data_ptr<float>();
  for_each_part(outputs, kTaskOutputs, [&](int64_t o, int64_t count) {
    for_each_chunk(depth, [&](int64_t k, int64_t here) {
      isa.thin_weight(left + o, outputs, right + k, depth, rows, count, here, to + o * depth + k);
    });
  });
  return dw;
}

}  // namespace

TORCH_LIBRARY_IMPL(cin_fast, CPU, m) {
  m.impl("cpu_thin_linear", thin_linear);
  m.impl("cpu_thin_linear_input", thin_linear_input);
  m.impl("cpu_thin_linear_weight", thin_linear_weight);
}

}  // namespace cin_fast
