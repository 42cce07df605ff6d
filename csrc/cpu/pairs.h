// What happens to the tiles of two paired images in cci.

#pragma once

#include "rows.h"

namespace cin_fast::CIN_FAST_ISA {

inline void cci_weights(const float* own, const float* other, RowStats own_stats,
                        RowStats other_stats, bool mirrored, float eta, int64_t rows, int64_t cols,
                        int64_t ld, float scale, float* a, float* b) {
  const auto weight_of = [&](const float* s, RowStats stats, int64_t r, int64_t j) {
    const Vec t = load(s + r * ld + j) * splat(scale);
    return mirrored ? col_weight(t, stats, j) : row_weight(t, stats, r);
  };
  for (int64_t r = 0; r < rows; r += kPack) {
    for (int64_t j = 0; j < cols; j += kWidth) {
      Vec weights[kPack], signed_weights[kPack];
      for (int64_t n = 0; n < kPack; n++) {
        weights[n] = signed_weights[n] = splat(0);
        if (r + n == rows) break;
        const Vec p = weight_of(own, own_stats, r + n, j);
        const Vec q = weight_of(other, other_stats, r + n, j);
        const Vec m = p - splat(eta) * q;
        weights[n] = abs(m);
        signed_weights[n] = sign_times(m, q);
        if (mirrored) continue;
        store_columns(a + (r + n) * ld, j, cols, weights[n]);
        store_columns(b + (r + n) * ld, j, cols, signed_weights[n]);
      }
      if (!mirrored) continue;
      store_rows(a + r * ld, j, weights);
      store_rows(b + r * ld, j, signed_weights);
    }
  }
}

// Of one direction (a tile, or its mirror image) at one vector: both images' weights P, M, and the
// gradient of their weights dP = sign(M) dY V^T - eta_other sign(M_other) dY_other V_other^T, to
// which sci adds its own.
struct PairGradient {
  Vec p_a, p_b, m_a, m_b, dm_a, dm_b, dp_a, dp_b;
};
inline PairGradient pair_gradient(Vec p_a, Vec p_b, Vec e_a, Vec e_b, float eta_a, float eta_b) {
  PairGradient g{p_a, p_b, p_a - splat(eta_a) * p_b, p_b - splat(eta_b) * p_a, {}, {}, {}, {}};
  g.dm_a = sign_times(g.m_a, e_a);
  g.dm_b = sign_times(g.m_b, e_b);
  g.dp_a = g.dm_a - splat(eta_b) * g.dm_b;
  g.dp_b = g.dm_b - splat(eta_a) * g.dm_a;
  return g;
}

inline void add_sci(PairGradient& g, Vec dp_a, Vec dp_b) {
  g.dp_a = g.dp_a + dp_a;
  g.dp_b = g.dp_b + dp_b;
}

struct BothDirections {
  PairGradient straight, mirrored;
};
template <bool kWithSci>
inline BothDirections both_directions(const PairSide& a, const PairSide& b, int64_t ld, float scale,
                                      int64_t r, int64_t j) {
  const int64_t at = r * ld + j;
  const Weights w_a = weights(load(a.s + at) * splat(scale), a.row, a.col, r, j);
  const Weights w_b = weights(load(b.s + at) * splat(scale), b.row, b.col, r, j);
  BothDirections g{pair_gradient(w_a.p, w_b.p, load(a.e + at), load(b.e + at), a.eta, b.eta),
                   pair_gradient(w_a.q, w_b.q, load(a.f + at), load(b.f + at), a.eta, b.eta)};
  if constexpr (kWithSci) {
    add_sci(g.straight, load(a.sci_e + at), load(b.sci_e + at));
    add_sci(g.mirrored, load(a.sci_f + at), load(b.sci_f + at));
  }
  return g;
}

// Sums over a tile's rows in the making, of one image: delta straight and mirrored, deta.
struct PairSums {
  Vec row_delta[kRowsOfSum], row_deta[kRowsOfSum];
  Vec col_delta;
};

template <bool kWithSci>
inline void add_delta(const PairSide& a, const PairSide& b, int64_t rows, int64_t cols, int64_t ld,
                      float scale) {
  const PairSide* sides[2] = {&a, &b};
  const int64_t images = a.s == b.s ? 1 : 2;
  for (int64_t first = 0; first < rows; first += kRowsOfSum) {
    const int64_t n = rows - first < kRowsOfSum ? rows - first : kRowsOfSum;
    PairSums sums[2];
    for (PairSums& side : sums)
      for (int64_t r = 0; r < n; r++) side.row_delta[r] = side.row_deta[r] = splat(0);
    for (int64_t j = 0; j < cols; j += kWidth) {
      const auto within = [&](Vec v) { return first_lanes(cols - j, v, splat(0)); };
      sums[0].col_delta = sums[1].col_delta = splat(0);
      for (int64_t r = 0; r < n; r++) {
        const BothDirections g = both_directions<kWithSci>(a, b, ld, scale, first + r, j);
        const auto add = [&](PairSums& to, const PairSide& side, Vec p, Vec dp, Vec deta, Vec q,
                             Vec dq, Vec mirrored_deta) {
          const Vec pivot = splat(side.row.pivot[first + r]);
          to.row_delta[r] = to.row_delta[r] + within(p * (dp - pivot));
          to.row_deta[r] = to.row_deta[r] + within(side.col_delta ? deta + mirrored_deta : deta);
          to.col_delta = to.col_delta + q * (dq - load(side.col.pivot + j));
        };
        const PairGradient &s = g.straight, &m = g.mirrored;
        add(sums[0], a, s.p_a, s.dp_a, s.dm_a * s.p_b, m.p_a, m.dp_a, m.dm_a * m.p_b);
        add(sums[1], b, s.p_b, s.dp_b, s.dm_b * s.p_a, m.p_b, m.dp_b, m.dm_b * m.p_a);
      }
      for (int64_t side = 0; side < images; side++) {
        float* col_delta = sides[side]->col_delta;
        if (col_delta) store(col_delta + j, load(col_delta + j) + sums[side].col_delta);
      }
    }
    for (int64_t side = 0; side < images; side++) {
      for (int64_t r = 0; r < n; r++) {
        sides[side]->row_delta[first + r] += sum_lanes(sums[side].row_delta[r]);
        sides[side]->row_deta[first + r] += sum_lanes(sums[side].row_deta[r]);
      }
    }
  }
}

inline void cci_delta(const PairSide& a, const PairSide& b, int64_t rows, int64_t cols, int64_t ld,
                      float scale) {
  if (a.sci_e) return add_delta<true>(a, b, rows, cols, ld, scale);
  add_delta<false>(a, b, rows, cols, ld, scale);
}

// sci's weights where the products look for them.
inline void store_sci(const Gradient* g, int64_t r, int64_t j, int64_t cols, int64_t ld, float* e,
                      float* f) {
  Vec across[kPack];
  for (int64_t n = 0; n < kPack; n++) {
    store_columns(f + (r + n) * ld, j, cols, g[n].q);
    across[n] = g[n].p;
  }
  store_rows(e + r * ld, j, across);
}

template <bool kWithSci>
inline void gradients_of_pair(const PairSide& a, const PairSide& b, int64_t rows, int64_t cols,
                              int64_t ld, float scale) {
  const auto gradient = [&](const PairSide& side, int64_t r, int64_t j, Vec p, Vec dp, Vec m, Vec q,
                            Vec dq, Vec mirrored_m) {
    const Vec ds = softmax_gradient(p, dp, splat(side.row.pivot[r]), splat(side.row.delta[r]));
    const Vec mirrored_ds =
        softmax_gradient(q, dq, load(side.col.pivot + j), load(side.col.delta + j));
    return Gradient{(ds + mirrored_ds) * splat(scale), abs(m), abs(mirrored_m)};
  };
  for (int64_t r = 0; r < rows; r += kPack) {
    for (int64_t j = 0; j < cols; j += kWidth) {
      Gradient of_a[kPack], of_b[kPack], sci_a[kPack], sci_b[kPack];
      for (int64_t n = 0; n < kPack; n++) {
        of_a[n] = of_b[n] = sci_a[n] = sci_b[n] = Gradient{splat(0), splat(0), splat(0)};
        if (r + n == rows) break;
        const auto [straight, back] = both_directions<kWithSci>(a, b, ld, scale, r + n, j);
        of_a[n] = gradient(a, r + n, j, straight.p_a, straight.dp_a, straight.m_a, back.p_a,
                           back.dp_a, back.m_a);
        of_b[n] = gradient(b, r + n, j, straight.p_b, straight.dp_b, straight.m_b, back.p_b,
                           back.dp_b, back.m_b);
        sci_a[n] = {splat(0), straight.p_a, back.p_a};
        sci_b[n] = {splat(0), straight.p_b, back.p_b};
      }
      store_gradients(of_a, r, j, cols, ld, a.s, a.e, a.f);
      store_gradients(of_b, r, j, cols, ld, b.s, b.e, b.f);
      if constexpr (kWithSci) {
        store_sci(sci_a, r, j, cols, ld, a.sci_e, a.sci_f);
        store_sci(sci_b, r, j, cols, ld, b.sci_e, b.sci_f);
      }
    }
  }
}

inline void cci_gradient(const PairSide& a, const PairSide& b, int64_t rows, int64_t cols,
                         int64_t ld, float scale) {
  if (a.sci_e) return gradients_of_pair<true>(a, b, rows, cols, ld, scale);
  gradients_of_pair<false>(a, b, rows, cols, ld, scale);
}

}  // namespace cin_fast::CIN_FAST_ISA
