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
                         const float* row_max, float* p, float* row_sum, float* rounded_sum) {
  for (int64_t r = 0; r < rows; r++) {
    const Vec m = splat(finite_or_zero(row_max[r]));
    Vec sum = splat(0), of_rounded = splat(0);
    for (int64_t j = 0; j < cols; j += kWidth) {
      const Vec weight = exp(load(s + r * ld + j) - m);
      sum = sum + weight;
      if (rounded_sum) of_rounded = of_rounded + rounded(weight);
      if (p) store_columns(p + r * ld, j, cols, weight);
    }
    row_sum[r] += sum_lanes(sum);
    if (rounded_sum) rounded_sum[r] += sum_lanes(of_rounded);
  }
}

// Rows whose weights are added up before they join a column's sum: a long sum of numbers of one
// size rounds the same way every time.
constexpr int64_t kRowsOfSum = 16;

inline void mirrored_exponentials(const float* s, int64_t rows, int64_t cols, int64_t ld,
                                  const float* col_max, float* q, float* col_sum,
                                  float* rounded_sum) {
  for (int64_t j = 0; j < cols; j += kWidth) {
    const Vec m = finite_or_zero(load(col_max + j));
    Vec tile_sum = splat(0), of_rounded = splat(0);
    for (int64_t first = 0; first < rows; first += kRowsOfSum) {
      const int64_t end = first + kRowsOfSum < rows ? first + kRowsOfSum : rows;
      Vec sum = splat(0);
      for (int64_t r = first; r < end; r += kPack) {
        Vec weights[kPack];
        for (int64_t n = 0; n < kPack; n++) {
          weights[n] = r + n < end ? exp(load(s + (r + n) * ld + j) - m) : splat(0);
          sum = sum + weights[n];
          if (rounded_sum) of_rounded = of_rounded + rounded(weights[n]);
        }
        if (q) store_rows(q + r * ld, j, weights);
      }
      tile_sum = tile_sum + sum;
    }
    store(col_sum + j, load(col_sum + j) + tile_sum);
    if (rounded_sum) store(rounded_sum + j, load(rounded_sum + j) + of_rounded);
  }
}

inline void results(const float* acc, int64_t ld, int64_t rows, int64_t cols, const float* sum,
                    void* y, void* rest) {
  for (int64_t r = 0; r < rows; r++) {
    Element* to = static_cast<Element*>(y) + r * cols;
    const Vec divisor = splat(sum ? sum[r] : 1.0f);
    for (int64_t j = 0; j < cols; j += kWidth) {
      const Vec values = load(acc + r * ld + j) / divisor;
      store_results(to + j, cols - j, values);
      if (!rest) continue;
      Element* rest_to = static_cast<Element*>(rest) + r * cols;
      store_results(rest_to + j, cols - j, values - rounded(values));
    }
  }
}

// dot[r] = a[r] . column(r), added in gram's order: column(k) gives what all lanes' right sides
// hold in slot k.
template <typename Columns>
inline Vec ordered_dot(const float* left, int64_t pitch, int64_t depth, Columns columns) {
  const int64_t length = slots(depth), step = depth_step(length);
  Vec total = splat(0);
  for (int64_t first = 0; first < length; first += step) {
    const int64_t end = first + step < length ? first + step : length;
    Vec sum = splat(0);
    for (int64_t k = first; k < end; k++) sum = dot(load(left + k * pitch), columns(k), sum);
    total = first == 0 ? sum : total + sum;
  }
  return total;
}

// Slot k of kWidth rows, for k = 0, 1, ... in turn; zeros past their `bytes`. By way of a small
// square: rows at a power of two apart share a few places in the cache.
class SlotColumns {
 public:
  // row(lane) points to that lane's row.
  template <typename Row>
  SlotColumns(int64_t bytes, Row row) : bytes_(bytes) {
    for (int64_t lane = 0; lane < kWidth; lane++)
      rows_[lane] = reinterpret_cast<const char*>(row(lane));
  }

  Vec next(int64_t k) {
    if (k % kStep == 0) fill(k * sizeof(float));
    float values[kWidth];
    for (int64_t lane = 0; lane < kWidth; lane++) values[lane] = square_[lane][k % kStep];
    return load(values);
  }

 private:
  static constexpr int64_t kStep = 16, kStepBytes = kStep * sizeof(float);

  void fill(int64_t first) {
    const bool whole = first + kStepBytes <= bytes_;
    for (int64_t lane = 0; lane < kWidth; lane++) {
      if (whole) {
        std::memcpy(square_[lane], rows_[lane] + first, kStepBytes);
      } else {
        std::memset(square_[lane], 0, kStepBytes);
        std::memcpy(square_[lane], rows_[lane] + first, bytes_ - first);
      }
    }
  }

  const int64_t bytes_;
  const char* rows_[kWidth];
  float square_[kWidth][kStep];
};

// The same with those rows of a source that `which` names.
inline Vec dot_with_rows(const float* left, int64_t pitch, int64_t depth, const void* source,
                         const float* which) {
  SlotColumns rows(depth * sizeof(Element), [&](int64_t lane) {
    return static_cast<const Element*>(source) + static_cast<int64_t>(which[lane]) * depth;
  });
  return ordered_dot(left, pitch, depth, [&](int64_t k) { return rows.next(k); });
}

