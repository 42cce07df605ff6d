// What happens to a tile between its products: softmax statistics, exponentials, gradients.

#pragma once

#include "exp.h"
#include "tile.h"

namespace cin_fast::CIN_FAST_ISA {

inline Vec minus_infinity() { return splat(-__builtin_inff()); }

// A row of nothing but -inf has no maximum to subtract: its weights are 0 (0 / 0 in the end).
inline Vec finite_or_zero(Vec max) { return where_equal(max, minus_infinity(), splat(0), max); }
inline float finite_or_zero(float max) { return max == -__builtin_inff() ? 0.0f : max; }

inline void scale_and_max(float* s, int64_t rows, int64_t cols, int64_t ld, float scale,
                          float* row_max, float* col_max) {
  const int64_t n = vecs(cols);
  for (int64_t j = 0; j < n; j++) store(col_max + j * kWidth, minus_infinity());
  for (int64_t r = 0; r < rows; r++) {
    float* row = s + r * ld;
    Vec largest = minus_infinity();
    for (int64_t j = 0; j < n; j++) {
      Vec t = load(row + j * kWidth) * splat(scale);
      if (j == n - 1) t = first_lanes(cols - j * kWidth, t, minus_infinity());
      store(row + j * kWidth, t);
      largest = max(largest, t);
      store(col_max + j * kWidth, max(load(col_max + j * kWidth), t));
    }
    row_max[r] = max_lanes(largest);
  }
}

inline void merge_max(const float* s, int64_t rows, int64_t cols, int64_t ld, bool transposed,
                      const float* tile_max, int64_t offset, bool first, float* max_so_far,
                      float* argmax, float* sum, float* factor) {
  const int64_t n = transposed ? cols : rows, depth = transposed ? rows : cols;
  const int64_t step = transposed ? ld : 1, row_step = transposed ? 1 : ld;
  for (int64_t r = 0; r < n; r++) {
    if (!first && !(tile_max[r] > max_so_far[r])) continue;
    const float* row = s + r * row_step;
    int64_t k = 0;
    while (k < depth - 1 && row[k * step] != tile_max[r]) k++;
    argmax[r] = static_cast<float>(offset + k);
  }
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec old_max = first ? minus_infinity() : load(max_so_far + i);
    const Vec new_max = max(load(tile_max + i), old_max);
    const Vec shrink = exp(old_max - finite_or_zero(new_max));
    store(max_so_far + i, new_max);
    store(sum + i, first ? splat(0) : load(sum + i) * shrink);
    store(factor + i, shrink);
  }
}

inline void rescale(float* acc, int64_t rows, int64_t cols, int64_t ld, const float* factor) {
  const int64_t n = vecs(cols);
  for (int64_t r = 0; r < rows; r++) {
    if (factor[r] == 1.0f) continue;
    const Vec f = splat(factor[r]);
    for (int64_t j = 0; j < n; j++) {
      float* to = acc + r * ld + j * kWidth;
      store(to, load(to) * f);
    }
  }
}

inline void exponentials(const float* s, int64_t rows, int64_t cols, int64_t ld,
                         const float* row_max, float* p, float* row_sum) {
  for (int64_t r = 0; r < rows; r++) {
    const Vec m = splat(finite_or_zero(row_max[r]));
    Vec sum = splat(0);
    for (int64_t j = 0; j < cols; j += kWidth) {
      const Vec weight = exp(load(s + r * ld + j) - m);
      sum = sum + weight;
      if (p) store(p + r * ld + j, weight);
    }
    row_sum[r] += sum_lanes(sum);
  }
}

// Rows whose weights are added up before they join a column's sum: a long sum of numbers of one
// size rounds the same way every time.
constexpr int64_t kRowsOfSum = 16;

