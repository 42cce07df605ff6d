"""How each kernel is cut, by the width of its numbers, the shape of its maps and the chip.

Timed on an H100 80GB HBM3 (torch 2.11.0, triton 3.6.0): the dense and thin rows, in bfloat16, on 20
maps of 2048 x 196, v = x or of 9 columns. What a Hopper chip takes is within 5 % of the fastest row
without spills, or faster (the same code timed twice differed by 3 %). Not timed: other shapes,
longer rows ("long"), other v of their own, float32, sm_80. There, rows were chosen for what the
compiler reports: no spills, and shared memory that suffices (tests/test_triton_compile.py).

On each chip a delta sweep and its backward pass cut a row alike: dP - delta then cancels exactly
where it has to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SMALLEST = 16
# A map with at most so many columns is thin.
THIN = 16
# Compute capabilities: the least there is, and the one with rows of its own.
AMPERE, HOPPER = 80, 90


@dataclass(frozen=True)
class Piece:
    """Columns of a panel that are one tile; ``full`` if none lies beyond the pitch."""

    start: int
    width: int
    full: bool


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class Columns:
    """The columns of a map (C, count) with ``pitch`` numbers from row to row, zeros past count.

    Rows are held as a panel of the pieces, or, where there are none, met in chunks.
    """

    count: int
    pitch: int
    pieces: Pieces
    chunk: int


@dataclass(frozen=True)
class Out:
    """Output columns, in ``spans`` of ``width``; ``is_panel``: the panel held has just those."""

    pieces: Pieces = ()
    width: int = 0
    spans: int = 1
    is_panel: bool = False


Numbers = Literal["half", "single"]
Kind = Literal["dense", "thin", "long"]


@dataclass(frozen=True)
class Config:
    """A program owns ``bm`` rows, meets ``bn`` at a time and makes at most ``span`` columns.

    Rows of up to ``panel`` columns are held; longer ones are met in chunks.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    span: int
    panel: int
    chunk: int = 64

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton's compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


Table = dict[tuple[str, Numbers, Kind], Config]

# For every chip that has no row of its own.
CONFIGS: Table = {
    ("sci_forward", "half", "dense"): Config(64, 64, 4, 2, 256, 256),
    ("sci_forward", "half", "thin"): Config(128, 64, 8, 2, 256, 256),
    ("sci_forward", "half", "long"): Config(64, 64, 8, 2, 128, 0),
    ("row_numbers", "half", "dense"): Config(128, 64, 8, 2, 16, 256),
    ("row_numbers", "half", "long"): Config(128, 64, 8, 3, 16, 0),
    ("sci_delta", "half", "dense"): Config(64, 64, 4, 2, 16, 256),
    ("sci_delta", "half", "thin"): Config(64, 64, 4, 2, 16, 256),
    ("sci_delta", "half", "long"): Config(64, 64, 4, 2, 16, 0),
    ("sci_backward", "half", "dense"): Config(64, 32, 8, 2, 128, 256),
    ("sci_backward", "half", "thin"): Config(128, 32, 8, 3, 256, 256),
    ("sci_backward", "half", "long"): Config(64, 32, 8, 2, 128, 0),
    ("cci_forward", "half", "dense"): Config(64, 32, 8, 2, 128, 256),
    ("cci_forward", "half", "thin"): Config(64, 32, 4, 2, 256, 256),
    ("cci_forward", "half", "long"): Config(64, 32, 8, 2, 64, 0),
    ("cci_delta", "half", "long"): Config(64, 32, 8, 2, 16, 0, 32),
    ("cci_backward", "half", "long"): Config(64, 32, 8, 2, 64, 0, 32),
    ("sci_forward", "single", "long"): Config(32, 32, 4, 2, 64, 0, 32),
    ("row_numbers", "single", "long"): Config(32, 64, 4, 2, 16, 0, 32),
    ("sci_delta", "single", "long"): Config(32, 32, 4, 2, 16, 0, 32),
    ("sci_backward", "single", "long"): Config(32, 32, 4, 2, 128, 0, 32),
    ("cci_forward", "single", "long"): Config(32, 32, 4, 3, 64, 0, 32),
    ("cci_delta", "single", "long"): Config(32, 32, 4, 2, 16, 0, 32),
    ("cci_backward", "single", "long"): Config(32, 16, 4, 1, 32, 0, 32),
}

