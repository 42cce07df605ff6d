// Products of float32 operands: a slot of 32 bits holds one number.

#pragma once

namespace cin_fast::CIN_FAST_ISA {

using Element = float;
constexpr int64_t kPack = 1;

// sum + a b, slot by slot.
inline Vec dot(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }

// n numbers of a row (and of the one below it, where a slot holds two), zeros beyond.
inline Vec load_slots(const Element* row, const Element*, int64_t n) {
  if (n >= kWidth) return load(row);
  float part[kWidth] = {};
  for (int64_t lane = 0; lane < n; lane++) part[lane] = row[lane];
  return load(part);
}

// Columns from j on of a row of weights; a row of a product's left side.
inline void store_columns(float* row, int64_t j, int64_t, Vec weights) { store(row + j, weights); }
// The same for kPack rows of a left side that is transposed.
inline void store_rows(float* row, int64_t j, const Vec* weights) { store(row + j, weights[0]); }

// The elements of a slot.
struct Parts {
  Vec of[kPack];
};
inline Parts parts(Vec slots) { return {{slots}}; }

// What store_results() makes of them.
inline Vec rounded(Vec values) { return values; }

inline void store_results(Element* to, int64_t n, Vec values) {
  if (n >= kWidth) return store(to, values);
  float part[kWidth];
  store(part, values);
  for (int64_t lane = 0; lane < n; lane++) to[lane] = part[lane];
}

}  // namespace cin_fast::CIN_FAST_ISA