inline void mirrored_exponentials(const float* s, int64_t rows, int64_t cols, int64_t ld,
                                  const float* col_max, float* q, float* col_sum) {
  for (int64_t j = 0; j < cols; j += kWidth) {
    const Vec m = finite_or_zero(load(col_max + j));
    Vec tile_sum = splat(0);
    for (int64_t first = 0; first < rows; first += kRowsOfSum) {
      const int64_t end = first + kRowsOfSum < rows ? first + kRowsOfSum : rows;
      Vec sum = splat(0);
      for (int64_t r = first; r < end; r++) {
        const Vec weight = exp(load(s + r * ld + j) - m);
        sum = sum + weight;
        if (q) store(q + r * ld + j, weight);
      }
      tile_sum = tile_sum + sum;
    }
    store(col_sum + j, load(col_sum + j) + tile_sum);
  }
}

inline void normalize(const float* acc, int64_t ld, int64_t rows, int64_t cols, const float* sum,
                      float* y) {
  for (int64_t r = 0; r < rows; r++) {
    const float* from = acc + r * ld;
    float* to = y + r * cols;
    const Vec divisor = splat(sum[r]);
    int64_t j = 0;
    for (; j + kWidth <= cols; j += kWidth) store(to + j, load(from + j) / divisor);
    for (; j < cols; j++) to[j] = from[j] / sum[r];
  }
}

// dot[r] = a[r] . column(r), added in gram's order: column(k, values) gives what all lanes' right
// sides hold at position k.
template <typename Columns>
inline Vec ordered_dot(const float* left, int64_t pitch, int64_t depth, Columns columns) {
  const int64_t step = depth_step(depth);
  Vec total = splat(0);
  for (int64_t first = 0; first < depth; first += step) {
    const int64_t end = first + step < depth ? first + step : depth;
    Vec sum = splat(0);
    for (int64_t k = first; k < end; k++) sum = fma(load(left + k * pitch), columns(k), sum);
    total = first == 0 ? sum : total + sum;
  }
  return total;
}

// The same sum with twice the digits: one rounding of it would reach every weight of its row.
template <typename Columns>
inline Vec compensated_dot(const float* left, int64_t pitch, int64_t depth, Columns columns) {
  Vec sum = splat(0), rest = splat(0);
  for (int64_t k = 0; k < depth; k++) {
    const Vec a = load(left + k * pitch), b = columns(k), product = a * b;
    const Vec next = sum + product, added = next - sum;
    rest = rest + ((sum - (next - added)) + (product - added)) + fma(a, b, splat(0) - product);
    sum = next;
  }
  return sum + rest;
}

// visit(panel, pitch, row) for each vector of rows of a block packed by columns.
template <typename Visit>
inline void for_each_row_vector(const float* packed, int64_t rows, int64_t depth, Visit visit) {
  for_each_panel(rows, [&](int64_t first, int64_t, int64_t n) {
    for (int64_t v = 0; v < n; v++)
      visit(packed + first * depth + v * kWidth, n * kWidth, first + v * kWidth);
  });
}

inline void max_logits(const float* x_columns, const float* x, const float* argmax, int64_t rows,
                       int64_t depth, float scale, float* row_max) {
  for_each_row_vector(x_columns, rows, depth, [&](const float* left, int64_t pitch, int64_t row) {
    const auto column = [&](int64_t k) {
      float values[kWidth];
      for (int64_t i = 0; i < kWidth; i++)
        values[i] = x[static_cast<int64_t>(argmax[row + i]) * depth + k];
      return load(values);
    };
    store(row_max + row, ordered_dot(left, pitch, depth, column) * splat(scale));
  });
}

// Column k of kWidth rows.
inline Vec column_of(const float* const* rows, int64_t k) {
  float values[kWidth];
  for (int64_t i = 0; i < kWidth; i++) values[i] = rows[i][k];
  return load(values);
}