// The same sum with twice the digits: one rounding of it would reach every weight of its row.
// columns(k) gives the elements of slot k.
template <typename Columns>
inline Vec compensated_dot(const float* left, int64_t pitch, int64_t depth, Columns columns) {
  Vec sum = splat(0), rest = splat(0);
  for (int64_t k = 0; k < slots(depth); k++) {
    const Parts lefts = parts(load(left + k * pitch)), rights = columns(k);
    for (int64_t n = 0; n < kPack; n++) {
      const Vec a = lefts.of[n], b = rights.of[n], product = a * b;
      const Vec next = sum + product, added = next - sum;
      rest = rest + ((sum - (next - added)) + (product - added)) + fma(a, b, splat(0) - product);
      sum = next;
    }
  }
  return sum + rest;
}

// visit(panel, pitch, row) for each vector of rows of a block packed by columns.
template <typename Visit>
inline void for_each_row_vector(const float* packed, int64_t rows, int64_t depth, Visit visit) {
  for_each_panel(rows, [&](int64_t first, int64_t, int64_t n) {
    for (int64_t v = 0; v < n; v++)
      visit(packed + first * slots(depth) + v * kWidth, n * kWidth, first + v * kWidth);
  });
}

inline void max_logits(const float* x_columns, const void* x, const float* argmax, int64_t rows,
                       int64_t depth, float scale, float* row_max) {
  for_each_row_vector(x_columns, rows, depth, [&](const float* left, int64_t pitch, int64_t row) {
    store(row_max + row, dot_with_rows(left, pitch, depth, x, argmax + row) * splat(scale));
  });
}

inline void pivots(const float* dy_columns, const void* v, const float* argmax, const float* use,
                   int64_t rows, int64_t depth, float* pivot) {
  for_each_row_vector(dy_columns, rows, depth, [&](const float* left, int64_t pitch, int64_t row) {
    const Vec largest = dot_with_rows(left, pitch, depth, v, argmax + row);
    store(pivot + row, where_equal(load(use + row), splat(0), splat(0), load(use + row) * largest));
  });
}

inline void deltas(const float* dy_columns, const void* v, const void* y, const void* more,
                   float factor, const float* argmax, const float* use, int64_t rows, int64_t depth,
                   float* delta) {
  for_each_row_vector(dy_columns, rows, depth, [&](const float* left, int64_t pitch, int64_t row) {
    const auto existing = [&](int64_t lane) { return row + lane < rows ? row + lane : 0; };
    const auto rows_of = [&](const void* source) {
      return SlotColumns(depth * sizeof(Element), [&](int64_t lane) {
        return static_cast<const Element*>(source) + existing(lane) * depth;
      });
    };
    SlotColumns largest(depth * sizeof(Element), [&](int64_t lane) {
      return static_cast<const Element*>(v) + static_cast<int64_t>(argmax[existing(lane)]) * depth;
    });
    SlotColumns result = rows_of(y), added = rows_of(more ? more : y);
    const Vec used = load(use + row);
    const auto remainder = [&](int64_t k) {
      Parts parts_of_slot = parts(result.next(k));
      const Parts of_largest = parts(largest.next(k));
      for (int64_t n = 0; n < kPack; n++)
        parts_of_slot.of[n] = parts_of_slot.of[n] - used * of_largest.of[n];
      if (!more) return parts_of_slot;
      const Parts of_added = parts(added.next(k));
      for (int64_t n = 0; n < kPack; n++)
        parts_of_slot.of[n] = parts_of_slot.of[n] + splat(factor) * of_added.of[n];
      return parts_of_slot;
    };
    store(delta + row, compensated_dot(left, pitch, depth, remainder));
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

// Of one vector of a tile: dS + dS^T, P and the mirrored P.
struct Gradient {
  Vec s, p, q;
};

// Gradients of kPack rows from row r on, where the products look for them (see kernels.h).
inline void store_gradients(const Gradient* g, int64_t r, int64_t j, int64_t cols, int64_t ld,
                            float* s, float* e, float* f) {
  Vec across_s[kPack], across_p[kPack];
  for (int64_t n = 0; n < kPack; n++) {
    store_columns(s + (r + n) * ld, j, cols, g[n].s);
    store_columns(f + (r + n) * ld, j, cols, g[n].q);
    across_s[n] = g[n].s;
    across_p[n] = g[n].p;
  }
  store_rows(e + r * ld, j, across_p);
  if constexpr (kPack > 1) store_rows(e + (r + 1) * ld, j, across_s);
}

inline void sci_gradient(float* s, float* e, float* f, int64_t rows, int64_t cols, int64_t ld,
                         float scale, RowStats row, RowStats col) {
  const auto gradient = [&](int64_t r, int64_t j) {
    const int64_t at = r * ld + j;
    const Weights w = weights(load(s + at) * splat(scale), row, col, r, j);
    const Vec d = softmax_gradient(w.p, load(e + at), splat(row.pivot[r]), splat(row.delta[r])) +
                  softmax_gradient(w.q, load(f + at), load(col.pivot + j), load(col.delta + j));
    return Gradient{d * splat(scale), w.p, w.q};
  };
  for (int64_t r = 0; r < rows; r += kPack) {
    for (int64_t j = 0; j < cols; j += kWidth) {
      Gradient g[kPack];
      for (int64_t n = 0; n < kPack; n++)
        g[n] = r + n < rows ? gradient(r + n, j) : Gradient{splat(0), splat(0), splat(0)};
      store_gradients(g, r, j, cols, ld, s, e, f);
    }
  }
}

}  // namespace cin_fast::CIN_FAST_ISA
