"""``sci`` and ``cci`` of the same images in one operator: the pair head of a training step.

The composition is the definition. Where there are kernels, ``cci`` takes its softmax statistics
from ``sci``. On the CPU both gradients share one sweep over the tiles, too: d eta comes from what
the forward pass kept, so that all of ``sci``'s gradient is known before the sweep.

Shapes as in :mod:`cin_fast.ops`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cin_fast import arguments, dispatch, operators, ops, reference, schemas
from cin_fast.operators import operator_of


def pair_columns(
    x: Tensor,
    partner: Tensor,
    psi_weight: Tensor,
    psi_bias: Tensor,
    v: Tensor,
    *,
    mean: int,
    scale: float = -1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = sci(x, v)`` and ``y_pair = cci(x, partner, eta, v)`` with eta = psi of y's means.

    eta of image i is ``psi_weight . [mean Y_i, mean Y_partner(i)] + psi_bias``, and column ``mean``
    of v makes the mean: 4 of :func:`cin_fast.tap_means`.

    Args:
        x: features, (B, C, L) or (B, C, H, W), as for :func:`cin_fast.sci`.
        partner: int64 (B,), an involution, as for :func:`cin_fast.cci`.
        psi_weight: floating point, 2 C numbers in any shape: ``Linear(2C, 1).weight``.
        psi_bias: one number.
        v: (B, C, K), of x's dtype.
        mean: a column of v, 0 to K - 1.
        scale, backend: as for :func:`cin_fast.sci`.

    Returns:
        y and y_pair, (B, C, K) of x's dtype. psi is applied in float32 or wider.

    Raises:
        ValueError: naming the argument and what was found.
    """
    arguments.check_features(x)
    arguments.check_partner(x, partner)
    if not isinstance(v, Tensor) or v.dim() != 3:
        found = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"v: expected a tensor (B, C, K), found {found}")
    arguments.check_values(x, v)
    _check_psi("psi_weight", psi_weight, x, 2 * x.shape[1])
    _check_psi("psi_bias", psi_bias, x, 1)
    if not isinstance(mean, int) or not 0 <= mean < v.shape[2]:
        raise ValueError(f"mean: expected a column of v, 0 to {v.shape[2] - 1}, found {mean!r}")
    x, cast_v = arguments.as_autocast(x, v)
    assert cast_v is not None
    scale = arguments.as_number("scale", scale)
    name = ops.pick_backend(x, backend)
    on_device = partner.to(x.device, non_blocking=True)
    inputs = (arguments.flat_map(x), on_device, psi_weight, psi_bias, cast_v, mean, scale)
    if not (dispatch.transformed(x, cast_v, psi_weight, psi_bias) or dispatch.exported(name)):
        if name == "cpu":
            y_BCK, y_pair_BCK, *_ = torch.ops.cin_fast.cpu_pair(*inputs)
            return y_BCK, y_pair_BCK
        if name in operators.AFTER_SCI_BACKENDS:
            y_BCK, y_pair_BCK, *_ = _forward(name, *inputs)
            return y_BCK, y_pair_BCK
    y_BCK = ops.sci(x, cast_v, scale=scale, backend=backend)
    eta_B = reference.eta(y_BCK[..., mean], on_device, psi_weight, psi_bias)
    return y_BCK, ops.cci(x, partner, eta_B, cast_v, scale=scale, backend=backend)


def _check_psi(name: str, t: Tensor, x: Tensor, numbers: int) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        found = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"{name}: expected a floating-point tensor, found {found}")
    if t.numel() != numbers:
        raise ValueError(f"{name}: expected {numbers} numbers to go with x, found {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name}: expected x's device {x.device}, found {t.device}")


