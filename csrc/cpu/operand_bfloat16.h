// Products of bfloat16 operands by AVX512-BF16: a slot of 32 bits holds two numbers that follow one
// another along the depth of the product. Products are exact and added up in float32; what is
// denormal counts as 0. Included by kernels_avx512_bf16.cpp alone.

#pragma once

namespace cin_fast::CIN_FAST_ISA {

using Element = uint16_t;
constexpr int64_t kPack = 2;

inline __m512bh as_pairs(Vec slots) { return (__m512bh)slots; }
inline Vec as_slots(__m512i bits) { return _mm512_castsi512_ps(bits); }

// sum + a b, slot by slot.
inline Vec dot(Vec a, Vec b, Vec sum) { return _mm512_dpbf16_ps(sum, as_pairs(a), as_pairs(b)); }

// n numbers of a row in the lower halves of the slots, zeros beyond.
inline __m512i lower_halves(const Element* row, int64_t n) {
  const auto within = static_cast<__mmask16>(n >= kWidth ? 0xffff : n > 0 ? (1u << n) - 1 : 0);
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(within, row));
}

// n numbers of a row and of the one below it (null: zeros), zeros beyond.
inline Vec load_slots(const Element* row, const Element* below, int64_t n) {
  const __m512i lower = lower_halves(row, n);
  if (!below) return as_slots(lower);
  return as_slots(_mm512_or_si512(lower, _mm512_slli_epi32(lower_halves(below, n), 16)));
}

// Columns from j on of a row of weights, zeros from `cols` on; a row of a product's left side.
inline void store_columns(float* row, int64_t j, int64_t cols, Vec weights) {
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(first_lanes(cols - j, weights, splat(0)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + j / kPack), rounded);
}
// The same for kPack rows of a left side that is transposed.
inline void store_rows(float* row, int64_t j, const Vec* weights) {
  const __m512i lower = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(weights[0]));
  const __m512i upper = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(weights[1]));
  store(row + j, as_slots(_mm512_or_si512(lower, _mm512_slli_epi32(upper, 16))));
}

// The elements of a slot.
struct Parts {
  Vec of[kPack];
};
inline Parts parts(Vec slots) {
  const __m512i bits = _mm512_castps_si512(slots);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {{as_slots(_mm512_slli_epi32(bits, 16)), as_slots(_mm512_and_si512(bits, upper))}};
}

// What store_results() makes of them.
inline Vec rounded(Vec values) {
  const __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
  return as_slots(_mm512_slli_epi32(bits, 16));
}

inline void store_results(Element* to, int64_t n, Vec values) {
  const auto within = static_cast<__mmask16>(n >= kWidth ? 0xffff : (1u << n) - 1);
  _mm256_mask_storeu_epi16(to, within, (__m256i)_mm512_cvtneps_pbh(values));
}

}  // namespace cin_fast::CIN_FAST_ISA
