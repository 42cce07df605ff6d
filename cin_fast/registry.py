"""What torch's table of operators holds."""

from __future__ import annotations

import torch


def has_kernel(operator: str, key: str) -> bool:
    """Whether ``operator`` ("cin_fast::cpu_sci") can be called on tensors of ``key`` ("CPU")."""
    try:
        return torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, key)
    except RuntimeError:
        # Nobody has declared the operator either.
        return False
