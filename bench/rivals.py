"""Whom the operators are measured against: what a user of plain PyTorch would write today.

A rival makes a function of the same arguments for a case; where it cannot, it says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import cin_fast
from cin_fast import dispatch
from cin_fast.dispatch import BACKENDS
from cin_fast.nn import mean_of_conv
from cin_fast.pair import pair_columns

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Rival:
    """A function of the subject's arguments, and whether it can run on a device."""

    name: str
    call: Callable[..., Tensor]
    why_not: Callable[[Tensor], str] = lambda x: ""
    compiles: bool = False


def eager_sci(x_BCL: Tensor) -> Tensor:
    """bmm, softmax, bmm: DANet's lines with the C x C matrix in memory."""
    return torch.bmm(torch.softmax(torch.bmm(-x_BCL, x_BCL.transpose(1, 2)), -1), x_BCL)


def sdpa_sci(x_BCL: Tensor) -> Tensor:
    """The clever user: attention over channels, with the head axis that fused kernels want.

    Each device gets the call that is fastest there. CPU kernels take a negative scale, which
    saves a copy; on a GPU some assume a positive one, and some refuse rows that are no multiple
    of eight numbers, so that x is padded with zeros, which change no product.
    """
    x = x_BCL.unsqueeze(1)
    if not x.is_cuda:
        return F.scaled_dot_product_attention(x, x, x, scale=-1.0).squeeze(1)
    positions = x.shape[-1]
    x = F.pad(x, (0, -positions % 8))
    return F.scaled_dot_product_attention(-x, x, x, scale=1.0).squeeze(1)[..., :positions]


def eager_cci(x_BCL: Tensor, partner: Tensor, eta_B: Tensor) -> Tensor:
    """Eq. 5 and 6 with whole matrices."""
    weights_BCC = torch.softmax(torch.bmm(-x_BCL, x_BCL.transpose(1, 2)), -1)
    eta_B11 = eta_B.to(x_BCL.dtype)[:, None, None]
    return torch.bmm((weights_BCC - eta_B11 * weights_BCC[partner]).abs(), x_BCL)


class Phi(NamedTuple):
    """The convolution's weight (C, C, 3, 3) and bias (C,)."""

    weight: Tensor
    bias: Tensor


def eager_head(x_BCHW: Tensor, *phi: Tensor) -> Tensor:
    """The mean of Z as other projects write it: bmm, softmax, bmm, convolution, mean."""
    y_BCL = eager_sci(x_BCHW.flatten(2))
    return (F.conv2d(y_BCL.view_as(x_BCHW), *phi, padding=1) + x_BCHW).mean((2, 3))


def sdpa_head(x_BCHW: Tensor, *phi: Tensor) -> Tensor:
    """The same through attention over channels."""
    y_BCL = sdpa_sci(x_BCHW.flatten(2))
    return (F.conv2d(y_BCL.view_as(x_BCHW), *phi, padding=1) + x_BCHW).mean((2, 3))


def pooled_head(x_BCHW: Tensor, *phi: Tensor, backend: str) -> Tensor:
    """The mean of Z without Y and without the convolution's map."""
    v_BC9 = cin_fast.tap_means(x_BCHW, backend=backend)
    y_BC9 = cin_fast.sci(x_BCHW, v_BC9, backend=backend)
    return mean_of_conv(Phi(*phi), y_BC9, backend) + v_BC9[..., 4]


def pooled_pair_head(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    psi_weight: Tensor,
    psi_bias: Tensor,
    partner: Tensor,
    *,
    backend: str,
) -> Tensor:
    """The means of Z and, behind them, of Z' (2B, C): the head of a training step."""
    v_BC9 = cin_fast.tap_means(x_BCHW, backend=backend)
    columns = pair_columns(x_BCHW, partner, psi_weight, psi_bias, v_BC9, mean=4, backend=backend)
    means_BC = v_BC9[..., 4].repeat(2, 1)
    return mean_of_conv(Phi(weight, bias), torch.cat(columns), backend) + means_BC


def sci_rivals() -> list[Rival]:
    """Everybody who computes ``softmax(-x x^T) x``."""
    return [
        Rival("eager", eager_sci),
        _compiled(eager_sci),
        Rival("sdpa", sdpa_sci),
        *(
            Rival(f"sdpa-{name}", partial(_sdpa_with, backend), _needs_gpu)
            for name, backend in _SDPA.items()
        ),
        Rival("flex", _flex, _needs_gpu, compiles=True),
        *(Rival(name, partial(_sci, backend=name), _ours(name)) for name in BACKENDS),
    ]


def cci_rivals() -> list[Rival]:
    """Everybody who computes ``|W_i - eta_i W_partner(i)| x_i``."""
    return [
        Rival("eager", eager_cci),
        _compiled(eager_cci),
        *(Rival(name, partial(_cci, backend=name), _ours(name)) for name in BACKENDS),
    ]


def head_rivals() -> list[Rival]:
    """Everybody who computes the spatial mean of Z from the features."""
    return [
        Rival("eager", eager_head),
        _compiled(eager_head),
        Rival("sdpa", sdpa_head),
        *(Rival(name, partial(pooled_head, backend=name), _ours(name)) for name in BACKENDS),
    ]


def _sci(x: Tensor, *, backend: str) -> Tensor:
    return cin_fast.sci(x, backend=backend)


def _cci(x: Tensor, partner: Tensor, eta: Tensor, *, backend: str) -> Tensor:
    return cin_fast.cci(x, partner, eta, backend=backend)


def _sdpa_with(backend: SDPBackend, x_BCL: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa_sci(x_BCL)


def _compiled(function: Callable[..., Tensor]) -> Rival:
    return Rival("compiled", torch.compile(function, dynamic=False), compiles=True)


def forget_compiled() -> None:
    """Before another shape: past a few shapes, Dynamo gives up and runs eagerly, in silence."""
    torch.compiler.reset()


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(x_BCL: Tensor) -> Tensor:
    x = x_BCL.unsqueeze(1)
    return _compiled_flex()(-x, x, x, scale=1.0).squeeze(1)


def _needs_gpu(x: Tensor) -> str:
    return "" if x.is_cuda else "needs a CUDA device"


def why_not_ours(backend: str, x: Tensor) -> str:
    """Why a backend of ours has no turn on x; empty if it has one."""
    if backend == "matmul" and not x.is_cuda:
        return "on a CPU the cpu backend serves"
    return dispatch.why_not(x, backend)


def _ours(backend: str) -> Callable[[Tensor], str]:
    return partial(why_not_ours, backend)
