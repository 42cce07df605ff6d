// Vectors of 4 floats in the compiler's own notation, for any processor: SSE2, NEON, or scalars.

#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>

namespace cin_fast::CIN_FAST_ISA {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
constexpr int64_t kWidth = 4;
constexpr int kRows = 4;
constexpr int kVecs = 3;

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec splat(float x) { return Vec{x, x, x, x}; }
// One rounding: where no instruction does it, by way of double. That is slow, and as exact as the
// others.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  typedef double Wide __attribute__((vector_size(32)));
  Wide wide_a = __builtin_convertvector(a, Wide), wide_b = __builtin_convertvector(b, Wide);
  return __builtin_convertvector(wide_a * wide_b + __builtin_convertvector(c, Wide), Vec);
#endif
}
inline Vec select(Mask m, Vec a, Vec b) { return (Vec)((m & (Mask)a) | (~m & (Mask)b)); }
// NaN in a is dropped, NaN in b stays.
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }
inline Vec abs(Vec v) { return (Vec)((Mask)v & INT32_MAX); }
inline float sum_lanes(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float max_lanes(Vec v) {
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}

// a in the first n lanes, b in the others.
inline Vec first_lanes(int64_t n, Vec a, Vec b) {
  return select(Mask{0, 1, 2, 3} < static_cast<int32_t>(n), a, b);
}
inline Vec where_equal(Vec x, Vec y, Vec then, Vec otherwise) {
  return select(x == y, then, otherwise);
}
// sign(x) y for finite y, with sign(0) = 0 and sign(NaN) = NaN.
inline Vec sign_times(Vec x, Vec y) {
  const Vec signed_y = (Vec)((Mask)y ^ ((Mask)x & INT32_MIN));
  return where_equal(x, splat(0), splat(0), fma(x, splat(0), signed_y));
}

inline Vec round_to_integer(Vec x) {
  // Holds for |x| < 2^22, and exp asks for no more.
  const Vec magic = splat(12582912.0f);
  return (x + magic) - magic;
}
// p 2^n where x is not below limit (NaN included), else 0.
inline Vec scale_by_power(Vec p, Vec n, Vec x, Vec limit) {
  const Mask keep = ~(x < limit);
  const Vec usable = select(n == n, select(keep, n, splat(0)), splat(0));
  const Mask exponent = (__builtin_convertvector(usable, Mask) + 127) << 23;
  return (Vec)((Mask)(p * (Vec)exponent) & keep);
}

}  // namespace cin_fast::CIN_FAST_ISA
