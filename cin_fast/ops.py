"""The public functions: ``sci``, ``cci`` and what goes with them.

Shapes: B images, C channels, L positions, K columns of ``v``. ``v = None`` means ``v = x``.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from cin_fast import dispatch, reference, schemas
from cin_fast.arguments import (
    as_autocast,
    as_number,
    check_eta,
    check_features,
    check_partner,
    check_values,
    flat_map,
)
from cin_fast.operators import operator_of


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
    if _definition_serves(backend, x, v):
        y_BCK = reference.sci(x_BCL, x_BCL if v_BCK is None else v_BCK, scale)
    else:
        name = pick_backend(x, backend)
        if _has_values(name, "sci", x, v):
            y_BCK = operator_of(name, "sci_values")(x_BCL, v_BCK, scale)
        else:
            y_BCK = operator_of(name, "sci")(x_BCL, v_BCK, scale)[0]
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
    if _definition_serves(backend, x, v, eta):
        y_BCK = reference.cci(x_BCL, partner, eta, x_BCL if v_BCK is None else v_BCK, scale)[0]
    else:
        name = pick_backend(x, backend)
        if _has_values(name, "cci", x, eta, v):
            y_BCK = operator_of(name, "cci_values")(x_BCL, partner, eta, v_BCK, scale)
        else:
            y_BCK = operator_of(name, "cci")(x_BCL, partner, eta, v_BCK, scale)[0]
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
    if dispatch.transformed(x) or dispatch.exported(name):
        return reference.tap_means(x)
    compiled = (one for one in ("cpu", "cuda") if not dispatch.why_not(x, one))
    backend = name if name == "reference" else next(compiled, "reference")
    return operator_of(backend, "tap_means")(x)


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
    # Those of the pooled forms, which these modules define.
    for name in ("pair", "thin"):
        importlib.import_module(f"cin_fast.{name}")
    return {name: dispatch.unavailable(name) for name in dispatch.BACKENDS}


def _has_values(backend: str, stem: str, *tensors: Tensor | None) -> bool:
    """Whether there is an operator for values alone, and they are all that is asked for."""
    if f"{stem}_values" not in schemas.COMPILED.get(backend, {}):
        return False
    needed = any(t is not None and t.requires_grad for t in tensors)
    return not (needed and torch.is_grad_enabled())


def pick_backend(x: Tensor, backend: str | None) -> str:
    """The backend named, or the one that ``None`` means for x; ``ValueError`` if it cannot run."""
    return dispatch.choose(x) if backend is None else dispatch.require(x, backend)


def _definition_serves(backend: str | None, x: Tensor, *others: Tensor | None) -> bool:
    """Whether plain PyTorch has to run, and no operator."""
    if not dispatch.transformed(x, *others):
        return dispatch.exported(pick_backend(x, backend))
    if backend not in (None, "reference"):
        raise ValueError(
            f"backend: {backend!r} cannot run under forward-mode AD or torch.func: 'reference' can"
        )
    return True
