// exp of a vector, for softmax weights: arguments of at most about 0.

#pragma once

namespace cin_fast::CIN_FAST_ISA {

// Within one unit in the last place of float32 for x in (-87.3, 1); 0 below, so that no weight is
// denormal (they are slow); NaN for NaN.
inline Vec exp(Vec x) {
  const Vec n = round_to_integer(x * splat(1.442695041f));
  // ln 2 in two parts: the first has so few bits that n times it is exact.
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  // Minimax on [-ln 2 / 2, ln 2 / 2]: relative error 4e-9.
  Vec p = splat(1.386375678e-3f);
  p = fma(p, r, splat(8.367509211e-3f));
  p = fma(p, r, splat(4.166723877e-2f));
  p = fma(p, r, splat(1.666653380e-1f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return scale_by_power(p, n, x, splat(-87.33654f));
}

}  // namespace cin_fast::CIN_FAST_ISA
