"""What every method shares: a backbone, a classifier, and how its output becomes a loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from cin_fast.losses import classification_loss
from cin_fast.models.backbones import build_backbone


@dataclass(frozen=True)
class LossParts:
    """The two terms of Eq. 9.

    ``pair`` is None for a method without one; ``weight`` is what its own paper puts in place of
    alpha, None for alpha.
    """

    classification: Tensor
    pair: Tensor | None = None
    weight: float | None = None

    def total(self, alpha: float) -> Tensor:
        """classification + alpha * pair."""
        if self.pair is None:
            return self.classification
        return self.classification + (alpha if self.weight is None else self.weight) * self.pair


class Classifier(nn.Module):
    """A backbone and a ``Linear(C, num_classes)`` on what :meth:`features` makes of its map.

    Args:
        num_classes: at least 1.
        backbone: a name that :func:`cin_fast.models.backbones.build_backbone` knows.
        pretrained: as there.

    Raises:
        ValueError, FileNotFoundError: as there, and for ``num_classes`` below 1.
    """

    uses_pairs: ClassVar[bool] = False

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool | str | Path | None = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, found {num_classes}")
        self.num_classes = num_classes
        self.backbone = build_backbone(backbone, pretrained)
        self.classifier = nn.Linear(self.backbone.channels, num_classes)

    def features(self, x_BCHW: Tensor) -> Tensor:
        """What the classifier reads, (B, C), from the backbone's map; the spatial mean here."""
        return x_BCHW.mean(dim=(2, 3))

    def forward(self, images: Tensor, partner: Tensor | None = None) -> Any:
        """Logits (B, num_classes) of images (B, 3, H, W); methods with pairs add to them."""
        return self.classifier(self.features(self.backbone(images)))

    def loss(self, output: Any, labels: Tensor, partner: Tensor | None, margin: float) -> LossParts:
        """The loss of what :meth:`forward` returned for a training batch."""
        return LossParts(classification_loss(output, labels))


class BlockClassifier(Classifier):
    """A block between the backbone's map and its spatial mean: one after the last stage.

    Args:
        num_classes, backbone, pretrained: as for :class:`Classifier`.
    """

    block_class: ClassVar[type[nn.Module]]
    """Called with the number of channels."""

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool | str | Path | None = False,
    ) -> None:
        super().__init__(num_classes, backbone, pretrained)
        self.block = self.block_class(self.backbone.channels)

    def features(self, x_BCHW: Tensor) -> Tensor:
        return self.block(x_BCHW).mean(dim=(2, 3))
