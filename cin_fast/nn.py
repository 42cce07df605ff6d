"""Channel interaction as modules, each usable on any (B, C, H, W) map in any network.

``forward`` is the dense form: maps in, maps out. ``pooled`` gives the spatial means of the same
maps without ever making them: the convolution phi is linear, so the mean over positions of
``phi(W x)`` needs only ``W`` applied to nine columns (:func:`cin_fast.tap_means`).

Shapes: B images, C channels, H x W positions; 9 columns of tap means, the fifth (index 4) the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from cin_fast import reference
from cin_fast.arguments import check_partner
from cin_fast.ops import cci, sci, tap_means
from cin_fast.pair import pair_columns
from cin_fast.thin import thin_linear

_CENTRE_TAP = 4

# torch.fx traces the dense SCI and ChannelAttention, and takes these for steps of its graph.
torch.fx.wrap("sci")
torch.fx.wrap("_check_map")


class PooledSCI(NamedTuple):
    """What :meth:`SCI.pooled` returns."""

    z_BC: Tensor
    """Spatial mean of Z."""
    y_BC: Tensor
    """Spatial mean of Y, which :class:`CCI` compares."""
    v_BC9: Tensor
    """Tap means of x, which :class:`CCI` can use again."""


class PooledPair(NamedTuple):
    """What :meth:`CCI.pooled_pair` returns."""

    z_BC: Tensor
    """Spatial mean of Z."""
    z_pair_BC: Tensor
    """Spatial mean of Z', each image against its partner."""


def make_phi(channels: int) -> nn.Conv2d:
    """phi of Eq. 3 and 6: one 3 x 3 convolution with bias, no norm, no activation.

    Raises:
        ValueError: for ``channels`` below 1.
    """
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, found {channels}")
    return nn.Conv2d(channels, channels, 3, padding=1)


def mean_of_conv(phi: nn.Conv2d, taps_BC9: Tensor, backend: str | None = None) -> Tensor:
    """The mean over positions of ``phi(map)``, (B, C), from the map's tap means."""
    return thin_linear(taps_BC9.flatten(1), phi.weight.flatten(1), phi.bias, backend=backend)


