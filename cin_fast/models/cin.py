"""The channel interaction network (Gao et al., AAAI 2020), and its ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from cin_fast.arguments import check_partner
from cin_fast.losses import contrastive_loss
from cin_fast.models.base import Classifier, LossParts
from cin_fast.nn import CCI, SCI


class SCINet(Classifier):
    """ResNet + SCI: the classifier reads the spatial mean of ``Z = phi(W x) + x`` (Eq. 1 to 3).

    Args:
        num_classes, backbone, pretrained: as for :class:`Classifier`.
        pooled: take the spatial means without making Z (the same values, far cheaper); False
            runs the dense maps.
        scale: -1 as in the paper; +1 is its Pos-SCI.
        backend: passed to the operators.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool | str | Path | None = False,
        *,
        pooled: bool = True,
        scale: float = -1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(num_classes, backbone, pretrained)
        self.pooled = pooled
        self.sci = SCI(self.backbone.channels, scale, backend)

    def features(self, x_BCHW: Tensor) -> Tensor:
        if self.pooled:
            return self.sci.pooled(x_BCHW).z_BC
        return self.sci(x_BCHW).mean(dim=(2, 3))


class SCICont(SCINet):
    """ResNet + SCI + Cont: the contrastive loss on h(mean Z), which is Eq. 5 with eta = gamma = 0.

    Args:
        embedding_dim: r of Eq. 8, at least 1.
        num_classes, backbone, pretrained, pooled, scale, backend: as for :class:`SCINet`.

    Raises:
        ValueError: as there, and for ``embedding_dim`` below 1.
    """

    uses_pairs: ClassVar[bool] = True

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool | str | Path | None = False,
        *,
        pooled: bool = True,
        embedding_dim: int = 512,
        scale: float = -1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            num_classes, backbone, pretrained, pooled=pooled, scale=scale, backend=backend
        )
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim: expected at least 1, found {embedding_dim}")
        self.h = nn.Linear(self.backbone.channels, embedding_dim)
        # Distances start well inside the margin: torch's own initialisation starts them far
        # beyond it, and the features collapse before the classifier can use them.
        nn.init.normal_(self.h.weight, std=1e-3)

    def forward(self, images: Tensor, partner: Tensor | None = None) -> Any:
        """Logits (B, num_classes); with ``partner`` (int64, an involution) also embeddings.

        Args:
            images: (B, 3, H, W), any B.
            partner: int64 (B,): image i is compared with image ``partner[i]``.

        Returns:
            logits, or (logits, embeddings (B, embedding_dim)) if ``partner`` is given.
        """
        if partner is None:
            return super().forward(images)
        check_partner(images, partner)
        z_BC, embedded_BC = self.pair_features(self.backbone(images), partner)
        return self.classifier(z_BC), self.h(embedded_BC)

    def pair_features(self, x_BCHW: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """Spatial means of Z and of what h embeds, both (B, C)."""
        z_BC = self.features(x_BCHW)
        return z_BC, z_BC

    def loss(self, output: Any, labels: Tensor, partner: Tensor | None, margin: float) -> LossParts:
        """Both terms of Eq. 9; the classification alone where no partner was given."""
        if partner is None:
            return super().loss(output, labels, partner, margin)
        logits, embeddings = output
        classification = super().loss(logits, labels, None, margin).classification
        return LossParts(classification, contrastive_loss(embeddings, labels, partner, margin))


class CIN(SCICont):
    """ResNet + CIN: SCI for the classifier, CCI between the images of a pair (Eq. 5 to 8).

    ``model(images)`` uses SCI alone, one image at a time, as the paper does in inference.

    Args:
        num_classes, backbone, pretrained, pooled, embedding_dim, scale, backend: as for
            :class:`SCICont`.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool | str | Path | None = False,
        *,
        pooled: bool = True,
        embedding_dim: int = 512,
        scale: float = -1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            backbone,
            pretrained,
            pooled=pooled,
            embedding_dim=embedding_dim,
            scale=scale,
            backend=backend,
        )
        self.cci = CCI(self.backbone.channels, scale, phi=self.sci.phi, backend=backend)

    def pair_features(self, x_BCHW: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        if self.pooled:
            return self.cci.pooled_pair(x_BCHW, partner)
        z_BCHW = self.sci(x_BCHW)
        z_pair_BCHW = self.cci(x_BCHW, partner)
        return z_BCHW.mean(dim=(2, 3)), z_pair_BCHW.mean(dim=(2, 3))
