"""The pair head's C++ kernels: the rule for numbers, the same bits, and what torch sees."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from cpu_isas import ISA_DTYPES, poisoned_memory
from torch import Tensor

import cin_fast
from cin_fast.pair import pair_columns
from cin_fast.testing import (
    INPUT_KINDS,
    SHAPES,
    Truth,
    assert_exact_as_torch,
    check_pair,
    evaluate_pair,
    find_truth,
    make_pair_inputs,
)

pytestmark = pytest.mark.usefixtures("cpu_extension", "two_threads")

NAN = float("nan")
Inputs = tuple[Tensor, ...]


def draws(
    shape: tuple[int, ...], k: int, kind: str, dtype: torch.dtype, bias: float, repeat: int = 8
) -> Inputs:
    """Of 8 times the images: few errors' largest is chance."""
    return make_pair_inputs((repeat * shape[0], *shape[1:]), k, kind, dtype, bias)


def double(inputs: Inputs) -> Inputs:
    return tuple(t.double() if t.is_floating_point() else t for t in inputs)


# So that the instruction sets, which change first, share what is true.
@lru_cache(maxsize=32)
def case(
    shape: tuple[int, ...],
    kind: str,
    dtype: torch.dtype,
    *,
    k: int = 9,
    bias: float = -0.6,
    repeat: int = 8,
    scale: float = -1.0,
) -> tuple[Inputs, Truth]:
    """Inputs, and what is true of them."""
    inputs = draws(shape, k, kind, dtype, bias, repeat)
    return inputs, find_truth(evaluate_pair, *inputs, scale=scale)


def check(inputs: Inputs, truth: Truth, scale: float = -1.0) -> None:
    with poisoned_memory():
        check_pair("cpu", *inputs, scale=scale, truth=truth)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


on_every_isa = pytest.mark.parametrize(("isa", "dtype"), ISA_DTYPES, indirect=["isa"], ids=str)


# The gradient of |M| jumps at M = 0, and which side a weight is on may be rounding: the rule is
# kept where no weight is near, with eta below 0.
@on_every_isa
@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("k", [1, 9])
def test_the_rule(isa: str, dtype: torch.dtype, kind: str, k: int) -> None:
    for shape in SHAPES:
        check(*case(shape, kind, dtype, k=k))


@on_every_isa
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_the_rule_among_many_channels(isa: str, dtype: torch.dtype, kind: str) -> None:
    check(*case((2, 300, 49), kind, dtype, repeat=2))


@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_the_rule_for_other_scales(isa: str, scale: float) -> None:
    for shape in ((3, 64, 49), (2, 270, 33)):
        check(*case(shape, "relu", torch.float32, scale=scale), scale)


@on_every_isa
def test_the_rule_for_psis_bias(isa: str, dtype: torch.dtype) -> None:
    found = []
    for kind in INPUT_KINDS:
        for channels in range(20, 180, 20):
            inputs, truth = case((2, channels, 30), kind, dtype, repeat=1)
            actual = evaluate_pair(*inputs, backend="cpu").results
            found.append([results["dpsi_bias"] for results in (actual, truth.plain, truth.exact)])
    pooled = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert_exact_as_torch("dpsi_bias", *pooled)


@on_every_isa
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_weights_of_both_signs(isa: str, dtype: torch.dtype, kind: str) -> None:
    tolerance = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for shape in ((2, 17, 5), (4, 65, 33), (2, 300, 49)):
        inputs = draws(shape, 9, kind, dtype, bias=0.7, repeat=2)
        exact = evaluate_pair(*double(inputs), backend="torch").results
        for name, found in evaluate_pair(*inputs, backend="cpu").results.items():
            # A few signs decide much of psi's bias.
            limit = tolerance * (10 if name.startswith("d") else 1)
            assert relative_error(found, exact[name]) < limit, f"{name} {shape}"