class SCI(nn.Module):
    """Self-channel interaction: ``Z = phi(W x) + x``, ``W = softmax(scale * x x^T)`` (Eq. 1 to 3).

    Args:
        channels: C of the maps.
        scale: -1 as in the paper; +1 is its Pos-SCI.
        backend: passed to :func:`cin_fast.sci`.

    Raises:
        ValueError: here and at the call, naming the argument and what was found.
    """

    def __init__(self, channels: int, scale: float = -1.0, backend: str | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.backend = backend
        self.phi = make_phi(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Z, (B, C, H, W), of a map x of that shape."""
        _check_map(x, self.phi.in_channels)
        # x first: its memory format is the result's.
        return x + self.phi(sci(x, scale=self.scale, backend=self.backend))

    def pooled(self, x: Tensor) -> PooledSCI:
        """Spatial means of Z and Y, equal to those of the dense form.

        It reads phi's weight and never calls phi, so hooks of phi do not run. FSDP2 gathers a
        module's weights for its forward alone: shard a module around this one, or call
        ``torch.distributed.fsdp.register_fsdp_forward_method(module, "pooled")``.
        """
        _check_read(self.phi)
        _check_map(x, self.phi.in_channels)
        v_BC9 = tap_means(x, backend=self.backend)
        y_BC9 = sci(x, v_BC9, scale=self.scale, backend=self.backend)
        z_BC = mean_of_conv(self.phi, y_BC9, self.backend) + v_BC9[..., _CENTRE_TAP]
        return PooledSCI(z_BC, y_BC9[..., _CENTRE_TAP], v_BC9)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class CCI(nn.Module):
    """Contrastive channel interaction: ``Z' = phi(|W_A - eta W_B| x_A) + x_A`` (Eq. 5 and 6).

    ``eta = psi([mean Y_A, mean Y_B])`` is one number an image against its partner; both directions
    of a pair share psi, so the paper's gamma is the partner's eta.

    Args:
        channels: C of the maps.
        scale: as for :class:`SCI`.
        phi: the convolution of Eq. 6, as :func:`make_phi` makes it; the paper shares it with
            :class:`SCI`. A new one if None.
        backend: passed to :func:`cin_fast.cci`.

    Raises:
        ValueError: here and at the call, naming the argument and what was found.
    """

    def __init__(
        self,
        channels: int,
        scale: float = -1.0,
        phi: nn.Conv2d | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.backend = backend
        self.phi = make_phi(channels) if phi is None else phi
        _check_phi(self.phi, channels)
        self.psi = nn.Linear(2 * channels, 1)

    def eta(self, y_BC: Tensor, partner: Tensor) -> Tensor:
        """eta of every image against its partner, (B,), from the spatial means of Y (B, C).

        psi is applied in float32 or wider, under autocast as well.
        """
        if y_BC.shape[1:] != (self.phi.in_channels,):
            raise ValueError(
                f"y_BC: expected (B, {self.phi.in_channels}), found {tuple(y_BC.shape)}"
            )
        check_partner(y_BC, partner)
        return reference.eta(y_BC, partner.to(y_BC.device), self.psi.weight, self.psi.bias)

    def forward(self, x: Tensor, partner: Tensor, y_BC: Tensor | None = None) -> Tensor:
        """Z', (B, C, H, W).

        Args:
            x: maps (B, C, H, W).
            partner: int64 (B,), an involution.
            y_BC: spatial means of Y = W x where they are known already.
        """
        _check_map(x, self.phi.in_channels)
        if y_BC is None:
            mean_BC1 = x.flatten(2).mean(-1, keepdim=True)
            y_BC = sci(x, mean_BC1, scale=self.scale, backend=self.backend).squeeze(-1)
        _check_means("y_BC", y_BC, x)
        eta_B = self.eta(y_BC, partner)
        return x + self.phi(cci(x, partner, eta_B, scale=self.scale, backend=self.backend))

    def pooled(self, x: Tensor, partner: Tensor, sci_means: PooledSCI | None = None) -> Tensor:
        """Spatial means of Z', (B, C), equal to those of the dense form.

        Args:
            x: maps (B, C, H, W).
            partner: int64 (B,), an involution.
            sci_means: what :meth:`SCI.pooled` gave for the same maps, where it is known already.
        """
        _check_read(self.phi)
        _check_map(x, self.phi.in_channels)
        if sci_means is None:
            v_BC9 = tap_means(x, backend=self.backend)
            y_BC1 = sci(x, v_BC9[..., _CENTRE_TAP, None], scale=self.scale, backend=self.backend)
            y_BC = y_BC1.squeeze(-1)
        else:
            v_BC9, y_BC = sci_means.v_BC9, sci_means.y_BC
            _check_means("sci_means", y_BC, x)
        eta_B = self.eta(y_BC, partner)
        y_BC9 = cci(x, partner, eta_B, v_BC9, scale=self.scale, backend=self.backend)
        return mean_of_conv(self.phi, y_BC9, self.backend) + v_BC9[..., _CENTRE_TAP]

    def pooled_pair(self, x: Tensor, partner: Tensor) -> PooledPair:
        """Spatial means of Z and of Z', where phi is shared with SCI as in the paper.

        Equal to those of :meth:`SCI.pooled` and :meth:`pooled`; phi's weight is read once for both,
        and on the CPU the operators share their sweeps.

        Args:
            x: maps (B, C, H, W).
            partner: int64 (B,), an involution.
        """
        _check_read(self.phi)
        _check_map(x, self.phi.in_channels)
        v_BC9 = tap_means(x, backend=self.backend)
        y_BC9, y_pair_BC9 = pair_columns(
            x,
            partner,
            self.psi.weight,
            self.psi.bias,
            v_BC9,
            mean=_CENTRE_TAP,
            scale=self.scale,
            backend=self.backend,
        )
        conv_2BC = mean_of_conv(self.phi, torch.cat([y_BC9, y_pair_BC9]), self.backend)
        mean_BC, images = v_BC9[..., _CENTRE_TAP], x.shape[0]
        return PooledPair(conv_2BC[:images] + mean_BC, conv_2BC[images:] + mean_BC)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class ChannelAttention(nn.Module):
    """DANet's channel attention (Fu et al., CVPR 2019): ``gamma * W x + x``, gamma learned from 0.

    DANet writes ``softmax(max(E) - E)`` with ``E = x x^T``, which is ``W`` with scale -1: a drop-in
    for its ``CAM_Module`` that needs no C x C matrix.

    Args:
        in_dim: channels of the maps, as ``CAM_Module`` takes them; None for any.
        scale: -1 as in DANet.
        backend: passed to :func:`cin_fast.sci`.

    Raises:
        ValueError: at the call, naming the argument and what was found.
    """

    def __init__(
        self, in_dim: int | None = None, *, scale: float = -1.0, backend: str | None = None
    ) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.scale = scale
        self.backend = backend
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """A map of x's shape, (B, C, H, W)."""
        _check_map(x, self.in_dim)
        return x + self.gamma * sci(x, scale=self.scale, backend=self.backend)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def _check_phi(phi: nn.Conv2d, channels: int | None = None) -> None:
    if not isinstance(phi, nn.Conv2d):
        raise ValueError(f"phi: expected a Conv2d, found {type(phi).__name__}")
    channels = phi.in_channels if channels is None else channels
    # The identity behind mean_of_conv holds for this convolution alone.
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    expected = (channels, channels, (3, 3), (1, 1), (1, 1), (1, 1))
    plain = phi.groups == 1 and phi.padding_mode == "zeros"
    if not plain or tuple(getattr(phi, name) for name in names) != expected:
        raise ValueError(f"phi: expected Conv2d({channels}, {channels}, 3, padding=1), found {phi}")


def _check_read(phi: nn.Conv2d) -> None:
    # The pooled form reads weight and bias and never calls phi. The older ways of making one do so
    # in a hook of that call; one of torch.nn.utils.parametrize is made when it is read.
    _check_phi(phi)
    methods = ("forward", "_conv_forward")
    ours = all(getattr(type(phi), name) is getattr(nn.Conv2d, name) for name in methods)
    if not ours or "forward" in vars(phi):
        raise ValueError(
            f"phi: {type(phi).__name__} has a forward of its own, which the pooled form does not "
            "run: take the dense form"
        )
    for name in ("weight", "bias"):
        known = name in phi._parameters or is_parametrized(phi, name)
        if phi._forward_pre_hooks and not known:
            raise ValueError(
                f"phi: its {name} is made by a hook (weight_norm, spectral_norm, prune), which the "
                "pooled form does not run: take torch.nn.utils.parametrizations, or the dense form"
            )


def _check_means(name: str, y_BC: Tensor, x: Tensor) -> None:
    if y_BC.shape != x.shape[:2]:
        raise ValueError(
            f"{name}: expected means of {tuple(x.shape[:2])} to go with x, found "
            f"{tuple(y_BC.shape)}"
        )


def _check_map(x: Tensor, channels: int | None = None) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"x: expected a tensor, found {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"x: expected a map (B, C, H, W), found shape {tuple(x.shape)}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"x: expected {channels} channels, found {x.shape[1]}")
