"""What the operators take: checks that name the argument and what was found, and casts.

Shapes: B images, C channels, L positions, K columns of ``v``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from cin_fast import dispatch

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_number(name: str, value: Any) -> float:
    """``value`` as a float, or ``ValueError`` that names the argument."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name}: expected a number, found a tensor that asks for a gradient")
    if isinstance(value, str) or (isinstance(value, Tensor) and value.is_meta):
        raise ValueError(f"{name}: expected a number, found {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected a number, found {value!r}") from error
    # A graph's number may be a symbol, which has no value to look at.
    if not torch.compiler.is_compiling() and not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, found {number}")
    return number


def flat_map(t: Tensor) -> Tensor:
    """(B, C, H, W) as (B, C, H * W); three axes as they are."""
    return t.flatten(2) if t.dim() == 4 else t


def as_autocast(x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and v in autocast's dtype where it is on."""
    if x.dtype == torch.float64 or not dispatch.autocast_enabled(x):
        return x, v
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), None if v is None else v.to(dtype)


def _check_dense(name: str, t: Tensor) -> None:
    if t.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, found layout {t.layout}")


def check_features(x: Tensor) -> None:
    """Raise ValueError unless x can be the operators' features."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x: expected a tensor, found {type(x).__name__}")
    _check_dense("x", x)
    if x.is_nested:
        raise ValueError("x: expected one shape for all images, found a nested tensor")
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected (B, C, L) or (B, C, H, W), found shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x: expected float32, float64, bfloat16 or float16, found {x.dtype}")
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: channels and positions may not be empty, found {tuple(x.shape)}")


def check_values(x: Tensor, v: Tensor | None) -> None:
    """Refuse, with ``ValueError``, a ``v`` that does not go with ``x``."""
    if v is None:
        return
    if not isinstance(v, Tensor):
        raise ValueError(f"v: expected a tensor or None, found {type(v).__name__}")
    _check_dense("v", v)
    if v.dim() not in (3, 4) or v.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"v: expected ({x.shape[0]}, {x.shape[1]}, K) to go with x, found {tuple(v.shape)}"
        )
    if v.shape[2] == 0 or v.shape[-1] == 0:
        raise ValueError(f"v: columns may not be empty, found {tuple(v.shape)}")
    # Autocast leaves float64 alone.
    cast = dispatch.autocast_enabled(x) and torch.float64 not in (x.dtype, v.dtype)
    if v.dtype != x.dtype and not cast:
        raise ValueError(f"v: expected x's dtype {x.dtype}, found {v.dtype}")
    if v.device != x.device:
        raise ValueError(f"v: expected x's device {x.device}, found {v.device}")


def check_partner(x: Tensor, partner: Tensor) -> None:
    """Refuse, with ``ValueError``, a ``partner`` that does not pair the images of ``x``."""
    if not isinstance(partner, Tensor) or partner.dtype != torch.int64:
        found = partner.dtype if isinstance(partner, Tensor) else type(partner).__name__
        raise ValueError(f"partner: expected an int64 tensor, found {found}")
    _check_dense("partner", partner)
    if partner.shape != x.shape[:1]:
        raise ValueError(
            f"partner: expected shape ({x.shape[0]},) to go with x, found {tuple(partner.shape)}"
        )
    if partner.device != x.device and partner.device.type != "cpu":
        raise ValueError(
            f"partner: expected x's device {x.device} or the CPU, found {partner.device}"
        )
    # There are no values to read while a graph is being traced, nor without data.
    if torch.compiler.is_compiling() or partner.is_meta or isinstance(partner, FakeTensor):
        return
    if torch._C._functorch.is_batchedtensor(partner):
        raise ValueError("partner: expected one for all, found a tensor that vmap batches")
    index = torch.arange(len(partner), device=partner.device)
    inside = (partner >= 0) & (partner < len(partner))
    if not bool((inside & (partner[partner.where(inside, index)] == index)).all()):
        raise ValueError(
            "partner: expected an involution (partner[partner[i]] == i), found "
            f"{partner.tolist() if len(partner) <= 32 else 'one that is not'}"
        )


def check_eta(x: Tensor, eta: Tensor) -> None:
    """Refuse, with ``ValueError``, an ``eta`` that does not go with ``x``."""
    if not isinstance(eta, Tensor) or not eta.is_floating_point():
        found = eta.dtype if isinstance(eta, Tensor) else type(eta).__name__
        raise ValueError(f"eta: expected a floating-point tensor, found {found}")
    _check_dense("eta", eta)
    if eta.shape != x.shape[:1]:
        raise ValueError(f"eta: expected shape ({x.shape[0]},), found {tuple(eta.shape)}")
    if eta.device != x.device:
        raise ValueError(f"eta: expected x's device {x.device}, found {eta.device}")
