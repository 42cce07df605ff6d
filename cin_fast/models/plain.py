"""The plain backbone: spatial mean and a linear classifier, under the same recipe as the rest."""

from __future__ import annotations

from cin_fast.models.base import Classifier


class Plain(Classifier):
    """The baseline rows of Table 1 (VGG-19, ResNet-50, ResNet-101)."""
