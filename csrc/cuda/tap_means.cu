// v = x U and its gradient: per channel, the mean over the map of what each tap of a padded 3x3
// convolution sees. Both take as long as reading the map, or writing its gradient, takes: 16 MB at
// 20 x 2048 x 14 x 14 in 16 bits.
#include "host.cuh"

namespace cin_fast {
namespace {

constexpr int kTaps = 9;
// Of a block: channels, and threads that share the positions of one.
constexpr int kChannels = 32, kShares = 8, kThreads = kChannels * kShares;
// Between the sums of two taps: neither layout's threads then meet a bank twice.
constexpr int kSumsPitch = kChannels + 4;

// A walk over the map, row by row.
struct Position {
  int row, column, height, width;

  __device__ Position(const Map& map, int first)
      : row(first / map.width), column(first % map.width), height(map.height), width(map.width) {}

  __device__ void advance(int positions) {
    column += positions;
    for (; column >= width; column -= width) ++row;
  }

  // Tap 3 ky + kx reads ky - 1 rows below and kx - 1 columns to the right of where it writes.
  __device__ bool is_seen_by(int tap) const {
    const int ky = tap / 3, kx = tap % 3;
    return (ky > 0 || row < height - 1) && (ky < 2 || row > 0) && (kx > 0 || column < width - 1) &&
           (kx < 2 || column > 0);
  }
};

// kAcross: neighbouring threads have neighbouring channels, as memory has in channels_last; where
// not, they have neighbouring positions.
template <class T, class Piece, bool kAcross>
__global__ void __launch_bounds__(kThreads)
    tap_means_kernel(View x, Map map, int channel_blocks, T* v) {
  constexpr int kElements = sizeof(Piece) / sizeof(T), kStep = kShares * kElements, kBatch = 8;
  const int64_t image = blockIdx.x / channel_blocks;
  const int first = blockIdx.x % channel_blocks * kChannels;
  const int mine = kAcross ? threadIdx.x % kChannels : threadIdx.x / kShares;
  const int share = kAcross ? threadIdx.x / kChannels : threadIdx.x % kShares;
  const int positions = map.height * map.width;
  SharedMemory shared;
  float* sums = shared.take<float>(kShares * kTaps * kSumsPitch);

  float own[kTaps] = {};
  if (first + mine < map.channels) {
    const T* from =
        static_cast<const T*>(x.data) + image * x.strides[0] + (first + mine) * x.strides[1];
    Position at(map, share * kElements);
    for (int i = share * kElements; i < positions; i += kBatch * kStep) {
      // All loads stand before the first sum: one after another they would wait for memory one
      // after another.
      Piece batch[kBatch] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int position = i + b * kStep;
        if (position < positions)
          batch[b] = *reinterpret_cast<const Piece*>(from + position * x.strides[2]);
      }
      // Beyond the map they are zeros.
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        T elements[kElements];
        memcpy(elements, &batch[b], sizeof(Piece));
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
#pragma unroll
          for (int tap = 0; tap < kTaps; ++tap)
            if (at.is_seen_by(tap)) own[tap] += widen(elements[e]);
          at.advance(e + 1 < kElements ? 1 : kStep - kElements + 1);
        }
      }
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
    v[i] = narrow<T>(sum * (1.f / positions));
  }
}

template <class T, class Piece>
__global__ void __launch_bounds__(kThreads)
    tap_means_backward_kernel(const T* dv, Map map, int64_t channels, T* dx) {
  constexpr int kElements = sizeof(Piece) / sizeof(T), kStep = kShares * kElements;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannels + threadIdx.x / kShares;
  if (channel >= channels) return;
  const int share = threadIdx.x % kShares, positions = map.height * map.width;
  float taps[kTaps];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) taps[tap] = widen(dv[channel * kTaps + tap]);
  dx += channel * positions;
  Position at(map, share * kElements);
  for (int i = share * kElements; i < positions; i += kStep) {
    T elements[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      float sum = 0;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) sum += at.is_seen_by(tap) ? taps[tap] : 0.f;
      elements[e] = narrow<T>(sum * (1.f / positions));
      at.advance(e + 1 < kElements ? 1 : kStep - kElements + 1);
    }
    Piece piece;
    memcpy(&piece, elements, sizeof(Piece));
    *reinterpret_cast<Piece*>(dx + i) = piece;
  }
}

// Calls body<T>() with the dtype's element.
template <class Body>
cudaError_t with_element(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kBfloat16:
      return body.template operator()<__nv_bfloat16>();
    case Dtype::kFloat16:
      return body.template operator()<__half>();
    case Dtype::kFloat32:
      break;
  }
  return body.template operator()<float>();
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
    if (in_pieces<T>(x, map.height * map.width, 8))
      return start(tap_means_kernel<T, uint64_t, false>);
    return x.strides[1] == 1 ? start(tap_means_kernel<T, T, true>)
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
