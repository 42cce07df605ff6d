// The leaf kernels of one instruction set, and the choice among them when the extension runs.
//
// Legend: a tile is the part of a C x C matrix where row block I meets row block J: `rows` by
// `cols`, at a pitch of `ld` floats. A packed operand is cut into panels of one to three vectors:
//   by columns: panel[k][lane], lane = row of the source (a product's right side, or its left);
//   by rows:    panel[row][lane], lane = column of the source (a product's right side).
// Packed widths are padded with zeros to whole vectors. Arrays of one number a row or column are
// readable and writable up to whole vectors, too.

#pragma once

#include <cstdint>

namespace cin_fast {

// What a row block brings to a tile when weights are made again: its rows' softmax maximum, the
// reciprocal of the softmax sum as a number and the rest that its rounding left, and in two parts
// the number delta that the softmax takes off dP. `pivot` is dP at the row's largest weight and
// delta the rest: where one weight is nearly 1, dP - pivot - delta then loses no digits.
struct RowStats {
  const float* max;
  const float* share;
  const float* share_rest;
  const float* pivot;
  const float* delta;
};

// One image's part of a tile in cci: its tiles (see cci_gradient), its statistics for the tile's
// rows and columns, its eta, and what cci_delta adds to.
struct PairSide {
  float *s, *e, *f;
  RowStats row, col;
  float eta;
  float *row_delta, *col_delta, *row_deta;
};

struct Kernels {
  const char* name;
  // Floats in a vector.
  int64_t width;

  void (*pack_columns)(const float* src, int64_t ld, int64_t rows, int64_t depth, float* dst);
  void (*pack_rows)(const float* src, int64_t ld, int64_t rows, int64_t cols, float* dst);

  // c = a b^T, both packed by columns.
  void (*gram)(const float* a, const float* b, int64_t rows, int64_t cols, int64_t depth, float* c,
               int64_t ldc);
  // c (+)= a b, with b packed by rows; a is (rows, depth), or its transpose where so named.
  void (*multiply)(const float* a, int64_t lda, const float* b, int64_t rows, int64_t cols,
                   int64_t depth, float* c, int64_t ldc, bool add);
  void (*multiply_transposed)(const float* a, int64_t lda, const float* b, int64_t rows,
                              int64_t cols, int64_t depth, float* c, int64_t ldc, bool add);

  // s *= scale; the largest of each row and column. Padding becomes -inf.
  void (*scale_and_max)(float* s, int64_t rows, int64_t cols, int64_t ld, float scale,
                        float* row_max, float* col_max);
  // max and sum, so far, meet the maxima of the rows of tile s, or of its columns if `transposed`;
  // argmax learns where a new maximum stands, `offset` being the tile's first column (row). What
  // was gathered under the old maximum shrinks by `factor`. `first`: nothing was gathered yet.
  void (*merge_max)(const float* s, int64_t rows, int64_t cols, int64_t ld, bool transposed,
                    const float* tile_max, int64_t offset, bool first, float* max, float* argmax,
                    float* sum, float* factor);
  // Rows of acc times factor, where it is not 1.
  void (*rescale)(float* acc, int64_t rows, int64_t cols, int64_t ld, const float* factor);
  // p = exp(s - row_max), added up over each row into row_sum; p may be s. Null p: not written.
  void (*exponentials)(const float* s, int64_t rows, int64_t cols, int64_t ld, const float* row_max,
                       float* p, float* row_sum);
  // The same by columns, for the mirrored tile: q = exp(s - col_max), col_sum.
  void (*mirrored_exponentials)(const float* s, int64_t rows, int64_t cols, int64_t ld,
                                const float* col_max, float* q, float* col_sum);
  // y = acc / sum, row by row.
  void (*normalize)(const float* acc, int64_t ld, int64_t rows, int64_t cols, const float* sum,
                    float* y);
  // The largest logit of each row of x_columns, found again from where it stands: the products are
  // added in gram's order, so that it is gram's number, bit for bit. argmax counts rows of x.
  void (*max_logits)(const float* x_columns, const float* x, const float* argmax, int64_t rows,
                     int64_t depth, float scale, float* row_max);
  // dY . r in two parts, of r = y + eta b (b may be null): pivot, of use times row argmax of v, and
  // delta, of the rest. dY = dy_columns, y and b are the block's rows, v the image's. Where a
  // weight is nearly 1, v's row is nearly r: use is 1 (or the weight's sign) where one is above
  // 1/2, else 0.
  void (*pivots)(const float* dy_columns, const float* v, const float* y, const float* b, float eta,
                 const float* argmax, const float* use, int64_t rows, int64_t depth, float* pivot,
                 float* delta);
  // row_delta += row sums of P dP, col_delta (unless null) the same of the mirrored tile, from the
  // tiles named below.
  void (*sci_delta)(const float* s, const float* e, const float* f, int64_t rows, int64_t cols,
                    int64_t ld, float scale, RowStats row, RowStats col, float* row_delta,
                    float* col_delta);
  // From s = G, e = dP and f = (dP of the mirrored tile)^T: s becomes scale (dS + dS^T), e the
  // weights P, f the mirrored weights.
  void (*sci_gradient)(float* s, float* e, float* f, int64_t rows, int64_t cols, int64_t ld,
                       float scale, RowStats row, RowStats col);
  // For M = P_own - eta P_other of a tile: a = |M|, b = sign(M) P_other. `mirrored`: the same of
  // the mirrored tile, transposed.
  void (*cci_weights)(const float* own, const float* other, RowStats own_stats,
                      RowStats other_stats, bool mirrored, float eta, int64_t rows, int64_t cols,
                      int64_t ld, float scale, float* a, float* b);
  // As sci_delta, for both images of a pair. row_deta += row sums of dM P_other, of both
  // tiles. Null col_delta: the tile has no mirror image.
  void (*cci_delta)(const PairSide& a, const PairSide& b, int64_t rows, int64_t cols, int64_t ld,
                    float scale);
  // As sci_gradient: of both images, s becomes scale (dS + dS^T), e the weights |M| and f the
  // mirrored |M|. a and b may be the same image.
  void (*cci_gradient)(const PairSide& a, const PairSide& b, int64_t rows, int64_t cols, int64_t ld,
                       float scale);
};

const Kernels& plain_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// The best that this processor runs; CIN_FAST_CPU_ISA = plain, avx2 or avx512 forces one.
const Kernels& kernels();

}  // namespace cin_fast
