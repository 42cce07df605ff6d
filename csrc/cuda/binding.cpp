// The operators for torch, over its stable ABI: one binary serves every torch from 2.11 on.
// Schemas, fakes and autograd are defined in cin_fast/operators.py; arguments were checked there.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "operators.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "cin_fast cuda ", what, ": ", cudaGetErrorString(error));
}

cin_fast::Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return cin_fast::Dtype::kFloat32;
    case ScalarType::BFloat16:
      return cin_fast::Dtype::kBfloat16;
    case ScalarType::Half:
      return cin_fast::Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "cin_fast cuda: x: expected float32, bfloat16 or float16");
  }
}

// torch's function, found at run time: a torch without CUDA, for which this builds and loads, too,
// has none, and Python loads the library that holds it out of the linker's sight.
cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function*>(
        library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(function, "cin_fast cuda: this torch does not tell its current CUDA stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// What torch.get_float32_matmul_precision() says, through an operator that Python defines.
cin_fast::Float32Products float32_products() {
  StableIValue result = 0;
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("cin_fast::float32_products", "", &result, TORCH_ABI_VERSION));
  return torch::stable::detail::to<int64_t>(result) == 0 ? cin_fast::Float32Products::kIeee
                                                         : cin_fast::Float32Products::kTf32;
}

// CIN_FAST_CUDA_PATH=sm80: the kernels of that chip on a newer one, to compare both.
bool takes_older_path() {
  const char* path = std::getenv("CIN_FAST_CUDA_PATH");
  if (!path || !*path) return false;
  STD_TORCH_CHECK(std::string(path) == "sm80", "CIN_FAST_CUDA_PATH: expected sm80, found ", path);
  return true;
}

// The device and stream that x says, for one call, and the workspaces of that call. torch gives
// their memory to later work of the same stream alone.
class Call {
 public:
  explicit Call(const Tensor& x) : guard_(x.get_device_index()), device_(x.device()) {
    STD_TORCH_CHECK(x.is_cuda(), "cin_fast cuda: x: expected a CUDA tensor");
    context.owner = this;
    context.allocate = [](void* owner, size_t bytes) {
      return static_cast<Call*>(owner)->allocate(bytes);
    };
    const int index = x.get_device_index();
    context.stream = current_stream(index);
    context.shared_limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    context.capability = attribute(cudaDevAttrComputeCapabilityMajor, index) * 10 +
                         attribute(cudaDevAttrComputeCapabilityMinor, index);
    context.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
    STD_TORCH_CHECK(context.capability >= 80,
                    "cin_fast cuda: it needs compute capability 8.0, found ",
                    context.capability / 10, ".", context.capability % 10);
    if (takes_older_path()) context.capability = 80;
    context.float32_products = x.scalar_type() == ScalarType::Float
                                   ? float32_products()
                                   : cin_fast::Float32Products::kIeee;
  }

  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) const {
    return torch::stable::empty(shape, dtype, std::nullopt, device_);
  }

  cin_fast::Context context;

 private:
  static int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  }

  void* allocate(size_t bytes) {
    workspaces_.push_back(empty({static_cast<int64_t>(bytes)}, ScalarType::Byte));
    return workspaces_.back().mutable_data_ptr();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::Device device_;
  std::vector<Tensor> workspaces_;
};

cin_fast::View view(const Tensor& t) {
  return {t.const_data_ptr(), {t.stride(0), t.stride(1), t.stride(2)}};
}

cin_fast::View view(const std::optional<Tensor>& t) {
  return t ? view(*t) : cin_fast::View{nullptr, {0, 0, 0}};
}

std::vector<int64_t> shape_of(const Tensor& t) { return {t.size(0), t.size(1), t.size(2)}; }

const Tensor& values(const Tensor& x, const std::optional<Tensor>& v) { return v ? *v : x; }

void check_image(int64_t elements) {
  STD_TORCH_CHECK(elements < INT32_MAX, "cin_fast cuda: x: an image of more than 2^31 elements");
}

