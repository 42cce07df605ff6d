"""Compact generalised non-local block on the last map (Yue et al., NeurIPS 2018)."""

from __future__ import annotations

from torch import Tensor, nn

from cin_fast.models.base import BlockClassifier


class CompactGeneralizedNonLocal(nn.Module):
    """``z = norm(W_z vec^-1(theta (phi^T g))) + x`` with the dot-product kernel, in groups.

    Every channel of every position is compared with every other (Eq. 6 of that paper). With a
    dot product, ``theta phi^T g`` needs no matrix: in each group, phi and g give one number, by
    which theta is multiplied (Eq. 12, without its division, as in the authors' code).

    Args:
        channels: C of the maps, a multiple of 2 * groups.
        groups: 8 as in that paper.

    Raises:
        ValueError: for channels that cannot be split so.
    """

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        inner = channels // 2
        if channels % (2 * groups):
            raise ValueError(
                f"channels: expected a multiple of {2 * groups} for {groups} groups, "
                f"found {channels}"
            )
        self.groups = groups
        self.theta = nn.Conv2d(channels, inner, 1, bias=False)
        self.phi = nn.Conv2d(channels, inner, 1, bias=False)
        self.g = nn.Conv2d(channels, inner, 1, bias=False)
        self.out = nn.Conv2d(inner, channels, 1, groups=groups, bias=False)
        # Its weight starts at 0, so that the block starts as the identity.
        self.norm = nn.GroupNorm(groups, channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A map of x's shape, (B, C, H, W)."""
        theta, phi, g = (
            layer(x_BCHW).flatten(1).unflatten(1, (self.groups, -1))
            for layer in (self.theta, self.phi, self.g)
        )
        # float32: the sum runs over a group's channels and positions.
        similarity_BG1 = (phi.float() * g.float()).sum(-1, keepdim=True)
        y_BIHW = (similarity_BG1 * theta).flatten(1).unflatten(1, (-1, *x_BCHW.shape[2:]))
        return self.norm(self.out(y_BIHW.to(x_BCHW.dtype))) + x_BCHW


class CGNLNet(BlockClassifier):
    """ResNet + CGNL: one block after the last stage."""

    block_class = CompactGeneralizedNonLocal
