"""The systems of the paper's Table 1, one file each, by the name of their ``--method``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cin_fast.models.base import Classifier, LossParts
from cin_fast.models.cgnl import CGNLNet
from cin_fast.models.cin import CIN, SCICont, SCINet
from cin_fast.models.mamc import MAMC
from cin_fast.models.non_local import NonLocalNet
from cin_fast.models.plain import Plain
from cin_fast.models.se import SENet

__all__ = [
    "CIN",
    "MAMC",
    "METHODS",
    "CGNLNet",
    "Classifier",
    "LossParts",
    "NonLocalNet",
    "Plain",
    "SCICont",
    "SCINet",
    "SENet",
    "build_model",
]

METHODS: dict[str, Callable[..., Classifier]] = {
    "plain": Plain,
    "se": SENet,
    "pos-sci": partial(SCINet, scale=1.0),
    "non-local": NonLocalNet,
    "mamc": MAMC,
    "cgnl": CGNLNet,
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
        options: ``pooled``, ``embedding_dim``, ``backend``: those that the method has are passed
            to it, the others left out, so that every method runs under one recipe.

    Raises:
        ValueError: for an unknown method; as :class:`Classifier` otherwise.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
    accepted = inspect.signature(METHODS[method]).parameters
    chosen = {name: value for name, value in options.items() if name in accepted}
    return METHODS[method](num_classes, backbone, pretrained, **chosen)