cin_fast::Shape shape(const Tensor& x, const std::optional<Tensor>& v) {
  STD_TORCH_CHECK(x.dim() == 3, "cin_fast cuda: x: expected (B, C, L)");
  check_image(x.size(1) * x.size(2));
  return {static_cast<int>(x.size(0)), static_cast<int>(x.size(1)), static_cast<int>(x.size(2)),
          static_cast<int>(values(x, v).size(2))};
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

struct Results {
  Tensor y, row_max, row_sum;

  Results(const Call& call, const Tensor& x, const std::optional<Tensor>& v)
      : y(call.empty(shape_of(values(x, v)), x.scalar_type())),
        row_max(call.empty({x.size(0), x.size(1)}, ScalarType::Float)),
        row_sum(call.empty({x.size(0), x.size(1)}, ScalarType::Float)) {}
};

// y_rest is empty where it is not asked for, or nothing is taken off y.
std::tuple<Tensor, Tensor, Tensor, Tensor> sci_forward(const Tensor& x,
                                                       const std::optional<Tensor>& v, double scale,
                                                       bool keeps_rest) {
  Call call(x);
  Results r(call, x, v);
  keeps_rest = keeps_rest && x.scalar_type() != ScalarType::Float;
  const Tensor y_rest =
      call.empty(keeps_rest ? shape_of(r.y) : std::vector<int64_t>{0}, x.scalar_type());
  check(cin_fast::sci_forward(
            call.context, dtype_of(x), shape(x, v), static_cast<float>(scale),
            {view(x), view(v), data<void>(r.y), keeps_rest ? data<void>(y_rest) : nullptr,
             data<float>(r.row_max), data<float>(r.row_sum)}),
        "sci");
  return {r.y, r.row_max, r.row_sum, y_rest};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sci(const Tensor& x, const std::optional<Tensor>& v,
                                               double scale) {
  return sci_forward(x, v, scale, true);
}

Tensor sci_values(const Tensor& x, const std::optional<Tensor>& v, double scale) {
  return std::get<0>(sci_forward(x, v, scale, false));
}

std::tuple<Tensor, Tensor> sci_backward(const Tensor& dy, const Tensor& x,
                                        const std::optional<Tensor>& v, const Tensor& y,
                                        const Tensor& row_max, const Tensor& row_sum,
                                        const Tensor& y_rest, double scale) {
  Call call(x);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || y_rest.numel() == y.numel(),
                  "cin_fast cuda: y_rest: expected y's shape");
  const Tensor our_y = torch::stable::contiguous(y), our_rest = torch::stable::contiguous(y_rest);
  const Tensor our_max = torch::stable::contiguous(row_max);
  const Tensor our_sum = torch::stable::contiguous(row_sum);
  Tensor dx = call.empty(shape_of(x), x.scalar_type());
  Tensor dv = call.empty(v ? shape_of(*v) : std::vector<int64_t>{0}, x.scalar_type());
  check(cin_fast::sci_backward(
            call.context, dtype_of(x), shape(x, v), static_cast<float>(scale),
            {view(dy), view(x), view(v), const_data<void>(our_y), const_data<void>(our_rest),
             const_data<float>(our_max), const_data<float>(our_sum), data<void>(dx),
             v ? data<void>(dv) : nullptr}),
        "sci_backward");
  return {dx, dv};
}

void cci_forward(const Call& call, const Tensor& x, const Tensor& partner, const Tensor& eta,
                 const std::optional<Tensor>& v, double scale, const Tensor& y, float* row_max,
                 float* row_sum, bool after_sci) {
  const Tensor partners = torch::stable::contiguous(partner);
  const Tensor etas = torch::stable::contiguous(eta);
  check(
      cin_fast::cci_forward(call.context, dtype_of(x), shape(x, v), static_cast<float>(scale),
                            {view(x), view(v), const_data<int64_t>(partners),
                             const_data<float>(etas), data<void>(y), row_max, row_sum, after_sci}),
      "cci");
}

// b is empty: the backward pass does without.
std::tuple<Tensor, Tensor, Tensor, Tensor> cci(const Tensor& x, const Tensor& partner,
                                               const Tensor& eta, const std::optional<Tensor>& v,
                                               double scale) {
  Call call(x);
  Results r(call, x, v);
  cci_forward(call, x, partner, eta, v, scale, r.y, data<float>(r.row_max), data<float>(r.row_sum),
              false);
  return {r.y, call.empty({0}, x.scalar_type()), r.row_max, r.row_sum};
}

std::tuple<Tensor, Tensor> cci_after_sci(const Tensor& x, const Tensor& partner, const Tensor& eta,
                                         const Tensor& v, const Tensor& row_max,
                                         const Tensor& row_sum, double scale) {
  Call call(x);
  Tensor y = call.empty(shape_of(v), x.scalar_type());
  const Tensor our_max = torch::stable::contiguous(row_max);
  const Tensor our_sum = torch::stable::contiguous(row_sum);
  // Only read.
  float* peaks = const_cast<float*>(const_data<float>(our_max));
  float* sums = const_cast<float*>(const_data<float>(our_sum));
  cci_forward(call, x, partner, eta, v, scale, y, peaks, sums, true);
  return {y, call.empty({0}, x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> cci_backward(const Tensor& dy, const Tensor& x,
                                                const Tensor& partner, const Tensor& eta,
                                                const std::optional<Tensor>& v, const Tensor&,
                                                const Tensor&, const Tensor& row_max,
                                                const Tensor& row_sum, double scale) {
  Call call(x);
  Tensor dx = call.empty(shape_of(x), x.scalar_type());
  Tensor deta = call.empty({x.size(0)}, ScalarType::Float);
  Tensor dv = call.empty(v ? shape_of(*v) : std::vector<int64_t>{0}, x.scalar_type());
  const Tensor partners = torch::stable::contiguous(partner);
  const Tensor etas = torch::stable::contiguous(eta);
  const Tensor our_max = torch::stable::contiguous(row_max);
  const Tensor our_sum = torch::stable::contiguous(row_sum);
  check(cin_fast::cci_backward(
            call.context, dtype_of(x), shape(x, v), static_cast<float>(scale),
            {view(dy), view(x), view(v), const_data<int64_t>(partners), const_data<float>(etas),
             const_data<float>(our_max), const_data<float>(our_sum), data<void>(dx),
             v ? data<void>(dv) : nullptr, data<float>(deta)}),
        "cci_backward");
  return {dx, deta, dv};
}

cin_fast::Map map_of(const Tensor& channels, int64_t height, int64_t width) {
  check_image(channels.size(1) * height * width);
  return {static_cast<int>(channels.size(0)), static_cast<int>(channels.size(1)),
          static_cast<int>(height), static_cast<int>(width)};
}

// A map whose positions are one axis, as in either of torch's memory formats.
Tensor with_one_axis(const Tensor& x) {
  const bool is_one = x.size(2) == 1 || x.size(3) == 1 || x.stride(2) == x.size(3) * x.stride(3);
  return is_one ? x : torch::stable::contiguous(x);
}

Tensor tap_means(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "cin_fast cuda: x: expected (B, C, H, W)");
  Call call(x);
  const Tensor map = with_one_axis(x);
  const int64_t step = map.stride(map.size(3) > 1 ? 3 : 2);
  Tensor v = call.empty({x.size(0), x.size(1), 9}, x.scalar_type());
  check(cin_fast::tap_means(call.context, dtype_of(x), map_of(x, x.size(2), x.size(3)),
                            {map.const_data_ptr(), {map.stride(0), map.stride(1), step}},
                            data<void>(v)),
        "tap_means");
  return v;
}

Tensor tap_means_backward(const Tensor& dv, int64_t height, int64_t width) {
  Call call(dv);
  const Tensor dense = torch::stable::contiguous(dv);
  Tensor dx = call.empty({dv.size(0), dv.size(1), height, width}, dv.scalar_type());
  check(cin_fast::tap_means_backward(call.context, dtype_of(dv), map_of(dv, height, width),
                                     const_data<void>(dense), data<void>(dx)),
        "tap_means_backward");
  return dx;
}

cin_fast::Rows rows_of(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.is_contiguous(),
                  "cin_fast cuda: logits: expected (N, C, C), contiguous");
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float,
                  "cin_fast cuda: logits: expected float32");
  const int64_t rows = logits.size(0) * logits.size(1);
  STD_TORCH_CHECK(rows < INT32_MAX, "cin_fast cuda: logits: more than 2^31 rows");
  return {static_cast<unsigned>(rows), static_cast<int>(logits.size(2))};
}

void check_like(const Tensor& t, const Tensor& logits) {
  STD_TORCH_CHECK(t.dim() == 3 && t.is_contiguous() && t.numel() == logits.numel(),
                  "cin_fast cuda: expected a contiguous tensor of the logits' shape");
}

void softmax_rows(const Tensor& weights, const Tensor& logits, double scale) {
  Call call(logits);
  check_like(weights, logits);
  check(cin_fast::softmax_rows(call.context, dtype_of(weights), rows_of(logits),
                               static_cast<float>(scale), const_data<float>(logits),
                               data<void>(weights)),
        "softmax_rows");
}

void softmax_rows_backward(const Tensor& weights, const Tensor& ds, const Tensor& logits,
                           const Tensor& dp, double scale) {
  Call call(logits);
  for (const Tensor* one : {&weights, &ds, &dp}) check_like(*one, logits);
  check(cin_fast::softmax_rows_backward(call.context, dtype_of(weights), rows_of(logits),
                                        static_cast<float>(scale), const_data<float>(logits),
                                        const_data<float>(dp), data<void>(weights), data<void>(ds)),
        "softmax_rows_backward");
}

void cci_rows(const Tensor& weights, const Tensor& logits, const Tensor& partner, const Tensor& eta,
              double scale) {
  Call call(logits);
  check_like(weights, logits);
  check(cin_fast::cci_rows(call.context, dtype_of(weights), rows_of(logits),
                           static_cast<float>(scale),
                           {const_data<float>(logits), const_data<int64_t>(partner),
                            const_data<float>(eta), data<void>(weights)}),
        "cci_rows");
}

void cci_rows_backward(const Tensor& weights, const Tensor& ds, const Tensor& deta,
                       const Tensor& logits, const Tensor& d, const Tensor& partner,
                       const Tensor& eta, double scale) {
  Call call(logits);
  for (const Tensor* one : {&weights, &ds, &d}) check_like(*one, logits);
  check(cin_fast::cci_rows_backward(call.context, dtype_of(weights), rows_of(logits),
                                    static_cast<float>(scale),
                                    {const_data<float>(logits), const_data<int64_t>(partner),
                                     const_data<float>(eta), data<void>(weights)},
                                    {const_data<float>(d), data<void>(ds), data<float>(deta)}),
        "cci_rows_backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cin_fast, CUDA, m) {
  m.impl("cuda_sci", TORCH_BOX(&sci));
  m.impl("cuda_sci_values", TORCH_BOX(&sci_values));
  m.impl("cuda_sci_backward", TORCH_BOX(&sci_backward));
  m.impl("cuda_cci", TORCH_BOX(&cci));
  m.impl("cuda_cci_after_sci", TORCH_BOX(&cci_after_sci));
  m.impl("cuda_cci_backward", TORCH_BOX(&cci_backward));
  m.impl("cuda_tap_means", TORCH_BOX(&tap_means));
  m.impl("cuda_tap_means_backward", TORCH_BOX(&tap_means_backward));
  m.impl("cuda_softmax_rows", TORCH_BOX(&softmax_rows));
  m.impl("cuda_softmax_rows_backward", TORCH_BOX(&softmax_rows_backward));
  m.impl("cuda_cci_rows", TORCH_BOX(&cci_rows));
  m.impl("cuda_cci_rows_backward", TORCH_BOX(&cci_rows_backward));
}
