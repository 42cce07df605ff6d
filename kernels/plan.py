"""Which kernels a call takes, with which grids and constants. Pure Python: imports no Triton."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from cin_fast.kernels.configs import THIN, Config, Maps, Out, choose, columns_of, out_of

Operator = Literal["sci", "sci_backward", "cci", "cci_after_sci", "cci_backward"]
Precision = Literal["ieee", "tf32"]


@dataclass(frozen=True)
class Launch:
    """One kernel's launch: (row blocks, images, spans of output columns) programs."""

    kernel: str
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    config: Config


@functools.lru_cache(maxsize=1024)
def plan(
    operator: Operator,
    maps: Maps,
    chip: int,
    precision: Precision = "ieee",
    negative: bool = True,
) -> tuple[Launch, ...]:
    """The launches of an operator, first to last.

    Args:
        chip: the GPU's compute capability (80: 8.0).
        negative: whether the scale is below 0.
    """
    if operator == "sci":
        return (_forward("sci_forward", maps, chip, precision, NEGATIVE=negative),)
    if operator in ("cci", "cci_after_sci"):
        rows = _rows("row_numbers", maps, chip, precision, NEGATIVE=negative)
        forward = _forward("cci_forward", maps, chip, precision)
        return (rows, forward) if operator == "cci" else (forward,)
    stem = operator.removesuffix("_backward")
    return (
        _rows(f"{stem}_delta", maps, chip, precision),
        *_backward(f"{stem}_backward", maps, chip, precision),
    )


def _forward(kernel: str, maps: Maps, chip: int, precision: Precision, **more: Any) -> Launch:
    config = choose(kernel, maps, chip)
    v = columns_of(maps.columns, maps.itemsize, config)
    out = out_of(v, config, at_hand=maps.v_is_x)
    return _launch(kernel, maps, config, precision, out.spans, V=v, OUT=out, **more)


def _rows(kernel: str, maps: Maps, chip: int, precision: Precision, **more: Any) -> Launch:
    config = choose(kernel, maps, chip)
    if kernel != "row_numbers":
        more["V"] = columns_of(maps.columns, maps.itemsize, config)
        more["V_IS_X"] = maps.v_is_x
    return _launch(kernel, maps, config, precision, 1, **more)


def _backward(kernel: str, maps: Maps, chip: int, precision: Precision) -> list[Launch]:
    config = choose(kernel, maps, chip)
    x = columns_of(maps.positions, maps.itemsize, config)
    v = columns_of(maps.columns, maps.itemsize, config)
    out_x, out_v = (out_of(columns, config, at_hand=True) for columns in (x, v))

    def launch(out_x: Out, out_v: Out) -> Launch:
        spans = max(out_x.spans, out_v.spans)
        more = {"V": v, "V_IS_X": maps.v_is_x, "OUT_X": out_x, "OUT_V": out_v}
        return _launch(kernel, maps, config, precision, spans, **more)

    if maps.v_is_x:
        return [launch(out_x, Out())]
    # A thin dv costs next to nothing beside the one span of dx.
    if out_x.spans == 1 and maps.columns <= THIN:
        return [launch(out_x, out_v)]
    return [launch(out_x, Out()), launch(Out(), out_v)]


def _launch(
    kernel: str, maps: Maps, config: Config, precision: Precision, spans: int, **more: Any
) -> Launch:
    constants = {
        "C": maps.channels,
        "X": columns_of(maps.positions, maps.itemsize, config),
        **more,
        "BM": config.bm,
        "BN": config.bn,
        "PRECISION": precision,
    }
    return Launch(kernel, (-(-maps.channels // config.bm), maps.batch, spans), constants, config)
