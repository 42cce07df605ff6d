"""Pieces that every kernel is made of: panels of rows, their products, and softmax of a tile.

Rows i are the block that a program owns, rows j the block that it meets. A panel is some rows of a
map as a tuple of tiles side by side: 196 columns are tiles of 128, 64 and 16, not of 256. All
shapes are constexpr: with them at run time, loads are two bytes wide and nothing is copied
asynchronously.
"""

import triton
import triton.language as tl

# A row's peak before any product is met; finite, so that a scale of 0 makes no NaN of it.
FAR = tl.constexpr(3e38)


@triton.jit
def load_tile(base, rows, columns, C: tl.constexpr, X: tl.constexpr, FULL: tl.constexpr):
    """Rows and columns of a map; 0 outside, as where its pitch exceeds its columns.

    FULL: all columns lie within the pitch.
    """
    where = base + rows[:, None] * X.pitch + columns[None, :]
    if FULL and tl.constexpr(C) % rows.shape[0] == 0:
        tile = tl.load(where)
    else:
        inside = (rows < C)[:, None] & (columns < X.pitch)[None, :]
        tile = tl.load(where, mask=inside, other=0.0)
    return tile


@triton.jit
def load_panel(base, rows, first, C: tl.constexpr, X: tl.constexpr, OUT: tl.constexpr):
    """Rows of a map, and columns from ``first`` on, as a panel of ``OUT.pieces``."""
    panel = ()
    for n in tl.static_range(len(OUT.pieces)):
        columns = first + OUT.pieces[n].start + tl.arange(0, OUT.pieces[n].width)
        panel = panel + (load_tile(base, rows, columns, C, X, OUT.pieces[n].full),)
    return panel


@triton.jit
def span_of(panel, base, rows, first, C: tl.constexpr, X: tl.constexpr, OUT: tl.constexpr):
    """An output's columns of some rows: the panel at hand if it holds just those, else loaded."""
    if OUT.is_panel:
        span = panel
    else:
        span = load_panel(base, rows, first, C, X, OUT)
    return span


@triton.jit
def store_panel(
    base, panel, rows, first, C: tl.constexpr, COLUMNS: tl.constexpr, OUT: tl.constexpr
):
    """Store rows of a (C, COLUMNS) map, from column ``first`` on."""
    for n in tl.static_range(len(OUT.pieces)):
        columns = first + OUT.pieces[n].start + tl.arange(0, OUT.pieces[n].width)
        inside = (rows < C)[:, None] & (columns < COLUMNS)[None, :]
        where = base + rows[:, None] * COLUMNS + columns[None, :]
        tl.store(where, panel[n].to(base.dtype.element_ty), mask=inside)


@triton.jit
def zero_panel(ROWS: tl.constexpr, OUT: tl.constexpr):
    """A panel to sum in."""
    panel = ()
    for n in tl.static_range(len(OUT.pieces)):
        columns = tl.arange(0, OUT.pieces[n].width)
        panel = panel + (tl.zeros((ROWS, columns.shape[0]), tl.float32),)
    return panel


@triton.jit
def scaled(panel, factors):
    """Each row times its factor."""
    result = ()
    for n in tl.static_range(len(panel)):
        result = result + (panel[n] * factors[:, None],)
    return result


@triton.jit
def add_product(sums, weights, panel, PRECISION: tl.constexpr):
    """``sums + weights @ panel``. IEEE float32 sums the product from 0 first."""
    result = ()
    for n in tl.static_range(len(sums)):
        right = panel[n]
        left = weights.to(right.dtype)
        if PRECISION == "ieee" and right.dtype == tl.float32:
            result = result + (sums[n] + block_product(left, right),)
        else:
            result = result + (tl.dot(left, right, sums[n], input_precision=PRECISION),)
    return result


@triton.jit
def block_product(left, right):
    """``left @ right`` in IEEE float32, summed from 0.

    Blocked libraries add such blocks up: the rounding errors of one long sum would be several times
    theirs. Without a limit, which float32 has no other use for, the compiler would make what the
    block is added to the accumulator of the product.
    """
    return tl.dot(left, right, input_precision="ieee", max_num_imprecise_acc=left.shape[1])


