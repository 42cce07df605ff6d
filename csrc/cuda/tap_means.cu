// v = x U and its gradient: per channel, the mean over the map of what each tap of a padded 3x3
// convolution sees. Both take as long as reading the map, or writing its gradient, takes: 16 MB at
// 20 x 2048 x 14 x 14 in 16 bits.
#include "host.cuh"

namespace cin_fast {
namespace {

constexpr int kTaps = 9;
// Of a block: channels, and threads that share the rows of one's map.
constexpr int kChannels = 32, kShares = 8, kThreads = kChannels * kShares;
// Between the sums of two taps: neither layout's threads then meet a bank twice.
constexpr int kSumsPitch = kChannels + 4;

// What one row of the map adds to tap 3 ky + kx, which reads ky - 1 rows below and kx - 1 columns
// to the right of where it writes: kx = 0 never sees the last column, kx = 2 never the first.
struct Row {
  float first = 0, inner = 0, last = 0;
  bool is_only;

  __device__ explicit Row(const Map& map) : is_only(map.width == 1) {}

  __device__ void add(float value, int column, int width) {
    if (column == 0)
      first = value;
    else if (column == width - 1)
      last = value;
    else
      inner += value;
  }

  __device__ void give(float (&taps)[kTaps], bool is_top, bool is_bottom) const {
    const float reached[3] = {is_only ? 0.f : first + inner, first + inner + last,
                              is_only ? 0.f : inner + last};
#pragma unroll
    for (int kx = 0; kx < 3; ++kx) {
      if (!is_bottom) taps[kx] += reached[kx];
      taps[3 + kx] += reached[kx];
      if (!is_top) taps[6 + kx] += reached[kx];
    }
  }
};

// kAcross: neighbouring threads have neighbouring channels, as memory has in channels_last; where
// not, they have neighbouring rows.
template <class T, class Piece, bool kAcross>
__global__ void __launch_bounds__(kThreads)
    tap_means_kernel(View x, Map map, int channel_blocks, T* v) {
  constexpr int kElements = sizeof(Piece) / sizeof(T), kBatch = 8;
  const int64_t image = blockIdx.x / channel_blocks;
  const int first = blockIdx.x % channel_blocks * kChannels;
  const int mine = kAcross ? threadIdx.x % kChannels : threadIdx.x / kShares;
  const int share = kAcross ? threadIdx.x / kChannels : threadIdx.x % kShares;
  SharedMemory shared;
  float* sums = shared.take<float>(kShares * kTaps * kSumsPitch);

  float own[kTaps] = {};
  if (first + mine < map.channels) {
    const int64_t step = x.strides[2];
    const T* from =
        static_cast<const T*>(x.data) + image * x.strides[0] + (first + mine) * x.strides[1];
    for (int h = share; h < map.height; h += kShares) {
      Row row(map);
      for (int w = 0; w < map.width; w += kBatch * kElements) {
        // All loads stand before the first sum: one after another they would wait for memory one
        // after another. Beyond the row they are zeros.
        Piece batch[kBatch] = {};
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int column = w + b * kElements;
          if (column < map.width)
            batch[b] = *reinterpret_cast<const Piece*>(from + (h * map.width + column) * step);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          T elements[kElements];
          memcpy(elements, &batch[b], sizeof(Piece));
#pragma unroll
          for (int e = 0; e < kElements; ++e)
            row.add(widen(elements[e]), w + b * kElements + e, map.width);
        }
      }
      row.give(own, h == 0, h == map.height - 1);
    }
  }
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) sums[(share * kTaps + tap) * kSumsPitch + mine] = own[tap];
  __syncthreads();

  v += (image * map.channels + first) * kTaps;
  const int results = min(kChannels, map.channels - first) * kTaps;
  for (int i = threadIdx.x; i < results; i += kThreads) {
    float sum = 0;
#pragma unroll
    for (int s = 0; s < kShares; ++s) sum += sums[(s * kTaps + i % kTaps) * kSumsPitch + i / kTaps];
    v[i] = narrow<T>(sum * (1.f / (map.height * map.width)));
  }
}