inline void pivots(const float* dy_columns, const float* v, const float* y, const float* b,
                   float eta, const float* argmax, const float* use, int64_t rows, int64_t depth,
                   float* pivot, float* delta) {
  for_each_row_vector(dy_columns, rows, depth, [&](const float* left, int64_t pitch, int64_t row) {
    const float *largest[kWidth], *result[kWidth], *rest[kWidth];
    for (int64_t i = 0; i < kWidth; i++) {
      const int64_t r = row + i < rows ? row + i : 0;
      largest[i] = v + static_cast<int64_t>(argmax[r]) * depth;
      result[i] = y + r * depth;
      rest[i] = b ? b + r * depth : result[i];
    }
    const Vec factor = load(use + row), part = splat(b ? eta : 0.0f);
    const auto pivot_column = [&](int64_t k) { return factor * column_of(largest, k); };
    const auto rest_column = [&](int64_t k) {
      return column_of(result, k) - pivot_column(k) + part * column_of(rest, k);
    };
    // Bit for bit what gram makes of it in dP.
    store(pivot + row, ordered_dot(left, pitch, depth, pivot_column));
    store(delta + row, compensated_dot(left, pitch, depth, rest_column));
  });
}

// Softmax weights of one vector of a tile: P from its rows' statistics, Q (mirrored) from its
// columns'.
struct Weights {
  Vec p, q;
};
// Not e * share: a row's weights would share the rounding of its share.
inline Vec weight(Vec e, Vec share, Vec share_rest) { return fma(e, share, e * share_rest); }
inline Vec row_weight(Vec t, RowStats row, int64_t r) {
  const Vec e = exp(t - splat(finite_or_zero(row.max[r])));
  return weight(e, splat(row.share[r]), splat(row.share_rest[r]));
}
inline Vec col_weight(Vec t, RowStats col, int64_t j) {
  const Vec e = exp(t - finite_or_zero(load(col.max + j)));
  return weight(e, load(col.share + j), load(col.share_rest + j));
}
inline Weights weights(Vec t, RowStats row, RowStats col, int64_t r, int64_t j) {
  return {row_weight(t, row, r), col_weight(t, col, j)};
}

inline void sci_delta(const float* s, const float* e, const float* f, int64_t rows, int64_t cols,
                      int64_t ld, float scale, RowStats row, RowStats col, float* row_delta,
                      float* col_delta) {
  Vec row_sum[kRowsOfSum];
  for (int64_t first = 0; first < rows; first += kRowsOfSum) {
    const int64_t n = rows - first < kRowsOfSum ? rows - first : kRowsOfSum;
    for (int64_t r = 0; r < n; r++) row_sum[r] = splat(0);
    for (int64_t j = 0; j < cols; j += kWidth) {
      Vec col_sum = splat(0);
      for (int64_t r = 0; r < n; r++) {
        const int64_t at = (first + r) * ld + j;
        const Weights w = weights(load(s + at) * splat(scale), row, col, first + r, j);
        const Vec share = w.p * (load(e + at) - splat(row.pivot[first + r]));
        row_sum[r] = row_sum[r] + first_lanes(cols - j, share, splat(0));
        col_sum = col_sum + w.q * (load(f + at) - load(col.pivot + j));
      }
      if (col_delta) store(col_delta + j, load(col_delta + j) + col_sum);
    }
    for (int64_t r = 0; r < n; r++) row_delta[first + r] += sum_lanes(row_sum[r]);
  }
}

inline Vec softmax_gradient(Vec p, Vec dp, Vec pivot, Vec delta) {
  return p * (dp - pivot - delta);
}

inline void sci_gradient(float* s, float* e, float* f, int64_t rows, int64_t cols, int64_t ld,
                         float scale, RowStats row, RowStats col) {
  for (int64_t r = 0; r < rows; r++) {
    const Vec pivot = splat(row.pivot[r]), delta = splat(row.delta[r]);
    for (int64_t j = 0; j < cols; j += kWidth) {
      const int64_t at = r * ld + j;
      const Weights w = weights(load(s + at) * splat(scale), row, col, r, j);
      const Vec d = softmax_gradient(w.p, load(e + at), pivot, delta) +
                    softmax_gradient(w.q, load(f + at), load(col.pivot + j), load(col.delta + j));
      store(s + at, d * splat(scale));
      store(e + at, w.p);
      store(f + at, w.q);
    }
  }
}

}  // namespace cin_fast::CIN_FAST_ISA
