"""A linear layer of few rows and a large weight: what the pooled head makes of phi.

At C = 2048 phi's weight is 151 MB, and a batch brings a row an image: the layer costs what reading
the weight costs, its gradient what writing one does. On the CPU three kernels come close to that;
elsewhere it is ``torch.nn.functional.linear``.

Shapes: B rows, K columns, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cin_fast import dispatch, schemas


def thin_linear(
    a_BK: Tensor, w_OK: Tensor, bias_O: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``a w^T + bias``, (B, O), as ``torch.nn.functional.linear`` gives it.

    Any shapes, dtypes and devices that function takes; only the speed differs. A ``backend`` other
    than None and ``cpu`` asks for that function.
    """
    if backend not in (None, "cpu") or not _has_kernel(a_BK, w_OK):
        return F.linear(a_BK, w_OK, bias_O)
    y_BO = torch.ops.cin_fast.cpu_thin_linear(a_BK, w_OK)
    return y_BO if bias_O is None else y_BO + bias_O


def _has_kernel(a: Tensor, w: Tensor) -> bool:
    if a.dim() != 2 or w.dim() != 2 or a.shape[1] != w.shape[1]:
        return False
    if not a.dtype == w.dtype == torch.float32 or w.device != a.device:
        return False
    if dispatch.transformed(a, w) or dispatch.autocast_enabled(a):
        return False
    name = dispatch.choose(a)
    return name == "cpu" and not dispatch.exported(name)


def _linear_fake(a: Tensor, w: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], w.shape[0]))


def _input_fake(dy: Tensor, w: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[0], w.shape[1]))


def _weight_fake(dy: Tensor, a: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[1], a.shape[1]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


# Each of the three is bilinear, and its derivatives are the other two.
def _linear_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, w = ctx.saved_tensors
    ops = torch.ops.cin_fast
    return (
        ops.cpu_thin_linear_input(dy, w) if ctx.needs_input_grad[0] else None,
        ops.cpu_thin_linear_weight(dy, a) if ctx.needs_input_grad[1] else None,
    )


def _input_gradient(ctx: Any, da: Tensor) -> tuple[Tensor | None, Tensor | None]:
    dy, w = ctx.saved_tensors
    ops = torch.ops.cin_fast
    return (
        ops.cpu_thin_linear(da, w) if ctx.needs_input_grad[0] else None,
        ops.cpu_thin_linear_weight(dy, da) if ctx.needs_input_grad[1] else None,
    )


def _weight_gradient(ctx: Any, dw: Tensor) -> tuple[Tensor | None, Tensor | None]:
    dy, a = ctx.saved_tensors
    ops = torch.ops.cin_fast
    return (
        ops.cpu_thin_linear(a, dw) if ctx.needs_input_grad[0] else None,
        ops.cpu_thin_linear_input(dy, dw) if ctx.needs_input_grad[1] else None,
    )


def _register() -> None:
    for (stem, schema), fake, gradient in zip(
        schemas.THIN_LINEAR.items(),
        (_linear_fake, _input_fake, _weight_fake),
        (_linear_gradient, _input_gradient, _weight_gradient),
        strict=True,
    ):
        name = f"cin_fast::cpu_{stem}"
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name, fake)
        torch.library.register_autograd(name, gradient, setup_context=_save)


_register()
# For those who export a model to plain PyTorch.
OPERATOR = torch.ops.cin_fast.cpu_thin_linear
