"""The operators by torch's own matrix products, a few images at a time.

Where a library multiplies faster than the fused kernels do (float32; maps of many positions), C x C
matrices cost little as long as they are few: those of a group of images fit into
:data:`WORKSPACE`, whatever the batch. None is kept for the backward pass, which makes them again.

Shapes: B images, C channels, L positions, K columns of ``v``, which is x if None; N images of a
group. Sums and weights are float32 at least; weights are rounded to v's dtype to multiply it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cin_fast.autocast import as_written

# Bytes of C x C matrices at a time; those of one image where they alone are more.
WORKSPACE = 128 << 20


@as_written
def sci(x_BCL: Tensor, v_BCK: Tensor | None, scale: float) -> Tensor:
    """Y = W v (Eq. 1): (B, C, K)."""
    v_BCK = x_BCL if v_BCK is None else v_BCK
    y_BCK = _like(v_BCK)
    for group in _groups(x_BCL, matrices=2):
        p_NCC = _weights(x_BCL[group], scale)
        torch.bmm(p_NCC.to(v_BCK.dtype), v_BCK[group], out=y_BCK[group])
    return y_BCK


@as_written
def sci_backward(
    dy_BCK: Tensor, x_BCL: Tensor, v_BCK: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`sci` with respect to x (B, C, L) and v (B, C, K)."""
    dx_BCL, dv_BCK = _like(x_BCL), None if v_BCK is None else _like(v_BCK)
    for group in _groups(x_BCL, matrices=4):
        x_NCL, dy_NCK, v_NCK = x_BCL[group], dy_BCK[group], _of(group, v_BCK, x_BCL)
        p_NCC = _weights(x_NCL, scale)
        dx_NCL = _through_softmax(_product(dy_NCK, v_NCK.mT), p_NCC, x_NCL, scale)
        _give_values(p_NCC, dy_NCK, dx_NCL, dv_BCK, group)
        dx_BCL[group] = dx_NCL
    return dx_BCL, dv_BCK


@as_written
def cci(
    x_BCL: Tensor, partner_B: Tensor, eta_B: Tensor, v_BCK: Tensor | None, scale: float
) -> Tensor:
    """Y' = |W_i - eta_i W_partner(i)| v_i (Eq. 5 and 6): (B, C, K)."""
    v_BCK = x_BCL if v_BCK is None else v_BCK
    y_BCK = _like(v_BCK)
    for group in _groups(x_BCL, matrices=4):
        other_NCC = _weights(x_BCL[partner_B[group]], scale)
        m_NCC = _weights(x_BCL[group], scale).sub_(other_NCC.mul_(_per_image(eta_B[group])))
        torch.bmm(m_NCC.abs_().to(v_BCK.dtype), v_BCK[group], out=y_BCK[group])
    return y_BCK


@as_written
def cci_backward(
    dy_BCK: Tensor,
    x_BCL: Tensor,
    partner_B: Tensor,
    eta_B: Tensor,
    v_BCK: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`cci`'s Y' with respect to x (B, C, L), eta (B,) and v (B, C, K)."""
    dx_BCL, dv_BCK = _like(x_BCL), None if v_BCK is None else _like(v_BCK)
    deta_B = torch.empty_like(eta_B)
    for group in _groups(x_BCL, matrices=7):
        partner_N, x_NCL, dy_NCK = partner_B[group], x_BCL[group], dy_BCK[group]
        eta_N11, its_eta_N11 = _per_image(eta_B[group]), _per_image(eta_B[partner_N])
        p_NCC, other_NCC = _weights(x_NCL, scale), _weights(x_BCL[partner_N], scale)
        # partner is an involution: what image i owes its partner's weights is due in the
        # partner's M, with the partner's eta.
        its_dm_NCC = torch.sub(other_NCC, p_NCC * its_eta_N11).sign_()
        its_dm_NCC *= _product(dy_BCK[partner_N], _of(partner_N, v_BCK, x_BCL).mT)
        m_NCC = p_NCC - eta_N11 * other_NCC
        dm_NCC = m_NCC.sign().mul_(_product(dy_NCK, _of(group, v_BCK, x_BCL).mT))
        deta_B[group] = -other_NCC.mul_(dm_NCC).sum((1, 2))
        dp_NCC = dm_NCC.sub_(its_dm_NCC.mul_(its_eta_N11))
        dx_NCL = _through_softmax(dp_NCC, p_NCC, x_NCL, scale)
        _give_values(m_NCC.abs_(), dy_NCK, dx_NCL, dv_BCK, group)
        dx_BCL[group] = dx_NCL
    return dx_BCL, deta_B, dv_BCK


def _groups(x_BCL: Tensor, matrices: int) -> Iterator[slice]:
    """The batch by as many images as may have so many matrices at once."""
    batch, channels, _ = x_BCL.shape
    image = matrices * channels**2 * _wide(x_BCL.dtype).itemsize
    step = max(1, WORKSPACE // max(1, image))
    for first in range(0, batch, step):
        yield slice(first, min(first + step, batch))


def _of(images: slice | Tensor, v_BCK: Tensor | None, x_BCL: Tensor) -> Tensor:
    return (x_BCL if v_BCK is None else v_BCK)[images]


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _per_image(eta_N: Tensor) -> Tensor:
    return eta_N[:, None, None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _weights(x_NCL: Tensor, scale: float) -> Tensor:
    if abs(scale) == 1 or x_NCL.dtype == _wide(x_NCL.dtype):
        return torch.softmax(_product(scale * x_NCL, x_NCL.mT), -1)
    # Rounded to 16 bits, scale x would give other logits.
    return torch.softmax(_product(x_NCL, x_NCL.mT).mul_(scale), -1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, where sums stay float32 at least, as does the result."""
    wide = _wide(a.dtype)
    if a.dtype != wide and a.is_cuda:
        return torch.bmm(a, b, out_dtype=wide)
    return torch.bmm(a.to(wide), b.to(wide))


def _through_softmax(dp_NCC: Tensor, p_NCC: Tensor, x_NCL: Tensor, scale: float) -> Tensor:
    """dx = scale (dS + dS^T) x with dS = P (dP - rowsum(P dP))."""
    ds_NCC = torch._softmax_backward_data(dp_NCC, p_NCC, -1, p_NCC.dtype).to(x_NCL.dtype)
    return _product(ds_NCC, x_NCL).add_(_product(ds_NCC.mT, x_NCL)).mul_(scale)


def _give_values(
    weights_NCC: Tensor, dy_NCK: Tensor, dx_NCL: Tensor, dv_BCK: Tensor | None, group: slice
) -> None:
    """The gradient of what the weights multiplied: dv, or where v = x a part of dx."""
    rounded_NCC = weights_NCC.to(dy_NCK.dtype)
    if dv_BCK is None:
        dx_NCL += _product(rounded_NCC.mT, dy_NCK)
    else:
        torch.bmm(rounded_NCC.mT, dy_NCK, out=dv_BCK[group])
