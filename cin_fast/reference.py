"""Channel interaction in plain PyTorch: the definition every other backend is held to.

Shapes: B images, C channels, L positions, K columns of ``v``; ``p_BCC`` holds softmax weights.
Everything here is differentiable by ordinary autograd, gradients included, in any floating dtype.
Logits and softmax are float32 for half-precision inputs; products are in the input's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cin_fast.autocast import as_written


@as_written
def sci_weights(x_BCL: Tensor, scale: float) -> Tensor:
    """W = softmax(scale * x x^T) over the last axis (Eq. 2): (B, C, C), at least float32."""
    wide = x_BCL.to(torch.promote_types(x_BCL.dtype, torch.float32))
    # Not mT, which the older of torch's ways to ONNX does not know.
    return torch.softmax(scale * (wide @ wide.transpose(1, 2)), dim=-1)


@as_written
def sci(x_BCL: Tensor, v_BCK: Tensor, scale: float) -> Tensor:
    """Y = W v (Eq. 1): (B, C, K)."""
    return sci_weights(x_BCL, scale).to(v_BCK.dtype) @ v_BCK


@as_written
def sci_backward(
    dy_BCK: Tensor, x_BCL: Tensor, v_BCK: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`sci` with respect to x (B, C, L) and v (B, C, K)."""
    p_BCC = sci_weights(x_BCL, scale)
    dp_BCC = (dy_BCK @ v_BCK.mT).to(p_BCC.dtype)
    dx_BCL = _through_softmax(dp_BCC, p_BCC, x_BCL, scale)
    dv_BCK = p_BCC.to(v_BCK.dtype).mT @ dy_BCK
    return dx_BCL, dv_BCK


@as_written
def cci(
    x_BCL: Tensor, partner_B: Tensor, eta_B: Tensor, v_BCK: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Y' = |W_i - eta_i W_partner(i)| v_i (Eq. 5 and 6), and its partner term b, both (B, C, K).

    With sigma = sign(W_i - eta_i W_p), b = (sigma W_p) v and Y' = (sigma W_i) v - eta b.
    """
    p_BCC = sci_weights(x_BCL, scale)
    other_BCC = p_BCC[partner_B]
    m_BCC = p_BCC - _per_image(eta_B, p_BCC) * other_BCC
    y_BCK = m_BCC.abs().to(v_BCK.dtype) @ v_BCK
    b_BCK = (m_BCC.sign() * other_BCC).to(v_BCK.dtype) @ v_BCK
    return y_BCK, b_BCK


@as_written
def cci_backward(
    dy_BCK: Tensor,
    x_BCL: Tensor,
    partner_B: Tensor,
    eta_B: Tensor,
    v_BCK: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`cci`'s Y' with respect to x (B, C, L), eta (B,) and v (B, C, K)."""
    p_BCC = sci_weights(x_BCL, scale)
    other_BCC = p_BCC[partner_B]
    eta_B11 = _per_image(eta_B, p_BCC)
    m_BCC = p_BCC - eta_B11 * other_BCC
    dm_BCC = m_BCC.sign() * (dy_BCK @ v_BCK.mT).to(p_BCC.dtype)
    # partner is an involution: what image i owes its partner's weights arrives as a gather.
    dp_BCC = dm_BCC - (eta_B11 * dm_BCC)[partner_B]
    dx_BCL = _through_softmax(dp_BCC, p_BCC, x_BCL, scale)
    deta_B = -(dm_BCC * other_BCC).sum(dim=(1, 2)).to(eta_B.dtype)
    dv_BCK = m_BCC.abs().to(v_BCK.dtype).mT @ dy_BCK
    return dx_BCL, deta_B, dv_BCK


@as_written
def eta(mean_y_BC: Tensor, partner_B: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """psi([mean Y_i, mean Y_partner(i)]) of Eq. 5, (B,): psi's weight has 2 C numbers, bias one."""
    wide = mean_y_BC.to(torch.promote_types(mean_y_BC.dtype, torch.float32))
    own_C, other_C = weight.to(wide.dtype).flatten().chunk(2)
    return wide @ own_C + wide[partner_B] @ other_C + bias.to(wide.dtype).reshape(())


@as_written
def eta_backward(
    deta_B: Tensor, mean_y_BC: Tensor, partner_B: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`eta` with respect to the means (B, C), psi's weight and its bias."""
    own_C, other_C = weight.to(deta_B.dtype).flatten().chunk(2)
    wide = mean_y_BC.to(deta_B.dtype)
    dmean_BC = torch.outer(deta_B, own_C) + torch.outer(deta_B[partner_B], other_C)
    dweight = torch.cat([deta_B @ wide, deta_B @ wide[partner_B]]).reshape(weight.shape)
    return dmean_BC, dweight, deta_B.sum()


def tap_rectangles(height: int, width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """U (H*W, 9): the positions that each tap of a padded 3x3 convolution reaches, divided by H*W.

    Column ``3 * ky + kx`` belongs to the weight ``[..., ky, kx]`` of a
    ``Conv2d(..., 3, padding=1)``; column 4, the centre tap, is the plain mean.
    """

    def reach(size: int) -> Tensor:
        position = torch.arange(size, device=device)
        return torch.stack([position < size - 1, position >= 0, position > 0], dim=1).to(dtype)

    rectangles = reach(height)[:, None, :, None] * reach(width)[None, :, None, :]
    return rectangles.reshape(height * width, 9) / (height * width)


@as_written
def tap_means(x_BCHW: Tensor) -> Tensor:
    """v = x U: per channel, the mean over the map of what each of nine taps sees: (B, C, 9)."""
    height, width = x_BCHW.shape[-2:]
    wide = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))
    u_L9 = tap_rectangles(height, width, device=x_BCHW.device, dtype=wide.dtype)
    return (wide.flatten(2) @ u_L9).to(x_BCHW.dtype)


@as_written
def tap_means_backward(dv_BC9: Tensor, height: int, width: int) -> Tensor:
    """Gradient of :func:`tap_means` with respect to its map: (B, C, H, W)."""
    wide = dv_BC9.to(torch.promote_types(dv_BC9.dtype, torch.float32))
    u_L9 = tap_rectangles(height, width, device=dv_BC9.device, dtype=wide.dtype)
    return (wide @ u_L9.mT).to(dv_BC9.dtype).unflatten(-1, (height, width))


def _through_softmax(dp_BCC: Tensor, p_BCC: Tensor, x_BCL: Tensor, scale: float) -> Tensor:
    """dx = scale (dS + dS^T) x with dS = P (dP - rowsum(P dP))."""
    ds_BCC = p_BCC * (dp_BCC - (p_BCC * dp_BCC).sum(-1, keepdim=True))
    return (scale * (ds_BCC + ds_BCC.mT)).to(x_BCL.dtype) @ x_BCL


def _per_image(eta_B: Tensor, like: Tensor) -> Tensor:
    return eta_B.to(like.dtype)[:, None, None]