# What sm_80 has too little shared memory or too few registers for.
HOPPER_CONFIGS: Table = {
    ("sci_backward", "half", "dense"): Config(128, 32, 8, 3, 256, 256),
    ("cci_forward", "half", "dense"): Config(64, 32, 4, 3, 128, 256),
    ("cci_delta", "half", "dense"): Config(64, 32, 4, 3, 256, 256),
    ("cci_delta", "half", "thin"): Config(64, 32, 4, 2, 256, 256),
    ("cci_backward", "half", "dense"): Config(64, 16, 4, 2, 256, 256),
    ("cci_backward", "half", "thin"): Config(64, 16, 4, 3, 256, 256),
}


@dataclass(frozen=True)
class Maps:
    """The shapes of a call: x is (batch, channels, positions), v (batch, channels, columns)."""

    batch: int
    channels: int
    positions: int
    columns: int
    v_is_x: bool
    itemsize: int


def table_of(chip: int) -> Table:
    """All rows of a chip, by its compute capability (80: 8.0)."""
    return CONFIGS | HOPPER_CONFIGS if chip == HOPPER else CONFIGS


def choose(kernel: str, maps: Maps, chip: int) -> Config:
    """The row of a chip's table for a call."""
    numbers: Numbers = "half" if maps.itemsize == 2 else "single"
    kind: Kind = "long"
    if maps.columns <= THIN:
        kind = "thin"
    elif maps.v_is_x:
        kind = "dense"
    table = table_of(chip)
    config = table.get((kernel, numbers, kind))
    if config is None or maps.positions > config.panel:
        config = table[kernel, numbers, "long"]
    return config


def pitch_of(count: int, itemsize: int) -> int:
    """Numbers from row to row: rows begin at multiples of 8 bytes, so that copies are wide.

    >>> pitch_of(196, 2), pitch_of(49, 2), pitch_of(49, 4)
    (196, 56, 52)
    """
    if count * itemsize % 8 == 0:
        return count
    return -(-count * itemsize // 16) * 16 // itemsize


def pieces(count: int, stop: int) -> Pieces:
    """Tiles that cover ``count`` columns of a map that may be read up to column ``stop``.

    Widths are powers of two: 196 columns become 128 + 64 + 16, of 208, and not 256.

    >>> [piece.width for piece in pieces(196, 196)]
    [128, 64, 16]
    >>> [piece.width for piece in pieces(9, 16)]
    [16]
    """
    found: list[Piece] = []
    start = 0
    while start < count:
        left = -(-(count - start) // SMALLEST) * SMALLEST
        width = 1 << (left.bit_length() - 1)
        # The third tile is the last one: more, and their products are too small.
        if len(found) == 2 and width < left:
            width *= 2
        found.append(Piece(start, width, start + width <= stop))
        start += width
    return tuple(found)


def columns_of(count: int, itemsize: int, config: Config) -> Columns:
    """A map's columns under a configuration."""
    pitch = pitch_of(count, itemsize)
    held = pieces(count, pitch) if count <= config.panel else ()
    return Columns(count, pitch, held, config.chunk)


def out_of(columns: Columns, config: Config, *, at_hand: bool) -> Out:
    """Spans that cover the columns of an output.

    Args:
        at_hand: whether the kernel meets those columns as a panel anyway.
    """
    spans = -(-columns.count // config.span)
    if spans == 1:
        whole = pieces(columns.count, columns.pitch)
        return Out(whole, sum(p.width for p in whole), 1, at_hand and whole == columns.pieces)
    each = -(-columns.count // spans)
    tiles = pieces(each, stop=0)
    width = sum(tile.width for tile in tiles)
    return Out(tiles, width, -(-columns.count // width))
