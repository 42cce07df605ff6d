// Products of tiles: packing, and register-blocked kernels over packed operands.

#pragma once

namespace cin_fast::CIN_FAST_ISA {

// Vectors of the next panel when n remain: three, but never a lone last one after a three.
inline int64_t panel_vecs(int64_t n) { return n == 4 ? 2 : n < kVecs ? n : kVecs; }

inline int64_t vecs(int64_t n) { return (n + kWidth - 1) / kWidth; }

// visit(first lane, lanes, vectors) for each panel of a packed width.
template <typename Visit>
inline void for_each_panel(int64_t width, Visit visit) {
  for (int64_t left = vecs(width), lane = 0; left > 0;) {
    const int64_t n = panel_vecs(left);
    const int64_t lanes = width - lane < n * kWidth ? width - lane : n * kWidth;
    visit(lane, lanes, n);
    lane += n * kWidth;
    left -= n;
  }
}

inline int64_t slots(int64_t depth) { return (depth + kPack - 1) / kPack; }

inline void pack_columns(const void* source, int64_t ld, int64_t rows, int64_t depth, float* dst) {
  const int64_t length = slots(depth);
  for_each_panel(rows, [&](int64_t first, int64_t lanes, int64_t n) {
    const Element* from = static_cast<const Element*>(source) + first * ld;
    float* to = dst + first * length;
    const int64_t pitch = n * kWidth;
    // By way of a small square: rows at a power of two apart share a few places in the cache.
    constexpr int64_t kStep = 16;
    float square[kVecs * kWidth][kStep] = {};
    for (int64_t first_k = 0; first_k < length; first_k += kStep) {
      const int64_t here = length - first_k < kStep ? length - first_k : kStep;
      const int64_t left = depth - first_k * kPack;
      const int64_t elements = left < here * kPack ? left : here * kPack;
      for (int64_t lane = 0; lane < lanes; lane++) {
        square[lane][here - 1] = 0;
        std::memcpy(square[lane], from + lane * ld + first_k * kPack, elements * sizeof(Element));
      }
      for (int64_t k = 0; k < here; k++)
        for (int64_t lane = 0; lane < pitch; lane++)
          to[(first_k + k) * pitch + lane] = square[lane][k];
    }
  });
}

inline void pack_rows(const void* source, int64_t ld, int64_t rows, int64_t cols, float* dst) {
  for_each_panel(cols, [&](int64_t first, int64_t lanes, int64_t n) {
    float* to = dst + first * slots(rows);
    for (int64_t row = 0; row < rows; row += kPack) {
      const Element* from = static_cast<const Element*>(source) + row * ld + first;
      const Element* below = row + 1 < rows ? from + ld : nullptr;
      for (int64_t lane = 0; lane < n * kWidth; lane += kWidth, to += kWidth)
        store(to, load_slots(from + lane, below ? below + lane : nullptr, lanes - lane));
    }
  });
}

// c (+)= a b for R rows and N vectors: a is (R, depth) slots at pitch lda, or its transpose.
template <int R, int N, bool kTransposed>
inline void micro_kernel(const float* a, int64_t lda, const float* b, int64_t depth, float* c,
                         int64_t ldc, bool add) {
  Vec acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      acc[r][n] = splat(0);
      // c is met again long after its last visit: it comes while the products are made.
      __builtin_prefetch(c + r * ldc + n * kWidth, 1);
    }
  }
  for (int64_t k = 0; k < depth; k++) {
    Vec right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) right[n] = load(b + (k * N + n) * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec left = splat(kTransposed ? a[k * lda + r] : a[r * lda + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[r][n] = dot(left, right[n], acc[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      float* to = c + r * ldc + n * kWidth;
      store(to, add ? load(to) + acc[r][n] : acc[r][n]);
    }
  }
}

// The rows of one panel: kRows at a time, then 4, 2 and 1.
template <int R, int N, bool kTransposed>
inline void panel_rows(const float* a, int64_t lda, const float* b, int64_t rows, int64_t depth,
                       float* c, int64_t ldc, bool add) {
  const int64_t step = kTransposed ? R : R * lda;
  for (; rows >= R; rows -= R, a += step, c += R * ldc)
    micro_kernel<R, N, kTransposed>(a, lda, b, depth, c, ldc, add);
  if constexpr (R > 1) {
    if (rows > 0) panel_rows<R / 2, N, kTransposed>(a, lda, b, rows, depth, c, ldc, add);
  }
}

template <bool kTransposed>
inline void panel(const float* a, int64_t lda, const float* b, int64_t n, int64_t rows,
                  int64_t depth, float* c, int64_t ldc, bool add) {
  if (n == 3) return panel_rows<kRows, 3, kTransposed>(a, lda, b, rows, depth, c, ldc, add);
  if (n == 2) return panel_rows<kRows, 2, kTransposed>(a, lda, b, rows, depth, c, ldc, add);
  panel_rows<kRows, 1, kTransposed>(a, lda, b, rows, depth, c, ldc, add);
}

template <bool kTransposed>
inline void multiply(const float* a, int64_t lda, const float* b, int64_t rows, int64_t cols,
                     int64_t depth, float* c, int64_t ldc, bool add) {
  const int64_t length = slots(depth);
  for_each_panel(cols, [&](int64_t first, int64_t, int64_t n) {
    panel<kTransposed>(a, lda, b + first * length, n, rows, length, c + first, ldc, add);
  });
}

// Deep products go in equal steps of at most kDepth slots: operands stay in the cache, and a sum of
// short sums rounds less than one long one. MKL takes L = 196 in two steps, too.
constexpr int64_t kDepth = 112;

inline int64_t depth_step(int64_t length) {
  const int64_t steps = (length + kDepth - 1) / kDepth;
  return (length + steps - 1) / steps;
}

inline void gram(const float* a, const float* b, int64_t rows, int64_t cols, int64_t depth,
                 float* c, int64_t ldc) {
  const int64_t length = slots(depth), step = depth_step(length);
  for (int64_t k = 0; k < length; k += step) {
    const int64_t here = length - k < step ? length - k : step;
    for_each_panel(cols, [&](int64_t col, int64_t, int64_t n) {
      const float* right = b + col * length + k * n * kWidth;
      for_each_panel(rows, [&](int64_t row, int64_t lanes, int64_t m) {
        const float* left = a + row * length + k * m * kWidth;
        panel<true>(left, m * kWidth, right, n, lanes, here, c + row * ldc + col, ldc, k > 0);
      });
    });
  }
}

}  // namespace cin_fast::CIN_FAST_ISA
