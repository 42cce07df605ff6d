"""Saved tensors that come back as they were, but in other strides."""

from __future__ import annotations

import torch
from torch import Tensor


def other_strides() -> torch.autograd.graph.saved_tensors_hooks:
    """Within it, what an operator saves for its backward pass comes back with its axes swapped.

    Hooks that compress or move saved tensors may do so, and a compiled graph may, too.
    """
    return torch.autograd.graph.saved_tensors_hooks(_kept, _restrided)


def _kept(t: Tensor) -> Tensor:
    return t


def _restrided(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t
