"""The operators by torch's own matrix products, a few images at a time.

Where a library multiplies faster than the fused kernels do (float32; maps of many positions), C x C
matrices cost little as long as they are few: those of a group of images fit into
:data:`WORKSPACE`, whatever the batch. None is kept for the backward pass, which makes them again.
On a GPU, kernels of ``cin_fast._C`` pass over them where it is built, torch's where it is not.

Shapes: B images, C channels, L positions, K columns of ``v``, which is x if None; N images of a
group. Sums and weights are float32 at least; weights are rounded to v's dtype to multiply it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from cin_fast import schemas
from cin_fast.autocast import as_written
from cin_fast.registry import has_kernel

# Bytes of C x C matrices at a time; those of one image, or of a pair, where they alone are more.
WORKSPACE = 256 << 20
# Bytes on which a GPU's libraries want rows to start: on others they fall back to slow kernels.
_ALIGNMENT = 16

for _stem, _schema in schemas.MATRIX_ROWS.items():
    torch.library.define(f"cin_fast::cuda_{_stem}", _schema)


@as_written
def sci(x_BCL: Tensor, v_BCK: Tensor | None, scale: float) -> Tensor:
    """Y = W v (Eq. 1): (B, C, K)."""
    x, v = _aligned(x_BCL, v_BCK)
    y_BCK = _like(x_BCL if v_BCK is None else v_BCK)
    for group in _groups(x, matrices=2):
        _sci(x[group], v[group], scale, out=y_BCK[group])
    return y_BCK


@as_written
def sci_backward(
    dy_BCK: Tensor, x_BCL: Tensor, v_BCK: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`sci` with respect to x (B, C, L) and v (B, C, K)."""
    (x, v), (dy, _) = _aligned(x_BCL, v_BCK), _aligned(dy_BCK)
    dx_BCL, dv_BCK = _like(x_BCL), None if v_BCK is None else _like(v_BCK)
    for group in _groups(x, matrices=3):
        dx, dv = _sci_backward(dy[group], x[group], v[group], scale, dv_BCK is None)
        dx_BCL[group] = dx[..., : x_BCL.shape[2]]
        if dv_BCK is not None and dv is not None:
            dv_BCK[group] = dv[..., : dv_BCK.shape[2]]
    return dx_BCL, dv_BCK


@as_written
def cci(
    x_BCL: Tensor, partner_B: Tensor, eta_B: Tensor, v_BCK: Tensor | None, scale: float
) -> Tensor:
    """Y' = |W_i - eta_i W_partner(i)| v_i (Eq. 5 and 6): (B, C, K)."""
    x, v = _aligned(x_BCL, v_BCK)
    y_BCK = _like(x_BCL if v_BCK is None else v_BCK)
    for images, partner_N in _pairs(x, partner_B, matrices=2):
        y = _cci(x[images], partner_N, eta_B[images], v[images], scale)
        y_BCK[images] = y[..., : y_BCK.shape[2]]
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
    (x, v), (dy, _) = _aligned(x_BCL, v_BCK), _aligned(dy_BCK)
    dx_BCL, dv_BCK = _like(x_BCL), None if v_BCK is None else _like(v_BCK)
    deta_B = torch.empty_like(eta_B)
    for images, partner_N in _pairs(x, partner_B, matrices=4):
        dx, deta_B[images], dv = _cci_backward(
            dy[images], x[images], partner_N, eta_B[images], v[images], scale, dv_BCK is None
        )
        dx_BCL[images] = dx[..., : x_BCL.shape[2]].to(x.dtype)
        if dv_BCK is not None and dv is not None:
            dv_BCK[images] = dv[..., : dv_BCK.shape[2]]
    return dx_BCL, deta_B, dv_BCK


# One function call per group: its matrices are freed before the next group's are made.


def _sci(x_NCL: Tensor, v_NCK: Tensor, scale: float, *, out: Tensor) -> None:
    p_NCC = _softmax(_product(x_NCL, x_NCL.mT), scale, v_NCK.dtype)
    if v_NCK.shape == out.shape:
        torch.bmm(p_NCC, v_NCK, out=out)
    else:
        out.copy_(torch.bmm(p_NCC, v_NCK)[..., : out.shape[2]])