@on_every_isa
def test_same_bits_at_every_run_whatever_memory_held(isa: str, dtype: torch.dtype) -> None:
    for shape in ((1, 200, 49), (3, 300, 20)):
        inputs = draws(shape, 9, "relu", dtype, bias=0.7, repeat=1)
        first = evaluate_pair(*inputs, backend="cpu").results
        with poisoned_memory():
            poisoned = evaluate_pair(*inputs, backend="cpu").results
        again = evaluate_pair(*inputs, backend="cpu").results
        for name, once in first.items():
            assert torch.equal(once, poisoned[name]), name
            assert torch.equal(once, again[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("bias", [-0.6, 0.7])
def test_at_the_papers_size(bias: float) -> None:
    check(*case((2, 2048, 196), "relu", torch.float32, bias=bias, repeat=1))


def test_sci_is_the_same_and_cci_but_for_rounding() -> None:
    x, partner, weight, bias, v, *_ = draws((2, 300, 49), 9, "relu", torch.float32, 0.7)
    y, y_pair = pair_columns(x, partner, weight, bias, v, mean=4, backend="cpu")
    assert torch.equal(y, cin_fast.sci(x, v, backend="cpu"))
    eta = cin_fast.reference.eta(y[..., 4], partner, weight, bias)
    again = cin_fast.cci(x, partner, eta, v, backend="cpu")
    torch.testing.assert_close(y_pair, again, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("partner", [[4, 1, 3, 2, 0], [0, 1, 2, 3, 4], [2, 4, 0, 3, 1]])
def test_any_involution(partner: list[int]) -> None:
    for channels in (40, 300):
        shape = (5, channels, 12)
        x, _, *rest = draws(shape, 9, "diffuse", torch.float32, bias=0.7, repeat=1)
        inputs = (x, torch.tensor(partner), *rest)
        exact = evaluate_pair(*double(inputs), backend="torch").results
        for name, found in evaluate_pair(*inputs, backend="cpu").results.items():
            assert relative_error(found, exact[name]) < 2e-6, name


def test_an_empty_batch() -> None:
    results = evaluate_pair(*draws((0, 5, 6), 3, "relu", torch.float32, 0.5), backend="cpu")
    assert results.results["y_pair"].shape == (0, 5, 3)
    assert not results.results["dpsi_weight"].any()


def test_any_strides() -> None:
    x, partner, weight, bias, v, dy, dy_pair = draws(
        (4, 33, 20), 5, "relu", torch.float32, 0.7, repeat=1
    )

    def strided(t: Tensor) -> Tensor:
        return torch.empty(*t.shape[1:], 2 * len(t))[..., ::2].permute(2, 0, 1).copy_(t)

    other = (strided(x), partner, weight, bias, *map(strided, (v, dy, dy_pair)))
    first = evaluate_pair(x, partner, weight, bias, v, dy, dy_pair, backend="cpu").results
    for name, found in evaluate_pair(*other, backend="cpu").results.items():
        assert torch.equal(found, first[name]), name


def test_nan_stays_where_it_belongs() -> None:
    inputs = draws((4, 300, 21), 9, "relu", torch.float32, 0.7, repeat=1)
    inputs[0][1, 77, 3] = NAN
    results = evaluate_pair(*inputs, backend="cpu").results
    for name in ("y_pair", "dx", "dv"):
        assert results[name][:2].isnan().any(), name
        assert results[name][2:].isfinite().all(), name
    assert results["y"][0].isfinite().all()


def test_with_frozen_features_psi_learns_without_a_sweep() -> None:
    x, partner, weight, bias, v, *_ = draws((2, 300, 6), 3, "relu", torch.float32, 0.7, repeat=1)
    found, sweeps = [], []
    for frozen in (False, True):
        psi = [t.detach().requires_grad_() for t in (weight, bias)]
        features = [t.detach().requires_grad_(not frozen) for t in (x, v)]
        y, y_pair = pair_columns(features[0], partner, *psi, features[1], mean=1, backend="cpu")
        with torch.profiler.profile() as profile:
            (y * y_pair).sum().backward()
        found.append([y.detach(), y_pair.detach(), *(t.grad for t in psi)])
        sweeps.append(sum(event.name == "cin_fast::cpu_pair_sweep" for event in profile.events()))
    assert sweeps == [1, 0]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_only_one_result_is_used() -> None:
    x, partner, weight, bias, v, *_ = draws((2, 300, 20), 9, "relu", torch.float32, 0.7)
    x.requires_grad_()
    y, _ = pair_columns(x, partner, weight, bias, v, mean=4)
    (actual,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(cin_fast.sci(x, v).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_without_gradients() -> None:
    inputs = draws((2, 20, 6), 3, "relu", torch.float32, 0.7, repeat=1)[:5]
    with torch.no_grad():
        y, y_pair = pair_columns(*inputs, mean=1)
    assert not y.requires_grad
    assert torch.equal(y_pair, pair_columns(*inputs, mean=1)[1])


def test_opcheck() -> None:
    x, partner, weight, bias, v, *_ = draws((2, 5, 6), 3, "relu", torch.float32, 0.7, repeat=1)
    for frozen in ((), (x, v), (weight, bias)):
        leaves = [t.detach() for t in (x, weight, bias, v)]
        for leaf, original in zip(leaves, (x, weight, bias, v), strict=True):
            leaf.requires_grad_(all(original is not t for t in frozen))
        arguments = (leaves[0], partner, *leaves[1:], 1, -1.0)
        torch.library.opcheck(torch.ops.cin_fast.cpu_pair, arguments)


def test_compiles_as_one_graph() -> None:
    x, partner, *rest, _, _ = draws((2, 5, 6), 3, "relu", torch.float32, 0.7, repeat=1)
    leaves = [t.requires_grad_() for t in (x, *rest)]

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        y, y_pair = pair_columns(x, partner, *rest, mean=1)
        return (y * y_pair).sum()

    expected = torch.autograd.grad(call(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(call, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(actual, expected)


def test_autocast_casts_the_features_and_not_psi() -> None:
    x, partner, weight, bias, v, *_ = draws((2, 20, 6), 3, "relu", torch.float32, 0.7)
    leaves = [t.requires_grad_() for t in (x, weight, bias, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, y_pair = pair_columns(x, partner, weight, bias, v, mean=1)
    expected = pair_columns(x.bfloat16(), partner, weight, bias, v.bfloat16(), mean=1)
    assert torch.equal(y, expected[0])
    assert torch.equal(y_pair, expected[1])
    assert y.dtype == torch.bfloat16
    (y.float().sum() + y_pair.float().sum()).backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)


def test_a_second_derivative_is_refused() -> None:
    x, partner, *rest, _, _ = draws((2, 5, 6), 3, "relu", torch.float32, 0.7, repeat=1)
    x.requires_grad_()
    y, y_pair = pair_columns(x, partner, *rest, mean=1, backend="cpu")
    (dx,) = torch.autograd.grad((y * y_pair).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        ("cci_after_sci", {"row_max": torch.ones(2, 4)}, r"row_max: expected \[2, 5\]"),
        ("cci_after_sci", {"eta": torch.ones(3)}, r"eta: expected \[2\]"),
        ("pair_sweep", {"dy": torch.ones(2, 5, 4)}, r"dy: expected \[2, 5, 3\]"),
        ("pair_sweep", {"y_pair": torch.ones(2, 5)}, r"y_pair: expected \[2, 5, 3\]"),
        ("pair_sweep", {"row_sum": torch.ones(1, 5)}, r"row_sum: expected \[2, 5\]"),
    ],
)
def test_kernels_check_what_they_are_handed(
    operator: str, change: dict[str, Tensor], message: str
) -> None:
    columns, rows = torch.ones(2, 5, 3), torch.zeros(2, 5)
    named = {
        **dict.fromkeys(("dy", "dy_pair"), columns),
        "x": torch.ones(2, 5, 6),
        "partner": torch.tensor([1, 0]),
        "eta": torch.ones(2),
        **dict.fromkeys(("v", "y", "y_pair", "b"), columns),
        "row_max": rows,
        "row_sum": rows + 1,
        "scale": -1.0,
    }
    if operator == "cci_after_sci":
        for name in ("dy", "dy_pair", "y", "y_pair", "b"):
            del named[name]
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.cin_fast, f"cpu_{operator}")(**{**named, **change})
