"""The operators: fakes and autograd for every backend, and the public ``sci`` and ``cci``.

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
from cin_fast.arguments import (
    as_autocast,
    as_number,
    check_eta,
    check_features,
    check_partner,
    check_values,
    flat_map,
)

TAP_BACKENDS = ("reference", "cpu", "cuda")

# Backends whose sci makes delta = dY . Y: y is kept for it, and what rounding to 16 bits took off
# it. And whose cci keeps y and the partner term b, y = A - eta b.
_SCI_KEEPS_Y = ("cpu", "cuda")
_CCI_KEEPS_Y = ("cpu",)

# Backends whose cci can take its rows' statistics from sci, as an operator with a gradient. (The
# cpu backend's is a part of cin_fast.pair's.)
AFTER_SCI_BACKENDS = ("triton", "cuda")


def sci(
    x: Tensor, v: Tensor | None = None, *, scale: float = -1.0, backend: str | None = None
) -> Tensor:
    """Self-channel interaction: ``softmax(scale * x x^T) v`` (Eq. 1 and 2).

    Args:
        x: features, (B, C, L) or (B, C, H, W); float32, bfloat16, float16, or float64 (reference).
        v: what the weights are applied to, (B, C, K) or (B, C, H, W), of x's dtype; x if None.
        scale: -1 for the paper's SCI and DANet's channel attention, +1 for Pos-SCI.
        backend: ``reference``, ``matmul``, ``cpu``, ``triton`` or ``cuda``; None picks
            (``dispatch.choose``).

    Returns:
        A tensor of v's shape and x's dtype. Under autocast, inputs are cast to its dtype.

    Raises:
        ValueError: naming the argument and what was found, for a wrong shape, dtype or device, or
            a backend that cannot run here.

    >>> x = torch.relu(torch.randn(2, 64, 14, 14))
    >>> sci(x).shape
    torch.Size([2, 64, 14, 14])
    """
    check_features(x)
    check_values(x, v)
    x, v = as_autocast(x, v)
    scale = as_number("scale", scale)
    x_BCL, v_BCK = flat_map(x), None if v is None else flat_map(v)
    if dispatch.transformed(x, v):
        _require_definition(backend)
        y_BCK = reference.sci(x_BCL, x_BCL if v_BCK is None else v_BCK, scale)
    else:
        name = pick_backend(x, backend)
        if _has_values(name, "sci", x, v):
            y_BCK = _op(name, "sci_values")(x_BCL, v_BCK, scale)
        else:
            y_BCK = _op(name, "sci")(x_BCL, v_BCK, scale)[0]
    return y_BCK.reshape((x if v is None else v).shape)


def cci(
    x: Tensor,
    partner: Tensor,
    eta: Tensor,
    v: Tensor | None = None,
    *,
    scale: float = -1.0,
    backend: str | None = None,
) -> Tensor:
    """Contrastive channel interaction: ``|W_i - eta_i W_partner(i)| v_i`` (Eq. 5 and 6).

    Both directions of every pair come from one call: eta of image A is the paper's eta, eta of
    its partner B is the paper's gamma.

    Args:
        x: features, (B, C, L) or (B, C, H, W), as for :func:`sci`.
        partner: int64 (B,), an involution: ``partner[partner[i]] == i``. On the CPU the check is
            free; on a GPU it waits for the device, so pass a CPU tensor where speed matters.
        eta: (B,), floating point, differentiable.
        v, scale, backend: as for :func:`sci`.

    Returns:
        A tensor of v's shape and x's dtype.

    Raises:
        ValueError: naming the argument and what was found.
    """
    check_features(x)
    check_partner(x, partner)
    check_eta(x, eta)
    check_values(x, v)
    x, v = as_autocast(x, v)
    scale = as_number("scale", scale)
    eta = eta.to(torch.promote_types(x.dtype, torch.float32))
    partner = partner.to(x.device, non_blocking=True)
    x_BCL, v_BCK = flat_map(x), None if v is None else flat_map(v)
    if dispatch.transformed(x, v, eta):
        _require_definition(backend)
        y_BCK = reference.cci(x_BCL, partner, eta, x_BCL if v_BCK is None else v_BCK, scale)[0]
    else:
        name = pick_backend(x, backend)
        if _has_values(name, "cci", x, eta, v):
            y_BCK = _op(name, "cci_values")(x_BCL, partner, eta, v_BCK, scale)
        else:
            y_BCK = _op(name, "cci")(x_BCL, partner, eta, v_BCK, scale)[0]
    return y_BCK.reshape((x if v is None else v).shape)


def sci_weights(x: Tensor, scale: float = -1.0) -> Tensor:
    """The matrix W = softmax(scale * x x^T) itself (Eq. 2), (B, C, C): for pictures.

    Quadratic in C, and never needed to compute :func:`sci`.

    Raises:
        ValueError: naming the argument and what was found.
    """
    check_features(x)
    return reference.sci_weights(flat_map(x), as_number("scale", scale))


def tap_means(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Per channel, the mean over the map of what each tap of a padded 3x3 convolution sees.

    The mean over positions of ``conv(x)`` is then ``tap_means(x).flatten(1) @ weight.flatten(1).T
    + bias``: the identity that lets the head skip the convolution. Column 4 is the mean of x.

    Args:
        x: (B, C, H, W), floating point.
        backend: ``reference`` asks for the definition. Whatever else computes the operators on
            these tap means, the compiled kernel of x's device makes them, where there is one.

    Returns:
        (B, C, 9) of x's dtype; sums are float32 or wider.

    Raises:
        ValueError: naming the argument and what was found.
    """
    check_features(x)
    if x.dim() != 4:
        raise ValueError(f"x: expected (B, C, H, W), found shape {tuple(x.shape)}")
    name = pick_backend(x, backend)
    if dispatch.transformed(x):
        return reference.tap_means(x)
    compiled = () if name == "reference" else ("cpu", "cuda")
    kernels = (one for one in compiled if not dispatch.why_not(x, one))
    return _op(next(kernels, "reference"), "tap_means")(x)


