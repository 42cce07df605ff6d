"""Pieces that every kernel is made of: panels of rows, their products, and softmax of a tile.

Rows i are the block that a program owns, rows j the block that it meets. A panel is some rows of a
map as a tuple of tiles side by side: 196 columns are tiles of 128, 64 and 16, not of 256. All
shapes are constexpr: with them at run time, loads are two bytes wide and nothing is copied
asynchronously.
"""

import triton
import triton.language as tl


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
def load_panel(base, rows, first, C: tl.constexpr, X: tl.constexpr, PIECES: tl.constexpr):
    """Rows of a map, and columns from ``first`` on, as a panel."""
    panel = ()
    for n in tl.static_range(len(PIECES)):
        columns = first + PIECES[n].start + tl.arange(0, PIECES[n].width)
        panel = panel + (load_tile(base, rows, columns, C, X, PIECES[n].full),)
    return panel


@triton.jit
def span_of(panel, base, rows, first, C: tl.constexpr, X: tl.constexpr, OUT: tl.constexpr):
    """An output's columns of some rows: the panel at hand if it holds just those, else loaded."""
    if OUT.is_panel:
        span = panel
    else:
        span = load_panel(base, rows, first, C, X, OUT.pieces)
    return span


@triton.jit
def store_panel(
    base, panel, rows, first, C: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr
):
    """Store rows of a (C, COLUMNS) map, from column ``first`` on."""
    for n in tl.static_range(len(PIECES)):
        columns = first + PIECES[n].start + tl.arange(0, PIECES[n].width)
        inside = (rows < C)[:, None] & (columns < COLUMNS)[None, :]
        where = base + rows[:, None] * COLUMNS + columns[None, :]
        tl.store(where, panel[n].to(base.dtype.element_ty), mask=inside)


@triton.jit
def zero_panel(ROWS: tl.constexpr, PIECES: tl.constexpr):
    """A panel to sum in."""
    panel = ()
    for n in tl.static_range(len(PIECES)):
        panel = panel + (tl.zeros((ROWS, PIECES[n].width), tl.float32),)
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
    """``sums + weights @ panel``."""
    result = ()
    for n in tl.static_range(len(sums)):
        right = panel[n]
        result = result + (
            tl.dot(weights.to(right.dtype), right, sums[n], input_precision=PRECISION),
        )
    return result


@triton.jit
def product(a_i, a, i, b_j, b, j, C: tl.constexpr, X: tl.constexpr, PRECISION: tl.constexpr):
    """``a_i b_j^T``, (rows i, rows j) in float32.

    From panels where rows are short enough to be held (``X.held``), else chunk by chunk from the
    maps a and b.
    """
    total = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    if len(X.held) > 0:
        for n in tl.static_range(len(X.held)):
            total = tl.dot(a_i[n], b_j[n].T, total, input_precision=PRECISION)
    else:
        for start in tl.range(0, X.count, X.chunk):
            columns = start + tl.arange(0, X.chunk)
            left = load_tile(a, i, columns, C, X, X.pitch % X.chunk == 0)
            right = load_tile(b, j, columns, C, X, X.pitch % X.chunk == 0)
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
def row_weights(logits, row_max, factor, j, C: tl.constexpr):
    """P_ij of a tile of logits, from the numbers of rows i: exp(logits - maximum) * factor."""
    return existing(tl.exp(logits - row_max[:, None]) * factor[:, None], j, C, 0.0)


@triton.jit
def column_weights(logits, row_max, factor):
    """P_ji of the same tile, laid out as (i, j): x x^T is symmetric, so row j's numbers serve.

    Beyond the last channel the maximum is infinite, and the weight 0.
    """
    return tl.exp(logits - row_max[None, :]) * factor[None, :]


@triton.jit
def two_floats(number):
    """A float64 as a float32 and the rest; a float32 as itself and 0."""
    high = number.to(tl.float32)
    return high, (number - high.to(number.dtype)).to(tl.float32)


@triton.jit
def through_softmax(p, dp, delta, delta_rest):
    """dS = P (dP - delta): a small difference, so delta comes as two numbers."""
    return p * ((dp - delta) - delta_rest)


@triton.jit
def sign(m):
    """-1, 0 or 1, as torch.sign has it."""
    return tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, 0.0))
