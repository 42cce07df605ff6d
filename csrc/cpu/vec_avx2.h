// Vectors of 8 floats. Included by kernels_avx2.cpp alone.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace cin_fast::CIN_FAST_ISA {

using Vec = __m256;
constexpr int64_t kWidth = 8;
// A register tile: kRows rows by up to kVecs vectors, 12 of the 16 registers.
constexpr int kRows = 4;
constexpr int kVecs = 3;

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// NaN in a is dropped, NaN in b stays.
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec abs(Vec v) { return _mm256_andnot_ps(splat(-0.0f), v); }

inline float sum_lanes(Vec v) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline float max_lanes(Vec v) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}

// a in the first n lanes, b in the others.
inline Vec first_lanes(int64_t n, Vec a, Vec b) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(keep));
}
inline Vec where_equal(Vec x, Vec y, Vec then, Vec otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(x, y, _CMP_EQ_OQ));
}
// sign(x) y for finite y, with sign(0) = 0 and sign(NaN) = NaN.
inline Vec sign_times(Vec x, Vec y) {
  const Vec signed_y = _mm256_xor_ps(y, _mm256_and_ps(x, splat(-0.0f)));
  return where_equal(x, splat(0), splat(0), fma(x, splat(0), signed_y));
}

inline Vec round_to_integer(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// p 2^n where x is not below limit (NaN included), else 0.
inline Vec scale_by_power(Vec p, Vec n, Vec x, Vec limit) {
  const __m256i exponent =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const Vec scaled = _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
  return _mm256_and_ps(scaled, _mm256_cmp_ps(x, limit, _CMP_NLT_UQ));
}

}  // namespace cin_fast::CIN_FAST_ISA
