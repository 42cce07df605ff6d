"""Launches the kernels on tensors: what ``cin_fast::triton_*`` computes."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cin_fast.kernels import cci as cci_kernels
from cin_fast.kernels import sci as sci_kernels
from cin_fast.kernels.configs import AMPERE, Maps, pitch_of
from cin_fast.kernels.plan import Operator, Precision, plan

KERNELS: dict[str, Any] = {
    "sci_forward": sci_kernels.sci_forward,
    "sci_delta": sci_kernels.sci_delta,
    "sci_backward": sci_kernels.sci_backward,
    "row_numbers": sci_kernels.row_numbers,
    "cci_forward": cci_kernels.cci_forward,
    "cci_delta": cci_kernels.cci_delta,
    "cci_backward": cci_kernels.cci_backward,
}


def sci(x: Tensor, v: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, each row's peak and the sum beside it, and nothing for what y's rounding took off."""
    y = _dense_like(x if v is None else v)
    row_max, row_sum = _rows(x), _rows(x)
    _run("sci", x, v, y=y, row_max=row_max, row_sum=row_sum, scale=scale)
    return y, row_max, row_sum, x.new_empty(0)


def sci_backward(
    dy: Tensor,
    x: Tensor,
    v: Tensor | None,
    y: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    y_rest: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dx and dv; with v None, dv is part of dx and empty itself."""
    dx, dv = _dense_like(x), _value_gradient(x, v)
    _run(
        "sci_backward", x, v, dy=_pitched(dy), row_max=row_max.contiguous(),
        row_sum=row_sum.contiguous(), delta=_delta(x), dx=dx, dv=dv, scale=scale,
    )  # fmt: skip
    return dx, dv


def cci(
    x: Tensor, partner: Tensor, eta: Tensor, v: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, nothing for the partner term, which this backward pass does without, and rows' numbers."""
    y = _dense_like(x if v is None else v)
    row_max, row_sum = _rows(x), _rows(x)
    _run(
        "cci", x, v, partner=partner.contiguous(), eta=eta.contiguous(), y=y,
        row_max=row_max, row_sum=row_sum, scale=scale,
    )  # fmt: skip
    return y, x.new_empty(0), row_max, row_sum


def cci_after_sci(
    x: Tensor,
    partner: Tensor,
    eta: Tensor,
    v: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y, and nothing, from rows' numbers that sci left."""
    y = _dense_like(v)
    _run(
        "cci_after_sci", x, v, partner=partner.contiguous(), eta=eta.contiguous(), y=y,
        row_max=row_max.contiguous(), row_sum=row_sum.contiguous(), scale=scale,
    )  # fmt: skip
    return y, x.new_empty(0)


def cci_backward(
    dy: Tensor,
    x: Tensor,
    partner: Tensor,
    eta: Tensor,
    v: Tensor | None,
    y: Tensor,
    b: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, deta and dv; with v None, dv is part of dx and empty itself."""
    dx, dv = _dense_like(x), _value_gradient(x, v)
    deta = _delta(x)
    _run(
        "cci_backward", x, v, dy=_pitched(dy), partner=partner.contiguous(),
        eta=eta.contiguous(), row_max=row_max.contiguous(), row_sum=row_sum.contiguous(),
        delta=_delta(x), deta=deta, dx=dx, dv=dv, scale=scale,
    )  # fmt: skip
    return dx, deta.sum(1).to(eta.dtype), dv


def precision(dtype: torch.dtype) -> Precision:
    """How float32 is multiplied, as ``torch.set_float32_matmul_precision`` says."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


@functools.cache
def chip_of(device: torch.device) -> int:
    """The compute capability whose table a device takes; interpreted, the one of every chip."""
    if device.type != "cuda":
        return AMPERE
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _run(operator: Operator, x: Tensor, v: Tensor | None, **others: Any) -> None:
    batch, channels, positions = x.shape
    if batch == 0:
        return
    columns = positions if v is None else v.shape[2]
    maps = Maps(batch, channels, positions, columns, v is None, x.dtype.itemsize)
    x = _pitched(x)
    arguments = {"x": x, "v": x if v is None else _pitched(v), **others}
    # Under the interpreter the tensors are on the CPU, and no device has to be chosen.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        for launch in plan(
            operator, maps, chip_of(x.device), precision(x.dtype), others["scale"] < 0
        ):
            kernel = KERNELS[launch.kernel]
            wanted = {name: arguments[name] for name in kernel.arg_names if name in arguments}
            kernel[launch.grid](**wanted, **launch.constants, **launch.config.options)


def _pitched(t: Tensor) -> Tensor:
    """The map with the pitch that the kernels take, filled up with zeros."""
    count = t.shape[2]
    pitch = pitch_of(count, t.dtype.itemsize)
    return t.contiguous() if pitch == count else functional.pad(t, (0, pitch - count))


def _dense_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _value_gradient(x: Tensor, v: Tensor | None) -> Tensor:
    return x.new_empty(0) if v is None else _dense_like(v)


def _rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def _delta(x: Tensor) -> Tensor:
    # Its sums are small differences: twice as exact as the numbers they are made of.
    return x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype.itemsize == 4 else torch.float32)
