"""The ``triton`` backend: NVIDIA GPUs from sm_80, or Triton's interpreter on CPU tensors."""

from __future__ import annotations

import functools

import torch


@functools.cache
def register() -> None:
    """Attach the kernels to the operators that cin_fast.operators has defined.

    Raises:
        ImportError: if Triton cannot be imported.
    """
    from cin_fast.kernels import launch

    for stem in ("sci", "sci_backward", "cci", "cci_after_sci", "cci_backward"):
        torch.library.impl(f"cin_fast::triton_{stem}", ("cpu", "cuda"), getattr(launch, stem))
