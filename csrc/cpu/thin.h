// Products of a thin matrix and a large one that is read, or written, once.
//
// a is (B, K) with few rows, w (O, K) is large; both are plain rows at a pitch of `ld`. What is
// gathered over a long axis is a sum of short sums: it rounds less than one long one.

#pragma once

namespace cin_fast::CIN_FAST_ISA {

// Rows of a, and of w, in a register tile.
constexpr int kThinRows = 4;
constexpr int kThinOutputs = 2;
// Rows of w whose products are added up before they join da.
constexpr int kThinSum = 8;

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// visit(first, Count of rows) for n rows in groups of kMost, then of half as many.
template <int kMost, typename Visit>
inline void for_each_group(int64_t n, Visit visit) {
  int64_t first = 0;
  for (; first + kMost <= n; first += kMost) visit(first, Count<kMost>{});
  if constexpr (kMost > 1)
    for_each_group<kMost / 2>(n - first,
                              [&](int64_t rest, auto rows) { visit(first + rest, rows); });
}

// y += a w^T over `depth` columns.
inline void thin_forward(const float* a, const float* w, int64_t ld, int64_t rows, int64_t outputs,
                         int64_t depth, float* y, int64_t ldy) {
  const int64_t whole = depth / kWidth * kWidth;
  for_each_group<kThinOutputs>(outputs, [&](int64_t o, auto n_outputs) {
    for_each_group<kThinRows>(rows, [&](int64_t b, auto n_rows) {
      constexpr int kB = decltype(n_rows)::value, kO = decltype(n_outputs)::value;
      const float *left = a + b * ld, *right = w + o * ld;
      Vec acc[kB][kO];
      for (auto& of_row : acc)
        for (Vec& sum : of_row) sum = splat(0);
      for (int64_t k = 0; k < whole; k += kWidth) {
        Vec here[kO];
#pragma GCC unroll 2
        for (int n = 0; n < kO; n++) here[n] = load(right + n * ld + k);
#pragma GCC unroll 4
        for (int m = 0; m < kB; m++) {
          const Vec value = load(left + m * ld + k);
#pragma GCC unroll 2
          for (int n = 0; n < kO; n++) acc[m][n] = fma(value, here[n], acc[m][n]);
        }
      }
      for (int m = 0; m < kB; m++) {
        for (int n = 0; n < kO; n++) {
          float sum = sum_lanes(acc[m][n]);
          for (int64_t k = whole; k < depth; k++) sum += left[m * ld + k] * right[n * ld + k];
          y[(b + m) * ldy + o + n] += sum;
        }
      }
    });
  });
}

// da += dy w over `depth` columns.
inline void thin_input(const float* dy, int64_t ldy, const float* w, int64_t ld, int64_t rows,
                       int64_t outputs, int64_t depth, float* da, int64_t ldda) {
  const int64_t whole = depth / kWidth * kWidth;
  for_each_group<kThinSum>(outputs, [&](int64_t o, auto n_outputs) {
    for_each_group<kThinRows>(rows, [&](int64_t b, auto n_rows) {
      constexpr int kB = decltype(n_rows)::value, kO = decltype(n_outputs)::value;
      const float *left = dy + b * ldy + o, *right = w + o * ld;
      float* sums = da + b * ldda;
      for (int64_t k = 0; k < whole; k += kWidth) {
        Vec acc[kB];
        for (Vec& sum : acc) sum = splat(0);
#pragma GCC unroll 8
        for (int n = 0; n < kO; n++) {
          const Vec here = load(right + n * ld + k);
#pragma GCC unroll 4
          for (int m = 0; m < kB; m++) acc[m] = fma(splat(left[m * ldy + n]), here, acc[m]);
        }
#pragma GCC unroll 4
        for (int m = 0; m < kB; m++) store(sums + m * ldda + k, load(sums + m * ldda + k) + acc[m]);
      }
      for (int m = 0; m < kB; m++) {
        for (int64_t k = whole; k < depth; k++) {
          float sum = 0;
          for (int n = 0; n < kO; n++) sum += left[m * ldy + n] * right[n * ld + k];
          sums[m * ldda + k] += sum;
        }
      }
    });
  });
}

// dw = dy^T a over `depth` columns.
inline void thin_weight(const float* dy, int64_t ldy, const float* a, int64_t ld, int64_t rows,
                        int64_t outputs, int64_t depth, float* dw) {
  const int64_t whole = depth / kWidth * kWidth;
  for_each_group<kThinSum>(outputs, [&](int64_t o, auto n_outputs) {
    constexpr int kO = decltype(n_outputs)::value;
    const float* left = dy + o;
    float* to = dw + o * ld;
    for (int64_t k = 0; k < whole; k += kWidth) {
      Vec acc[kO];
      for (Vec& sum : acc) sum = splat(0);
      for (int64_t b = 0; b < rows; b++) {
        const Vec value = load(a + b * ld + k);
#pragma GCC unroll 8
        for (int n = 0; n < kO; n++) acc[n] = fma(splat(left[b * ldy + n]), value, acc[n]);
      }
#pragma GCC unroll 8
      for (int n = 0; n < kO; n++) store(to + n * ld + k, acc[n]);
    }
    for (int n = 0; n < kO; n++) {
      for (int64_t k = whole; k < depth; k++) {
        float sum = 0;
        for (int64_t b = 0; b < rows; b++) sum += left[b * ldy + n] * a[b * ld + k];
        to[n * ld + k] = sum;
      }
    }
  });
}

}  // namespace cin_fast::CIN_FAST_ISA
