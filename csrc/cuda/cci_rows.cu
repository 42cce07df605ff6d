// cci between the products of the matmul backend: from the logits of an image and its partner to
// |M|, M = P_i - eta_i P_partner(i), and back.
#include "softmax_rows.cuh"

namespace cin_fast {
namespace {

// Rows of an image and of its partner, and the etas of both.
struct Pair {
  int64_t own, other;
  float eta, its_eta;

  __device__ Pair(const Rows& rows, const int64_t* partner, const float* etas) {
    const int image = blockIdx.x / rows.columns, row = blockIdx.x % rows.columns;
    const int64_t its_image = partner[image];
    own = (static_cast<int64_t>(image) * rows.columns + row) * rows.columns;
    other = (its_image * rows.columns + row) * rows.columns;
    eta = etas[image];
    its_eta = etas[its_image];
  }
};

// Softmax of a row of scaled logits, an element at a time.
struct RowWeights {
  float scale, peak, share;

  __device__ float operator()(float logit) const { return expf(scale * (logit - peak)) * share; }
};

constexpr int kWeightsMemory = 2 * kRowWarps;

// May be called again with the same memory: two barriers lie between uses of either half.
template <int kPiece>
__device__ RowWeights row_weights(const float* logits, int columns, float scale, float* memory) {
  RowWeights weights{scale, row_peak<kPiece>(logits, columns, scale, memory), 1.f};
  float sum = 0;
  for_each_piece<kPiece>(columns, [&](int column) {
    const auto s = load<kPiece>(logits + column);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) sum += weights(s.of[i]);
  });
  weights.share = 1.f / reduce(sum, memory + kRowWarps, Sum{});
  return weights;
}

__device__ float sign(float value) { return static_cast<float>((value > 0) - (value < 0)); }

template <class T, int kPiece>
__global__ void __launch_bounds__(kRowThreads)
    cci_rows_kernel(const float* logits, Rows rows, const int64_t* partner, const float* etas,
                    float scale, T* weights) {
  const Pair pair(rows, partner, etas);
  SharedMemory shared;
  float* memory = shared.take<float>(kWeightsMemory);
  const int columns = rows.columns;
  const float *own = logits + pair.own, *other = logits + pair.other;
  const RowWeights p = row_weights<kPiece>(own, columns, scale, memory),
                   q = row_weights<kPiece>(other, columns, scale, memory);
  for_each_piece<kPiece>(columns, [&](int column) {
    const auto s = load<kPiece>(own + column), t = load<kPiece>(other + column);
    Piece<T, kPiece> result;
#pragma unroll
    for (int i = 0; i < kPiece; ++i)
      result.of[i] = narrow<T>(fabsf(p(s.of[i]) - pair.eta * q(t.of[i])));
    store(weights + pair.own + column, result);
  });
}

// Of one element: M and its gradient, and that of P.
struct Gradient {
  float m, dm, dp;

  // d: the gradients of |M|, of the image and of its partner.
  __device__ Gradient(const Pair& pair, float p, float q, float d, float its_d)
      : m(p - pair.eta * q), dm(sign(m) * d) {
    // partner is an involution: what the image owes its partner's weights is due in its M.
    dp = dm - pair.its_eta * sign(q - pair.its_eta * p) * its_d;
  }
};

// dS = scale P (dP - rowsum(P dP)); deta gets a number a row, to be added up.
template <class T, int kPiece>
__global__ void __launch_bounds__(kRowThreads)
    cci_rows_backward_kernel(const float* logits, const float* d, Rows rows, const int64_t* partner,
                             const float* etas, float scale, T* weights, T* ds, float* deta) {
  const Pair pair(rows, partner, etas);
  SharedMemory shared;
  float* memory = shared.take<float>(kWeightsMemory + 2 * kRowWarps);
  const int columns = rows.columns;
  const float *own = logits + pair.own, *other = logits + pair.other;
  const RowWeights own_weights = row_weights<kPiece>(own, columns, scale, memory),
                   its_weights = row_weights<kPiece>(other, columns, scale, memory);
  const auto for_each_element = [&](const auto& body, const auto& after) {
    for_each_piece<kPiece>(columns, [&](int column) {
      const auto s = load<kPiece>(own + column), t = load<kPiece>(other + column),
                 dm = load<kPiece>(d + pair.own + column),
                 its_dm = load<kPiece>(d + pair.other + column);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        const float p = own_weights(s.of[i]), q = its_weights(t.of[i]);
        body(i, p, q, Gradient(pair, p, q, dm.of[i], its_dm.of[i]));
      }
      after(column);
    });
  };

  float delta = 0, deta_row = 0;
  for_each_element(
      [&](int, float p, float q, const Gradient& gradient) {
        delta += p * gradient.dp;
        deta_row -= q * gradient.dm;
      },
      [](int) {});
  delta = reduce(delta, memory + kWeightsMemory, Sum{});
  deta_row = reduce(deta_row, memory + kWeightsMemory + kRowWarps, Sum{});
  if (threadIdx.x == 0) deta[blockIdx.x] = deta_row;
  Piece<T, kPiece> weight, gradient_of_logit;
  for_each_element(
      [&](int i, float p, float, const Gradient& gradient) {
        weight.of[i] = narrow<T>(fabsf(gradient.m));
        gradient_of_logit.of[i] = narrow<T>(scale * p * (gradient.dp - delta));
      },
      [&](int column) {
        store(weights + pair.own + column, weight);
        store(ds + pair.own + column, gradient_of_logit);
      });
}

}  // namespace

cudaError_t cci_rows(const Context& context, Dtype dtype, const Rows& rows, float scale,
                     const CciRows& a) {
  if (rows.count == 0 || rows.columns == 0) return cudaSuccess;
  return with_pieces(dtype, rows.columns, [&]<class T, int kPiece>() {
    return launch(context, "cci_rows", cci_rows_kernel<T, kPiece>, dim3(rows.count), kRowThreads,
                  shared_bytes({kWeightsMemory * sizeof(float)}), a.logits, rows, a.partner, a.eta,
                  scale, static_cast<T*>(a.weights));
  });
}

cudaError_t cci_rows_backward(const Context& context, Dtype dtype, const Rows& rows, float scale,
                              const CciRows& a, const CciRowsBackward& b) {
  if (rows.count == 0 || rows.columns == 0) return cudaSuccess;
  return with_pieces(dtype, rows.columns, [&]<class T, int kPiece>() {
    return launch(context, "cci_rows_backward", cci_rows_backward_kernel<T, kPiece>,
                  dim3(rows.count), kRowThreads,
                  shared_bytes({(kWeightsMemory + 2 * kRowWarps) * sizeof(float)}), a.logits, b.d,
                  rows, a.partner, a.eta, scale, static_cast<T*>(a.weights), static_cast<T*>(b.ds),
                  b.deta);
  });
}

}  // namespace cin_fast
