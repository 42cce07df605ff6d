// v = x U: per channel, the mean over the map of what each tap of a padded 3x3 convolution sees.
//
// Nine rectangles differ from the whole map only by its border rows and columns, so one pass over
// x gives nine numbers, from each row's sum and its two ends.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace cin_fast {
namespace {

constexpr int64_t kTaps = 9;
// The kernel dtypes; float64 stays with the reference.
#define CIN_FAST_DISPATCH(type, name, ...)                     \
  AT_DISPATCH_SWITCH(type, name,                               \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) \
                         AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES(__VA_ARGS__))

constexpr int64_t kGrain = 4096;

// taps[ky][kx]: ky = 0 leaves out the last row, ky = 2 the first; kx = 0 the last column, kx = 2
// the first.
template <typename scalar_t>
void map_taps(const scalar_t* x, int64_t height, int64_t width, scalar_t* v) {
  float taps[3][3] = {};
  for (int64_t h = 0; h < height; h++) {
    const scalar_t* row = x + h * width;
    float sum = 0;
    for (int64_t w = 0; w < width; w++) sum += static_cast<float>(row[w]);
    const float reach[3] = {sum - static_cast<float>(row[width - 1]), sum,
                            sum - static_cast<float>(row[0])};
    for (int kx = 0; kx < 3; kx++) {
      if (h < height - 1) taps[0][kx] += reach[kx];
      taps[1][kx] += reach[kx];
      if (h > 0) taps[2][kx] += reach[kx];
    }
  }
  const float share = 1.0f / static_cast<float>(height * width);
  for (int64_t t = 0; t < kTaps; t++) v[t] = static_cast<scalar_t>(taps[t / 3][t % 3] * share);
}

template <typename scalar_t>
void map_taps_backward(const scalar_t* dv, int64_t height, int64_t width, scalar_t* dx) {
  const float share = 1.0f / static_cast<float>(height * width);
  for (int64_t h = 0; h < height; h++) {
    float column[3];
    for (int kx = 0; kx < 3; kx++) {
      column[kx] = static_cast<float>(dv[3 + kx]);
      if (h < height - 1) column[kx] += static_cast<float>(dv[kx]);
      if (h > 0) column[kx] += static_cast<float>(dv[6 + kx]);
    }
    for (int64_t w = 0; w < width; w++) {
      float sum = column[1];
      if (w < width - 1) sum += column[0];
      if (w > 0) sum += column[2];
      dx[h * width + w] = static_cast<scalar_t>(sum * share);
    }
  }
}

at::Tensor tap_means(const at::Tensor& x_BCHW) {
  TORCH_CHECK(x_BCHW.dim() == 4, "cpu_tap_means: expected (B, C, H, W), found ", x_BCHW.sizes());
  const at::Tensor x = x_BCHW.contiguous();
  const int64_t rows = x.size(0) * x.size(1), height = x.size(2), width = x.size(3);
  at::Tensor v = at::empty({x.size(0), x.size(1), kTaps}, x.options());
  CIN_FAST_DISPATCH(x.scalar_type(), "cpu_tap_means", [&] {
    const auto* in = x.const_data_ptr<scalar_t>();
    auto* out = v.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, kGrain / (height * width) + 1, [&](int64_t lo, int64_t hi) {
      for (int64_t r = lo; r < hi; r++)
        map_taps(in + r * height * width, height, width, out + r * kTaps);
    });
  });
  return v;
}

at::Tensor tap_means_backward(const at::Tensor& dv_BC9, int64_t height, int64_t width) {
  const at::Tensor dv = dv_BC9.contiguous();
  const int64_t rows = dv.size(0) * dv.size(1);
  at::Tensor dx = at::empty({dv.size(0), dv.size(1), height, width}, dv.options());
  CIN_FAST_DISPATCH(dv.scalar_type(), "cpu_tap_means_backward", [&] {
    const auto* in = dv.const_data_ptr<scalar_t>();
    auto* out = dx.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, kGrain / (height * width) + 1, [&](int64_t lo, int64_t hi) {
      for (int64_t r = lo; r < hi; r++)
        map_taps_backward(in + r * kTaps, height, width, out + r * height * width);
    });
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(cin_fast, CPU, m) {
  m.impl("cpu_tap_means", tap_means);
  m.impl("cpu_tap_means_backward", tap_means_backward);
}

}  // namespace cin_fast
