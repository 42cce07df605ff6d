// Vectors of 16 floats.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace cin_fast::CIN_FAST_ISA {

using Vec = __m512;
constexpr int64_t kWidth = 16;
// A register tile: kRows rows by up to kVecs vectors, 24 of the 32 registers.
constexpr int kRows = 8;
constexpr int kVecs = 3;

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// NaN in a is dropped, NaN in b stays.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float sum_lanes(Vec v) { return _mm512_reduce_add_ps(v); }
inline float max_lanes(Vec v) { return _mm512_reduce_max_ps(v); }
inline Vec abs(Vec v) { return _mm512_abs_ps(v); }

// a in the first n lanes, b in the others.
inline Vec first_lanes(int64_t n, Vec a, Vec b) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(n < kWidth ? (1u << n) - 1 : 0xffff), b, a);
}
inline Vec where_equal(Vec x, Vec y, Vec then, Vec otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ), otherwise, then);
}
// sign(x) y for finite y, with sign(0) = 0 and sign(NaN) = NaN.
inline Vec sign_times(Vec x, Vec y) {
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN));
  const Vec signed_y = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(y), sign));
  return where_equal(x, splat(0), splat(0), fma(x, splat(0), signed_y));
}

inline Vec round_to_integer(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// p 2^n where x is not below limit (NaN included), else 0.
inline Vec scale_by_power(Vec p, Vec n, Vec x, Vec limit) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), p, n);
}

}  // namespace cin_fast::CIN_FAST_ISA
