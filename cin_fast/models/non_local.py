"""The non-local block on the last map (Wang et al., CVPR 2018)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from cin_fast.models.base import BlockClassifier


class NonLocal(nn.Module):
    """``z = norm(W_z y) + x``, ``y = softmax(theta(x)^T phi(x)) g(x)`` (Eq. 1 to 6 of that paper).

    This is its embedded Gaussian: the softmax runs over the L = H x W positions. theta, phi and g
    halve the channels; the norm's weight starts at 0, so that the block starts as the identity
    (section 4.1 of that paper).

    Args:
        channels: C of the maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 2, 1)
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A map of x's shape, (B, C, H, W)."""
        # An axis of one head: torch.onnx takes no attention without heads.
        theta, phi, g = (
            layer(x_BCHW).flatten(2).transpose(1, 2)[:, None]
            for layer in (self.theta, self.phi, self.g)
        )
        y_BLI = F.scaled_dot_product_attention(theta, phi, g, scale=1.0)[:, 0]
        y_BIHW = y_BLI.transpose(1, 2).unflatten(2, x_BCHW.shape[2:])
        return self.norm(self.out(y_BIHW)) + x_BCHW


class NonLocalNet(BlockClassifier):
    """ResNet + Non-local: one block after the last stage."""

    block_class = NonLocal