@triton.jit
def product(a_i, a, i, b_j, b, j, C: tl.constexpr, X: tl.constexpr, PRECISION: tl.constexpr):
    """``a_i b_j^T``, (rows i, rows j) in float32.

    From panels where rows are short enough to be held (``X.pieces``), else chunk by chunk from the
    maps a and b.
    """
    BLOCKED: tl.constexpr = PRECISION == "ieee" and a.dtype.element_ty == tl.float32
    total = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    if len(X.pieces) > 0:
        for n in tl.static_range(len(X.pieces)):
            total = tl.dot(a_i[n], b_j[n].T, total, input_precision=PRECISION)
    else:
        for start in tl.range(0, X.count, X.chunk):
            columns = start + tl.arange(0, X.chunk)
            left = load_tile(a, i, columns, C, X, X.pitch % X.chunk == 0)
            right = load_tile(b, j, columns, C, X, X.pitch % X.chunk == 0)
            if BLOCKED:
                total += block_product(left, right.T)
            else:
                total = tl.dot(left, right.T, total, input_precision=PRECISION)
    return total


@triton.jit
def load_row(base, rows, C: tl.constexpr, other):
    """One number a row; ``other`` beyond the last channel."""
    return tl.load(base + rows, mask=rows < C, other=other)


@triton.jit
def existing(tile, j, C: tl.constexpr, other):
    """The tile, with ``other`` in columns j beyond the last channel."""
    if tl.constexpr(C) % j.shape[0] != 0:
        tile = tl.where((j < C)[None, :], tile, other)
    return tile


@triton.jit
def peak_of(products, j, C: tl.constexpr, NEGATIVE: tl.constexpr):
    """Each row's product with the largest weight: its least where the scale is negative."""
    if NEGATIVE:
        peak = tl.min(existing(products, j, C, float("inf")), 1)
    else:
        peak = tl.max(existing(products, j, C, -float("inf")), 1)
    return peak


@triton.jit
def higher(one, other, NEGATIVE: tl.constexpr):
    """The peak of two."""
    if NEGATIVE:
        peak = tl.minimum(one, other)
    else:
        peak = tl.maximum(one, other)
    return peak


@triton.jit
def exponent_of(scale, x):
    """scale log2(e), by which exp becomes a power of two: in float32, as two numbers."""
    wide = tl.cast(scale, tl.float64) * 1.4426950408889634
    high = wide.to(tl.float32)
    exponent = (high,)
    if x.dtype.element_ty == tl.float32:
        exponent = (high, (wide - high.to(tl.float64)).to(tl.float32))
    return exponent


@triton.jit
def exp(distance, exponent):
    """exp(scale distance).

    One rounded product is enough beside 16-bit numbers. In float32 what it and the first part of
    the exponent leave out is made up for: exp(a + b) = exp(a) (1 + b) for a small b.
    """
    power = distance * exponent[0]
    result = tl.exp2(power)
    if len(exponent) > 1:
        rest = tl.fma(distance, exponent[0], -power) + distance * exponent[1]
        result += result * tl.where(result > 0, 0.6931471805599453 * rest, 0.0)
    return result


@triton.jit
def powers(products, exponent, peak, j, C: tl.constexpr):
    """exp(scale (product - peak)) of a tile of x x^T, from the peaks of rows i.

    The distance from the peak is exact where it counts, and is scaled only then: products of any
    size neither overflow nor lose the difference.
    """
    return existing(exp(products - peak[:, None], exponent), j, C, 0.0)


@triton.jit
def row_weights(products, exponent, peak, factor, j, C: tl.constexpr):
    """P_ij of a tile of x x^T, from the numbers of rows i."""
    return powers(products, exponent, peak, j, C) * factor[:, None]


@triton.jit
def column_weights(products, exponent, peak, factor):
    """P_ji of the same tile, laid out as (i, j): x x^T is symmetric, so row j's numbers serve.

    Beyond the last channel the factor is 0, and so is the weight.
    """
    return exp(products - peak[None, :], exponent) * factor[None, :]


@triton.jit
def load_delta(base, rows, C: tl.constexpr):
    """delta of some rows as float32 numbers that sum up to it: one, or two for a float64."""
    number = load_row(base, rows, C, 0.0)
    high = number.to(tl.float32)
    parts = (high,)
    if base.dtype.element_ty == tl.float64:
        parts = (high, (number - high.to(tl.float64)).to(tl.float32))
    return parts


@triton.jit
def through_softmax(p, dp, delta, axis: tl.constexpr):
    """dS = P (dP - delta), delta of the tile's rows (``axis`` 1) or columns (0)."""
    for n in tl.static_range(len(delta)):
        dp = dp - tl.expand_dims(delta[n], axis)
    return p * dp


@triton.jit
def sign(m):
    """-1, 0 or 1, as torch.sign has it."""
    return tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, 0.0))
