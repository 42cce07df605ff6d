"""How many operations the operators' products take.

Importing this module tells ``torch.utils.flop_counter``, whose ``FlopCounterMode`` counts them then
(the package itself does not, as that counter imports Triton).

Two for a multiplication and an addition; softmax and sums are left out, as that counter leaves them
out. Products are counted as the definition has them, with x x^T made again in the gradient:
symmetry saves some of them on the CPU. Shapes: B images, C channels, L positions, K columns of v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# Where operators are defined.
from cin_fast import operators as operators
from cin_fast import pair as pair
from cin_fast import thin as thin
from cin_fast.dispatch import BACKENDS

_Shape = Sequence[int]


def sci_flops(x_BCL: _Shape, v_BCK: _Shape | None = None) -> int:
    """Of ``softmax(scale * x x^T) v``; those of ``cci`` are as many."""
    return _products(x_BCL, v_BCK, 1, 1)


def sci_backward_flops(x_BCL: _Shape, v_BCK: _Shape | None = None) -> int:
    """Of its gradient: x x^T and both of its gradients; dy v^T and that of v."""
    return _products(x_BCL, v_BCK, 3, 2)


def _products(x: _Shape, v: _Shape | None, of_x: int, of_v: int) -> int:
    batch, channels, positions = x
    columns = positions if v is None else v[2]
    return 2 * batch * channels**2 * (of_x * positions + of_v * columns)


def _sci(x: _Shape, v: _Shape | None, *_: Any, **__: Any) -> int:
    return sci_flops(x, v)


def _sci_backward(dy: _Shape, x: _Shape, v: _Shape | None, *_: Any, **__: Any) -> int:
    return sci_backward_flops(x, v)


def _cci(x: _Shape, partner: Any, eta: Any, v: _Shape | None, *_: Any, **__: Any) -> int:
    return sci_flops(x, v)


def _cci_backward(
    dy: _Shape, x: _Shape, partner: Any, eta: Any, v: _Shape | None, *_: Any, **__: Any
) -> int:
    return sci_backward_flops(x, v)


def _pair(
    x: _Shape, partner: Any, psi_weight: Any, psi_bias: Any, v: _Shape, *_: Any, **__: Any
) -> int:
    return 2 * sci_flops(x, v)


def _pair_backward(
    dy: Any,
    dy_pair: Any,
    x: _Shape,
    partner: Any,
    psi_weight: Any,
    psi_bias: Any,
    v: _Shape,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * sci_backward_flops(x, v)


def _linear(a_BK: _Shape, w_OK: _Shape, *_: Any, **__: Any) -> int:
    return 2 * a_BK[0] * a_BK[1] * w_OK[0]


def _linear_gradient(dy_BO: _Shape, other: _Shape, *_: Any, **__: Any) -> int:
    # The other is w or a, and K is its last axis.
    return 2 * dy_BO[0] * dy_BO[1] * other[1]


_FORMULAS: dict[str, Callable[..., int]] = {
    "sci": _sci,
    "sci_values": _sci,
    "sci_backward": _sci_backward,
    "cci": _cci,
    "cci_values": _cci,
    "cci_after_sci": _cci,
    "cci_backward": _cci_backward,
    "pair": _pair,
    "pair_backward": _pair_backward,
    "thin_linear": _linear,
    "thin_linear_input": _linear_gradient,
    "thin_linear_weight": _linear_gradient,
}

for _backend in BACKENDS:
    for _stem, _formula in _FORMULAS.items():
        if hasattr(torch.ops.cin_fast, f"{_backend}_{_stem}"):
            register_flop_formula(getattr(torch.ops.cin_fast, f"{_backend}_{_stem}"))(_formula)
