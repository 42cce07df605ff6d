"""The systems of the paper's Table 1, one file each, by the name of their ``--method``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cin_fast.models.base import Classifier, LossParts
from cin_fast.models.cin import CIN, SCICont, SCINet
from cin_fast.models.plain import Plain

__all__ = [
    "CIN",
    "METHODS",
    "Classifier",
    "LossParts",
    "Plain",
    "SCICont",
    "SCINet",
    "build_model",
]

METHODS: dict[str, Callable[..., Classifier]] = {
    "plain": Plain,
    "pos-sci": partial(SCINet, scale=1.0),
    "sci": SCINet,
    "sci-cont": SCICont,
    "cin": CIN,
}


def build_model(
    method: str,
    num_classes: int,
    backbone: str,
    pretrained: bool | str | Path | None = False,
    **options: Any,
) -> Classifier:
    """The model of one method.

    Args:
        method: a key of :data:`METHODS`.
        num_classes, backbone, pretrained: as for :class:`Classifier`.
        options: what the method takes beside them (``pooled``, ``embedding_dim``, ...).

    Raises:
        ValueError: for an unknown method; as :class:`Classifier` otherwise.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
    return METHODS[method](num_classes, backbone, pretrained, **options)