// The gradients of a row of the map: of its first, its inner and its last columns.
template <class T>
struct RowGradients {
  T first, inner, last;

  __device__ RowGradients(const float (&taps)[kTaps], const Map& map, int row) {
    float seen[3];
#pragma unroll
    for (int kx = 0; kx < 3; ++kx) {
      seen[kx] = taps[3 + kx];
      if (row < map.height - 1) seen[kx] += taps[kx];
      if (row > 0) seen[kx] += taps[6 + kx];
    }
    const float share = 1.f / (map.height * map.width);
    first = narrow<T>((map.width > 1 ? seen[1] + seen[0] : seen[1]) * share);
    inner = narrow<T>((seen[1] + seen[0] + seen[2]) * share);
    last = narrow<T>((seen[1] + seen[2]) * share);
  }

  __device__ T of(int column, int width) const {
    return column == 0 ? first : column == width - 1 ? last : inner;
  }
};

// Neighbouring threads write neighbouring pieces.
template <class T, class Piece>
__global__ void __launch_bounds__(kThreads)
    tap_means_backward_kernel(const T* dv, Map map, int64_t channels, T* dx) {
  constexpr int kElements = sizeof(Piece) / sizeof(T), kStep = kShares * kElements;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannels + threadIdx.x / kShares;
  if (channel >= channels) return;
  const int positions = map.height * map.width;
  float taps[kTaps];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) taps[tap] = widen(dv[channel * kTaps + tap]);
  dx += channel * positions;
  for (int i = threadIdx.x % kShares * kElements; i < positions; i += kStep) {
    int row = i / map.width, column = i % map.width;
    RowGradients<T> gradients(taps, map, row);
    T elements[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (column == map.width) {
        column = 0;
        gradients = RowGradients<T>(taps, map, ++row);
      }
      elements[e] = gradients.of(column++, map.width);
    }
    Piece piece;
    memcpy(&piece, elements, sizeof(Piece));
    *reinterpret_cast<Piece*>(dx + i) = piece;
  }
}

}  // namespace

cudaError_t tap_means(const Context& context, Dtype dtype, const Map& map, const View& x, void* v) {
  const int channel_blocks = divide_up(map.channels, kChannels);
  const int64_t blocks = static_cast<int64_t>(map.batch) * channel_blocks;
  if (blocks == 0) return cudaSuccess;
  return with_element(dtype, [&]<class T>() {
    const auto start = [&](auto kernel) {
      constexpr size_t kBytes = shared_bytes({kShares * kTaps * kSumsPitch * sizeof(float)});
      return launch(context, "tap_means", kernel, dim3(static_cast<unsigned>(blocks)), kThreads,
                    kBytes, x, map, channel_blocks, static_cast<T*>(v));
    };
    if (x.strides[1] == 1) return start(tap_means_kernel<T, T, true>);
    return in_pieces<T>(x, map.width, 4) ? start(tap_means_kernel<T, uint32_t, false>)
                                         : start(tap_means_kernel<T, T, false>);
  });
}

cudaError_t tap_means_backward(const Context& context, Dtype dtype, const Map& map, const void* dv,
                               void* dx) {
  const int64_t channels = static_cast<int64_t>(map.batch) * map.channels;
  if (channels == 0) return cudaSuccess;
  return with_element(dtype, [&]<class T>() {
    const auto start = [&](auto kernel) {
      const dim3 grid(static_cast<unsigned>((channels + kChannels - 1) / kChannels));
      return launch(context, "tap_means_backward", kernel, grid, kThreads, 0,
                    static_cast<const T*>(dv), map, channels, static_cast<T*>(dx));
    };
    const View gradient{dx, {0, map.height * map.width, 1}};
    return in_pieces<T>(gradient, map.height * map.width, 8)
               ? start(tap_means_backward_kernel<T, uint64_t>)
               : start(tap_means_backward_kernel<T, T>);
  });
}

}  // namespace cin_fast
