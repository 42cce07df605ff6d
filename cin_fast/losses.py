"""The losses of the paper: Eq. 7 to 9."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pair_distances(embeddings_BD: Tensor, partner: Tensor) -> Tensor:
    """Squared Euclidean distance of every image's embedding to its partner's, (B,), float32."""
    wide = embeddings_BD.float()
    return (wide - wide[partner]).square().sum(1)


def contrastive_loss(
    embeddings_BD: Tensor, labels: Tensor, partner: Tensor, margin: float = 0.5
) -> Tensor:
    """Mean over the pairs of Eq. 8 (Eq. 7).

    A pair costs distance^2 if its labels agree, max(0, margin - distance)^2 if not.

    Args:
        embeddings_BD: h(mean Z') of every image against its partner, (B, D).
        labels: int64 (B,).
        partner: int64 (B,), an involution; an image that is its own partner is in no pair.
        margin: beta of Eq. 8, above 0.

    Returns:
        A scalar; 0 where there is no pair. Its gradient is finite everywhere, also at distance 0.

    Raises:
        ValueError: naming the argument and what was found.
    """
    if embeddings_BD.dim() != 2 or labels.shape != embeddings_BD.shape[:1]:
        raise ValueError(
            f"labels: expected ({embeddings_BD.shape[0]},) to go with embeddings "
            f"{tuple(embeddings_BD.shape)}, found {tuple(labels.shape)}"
        )
    if partner.shape != labels.shape:
        raise ValueError(f"partner: expected {tuple(labels.shape)}, found {tuple(partner.shape)}")
    if margin <= 0:
        raise ValueError(f"margin: expected above 0, found {margin}")
    squared = pair_distances(embeddings_BD, partner)
    # sqrt has no gradient at 0: such a distance is replaced before, and its value put back after.
    apart = squared != 0
    distance = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
    positive = labels == labels[partner]
    terms = torch.where(positive, squared, (margin - distance).clamp(min=0).square())
    # Each pair stands twice, once in each direction, with the same value.
    in_pair = partner != torch.arange(partner.shape[0], device=partner.device)
    return (terms * in_pair).sum() / in_pair.sum().clamp(min=1)


def pair_counts(labels: Tensor, partner: Tensor) -> tuple[int, int]:
    """How many positive and negative pairs a batch holds."""
    index = torch.arange(partner.shape[0], device=partner.device)
    first = partner > index
    positive = int((first & (labels == labels[partner])).sum())
    return positive, int(first.sum()) - positive


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_soft of Eq. 9: cross entropy over all images of the batch."""
    return F.cross_entropy(logits.float(), labels)
