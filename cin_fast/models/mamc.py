"""Multi-attention multi-class constraint (Sun et al., ECCV 2018)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cin_fast.models.base import Classifier, LossParts
from cin_fast.models.se import SqueezeExcitation

_BRANCHES = 2


class OSME(nn.Module):
    """One-squeeze multi-excitation: P gated copies of a map, a feature of each (Eq. 1 to 4 there).

    That paper's last layer reads the whole gated map, ``W3 vec(S)``, so it is bound to one image
    size; this one reads the map's spatial mean, as every other method here does.

    Args:
        channels: C of the maps.
        features: D, the length of a branch's feature; 1024 as in that paper.
        branches: P.
    """

    def __init__(self, channels: int, features: int = 1024, branches: int = _BRANCHES) -> None:
        super().__init__()
        self.gates = nn.ModuleList(SqueezeExcitation(channels) for _ in range(branches))
        self.projections = nn.ModuleList(nn.Linear(channels, features) for _ in range(branches))
        self.width = branches * features

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The features of all branches, (B, P, D)."""
        mean_BC = x_BCHW.mean(dim=(2, 3))
        branches = zip(self.gates, self.projections, strict=True)
        return torch.stack([project(gate(mean_BC) * mean_BC) for gate, project in branches], dim=1)


def n_pair_loss(features_BPD: Tensor, labels: Tensor) -> Tensor:
    """The sum of the three N-pair losses of Eq. 11 to 14 of that paper, a mean over the anchors.

    Each branch of each image is an anchor. Same attention and same class are its positives against
    all else; then either one of the two against what shares neither:
    ``sum over positives of log(1 + sum over negatives of exp(f . negative - f . positive))``.

    Args:
        features_BPD: as :class:`OSME` gives them.
        labels: int64 (B,).
    """
    branches = features_BPD.shape[1]
    anchors = features_BPD.float().flatten(0, 1)
    products = anchors @ anchors.T
    label = labels.repeat_interleave(branches)
    attention = torch.arange(branches, device=label.device).repeat(len(labels))
    same_class = label[:, None] == label
    same_attention = attention[:, None] == attention
    itself = torch.eye(len(anchors), dtype=torch.bool, device=label.device)
    pulled = same_class & same_attention
    neither = ~same_class & ~same_attention
    terms = (
        (pulled & ~itself, ~pulled),
        (~same_class & same_attention, neither),
        (same_class & ~same_attention, neither),
    )
    total = sum(_n_pair(products, positive, negative) for positive, negative in terms)
    return torch.as_tensor(total) / len(anchors)


def _n_pair(products: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    # A finite floor: where there is no negative, an infinite one would make the gradient NaN.
    floor = torch.finfo(products.dtype).min / 2
    others = products.masked_fill(~negative, floor).logsumexp(1, keepdim=True)
    return (F.softplus(others - products) * positive).sum()


class MAMC(Classifier):
    """ResNet + MAMC: two attention branches; the classifier reads both features.

    The features that the N-pair loss compares are scaled to length 1, which bounds their products.

    Args:
        num_classes, backbone, pretrained: as for :class:`Classifier`.
    """

    # Its loss needs images of several classes and several of each, not the pairs themselves.
    uses_pairs: ClassVar[bool] = True
    # lambda of that paper's Eq. 15.
    pair_weight: ClassVar[float] = 0.5

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool | str | Path | None = False,
    ) -> None:
        super().__init__(num_classes, backbone, pretrained)
        self.osme = OSME(self.backbone.channels)
        self.classifier = nn.Linear(self.osme.width, num_classes)

    def forward(self, images: Tensor, partner: Tensor | None = None) -> Any:
        """Logits (B, num_classes); with ``partner`` also the branches' features (B, P, D)."""
        features_BPD = self.osme(self.backbone(images))
        logits = self.classifier(features_BPD.flatten(1))
        return logits if partner is None else (logits, F.normalize(features_BPD, dim=2))

    def loss(self, output: Any, labels: Tensor, partner: Tensor | None, margin: float) -> LossParts:
        """Cross entropy and, where a partner was given, 0.5 times the N-pair losses."""
        if partner is None:
            return super().loss(output, labels, partner, margin)
        logits, features_BPD = output
        classification = super().loss(logits, labels, None, margin).classification
        return LossParts(classification, n_pair_loss(features_BPD, labels), self.pair_weight)
