"""``cci``: |P_a - eta_a P_b| v_a for both images of a pair, forward and backward.

A program owns the same rows i of an image a and of its partner b, since each needs the other's
weights: M_a = P_a - eta_a P_b, sigma_a = sign(M_a), y_a = |M_a| v_a. partner is an involution, so
image a collects its own role and its role as a partner in one place and nothing is scattered. Where
registers allow, a program makes the results of both; the program of the second image then ends at
once, and an image that is its own partner writes the same twice. As in sci.py, a tile of x x^T
serves the rows i and, transposed, the rows j.
"""

import triton
import triton.language as tl

from cin_fast.kernels.tiles import (
    add_product,
    column_weights,
    exponent_of,
    load_delta,
    load_panel,
    load_row,
    product,
    row_weights,
    sign,
    span_of,
    store_panel,
    through_softmax,
    zero_panel,
)


@triton.jit
def cci_forward(
    x, v, partner, eta, row_max, row_sum, y, scale,
    C: tl.constexpr, X: tl.constexpr, V: tl.constexpr, OUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of both images of a pair, for a span of its columns."""
    one = tl.program_id(1).to(tl.int64)
    two = tl.load(partner + one)
    if two < one:
        return
    first = tl.program_id(2) * OUT.width
    eta_1, eta_2 = tl.load(eta + one), tl.load(eta + two)
    exponent = exponent_of(scale, x)
    x_1, x_2 = x + one * C * X.pitch, x + two * C * X.pitch
    v_1, v_2 = v + one * C * V.pitch, v + two * C * V.pitch
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    x_1i, x_2i = load_panel(x_1, i, 0, C, X, X), load_panel(x_2, i, 0, C, X, X)
    peak_1, peak_2 = load_row(row_max + one * C, i, C, 0.0), load_row(row_max + two * C, i, C, 0.0)
    factor_1 = 1 / load_row(row_sum + one * C, i, C, 1.0)
    factor_2 = 1 / load_row(row_sum + two * C, i, C, 1.0)
    y_1, y_2 = zero_panel(BM, OUT), zero_panel(BM, OUT)
    for start in range(0, C, BN):
        j = start + tl.arange(0, BN)
        x_1j, x_2j = load_panel(x_1, j, 0, C, X, X), load_panel(x_2, j, 0, C, X, X)
        products_1 = product(x_1i, x_1, i, x_1j, x_1, j, C, X, PRECISION)
        products_2 = product(x_2i, x_2, i, x_2j, x_2, j, C, X, PRECISION)
        p_1 = row_weights(products_1, exponent, peak_1, factor_1, j, C)
        p_2 = row_weights(products_2, exponent, peak_2, factor_2, j, C)
        v_1j = span_of(x_1j, v_1, j, first, C, V, OUT)
        v_2j = span_of(x_2j, v_2, j, first, C, V, OUT)
        y_1 = add_product(y_1, tl.abs(p_1 - eta_1 * p_2), v_1j, PRECISION)
        y_2 = add_product(y_2, tl.abs(p_2 - eta_2 * p_1), v_2j, PRECISION)
    store_panel(y + one * C * V.count, y_1, i, first, C, V.count, OUT)
    store_panel(y + two * C * V.count, y_2, i, first, C, V.count, OUT)


@triton.jit
def weight_gradients(p_1, p_2, dp_1, dp_2, eta_1, eta_2):
    """Gradients of P_1, P_2, eta_1 and eta_2 (not yet summed), where dp is dy v^T.

    dM = sigma dp; P_1 is in M_1 and, times -eta_2, in M_2; eta_1 is in M_1, times -P_2.
    """
    dm_1 = sign(p_1 - eta_1 * p_2) * dp_1
    dm_2 = sign(p_2 - eta_2 * p_1) * dp_2
    return dm_1 - eta_2 * dm_2, dm_2 - eta_1 * dm_1, -dm_1 * p_2, -dm_2 * p_1


@triton.jit
def cci_delta(
    dy, x, v, partner, eta, row_max, row_sum, delta, deta, scale,
    C: tl.constexpr, X: tl.constexpr, V: tl.constexpr, V_IS_X: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a pair: delta_i = sum over j of P_ij dP_ij, and what each row gives to d eta.

    dY . (Y + eta b) and dY . b would give the same sums, but too coarsely: see sci_delta.
    """
    one = tl.program_id(1).to(tl.int64)
    two = tl.load(partner + one)
    if two < one:
        return
    eta_1, eta_2 = tl.load(eta + one), tl.load(eta + two)
    exponent = exponent_of(scale, x)
    x_1, x_2 = x + one * C * X.pitch, x + two * C * X.pitch
    v_1, v_2 = v + one * C * V.pitch, v + two * C * V.pitch
    dy_1, dy_2 = dy + one * C * V.pitch, dy + two * C * V.pitch
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    x_1i, x_2i = load_panel(x_1, i, 0, C, X, X), load_panel(x_2, i, 0, C, X, X)
    dy_1i, dy_2i = load_panel(dy_1, i, 0, C, V, V), load_panel(dy_2, i, 0, C, V, V)
    peak_1, peak_2 = load_row(row_max + one * C, i, C, 0.0), load_row(row_max + two * C, i, C, 0.0)
    factor_1 = 1 / load_row(row_sum + one * C, i, C, 1.0)
    factor_2 = 1 / load_row(row_sum + two * C, i, C, 1.0)
    WIDE: tl.constexpr = delta.dtype.element_ty
    sum_1, sum_2 = tl.zeros((BM,), WIDE), tl.zeros((BM,), WIDE)
    delta_1, delta_2 = tl.zeros((BM,), WIDE), tl.zeros((BM,), WIDE)
    deta_1, deta_2 = tl.zeros((BM,), WIDE), tl.zeros((BM,), WIDE)
    for start in range(0, C, BN):
        j = start + tl.arange(0, BN)
        x_1j, x_2j = load_panel(x_1, j, 0, C, X, X), load_panel(x_2, j, 0, C, X, X)
        v_1j = x_1j if V_IS_X else load_panel(v_1, j, 0, C, V, V)
        v_2j = x_2j if V_IS_X else load_panel(v_2, j, 0, C, V, V)
        products_1 = product(x_1i, x_1, i, x_1j, x_1, j, C, X, PRECISION)
        products_2 = product(x_2i, x_2, i, x_2j, x_2, j, C, X, PRECISION)
        p_1 = row_weights(products_1, exponent, peak_1, factor_1, j, C)
        p_2 = row_weights(products_2, exponent, peak_2, factor_2, j, C)
        dp_1, dp_2, part_1, part_2 = weight_gradients(
            p_1, p_2,
            product(dy_1i, dy_1, i, v_1j, v_1, j, C, V, PRECISION),
            product(dy_2i, dy_2, i, v_2j, v_2, j, C, V, PRECISION),
            eta_1, eta_2,
        )  # fmt: skip
        sum_1 += tl.sum(p_1.to(WIDE), 1)
        sum_2 += tl.sum(p_2.to(WIDE), 1)
        delta_1 += tl.sum(p_1.to(WIDE) * dp_1.to(WIDE), 1)
        delta_2 += tl.sum(p_2.to(WIDE) * dp_2.to(WIDE), 1)
        deta_1 += tl.sum(part_1.to(WIDE), 1)
        deta_2 += tl.sum(part_2.to(WIDE), 1)
    # Dividing by the sums of weights, nearly 1, takes the rounding of row_sum away.
    tl.store(delta + one * C + i, delta_1 / sum_1, mask=i < C)
    tl.store(delta + two * C + i, delta_2 / sum_2, mask=i < C)
    tl.store(deta + one * C + i, deta_1 / sum_2, mask=i < C)
    tl.store(deta + two * C + i, deta_2 / sum_1, mask=i < C)


@triton.jit
def cci_backward(
    dy, x, v, partner, eta, row_max, row_sum, delta, dx, dv, scale,
    C: tl.constexpr, X: tl.constexpr, V: tl.constexpr, V_IS_X: tl.constexpr,
    OUT_X: tl.constexpr, OUT_V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one image: a span of dx_i = scale (dS_ij + dS_ji) x_j, and one of dv_i = |M_ji| dy_j.

    Either may have no columns. With V_IS_X, dx holds both. Its partner has a program of its own,
    which computes the same weights again: the sums of both images do not fit into registers.
    """
    one = tl.program_id(1).to(tl.int64)
    two = tl.load(partner + one)
    first_x = tl.program_id(2) * OUT_X.width
    first_v = tl.program_id(2) * OUT_V.width
    eta_1, eta_2 = tl.load(eta + one), tl.load(eta + two)
    exponent = exponent_of(scale, x)
    x_1, x_2 = x + one * C * X.pitch, x + two * C * X.pitch
    v_1, v_2 = v + one * C * V.pitch, v + two * C * V.pitch
    dy_1, dy_2 = dy + one * C * V.pitch, dy + two * C * V.pitch
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    x_1i, x_2i = load_panel(x_1, i, 0, C, X, X), load_panel(x_2, i, 0, C, X, X)
    dy_1i, dy_2i = load_panel(dy_1, i, 0, C, V, V), load_panel(dy_2, i, 0, C, V, V)
    v_1i = x_1i if V_IS_X else load_panel(v_1, i, 0, C, V, V)
    v_2i = x_2i if V_IS_X else load_panel(v_2, i, 0, C, V, V)
    peak_1i = load_row(row_max + one * C, i, C, 0.0)
    peak_2i = load_row(row_max + two * C, i, C, 0.0)
    factor_1i = 1 / load_row(row_sum + one * C, i, C, 1.0)
    factor_2i = 1 / load_row(row_sum + two * C, i, C, 1.0)
    delta_1i = load_delta(delta + one * C, i, C)
    dx_1, dv_1 = zero_panel(BM, OUT_X), zero_panel(BM, OUT_V)
    for start in range(0, C, BN):
        j = start + tl.arange(0, BN)
        x_1j, x_2j = load_panel(x_1, j, 0, C, X, X), load_panel(x_2, j, 0, C, X, X)
        dy_1j, dy_2j = load_panel(dy_1, j, 0, C, V, V), load_panel(dy_2, j, 0, C, V, V)
        products_1 = product(x_1i, x_1, i, x_1j, x_1, j, C, X, PRECISION)
        products_2 = product(x_2i, x_2, i, x_2j, x_2, j, C, X, PRECISION)
        peak_1j = load_row(row_max + one * C, j, C, 0.0)
        peak_2j = load_row(row_max + two * C, j, C, 0.0)
        factor_1j = 1 / load_row(row_sum + one * C, j, C, float("inf"))
        factor_2j = 1 / load_row(row_sum + two * C, j, C, float("inf"))
        p_1ji = column_weights(products_1, exponent, peak_1j, factor_1j)
        p_2ji = column_weights(products_2, exponent, peak_2j, factor_2j)
        m_1ji = tl.abs(p_1ji - eta_1 * p_2ji)
        dv_1 = add_product(dv_1, m_1ji, span_of(dy_1j, dy_1, j, first_v, C, V, OUT_V), PRECISION)
        # The columns' part is over before the rows' begins: registers hold one at a time.
        if len(OUT_X.pieces) > 0:
            if V_IS_X:
                dx_1 = add_product(
                    dx_1, m_1ji, span_of(dy_1j, dy_1, j, first_x, C, X, OUT_X), PRECISION
                )
            # dS_ji, from the numbers of rows j.
            dp_1, _, _, _ = weight_gradients(
                p_1ji, p_2ji,
                product(v_1i, v_1, i, dy_1j, dy_1, j, C, V, PRECISION),
                product(v_2i, v_2, i, dy_2j, dy_2, j, C, V, PRECISION),
                eta_1, eta_2,
            )  # fmt: skip
            ds_1 = through_softmax(p_1ji, dp_1, load_delta(delta + one * C, j, C), 0)
            # dS_ij, from those of rows i.
            v_1j = x_1j if V_IS_X else load_panel(v_1, j, 0, C, V, V)
            v_2j = x_2j if V_IS_X else load_panel(v_2, j, 0, C, V, V)
            p_1 = row_weights(products_1, exponent, peak_1i, factor_1i, j, C)
            p_2 = row_weights(products_2, exponent, peak_2i, factor_2i, j, C)
            dp_1, _, _, _ = weight_gradients(
                p_1, p_2,
                product(dy_1i, dy_1, i, v_1j, v_1, j, C, V, PRECISION),
                product(dy_2i, dy_2, i, v_2j, v_2, j, C, V, PRECISION),
                eta_1, eta_2,
            )  # fmt: skip
            ds_1 += through_softmax(p_1, dp_1, delta_1i, 1)
            dx_1 = add_product(
                dx_1, scale * ds_1, span_of(x_1j, x_1, j, first_x, C, X, OUT_X), PRECISION
            )
    store_panel(dx + one * C * X.count, dx_1, i, first_x, C, X.count, OUT_X)
    store_panel(dv + one * C * V.count, dv_1, i, first_v, C, V.count, OUT_V)