def _forward(
    backend: str,
    x: Tensor,
    partner: Tensor,
    psi_weight: Tensor,
    psi_bias: Tensor,
    v: Tensor,
    mean: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """The composition, with what sci leaves of x's rows handed on to cci."""
    y, row_max, row_sum, _ = operator_of(backend, "sci")(x, v, scale)
    eta = reference.eta(y[..., mean], partner, psi_weight, psi_bias).float()
    after_sci = operator_of(backend, "cci_after_sci")
    y_pair, b = after_sci(x, partner, eta, v, row_max, row_sum, scale)
    return y, y_pair, eta, b, row_max, row_sum


def _backward(
    dy: Tensor,
    dy_pair: Tensor,
    x: Tensor,
    partner: Tensor,
    psi_weight: Tensor,
    psi_bias: Tensor,
    v: Tensor,
    y: Tensor,
    y_pair: Tensor,
    eta: Tensor,
    b: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    mean: int,
    scale: float,
    sweep: bool,
) -> tuple[Tensor, ...]:
    deta = -(dy_pair.double() * b.double()).sum(dim=(1, 2)).to(eta.dtype)
    dmean, dweight, dbias = reference.eta_backward(deta, y[..., mean], partner, psi_weight)
    dpsi = dweight.to(psi_weight.dtype), dbias.reshape(psi_bias.shape).to(psi_bias.dtype)
    if not sweep:
        return x.new_empty(0), *dpsi, x.new_empty(0)
    dy_total = dy.to(eta.dtype, copy=True)
    dy_total[..., mean] += dmean
    dx, dv = torch.ops.cin_fast.cpu_pair_sweep(
        dy_total, dy_pair, x, partner, eta, v, y, y_pair, b, row_max, row_sum, scale
    )
    return dx, *dpsi, dv


def _forward_fake(
    x: Tensor,
    partner: Tensor,
    psi_weight: Tensor,
    psi_bias: Tensor,
    v: Tensor,
    mean: int,
    scale: float,
) -> tuple[Tensor, ...]:
    def wide(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    rows = x.shape[:2]
    y, y_pair = v.new_empty(v.shape), v.new_empty(v.shape)
    return y, y_pair, wide(x.shape[0]), wide(*v.shape), wide(*rows), wide(*rows)


def _backward_fake(
    dy: Tensor,
    dy_pair: Tensor,
    x: Tensor,
    partner: Tensor,
    psi_weight: Tensor,
    psi_bias: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    sweep = rest[-1]
    dx, dv = (t.new_empty(t.shape if sweep else (0,)) for t in (x, v))
    dweight, dbias = (t.new_empty(t.shape) for t in (psi_weight, psi_bias))
    return dx, dweight, dbias, dv


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, mean, scale = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output)
    ctx.mean, ctx.scale = mean, scale


def _gradient(ctx: Any, dy: Tensor, dy_pair: Tensor, *_: Any) -> tuple[Any, ...]:
    needs_x, _, _, _, needs_v, *_ = ctx.needs_input_grad
    sweep = needs_x or needs_v
    dx, dweight, dbias, dv = torch.ops.cin_fast.cpu_pair_backward(
        dy, dy_pair, *ctx.saved_tensors, ctx.mean, ctx.scale, sweep
    )
    return dx if sweep else None, None, dweight, dbias, dv if sweep else None, None, None


def _register() -> None:
    for stem, schema in (schemas.PAIR | schemas.AFTER_SCI | schemas.PAIR_SWEEP).items():
        torch.library.define(f"cin_fast::cpu_{stem}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    for stem, function, fake in (
        ("pair", partial(_forward, "cpu"), _forward_fake),
        ("pair_backward", _backward, _backward_fake),
    ):
        torch.library.impl(f"cin_fast::cpu_{stem}", "CPU", function)
        torch.library.register_fake(f"cin_fast::cpu_{stem}", fake)
    torch.library.register_autograd("cin_fast::cpu_pair", _gradient, setup_context=_context)
    torch.library.register_autograd("cin_fast::cpu_pair_backward", operators.refuse_double_backward)


_register()
