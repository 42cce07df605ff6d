// The leaf kernels of one instruction set, and the choice among them when the extension runs.
//
// Legend: a tile is the part of a C x C matrix where row block I meets row block J: `rows` by
// `cols`, at a pitch of `ld` floats. A packed operand is cut into panels of one to three vectors:
//   by columns: panel[k][lane], lane = row of the source (a product's right side, or its left);
//   by rows:    panel[row][lane], lane = column of the source (a product's right side).
// Packed widths are padded with zeros to whole vectors. Arrays of one number a row or column are
// readable and writable up to whole vectors, too.
//
// An element is a float, or a bfloat16 where `pack` is 2. Packed operands consist of slots of 32
// bits: one float, or two bfloat16 that follow one another along the depth of the product, the last
// slot filled up with zero. Depths count elements. The left side of `multiply` is a tile whose rows
// hold slots; the left side of `multiply_transposed` a tile where the slots of `pack` rows stand in
// the first of them, so that its pitch is pack * ld. Sums are floats.

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
// rows and columns, its eta, what cci_delta adds to, and the tiles of sci's gradient where that is
// taken along, else null.
struct PairSide {
  float *s, *e, *f;
  RowStats row, col;
  float eta;
  float *row_delta, *col_delta, *row_deta;
  float *sci_e, *sci_f;
};

struct Kernels {
  // Floats in a vector.
  int64_t width;
  // Elements in a slot.
  int64_t pack;

  int64_t slots(int64_t depth) const { return (depth + pack - 1) / pack; }
  // `offset` elements further.
  const void* at(const void* elements, int64_t offset) const {
    return static_cast<const char*>(elements) + offset * element_bytes();
  }
  void* at(void* elements, int64_t offset) const {
    return static_cast<char*>(elements) + offset * element_bytes();
  }
  int64_t element_bytes() const { return static_cast<int64_t>(sizeof(float)) / pack; }

  void (*pack_columns)(const void* src, int64_t ld, int64_t rows, int64_t depth, float* dst);
  void (*pack_rows)(const void* src, int64_t ld, int64_t rows, int64_t cols, float* dst);

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
  // p = exp(s - row_max), a left side, added up over each row into row_sum, and as rounded for the
  // product into rounded_sum; p may be s. Null p or rounded_sum: not written.
  void (*exponentials)(const float* s, int64_t rows, int64_t cols, int64_t ld, const float* row_max,
                       float* p, float* row_sum, float* rounded_sum);
  // The same by columns, for the mirrored tile: q = exp(s - col_max), a left side transposed.
  void (*mirrored_exponentials)(const float* s, int64_t rows, int64_t cols, int64_t ld,
                                const float* col_max, float* q, float* col_sum, float* rounded_sum);
  // y = acc / sum, row by row (acc itself where sum is null), as elements. rest (unless null)
  // becomes what rounding to an element took off.
  void (*results)(const float* acc, int64_t ld, int64_t rows, int64_t cols, const float* sum,
                  void* y, void* rest);
  // The largest logit of each row of x_columns, found again from where it stands: the products are
  // added in gram's order, so that it is gram's number, bit for bit. argmax counts rows of x.
  void (*max_logits)(const float* x_columns, const void* x, const float* argmax, int64_t rows,
                     int64_t depth, float scale, float* row_max);
  // dY . r, of r = y + factor more (more may be null), in two parts: of use times row argmax of v,
  // bit for bit as gram makes it, and of the rest. dY = dy_columns, y and more are the block's
  // rows, v the image's. Where a weight is nearly 1, v's row is nearly r: use is 1 (or the weight's
  // sign) where one is above 1/2, else 0.
  void (*pivots)(const float* dy_columns, const void* v, const float* argmax, const float* use,
                 int64_t rows, int64_t depth, float* pivot);
  void (*deltas)(const float* dy_columns, const void* v, const void* y, const void* more,
                 float factor, const float* argmax, const float* use, int64_t rows, int64_t depth,
                 float* delta);
  // row_delta += row sums of P dP, col_delta (unless null) the same of the mirrored tile, from the
  // tiles named below.
  void (*sci_delta)(const float* s, const float* e, const float* f, int64_t rows, int64_t cols,
                    int64_t ld, float scale, RowStats row, RowStats col, float* row_delta,
                    float* col_delta);
  // From s = G, e = dP and f = (dP of the mirrored tile)^T: s becomes scale (dS + dS^T), a left
  // side both as it is and transposed (see across); e the weights P, a left side transposed; f the
  // mirrored weights, a left side.
  void (*sci_gradient)(float* s, float* e, float* f, int64_t rows, int64_t cols, int64_t ld,
                       float scale, RowStats row, RowStats col);
  // For M = P_own - eta P_other of a tile: a = |M|, b = sign(M) P_other. `mirrored`: the same of
  // the mirrored tile. Left sides, transposed if mirrored.
  void (*cci_weights)(const float* own, const float* other, RowStats own_stats,
                      RowStats other_stats, bool mirrored, float eta, int64_t rows, int64_t cols,
                      int64_t ld, float scale, float* a, float* b);
  // As sci_delta, for both images of a pair. row_deta += row sums of dM P_other, of both
  // tiles. Null col_delta: the tile has no mirror image.
  void (*cci_delta)(const PairSide& a, const PairSide& b, int64_t rows, int64_t cols, int64_t ld,
                    float scale);
  // As sci_gradient: of both images, s becomes scale (dS + dS^T), e the weights |M| and f the
  // mirrored |M|; sci_e and sci_f add to dP and become P and its mirror image. a and b may be the
  // same image.
  void (*cci_gradient)(const PairSide& a, const PairSide& b, int64_t rows, int64_t cols, int64_t ld,
                       float scale);
  // Products of a (rows, depth), with few rows, and w (outputs, depth), floats at pitch ld:
  // y += a w^T, da += dy w, dw = dy^T a.
  void (*thin_forward)(const float* a, const float* w, int64_t ld, int64_t rows, int64_t outputs,
                       int64_t depth, float* y, int64_t ldy);
  void (*thin_input)(const float* dy, int64_t ldy, const float* w, int64_t ld, int64_t rows,
                     int64_t outputs, int64_t depth, float* da, int64_t ldda);
  void (*thin_weight)(const float* dy, int64_t ldy, const float* a, int64_t ld, int64_t rows,
                      int64_t outputs, int64_t depth, float* dw);
  // Where the gradients of a tile leave s as a left side transposed: in s itself, or, if slots hold
  // two rows, in the rows of e that they leave free.
  const float* across(const float* s, const float* e, int64_t ld) const {
    return pack == 1 ? s : e + ld;
  }
};

const Kernels& plain_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();

// The best that this processor runs; CIN_FAST_CPU_ISA = plain, avx2, avx512 or avx512_bf16 forces
// one. Those of avx512_bf16 multiply in bfloat16, and are chosen where `bfloat16` says that this
// will do; all others compute in float32.
const Kernels& kernels(bool bfloat16);

}  // namespace cin_fast