def _sci_backward(
    dy_NCK: Tensor, x_NCL: Tensor, v_NCK: Tensor, scale: float, is_tied: bool
) -> tuple[Tensor, Tensor | None]:
    logits_NCC, dp_NCC = _product(x_NCL, x_NCL.mT), _product(dy_NCK, v_NCK.mT)
    p_NCC, ds_NCC = _softmax_backward(logits_NCC, dp_NCC, scale, x_NCL.dtype)
    return _multiply_backward(dy_NCK, x_NCL, p_NCC, ds_NCC, is_tied)


def _cci(x_NCL: Tensor, partner_N: Tensor, eta_N: Tensor, v_NCK: Tensor, scale: float) -> Tensor:
    logits_NCC = _product(x_NCL, x_NCL.mT)
    return torch.bmm(_interaction(logits_NCC, partner_N, eta_N, scale, v_NCK.dtype), v_NCK)


def _cci_backward(
    dy_NCK: Tensor,
    x_NCL: Tensor,
    partner_N: Tensor,
    eta_N: Tensor,
    v_NCK: Tensor,
    scale: float,
    is_tied: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    logits_NCC, d_NCC = _product(x_NCL, x_NCL.mT), _product(dy_NCK, v_NCK.mT)
    m_NCC, ds_NCC, deta_N = _interaction_backward(
        logits_NCC, d_NCC, partner_N, eta_N, scale, x_NCL.dtype
    )
    dx_NCL, dv_NCK = _multiply_backward(dy_NCK, x_NCL, m_NCC, ds_NCC, is_tied)
    return dx_NCL, deta_N, dv_NCK


def _multiply_backward(
    dy_NCK: Tensor, x_NCL: Tensor, weights_NCC: Tensor, ds_NCC: Tensor, is_tied: bool
) -> tuple[Tensor, Tensor | None]:
    """dx, float32 at least, of logits x x^T, and dv of weights v: where v = x a part of dx."""
    dx_NCL = _add_product(_product(ds_NCC, x_NCL), ds_NCC.mT, x_NCL)
    if is_tied:
        return _add_product(dx_NCL, weights_NCC.mT, dy_NCK), None
    return dx_NCL, torch.bmm(weights_NCC.mT, dy_NCK)


def _aligned(x_BCL: Tensor, v_BCK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x and v, on a GPU with zeros behind rows that would start where its libraries are slow."""
    x = _padded(x_BCL)
    return x, x if v_BCK is None else _padded(v_BCK)


def _padded(t: Tensor) -> Tensor:
    missing = -t.shape[-1] % (_ALIGNMENT // t.itemsize)
    return F.pad(t, (0, missing)) if t.is_cuda and missing else t


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _per_image(eta_N: Tensor) -> Tensor:
    return eta_N[:, None, None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _groups(x: Tensor, matrices: int, multiple: int = 1) -> Iterator[slice]:
    """The batch by as many images as may have so many matrices at once."""
    image = matrices * x.shape[1] ** 2 * _wide(x.dtype).itemsize
    step = max(1, WORKSPACE // max(1, image) // multiple) * multiple
    for first in range(0, len(x), step):
        yield slice(first, min(first + step, len(x)))


def _pairs(x: Tensor, partner_B: Tensor, matrices: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of whole pairs: their images, and where among these the partner of each is.

    Without asking the device, so that nothing waits for it: pairs come first, side by side, then
    those that are their own partners.
    """
    index_B = torch.arange(len(x), device=x.device)
    alone_B = partner_B == index_B
    pair_B = torch.minimum(partner_B, index_B) + len(x) * alone_B
    order_B = torch.argsort(2 * pair_B + (index_B > partner_B))
    place_B = torch.argsort(order_B)
    for group in _groups(x, matrices, multiple=2):
        images = order_B[group]
        yield images, place_B[partner_B[images]] - group.start


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, where sums stay float32 at least, as does the result."""
    wide = _wide(a.dtype)
    if a.dtype != wide and a.is_cuda:
        return torch.bmm(a, b, out_dtype=wide)
    return torch.bmm(a.to(wide), b.to(wide))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same, added to ``total`` in place."""
    return total.baddbmm_(a, b) if a.dtype == total.dtype else total.add_(_product(a, b))


def _softmax(logits_NCC: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Weights of ``scale`` times the logits, whose memory they may take."""
    if not _has_passes(logits_NCC):
        return torch.softmax(logits_NCC.mul_(scale), -1).to(dtype)
    p_NCC = logits_NCC if dtype == torch.float32 else torch.empty_like(logits_NCC, dtype=dtype)
    torch.ops.cin_fast.cuda_softmax_rows(p_NCC, logits_NCC, scale)
    return p_NCC


def _softmax_backward(
    logits_NCC: Tensor, dp_NCC: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """P, and the gradient of the logits from that of P; both may take the arguments' memory."""
    if not _has_passes(logits_NCC):
        p_NCC = torch.softmax(logits_NCC.mul_(scale), -1)
        return p_NCC.to(dtype), _through_weights(dp_NCC, p_NCC, scale).to(dtype)
    in_place = dtype == torch.float32
    p_NCC, ds_NCC = (t if in_place else torch.empty_like(t, dtype=dtype)
                     for t in (logits_NCC, dp_NCC))  # fmt: skip
    torch.ops.cin_fast.cuda_softmax_rows_backward(p_NCC, ds_NCC, logits_NCC, dp_NCC, scale)
    return p_NCC, ds_NCC


def _interaction(
    logits_NCC: Tensor, partner_N: Tensor, eta_N: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """|M| with M = P - eta P_partner; may take the logits' memory."""
    if not _has_passes(logits_NCC):
        p_NCC = torch.softmax(logits_NCC.mul_(scale), -1)
        return p_NCC.sub(_per_image(eta_N) * p_NCC[partner_N]).abs_().to(dtype)
    m_NCC = torch.empty_like(logits_NCC, dtype=dtype)
    torch.ops.cin_fast.cuda_cci_rows(m_NCC, logits_NCC, partner_N, eta_N, scale)
    return m_NCC


def _interaction_backward(
    logits_NCC: Tensor,
    d_NCC: Tensor,
    partner_N: Tensor,
    eta_N: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """|M|, and from its gradient d those of the logits and of eta."""
    if _has_passes(logits_NCC):
        m_NCC, ds_NCC = (torch.empty_like(logits_NCC, dtype=dtype) for _ in "ms")
        deta_NC = torch.empty_like(logits_NCC[..., 0])
        torch.ops.cin_fast.cuda_cci_rows_backward(
            m_NCC, ds_NCC, deta_NC, logits_NCC, d_NCC, partner_N, eta_N, scale
        )
        return m_NCC, ds_NCC, deta_NC.sum(1)
    p_NCC = torch.softmax(logits_NCC.mul_(scale), -1)
    other_NCC, eta_N11 = p_NCC[partner_N], _per_image(eta_N)
    m_NCC = p_NCC - eta_N11 * other_NCC
    dm_NCC = m_NCC.sign().mul_(d_NCC)
    # partner is an involution: what image i owes its partner's weights arrives as a gather.
    dp_NCC = dm_NCC - (eta_N11 * dm_NCC)[partner_N]
    ds_NCC = _through_weights(dp_NCC, p_NCC, scale)
    return m_NCC.abs_().to(dtype), ds_NCC.to(dtype), -dm_NCC.mul_(other_NCC).sum((1, 2))


def _through_weights(dp_NCC: Tensor, p_NCC: Tensor, scale: float) -> Tensor:
    """scale P (dP - rowsum(P dP)), in dP's memory."""
    return dp_NCC.sub_((p_NCC * dp_NCC).sum(-1, keepdim=True)).mul_(p_NCC).mul_(scale)


def _has_passes(logits_NCC: Tensor) -> bool:
    """Whether our kernels can pass over these matrices."""
    key = logits_NCC.device.type.upper()
    return logits_NCC.dtype == torch.float32 and has_kernel("cin_fast::cuda_softmax_rows", key)