def empty_cache() -> int:
    """Give the memory that the ``cpu`` backend keeps from call to call back to the system.

    Scratch of large calls and gradients of a large phi, at most 512 MiB: fresh pages are slow to
    come, so the next call takes what the last one dropped.

    Returns:
        The bytes given back; 0 where the backend is off.
    """
    return 0 if dispatch.unavailable("cpu") else torch.ops.cin_fast.cpu_release_kept()


def load_backends() -> dict[str, str]:
    """Load every backend that runs on this machine; returns why not by name, empty for those.

    Calls of :func:`sci` and the like load what they need. A program that ``torch.export`` made
    names a backend's operators and does not, so the process that runs it calls this first.
    """
    return {name: dispatch.unavailable(name) for name in dispatch.BACKENDS}


def _has_values(backend: str, stem: str, *tensors: Tensor | None) -> bool:
    """Whether there is an operator for values alone, and they are all that is asked for."""
    if f"{stem}_values" not in schemas.COMPILED.get(backend, {}):
        return False
    needed = any(t is not None and t.requires_grad for t in tensors)
    return not (needed and torch.is_grad_enabled())


def _op(backend: str, stem: str) -> Any:
    return getattr(torch.ops.cin_fast, f"{backend}_{stem}").default


def pick_backend(x: Tensor, backend: str | None) -> str:
    """The backend named, or the one that ``None`` means for x; ``ValueError`` if it cannot run."""
    return dispatch.choose(x) if backend is None else dispatch.require(x, backend)


def _require_definition(backend: str | None) -> None:
    if backend not in (None, "reference"):
        raise ValueError(
            f"backend: {backend!r} cannot run under forward-mode AD or torch.func: 'reference' can"
        )


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
    compute = _REFERENCE["sci_backward"] if own else _op(backend, "sci_backward")

    def formula(saved: Sequence[Any], scale: float, dy: Tensor) -> tuple[Any, ...]:
        dx, dv = compute(dy, *saved, scale)
        return dx, None if saved[1] is None else dv, None

    return formula


def _cci_formula(backend: str) -> _Formula:
    own = backend == "reference"
    compute = _REFERENCE["cci_backward"] if own else _op(backend, "cci_backward")

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
        return _op(backend, "tap_means_backward")(dv, ctx.height, ctx.width)

    return gradient


def _tap_means_second_gradient(backend: str) -> Any:
    def gradient(ctx: Any, ddx: Tensor) -> tuple[Tensor, None, None]:
        return _op(backend, "tap_means")(ddx), None, None

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
                _values_gradient(_op(_name, _stem), _formula),
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
