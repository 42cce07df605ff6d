"""The registered operators: definition, fakes and autograd, for every backend.

Shapes: B images, C channels, L positions, K columns of ``v``. ``v = None`` means ``v = x``.
Backends only compute: each implements ``schemas.OPERATORS`` under its own prefix, and the
autograd formula and fakes here serve them all. ``row_max``, ``row_sum`` and ``y_rest`` are what a
backend's forward leaves for its own other operators: no other code reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cin_fast import dispatch, matmul, reference, schemas

TAP_BACKENDS = ("reference", "cpu", "cuda")

# Backends whose sci makes delta = dY . Y: y is kept for it, and what rounding to 16 bits took off
# it. And whose cci keeps y and the partner term b, y = A - eta b.
_SCI_KEEPS_Y = ("cpu", "cuda")
_CCI_KEEPS_Y = ("cpu",)

# Backends whose cci can take its rows' statistics from sci, as an operator with a gradient. (The
# cpu backend's is a part of cin_fast.pair's.)
AFTER_SCI_BACKENDS = ("triton", "cuda")


def operator_of(backend: str, stem: str) -> Any:
    """``cin_fast::BACKEND_STEM``, to be called."""
    return getattr(torch.ops.cin_fast, f"{backend}_{stem}").default


def _row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    shape, dtype = x.shape[:2], torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _like_values(x: Tensor, v: Tensor | None) -> Tensor:
    return x.new_empty((x if v is None else v).shape)


def _value_gradient(x: Tensor, v: Tensor | None) -> Tensor:
    return x.new_empty((0,) if v is None else v.shape)


def _sci_fake(
    x: Tensor, v: Tensor | None, scale: float, *, keeps_rest: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_rest = keeps_rest and x.dtype in (torch.bfloat16, torch.float16)
    rest = _like_values(x, v) if has_rest else x.new_empty(0)
    return _like_values(x, v), *_row_statistics(x), rest


def _sci_values_fake(x: Tensor, v: Tensor | None, scale: float) -> Tensor:
    return _like_values(x, v)


def _sci_backward_fake(
    dy: Tensor,
    x: Tensor,
    v: Tensor | None,
    y: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    y_rest: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _value_gradient(x, v)


def _cci_fake(
    x: Tensor, partner: Tensor, eta: Tensor, v: Tensor | None, scale: float, *, keeps_b: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b = _like_values(x, v) if keeps_b else x.new_empty(0)
    return _like_values(x, v), b, *_row_statistics(x)


def _cci_values_fake(
    x: Tensor, partner: Tensor, eta: Tensor, v: Tensor | None, scale: float
) -> Tensor:
    return _like_values(x, v)


def _cci_after_sci_fake(
    x: Tensor,
    partner: Tensor,
    eta: Tensor,
    v: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _like_values(x, v), x.new_empty(0)


def _cci_backward_fake(
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
    return x.new_empty(x.shape), torch.empty_like(eta), _value_gradient(x, v)


def _tap_means_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], 9))


def _tap_means_backward_fake(dv: Tensor, height: int, width: int) -> Tensor:
    return dv.new_empty((*dv.shape[:2], height, width))


_FAKES: dict[str, Callable[..., Any]] = {
    "sci_values": _sci_values_fake,
    "sci_backward": _sci_backward_fake,
    "cci_values": _cci_values_fake,
    "cci_after_sci": _cci_after_sci_fake,
    "cci_backward": _cci_backward_fake,
    "tap_means": _tap_means_fake,
    "tap_means_backward": _tap_means_backward_fake,
}


def _in_python(
    sci: Callable[..., Any],
    sci_backward: Callable[..., Any],
    cci: Callable[..., Any],
    cci_backward: Callable[..., Any],
) -> dict[str, Callable[..., Any]]:
    """A backend's operators, of functions in plain PyTorch that take v or None.

    Their gradients start again from x: nothing is left for them, and where v = x dv is None.
    """

    def no_statistics(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.zero_() for t in _row_statistics(x))

    def run_sci(x: Tensor, v: Tensor | None, scale: float) -> tuple[Tensor, ...]:
        return sci(x, v, scale).contiguous(), *no_statistics(x), x.new_empty(0)

    def run_cci(
        x: Tensor, partner: Tensor, eta: Tensor, v: Tensor | None, scale: float
    ) -> tuple[Tensor, ...]:
        y = cci(x, partner, eta, v, scale)
        return y.contiguous(), x.new_empty(0), *no_statistics(x)

    def run_sci_backward(
        dy: Tensor, x: Tensor, v: Tensor | None, *unread: Any
    ) -> tuple[Tensor, Tensor]:
        dx, dv = sci_backward(dy, x, v, unread[-1])
        return dx, x.new_empty(0) if dv is None else dv

    def run_cci_backward(
        dy: Tensor, x: Tensor, partner: Tensor, eta: Tensor, v: Tensor | None, *unread: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, deta, dv = cci_backward(dy, x, partner, eta, v, unread[-1])
        return dx, deta, x.new_empty(0) if dv is None else dv

    return {
        "sci": run_sci,
        "sci_backward": run_sci_backward,
        "cci": run_cci,
        "cci_backward": run_cci_backward,
    }


def _reference_sci(x: Tensor, v: Tensor | None, scale: float) -> Tensor:
    return reference.sci(x, x if v is None else v, scale)


def _reference_sci_backward(
    dy: Tensor, x: Tensor, v: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    dx, dv = reference.sci_backward(dy, x, x if v is None else v, scale)
    return (dx + dv, None) if v is None else (dx, dv)


def _reference_cci(
    x: Tensor, partner: Tensor, eta: Tensor, v: Tensor | None, scale: float
) -> Tensor:
    return reference.cci(x, partner, eta, x if v is None else v, scale)[0]


def _reference_cci_backward(
    dy: Tensor, x: Tensor, partner: Tensor, eta: Tensor, v: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    dx, deta, dv = reference.cci_backward(dy, x, partner, eta, x if v is None else v, scale)
    return (dx + dv, deta, None) if v is None else (dx, deta, dv)


_REFERENCE = _in_python(
    _reference_sci, _reference_sci_backward, _reference_cci, _reference_cci_backward
)
_IN_PYTHON = {
    "reference": _REFERENCE
    | {"tap_means": reference.tap_means, "tap_means_backward": reference.tap_means_backward},
    "matmul": _in_python(matmul.sci, matmul.sci_backward, matmul.cci, matmul.cci_backward),
}


def _sci_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], *, keeps_y: bool
) -> None:
    x, v, scale = inputs
    y, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, v, y if keeps_y else x.new_empty(0), *kept)
    ctx.scale = scale


def _cci_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], *, keeps_y: bool
) -> None:
    x, partner, eta, v, scale = inputs
    y, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, partner, eta, v, y if keeps_y else x.new_empty(0), *kept)
    ctx.scale = scale


def _cci_after_sci_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, partner, eta, v, row_max, row_sum, scale = inputs
    _, b = output
    ctx.mark_non_differentiable(b)
    ctx.save_for_backward(x, partner, eta, v, x.new_empty(0), b, row_max, row_sum)
    ctx.scale = scale


def _tap_means_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.height, ctx.width = inputs[0].shape[-2:]


def _values_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


# Of a forward operator's saved tensors, inputs first and outputs then, and of dy: its gradients.
_Formula = Callable[[Sequence[Any], float, Tensor], tuple[Any, ...]]


def _sci_formula(backend: str) -> _Formula:
    # The definition's can itself be differentiated, which an operator's cannot.
    own = backend == "reference"
    compute = _REFERENCE["sci_backward"] if own else operator_of(backend, "sci_backward")

    def formula(saved: Sequence[Any], scale: float, dy: Tensor) -> tuple[Any, ...]:
        dx, dv = compute(dy, *saved, scale)
        return dx, None if saved[1] is None else dv, None

    return formula


def _cci_formula(backend: str) -> _Formula:
    own = backend == "reference"
    compute = _REFERENCE["cci_backward"] if own else operator_of(backend, "cci_backward")

    def formula(saved: Sequence[Any], scale: float, dy: Tensor) -> tuple[Any, ...]:
        dx, deta, dv = compute(dy, *saved, scale)
        return dx, None, deta, None if saved[3] is None else dv, None

    return formula


def _gradient(formula: _Formula) -> Any:
    return lambda ctx, dy, *_: formula(ctx.saved_tensors, ctx.scale, dy)


# The rows' statistics are x's, whose gradient has their share.
def _after_sci_gradient(formula: _Formula) -> Any:
    return lambda ctx, dy, *_: (*formula(ctx.saved_tensors, ctx.scale, dy), None, None)


# A graph made for values alone (an exported one, say) may still be differentiated: its gradient
# first computes what the forward pass left out.
def _values_gradient(forward: Any, formula: _Formula) -> Any:
    def gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        return formula((*inputs, *forward(*inputs, ctx.scale)), ctx.scale, dy)

    return gradient


# tap_means is linear: it and its gradient are each other's derivatives.
def _tap_means_gradient(backend: str) -> Any:
    def gradient(ctx: Any, dv: Tensor) -> Tensor:
        return operator_of(backend, "tap_means_backward")(dv, ctx.height, ctx.width)

    return gradient


def _tap_means_second_gradient(backend: str) -> Any:
    def gradient(ctx: Any, ddx: Tensor) -> tuple[Tensor, None, None]:
        return operator_of(backend, "tap_means")(ddx), None, None

    return gradient


def refuse_double_backward(ctx: Any, *_: Any) -> Any:
    """The derivative of a gradient that no kernel computes."""
    raise NotImplementedError(
        "this backend has no second derivative: call the operator with backend='reference'"
    )


def _define(backend: str, operators: dict[str, str]) -> None:
    fakes = dict(_FAKES)
    fakes["sci"] = partial(_sci_fake, keeps_rest=backend in _SCI_KEEPS_Y)
    fakes["cci"] = partial(_cci_fake, keeps_b=backend in _CCI_KEEPS_Y)
    for stem, schema in operators.items():
        name = f"cin_fast::{backend}_{stem}"
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name, fakes[stem])
        if backend in _IN_PYTHON:
            torch.library.impl(name, "CompositeExplicitAutograd", _IN_PYTHON[backend][stem])


for _name in dispatch.BACKENDS:
    _define(_name, schemas.OPERATORS)
    _compiled = schemas.COMPILED.get(_name, {})
    _define(_name, {s: schema for s, schema in schemas.VALUES.items() if s in _compiled})
    for _stem, _formula, _context in (
        ("sci", _sci_formula(_name), partial(_sci_context, keeps_y=_name in _SCI_KEEPS_Y)),
        ("cci", _cci_formula(_name), partial(_cci_context, keeps_y=_name in _CCI_KEEPS_Y)),
    ):
        _full = f"cin_fast::{_name}_{_stem}"
        torch.library.register_autograd(_full, _gradient(_formula), setup_context=_context)
        torch.library.register_autograd(f"{_full}_backward", refuse_double_backward)
        if f"{_stem}_values" in _compiled:
            torch.library.register_autograd(
                f"{_full}_values",
                _values_gradient(operator_of(_name, _stem), _formula),
                setup_context=_values_context,
            )
for _name in AFTER_SCI_BACKENDS:
    _define(_name, schemas.AFTER_SCI)
    torch.library.register_autograd(
        f"cin_fast::{_name}_cci_after_sci",
        _after_sci_gradient(_cci_formula(_name)),
        setup_context=_cci_after_sci_context,
    )
for _name in TAP_BACKENDS:
    _define(_name, schemas.TAP_MEANS)
    torch.library.register_autograd(
        f"cin_fast::{_name}_tap_means",
        _tap_means_gradient(_name),
        setup_context=_tap_means_context,
    )
    torch.library.register_autograd(
        f"cin_fast::{_name}_tap_means_backward",
        _tap_means_second_gradient(_name),
    )

# 0 where float32 products follow IEEE 754, 1 where they may round to TF32. The cuda backend asks,
# since C++ over the stable ABI cannot read the setting.
torch.library.define("cin_fast::float32_products", "() -> int")
torch.library.impl(
    "cin_fast::float32_products",
    "CompositeExplicitAutograd",
    lambda: int(torch.get_float32_matmul_precision() != "highest"),
)

torch.library.define("cin_fast::cpu_release_kept", schemas.KEPT_MEMORY["release_kept"])
