// The operators as host functions over raw device memory. binding.cpp gives them to torch, the
// emulation's harness to the tests.
//
// Shapes: B images, C channels, L positions, K columns of v; v.data == nullptr stands for v = x.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef CIN_FAST_EMULATION
#include "../emulation/cuda.h"
#else
#include <cuda_runtime.h>
#endif

namespace cin_fast {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

// How float32 products are computed: as IEEE 754 has them, or from operands rounded to TF32.
enum class Float32Products { kIeee, kTf32 };

// A (B, C, columns) tensor, strides counted in elements.
struct View {
  const void* data;
  int64_t strides[3];
};

struct Shape {
  int batch, channels, positions, columns;
};

// A (B, C, H, W) tensor whose positions are one axis of its View.
struct Map {
  int batch, channels, height, width;
};

// Rows of contiguous matrices, one after another.
struct Rows {
  unsigned count;
  int columns;
};

// Where and how to run; allocate() returns device memory that outlives the launches.
struct Context {
  cudaStream_t stream;
  // The most dynamic shared memory that a block may have, the compute capability times ten, and how
  // many blocks that fill a multiprocessor run at once.
  int shared_limit, capability, multiprocessors;
  Float32Products float32_products;
  void* (*allocate)(void* owner, size_t bytes);
  void* owner;
};

// y_rest is what rounding to 16 bits takes off y; it may be nullptr, and is not written in float32.
struct SciForward {
  View x, v;
  void *y, *y_rest;
  float *row_max, *row_sum;
};

struct SciBackward {
  View dy, x, v;
  // Contiguous; not read in float32.
  const void *y, *y_rest;
  const float *row_max, *row_sum;
  // dv is nullptr where v = x: its share is then in dx.
  void *dx, *dv;
};

// partner and eta are contiguous. after_sci: row_max and row_sum are those that sci wrote of the
// same x, and are only read.
struct CciForward {
  View x, v;
  const int64_t* partner;
  const float* eta;
  void* y;
  float *row_max, *row_sum;
  bool after_sci = false;
};

struct CciBackward {
  View dy, x, v;
  const int64_t* partner;
  const float* eta;
  const float *row_max, *row_sum;
  // dv as above.
  void *dx, *dv;
  float* deta;
};

cudaError_t sci_forward(const Context& context, Dtype dtype, const Shape& shape, float scale,
                        const SciForward& arguments);
cudaError_t sci_backward(const Context& context, Dtype dtype, const Shape& shape, float scale,
                         const SciBackward& arguments);
cudaError_t cci_forward(const Context& context, Dtype dtype, const Shape& shape, float scale,
                        const CciForward& arguments);
cudaError_t cci_backward(const Context& context, Dtype dtype, const Shape& shape, float scale,
                         const CciBackward& arguments);
// v is (B, C, 9), its gradient dv, too; these and dx are contiguous.
cudaError_t tap_means(const Context& context, Dtype dtype, const Map& map, const View& x, void* v);
cudaError_t tap_means_backward(const Context& context, Dtype dtype, const Map& map, const void* dv,
                               void* dx);
// softmax(scale logits) along rows, in the dtype; weights may be the logits.
cudaError_t softmax_rows(const Context& context, Dtype dtype, const Rows& rows, float scale,
                         const float* logits, void* weights);
// Besides, the gradient of the logits from that of the weights; ds may be dp.
cudaError_t softmax_rows_backward(const Context& context, Dtype dtype, const Rows& rows,
                                  float scale, const float* logits, const float* dp, void* weights,
                                  void* ds);

// |M| of a group of images: partner says where in it each one's is. The results take no memory that
// is read.
struct CciRows {
  const float* logits;
  const int64_t* partner;
  const float* eta;
  void* weights;
};

// d: the gradient of |M|; ds: that of the logits; deta: a number a row, to be added up.
struct CciRowsBackward {
  const float* d;
  void* ds;
  float* deta;
};

cudaError_t cci_rows(const Context& context, Dtype dtype, const Rows& rows, float scale,
                     const CciRows& a);
cudaError_t cci_rows_backward(const Context& context, Dtype dtype, const Rows& rows, float scale,
                              const CciRows& a, const CciRowsBackward& b);

}  // namespace cin_fast
