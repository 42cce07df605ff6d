"""Squeeze-and-excitation on the last map (Hu, Shen and Sun, CVPR 2018)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from cin_fast.models.base import Classifier


class SqueezeExcitation(nn.Module):
    """The gate ``s = sigmoid(W2 relu(W1 mean(x)))`` of each channel (Eq. 3 of that paper).

    Args:
        channels: C of the maps.
        reduction: what C is divided by between the two layers; 16 as in that paper.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(channels // reduction, 1))
        self.excite = nn.Linear(self.squeeze.out_features, channels)

    def forward(self, mean_BC: Tensor) -> Tensor:
        """The gate, 0 to 1, (B, C), from the spatial mean of a map."""
        return self.excite(self.squeeze(mean_BC).relu()).sigmoid()


class SENet(Classifier):
    """ResNet + SE: the classifier reads the spatial mean of ``s * x``.

    A gate is one number a channel, so that mean is ``s * mean(x)``.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool | str | Path | None = False,
    ) -> None:
        super().__init__(num_classes, backbone, pretrained)
        self.gate = SqueezeExcitation(self.backbone.channels)

    def features(self, x_BCHW: Tensor) -> Tensor:
        mean_BC = x_BCHW.mean(dim=(2, 3))
        return self.gate(mean_BC) * mean_BC
