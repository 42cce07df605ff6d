// The operators as C functions, for ctypes. Workspaces come from malloc and are poisoned, so that
// reading what nothing wrote yields NaN.
#include "harness.h"

#include <cstdlib>
#include <memory>
#include <vector>

#include "../cuda/operators.h"

namespace {

constexpr size_t kGuard = 1 << 16;

struct Workspace {
  std::vector<std::unique_ptr<char[]>> blocks;

  static void* allocate(void* owner, size_t bytes) {
    auto& blocks = static_cast<Workspace*>(owner)->blocks;
    blocks.emplace_back(new char[bytes + 2 * kGuard]);
    auto address = reinterpret_cast<uintptr_t>(blocks.back().get()) + kGuard;
    char* begin = reinterpret_cast<char*>(address / 16 * 16);
    memset(begin, 0xff, bytes);
    emulation_buffer(begin, long(bytes), kGuard / 2);
    return begin;
  }
};

cin_fast::Context context_of(Workspace& workspace, const EmulationCall& call) {
  return {nullptr,
          call.shared_limit,
          call.capability,
          call.multiprocessors,
          cin_fast::Float32Products(call.float32_products),
          Workspace::allocate,
          &workspace};
}

cin_fast::View view(const void* data, const long* strides) {
  return {data, {strides[0], strides[1], strides[2]}};
}

cin_fast::Shape shape_of(const EmulationCall& call) {
  return {call.batch, call.channels, call.positions, call.columns};
}

// Of tap_means the columns are a row's.
cin_fast::Map map_of(const EmulationCall& call) {
  return {call.batch, call.channels, call.positions / call.columns, call.columns};
}

cin_fast::Rows rows_of(const EmulationCall& call) {
  return {static_cast<unsigned>(call.batch) * call.channels, call.positions};
}

}  // namespace

extern "C" int emulated_sci_forward(const EmulationCall* call, const void* x, const long* x_strides,
                                    const void* v, const long* v_strides, void* y, void* y_rest,
                                    float* row_max, float* row_sum) {
  Workspace workspace;
  return cin_fast::sci_forward(
      context_of(workspace, *call), cin_fast::Dtype(call->dtype), shape_of(*call), call->scale,
      {view(x, x_strides), view(v, v_strides), y, y_rest, row_max, row_sum});
}

extern "C" int emulated_sci_backward(const EmulationCall* call, const void* dy,
                                     const long* dy_strides, const void* x, const long* x_strides,
                                     const void* v, const long* v_strides, const void* y,
                                     const long*, const void* y_rest, const long*,
                                     const float* row_max, const long*, const float* row_sum,
                                     const long*, void* dx, void* dv) {
  Workspace workspace;
  return cin_fast::sci_backward(context_of(workspace, *call), cin_fast::Dtype(call->dtype),
                                shape_of(*call), call->scale,
                                {view(dy, dy_strides), view(x, x_strides), view(v, v_strides), y,
                                 y_rest, row_max, row_sum, dx, dv});
}

extern "C" int emulated_cci_forward(const EmulationCall* call, const void* x, const long* x_strides,
                                    const void* v, const long* v_strides, const int64_t* partner,
                                    const long*, const float* eta, const long*, void* y,
                                    float* row_max, float* row_sum) {
  Workspace workspace;
  return cin_fast::cci_forward(
      context_of(workspace, *call), cin_fast::Dtype(call->dtype), shape_of(*call), call->scale,
      {view(x, x_strides), view(v, v_strides), partner, eta, y, row_max, row_sum});
}

extern "C" int emulated_cci_after_sci(const EmulationCall* call, const void* x,
                                      const long* x_strides, const void* v, const long* v_strides,
                                      const int64_t* partner, const long*, const float* eta,
                                      const long*, float* row_max, const long*, float* row_sum,
                                      const long*, void* y) {
  Workspace workspace;
  return cin_fast::cci_forward(
      context_of(workspace, *call), cin_fast::Dtype(call->dtype), shape_of(*call), call->scale,
      {view(x, x_strides), view(v, v_strides), partner, eta, y, row_max, row_sum, true});
}

extern "C" int emulated_cci_backward(const EmulationCall* call, const void* dy,
                                     const long* dy_strides, const void* x, const long* x_strides,
                                     const void* v, const long* v_strides, const int64_t* partner,
                                     const long*, const float* eta, const long*,
                                     const float* row_max, const long*, const float* row_sum,
                                     const long*, void* dx, float* deta, void* dv) {
  Workspace workspace;
  return cin_fast::cci_backward(context_of(workspace, *call), cin_fast::Dtype(call->dtype),
                                shape_of(*call), call->scale,
                                {view(dy, dy_strides), view(x, x_strides), view(v, v_strides),
                                 partner, eta, row_max, row_sum, dx, dv, deta});
}

extern "C" int emulated_tap_means(const EmulationCall* call, const void* x, const long* x_strides,
                                  void* v) {
  Workspace workspace;
  return cin_fast::tap_means(context_of(workspace, *call), cin_fast::Dtype(call->dtype),
                             map_of(*call), view(x, x_strides), v);
}

extern "C" int emulated_tap_means_backward(const EmulationCall* call, const void* dv, const long*,
                                           void* dx) {
  Workspace workspace;
  return cin_fast::tap_means_backward(context_of(workspace, *call), cin_fast::Dtype(call->dtype),
                                      map_of(*call), dv, dx);
}

extern "C" int emulated_softmax_rows(const EmulationCall* call, const float* logits, const long*,
                                     void* weights) {
  Workspace workspace;
  return cin_fast::softmax_rows(context_of(workspace, *call), cin_fast::Dtype(call->dtype),
                                rows_of(*call), call->scale, logits, weights);
}

extern "C" int emulated_softmax_rows_backward(const EmulationCall* call, const float* logits,
                                              const long*, const float* dp, const long*,
                                              void* weights, void* ds) {
  Workspace workspace;
  return cin_fast::softmax_rows_backward(context_of(workspace, *call), cin_fast::Dtype(call->dtype),
                                         rows_of(*call), call->scale, logits, dp, weights, ds);
}

extern "C" int emulated_cci_rows(const EmulationCall* call, const float* logits, const long*,
                                 const int64_t* partner, const long*, const float* eta, const long*,
                                 void* weights) {
  Workspace workspace;
  return cin_fast::cci_rows(context_of(workspace, *call), cin_fast::Dtype(call->dtype),
                            rows_of(*call), call->scale, {logits, partner, eta, weights});
}

extern "C" int emulated_cci_rows_backward(const EmulationCall* call, const float* logits,
                                          const long*, const float* d, const long*,
                                          const int64_t* partner, const long*, const float* eta,
                                          const long*, void* weights, void* ds, float* deta) {
  Workspace workspace;
  return cin_fast::cci_rows_backward(context_of(workspace, *call), cin_fast::Dtype(call->dtype),
                                     rows_of(*call), call->scale, {logits, partner, eta, weights},
                                     {d, ds, deta});
}
