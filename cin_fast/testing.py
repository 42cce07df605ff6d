"""What tests/ and bench/ share: inputs, shapes, and the rule by which a result is right.

The rule: against float64, a backend's error is at most twice the error of plain PyTorch in the
same dtype, plus the rounding of the result itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cin_fast import ops, pair, reference

INPUT_KINDS = ("randn", "diffuse", "relu")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (B, C, L): unit sizes, odd sizes, tails on both sides of a block, and an empty batch.
SHAPES = (
    (1, 1, 1),
    (2, 3, 1),
    (1, 1, 7),
    (2, 17, 5),
    (3, 64, 49),
    (2, 65, 33),
    (1, 130, 196),
    (2, 200, 197),
    (0, 8, 9),
)


def make_input(
    kind: str,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Features of one kind, the same on every device.

    ``randn``: rows of W nearly one-hot at L = 196. ``diffuse``: randn * L ** -0.25, rows spread
    out. ``relu``: what a network gives.

    Raises:
        ValueError: for an unknown kind.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if kind == "diffuse":
        x = x * max(shape[-1], 1) ** -0.25
    elif kind == "relu":
        x = torch.relu(x) * 0.3
    elif kind != "randn":
        raise ValueError(f"kind: expected one of {', '.join(INPUT_KINDS)}, found {kind!r}")
    return x.to(device=device, dtype=dtype)


def make_pairs(batch: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """A partner involution over ``batch`` images (the odd one out is its own) and eta values."""
    partner = torch.arange(batch) ^ 1
    partner[partner >= batch] = batch - 1
    eta = torch.linspace(-0.5, 1.5, batch) if batch else torch.zeros(0)
    return partner.to(device), eta.to(device)


@dataclass(frozen=True)
class Evaluation:
    """An operator's value and the gradients of ``(value * dy).sum()``, by name."""

    results: dict[str, Tensor]


def evaluate_sci(
    x: Tensor, v: Tensor | None, dy: Tensor, scale: float = -1.0, backend: str | None = None
) -> Evaluation:
    """``sci`` of one backend, forward and backward; ``backend="torch"`` is plain PyTorch."""
    leaves = _leaves(x=x, v=v)
    x, v = leaves["x"], leaves.get("v")
    if backend == "torch":
        y = reference.sci(x, x if v is None else v, scale)
    else:
        y = ops.sci(x, v, scale=scale, backend=backend)
    return _evaluation(y, dy, leaves)


def evaluate_cci(
    x: Tensor,
    partner: Tensor,
    eta: Tensor,
    v: Tensor | None,
    dy: Tensor,
    scale: float = -1.0,
    backend: str | None = None,
) -> Evaluation:
    """``cci`` of one backend, forward and backward; ``backend="torch"`` is plain PyTorch."""
    leaves = _leaves(x=x, eta=eta, v=v)
    x, eta, v = leaves["x"], leaves["eta"], leaves.get("v")
    if backend == "torch":
        y, _ = reference.cci(x, partner, eta, x if v is None else v, scale)
    else:
        y = ops.cci(x, partner, eta, v, scale=scale, backend=backend)
    return _evaluation(y, dy, leaves)


def make_psi(
    channels: int, bias: float, dtype: torch.dtype = torch.float32, seed: int = 7
) -> tuple[Tensor, Tensor]:
    """psi's weight (1, 2 ``channels``) and bias (1,): eta is near ``bias``."""
    weight = make_input("randn", (1, 2 * channels), torch.float64, seed=seed) / (8 * channels)
    return weight.to(dtype), torch.full((1,), bias, dtype=dtype)


def evaluate_pair(
    x: Tensor,
    partner: Tensor,
    psi_weight: Tensor,
    psi_bias: Tensor,
    v: Tensor,
    dy: Tensor,
    dy_pair: Tensor,
    scale: float = -1.0,
    backend: str | None = None,
) -> Evaluation:
    """``pair_columns``, the last column being the mean; ``backend="torch"`` is plain PyTorch."""
    leaves = _leaves(x=x, psi_weight=psi_weight, psi_bias=psi_bias, v=v)
    x, psi_weight, psi_bias, v = leaves.values()
    mean = v.shape[-1] - 1
    if backend == "torch":
        y = reference.sci(x, v, scale)
        eta = reference.eta(y[..., mean], partner, psi_weight, psi_bias)
        y_pair, _ = reference.cci(x, partner, eta, v, scale)
    else:
        y, y_pair = pair.pair_columns(
            x, partner, psi_weight, psi_bias, v, mean=mean, scale=scale, backend=backend
        )
    evaluation = _evaluation(torch.cat([y, y_pair]), torch.cat([dy, dy_pair]), leaves)
    y, y_pair = evaluation.results.pop("y").chunk(2)
    return Evaluation({"y": y, "y_pair": y_pair, **evaluation.results})


def check_sci(
    backend: str, x: Tensor, v: Tensor | None, dy: Tensor, scale: float = -1.0
) -> Evaluation:
    """Hold ``sci`` of ``backend`` to the rule, values and gradients; returns what it computed."""
    return _check(
        lambda name, x, v, dy: evaluate_sci(x, v, dy, scale, backend=name), backend, x, v, dy
    )


def check_cci(
    backend: str,
    x: Tensor,
    partner: Tensor,
    eta: Tensor,
    v: Tensor | None,
    dy: Tensor,
    scale: float = -1.0,
) -> Evaluation:
    """Hold ``cci`` of ``backend`` to the rule, values and gradients; returns what it computed."""
    return _check(
        lambda name, x, eta, v, dy: evaluate_cci(x, partner, eta, v, dy, scale, backend=name),
        backend,
        x,
        eta,
        v,
        dy,
    )


def assert_exact_as_torch(name: str, actual: Tensor, torch_result: Tensor, exact: Tensor) -> None:
    """The rule for one tensor.

    Raises:
        AssertionError: naming ``name``, the error, and what was allowed.
    """
    if exact.numel() == 0:
        assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, not {exact.shape}"
        return
    error = _largest(actual, exact)
    torch_error = _largest(torch_result, exact)
    allowed = 2 * torch_error + _largest(exact.to(actual.dtype), exact)
    # `not <=` so that a NaN fails.
    if not error <= allowed:
        raise AssertionError(
            f"{name}: error {error:.3e} against float64, allowed {allowed:.3e} "
            f"(plain PyTorch {torch_error:.3e}, {actual.dtype}, shape {tuple(actual.shape)})"
        )


def _check(evaluate: Callable[..., Evaluation], backend: str, *inputs: Tensor | None) -> Evaluation:
    double = [None if t is None else t.double() for t in inputs]
    exact = evaluate("torch", *double).results
    plain = evaluate("torch", *inputs).results
    actual = evaluate(backend, *inputs)
    for name, result in actual.results.items():
        assert_exact_as_torch(f"{backend} {name}", result, plain[name], exact[name])
    return actual


def _leaves(**inputs: Tensor | None) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}


def _evaluation(y: Tensor, dy: Tensor, leaves: dict[str, Tensor]) -> Evaluation:
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    named = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return Evaluation({"y": y.detach(), **named})


def _largest(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item()
