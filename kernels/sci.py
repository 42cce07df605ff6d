"""``sci``: softmax(scale x x^T) v, forward and backward, without a C x C matrix in memory.

A program owns BM rows i of one image and a span of output columns, and meets all rows j in blocks
of BN. The forward pass keeps a running peak and sum (Milakov and Gimelshein 2018) and saves both:
their log-sum-exp would lose digits. The backward pass gathers a row block's whole gradient in
one sweep: a tile of x x^T gives P_ij and P_ji, so dS_ij and dS_ji, and nothing is scattered.
"""

import triton
import triton.language as tl

from cin_fast.kernels.tiles import (
    FAR,
    add_product,
    column_weights,
    exp,
    exponent_of,
    higher,
    load_delta,
    load_panel,
    load_row,
    peak_of,
    powers,
    product,
    row_weights,
    scaled,
    span_of,
    store_panel,
    through_softmax,
    zero_panel,
)


@triton.jit
def sci_forward(
    x, v, y, row_max, row_sum, scale,
    C: tl.constexpr, X: tl.constexpr, V: tl.constexpr, OUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """y_i = P_i v for a span of y's columns; the first span's program saves the rows' numbers."""
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * OUT.width
    x += image * C * X.pitch
    v += image * C * V.pitch
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    x_i = load_panel(x, i, 0, C, X, X)
    exponent = exponent_of(scale, x)
    peak = tl.full((BM,), FAR if NEGATIVE else -FAR, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    y_i = zero_panel(BM, OUT)
    for start in range(0, C, BN):
        j = start + tl.arange(0, BN)
        x_j = load_panel(x, j, 0, C, X, X)
        products = product(x_i, x, i, x_j, x, j, C, X, PRECISION)
        new = higher(peak, peak_of(products, j, C, NEGATIVE), NEGATIVE)
        kept = exp(peak - new, exponent)
        p = powers(products, exponent, new, j, C)
        total = total * kept + tl.sum(p, 1)
        v_j = span_of(x_j, v, j, first, C, V, OUT)
        y_i = add_product(scaled(y_i, kept), p, v_j, PRECISION)
        peak = new
    y += image * C * V.count
    store_panel(y, scaled(y_i, 1 / total), i, first, C, V.count, OUT)
    if tl.program_id(2) == 0:
        tl.store(row_max + image * C + i, peak, mask=i < C)
        tl.store(row_sum + image * C + i, total, mask=i < C)


@triton.jit
def row_numbers(
    x, row_max, row_sum, scale,
    C: tl.constexpr, X: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Each row's peak, the product x_i . x_j with its largest weight, and the sum beside it."""
    image = tl.program_id(1).to(tl.int64)
    x += image * C * X.pitch
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    x_i = load_panel(x, i, 0, C, X, X)
    exponent = exponent_of(scale, x)
    peak = tl.full((BM,), FAR if NEGATIVE else -FAR, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, C, BN):
        j = start + tl.arange(0, BN)
        x_j = load_panel(x, j, 0, C, X, X)
        products = product(x_i, x, i, x_j, x, j, C, X, PRECISION)
        new = higher(peak, peak_of(products, j, C, NEGATIVE), NEGATIVE)
        kept = exp(peak - new, exponent)
        total = total * kept + tl.sum(powers(products, exponent, new, j, C), 1)
        peak = new
    tl.store(row_max + image * C + i, peak, mask=i < C)
    tl.store(row_sum + image * C + i, total, mask=i < C)


@triton.jit
def sci_delta(
    dy, x, v, row_max, delta, scale,
    C: tl.constexpr, X: tl.constexpr, V: tl.constexpr, V_IS_X: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta_i = sum over j of P_ij dP_ij, in delta's dtype.

    It equals dY_i . Y_i, but from a rounded Y that is too coarse: where one weight is nearly 1,
    dP - delta is a small difference of large numbers.
    """
    image = tl.program_id(1).to(tl.int64)
    x += image * C * X.pitch
    v += image * C * V.pitch
    dy += image * C * V.pitch
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    x_i = load_panel(x, i, 0, C, X, X)
    dy_i = load_panel(dy, i, 0, C, V, V)
    exponent = exponent_of(scale, x)
    peak_i = load_row(row_max + image * C, i, C, 0.0)
    WIDE: tl.constexpr = delta.dtype.element_ty
    total = tl.zeros((BM,), WIDE)
    weighted = tl.zeros((BM,), WIDE)
    for start in range(0, C, BN):
        j = start + tl.arange(0, BN)
        x_j = load_panel(x, j, 0, C, X, X)
        v_j = x_j if V_IS_X else load_panel(v, j, 0, C, V, V)
        products = product(x_i, x, i, x_j, x, j, C, X, PRECISION)
        dp = product(dy_i, dy, i, v_j, v, j, C, V, PRECISION)
        e = powers(products, exponent, peak_i, j, C).to(WIDE)
        total += tl.sum(e, 1)
        weighted += tl.sum(e * dp.to(WIDE), 1)
    tl.store(delta + image * C + i, weighted / total, mask=i < C)


@triton.jit
def sci_backward(
    dy, x, v, row_max, row_sum, delta, dx, dv, scale,
    C: tl.constexpr, X: tl.constexpr, V: tl.constexpr, V_IS_X: tl.constexpr,
    OUT_X: tl.constexpr, OUT_V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A span of dx_i = scale (dS_ij + dS_ji) x_j, and one of dv_i = P_ji dy_j.

    Either may have no columns. With V_IS_X, dx holds both.
    """
    image = tl.program_id(1).to(tl.int64)
    first_x = tl.program_id(2) * OUT_X.width
    first_v = tl.program_id(2) * OUT_V.width
    x += image * C * X.pitch
    v += image * C * V.pitch
    dy += image * C * V.pitch
    row_max += image * C
    row_sum += image * C
    delta += image * C
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    x_i = load_panel(x, i, 0, C, X, X)
    v_i = x_i if V_IS_X else load_panel(v, i, 0, C, V, V)
    dy_i = load_panel(dy, i, 0, C, V, V)
    exponent = exponent_of(scale, x)
    peak_i = load_row(row_max, i, C, 0.0)
    factor_i = 1 / load_row(row_sum, i, C, 1.0)
    delta_i = load_delta(delta, i, C)
    dx_i = zero_panel(BM, OUT_X)
    dv_i = zero_panel(BM, OUT_V)
    for start in range(0, C, BN):
        j = start + tl.arange(0, BN)
        x_j = load_panel(x, j, 0, C, X, X)
        dy_j = load_panel(dy, j, 0, C, V, V)
        peak_j = load_row(row_max, j, C, 0.0)
        factor_j = 1 / load_row(row_sum, j, C, float("inf"))
        products = product(x_i, x, i, x_j, x, j, C, X, PRECISION)
        p_ji = column_weights(products, exponent, peak_j, factor_j)
        if len(OUT_X.pieces) > 0:
            v_j = x_j if V_IS_X else load_panel(v, j, 0, C, V, V)
            p_ij = row_weights(products, exponent, peak_i, factor_i, j, C)
            dp_ij = product(dy_i, dy, i, v_j, v, j, C, V, PRECISION)
            dp_ji = product(v_i, v, i, dy_j, dy, j, C, V, PRECISION)
            ds = through_softmax(p_ij, dp_ij, delta_i, 1)
            ds += through_softmax(p_ji, dp_ji, load_delta(delta, j, C), 0)
            columns = span_of(x_j, x, j, first_x, C, X, OUT_X)
            dx_i = add_product(dx_i, scale * ds, columns, PRECISION)
            if V_IS_X:
                columns = span_of(dy_j, dy, j, first_x, C, X, OUT_X)
                dx_i = add_product(dx_i, p_ji, columns, PRECISION)
        dv_i = add_product(dv_i, p_ji, span_of(dy_j, dy, j, first_v, C, V, OUT_V), PRECISION)
    store_panel(dx + image * C * X.count, dx_i, i, first_x, C, X.count, OUT_X)
    store_panel(dv + image * C * V.count, dv_i, i, first_v, C, V.count, OUT_V)
