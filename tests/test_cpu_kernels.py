"""The C++ kernels: the rule for numbers on every instruction set, and inputs that break kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import pytest
import torch
from cpu_isas import ISA_DTYPES, poisoned_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from strides import other_strides
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cin_fast
from cin_fast import dispatch
from cin_fast.testing import (
    INPUT_KINDS,
    KERNEL_DTYPES,
    SHAPES,
    Standard,
    Truth,
    assert_exact_as_torch,
    check_cci,
    check_sci,
    evaluate_cci,
    evaluate_sci,
    find_truth,
    make_input,
    make_pairs,
)

pytestmark = pytest.mark.usefixtures("cpu_extension", "two_threads")

INF, NAN = float("inf"), float("nan")


def draws(shape: tuple[int, ...], k: int | None, kind: str, dtype: torch.dtype) -> tuple:
    """x, v, dy, partner, eta, of 8 times the images: the largest of few errors is chance."""
    shape = (8 * shape[0], *shape[1:])
    x = make_input(kind, shape, dtype)
    v = None if k is None else make_input("randn", (*shape[:2], k), dtype, seed=2)
    dy = make_input("randn", (x if v is None else v).shape, dtype, seed=1)
    return x, v, dy, *make_pairs(shape[0])


@dataclass(frozen=True)
class Case:
    """Inputs of both operators, and what is true of them."""

    x: Tensor
    v: Tensor | None
    dy: Tensor
    partner: Tensor
    eta: Tensor
    scale: float = -1.0

    @cached_property
    def sci(self) -> Truth:
        return find_truth(evaluate_sci, self.x, self.v, self.dy, scale=self.scale)

    @cached_property
    def cci(self) -> Truth:
        return find_truth(evaluate_cci, *self.cci_inputs, scale=self.scale)

    @property
    def cci_inputs(self) -> tuple[Tensor | None, ...]:
        return self.x, self.partner, self.eta, self.v, self.dy


# Of one test, so that the instruction sets, which change first, share what is true.
@lru_cache(maxsize=1)
def cases(
    shapes: tuple[tuple[int, ...], ...],
    k: int | None,
    kind: str,
    dtype: torch.dtype,
    scale: float = -1.0,
) -> list[Case]:
    return [Case(*draws(shape, k, kind, dtype), scale) for shape in shapes]


def check_both(cases: Sequence[Case]) -> None:
    """The rule for both operators; that of d eta, one number an image, over all cases together."""
    detas = []
    for case in cases:
        with poisoned_memory():
            check_sci("cpu", case.x, case.v, case.dy, case.scale, case.sci)
            actual = evaluate_cci(*case.cci_inputs, case.scale, backend="cpu").results
        plain, exact = case.cci.plain, case.cci.exact
        detas.append([results["deta"] for results in (actual, plain, exact)])
        for name in actual.keys() - {"deta"}:
            assert_exact_as_torch(f"cci {name}", actual[name], plain[name], exact[name])
    assert_exact_as_torch("cci deta", *(torch.cat(parts) for parts in zip(*detas, strict=True)))


@pytest.mark.parametrize(("isa", "dtype"), ISA_DTYPES, indirect=["isa"], ids=str)
@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("k", [None, 1, 9])
def test_the_rule(isa: str, kind: str, dtype: torch.dtype, k: int | None) -> None:
    check_both(cases(SHAPES, k, kind, dtype))


@pytest.mark.parametrize("scale", [1.0, -0.3])
@pytest.mark.parametrize("k", [None, 9])
def test_the_rule_for_other_scales(isa: str, scale: float, k: int | None) -> None:
    check_both(cases(((3, 64, 49), (2, 200, 33)), k, "relu", torch.float32, scale))


@pytest.mark.parametrize(("isa", "dtype"), ISA_DTYPES, indirect=["isa"], ids=str)
@pytest.mark.parametrize("k", [None, 9])
def test_rows_with_nearly_one_weight(isa: str, dtype: torch.dtype, k: int | None) -> None:
    """dP - delta is a small difference of large numbers."""
    x, v, dy, _, _ = draws((1, 190, 32), k, "randn", dtype)
    check_sci("cpu", x * 1.5, v, dy, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_rounding_took_off_y_is_needed(dtype: torch.dtype) -> None:
    x, v, dy, _, _ = draws((1, 190, 32), 9, "randn", dtype)
    truth = find_truth(evaluate_sci, x, v, dy, scale=1.0)
    assert not dispatch.unavailable("cpu")
    y, *rows, rest = torch.ops.cin_fast.cpu_sci(x, v, 1.0)
    assert torch.equal((y.float() + rest).to(dtype), y)
    for kept, is_right in ((rest, True), (torch.zeros_like(rest), False)):
        dx, _ = torch.ops.cin_fast.cpu_sci_backward(dy, x, v, y, *rows, kept, 1.0)
        problem = Standard(truth.exact["dx"], [(truth.plain["dx"], truth.exact["dx"])]).problem(dx)
        assert (not problem) == is_right, problem


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_where_the_rows_of_v_agree_the_gradient_vanishes(dtype: torch.dtype, spread: float) -> None:
    """y is then a row of v only if weights rounded for the product are divided by their own sum."""
    for shape in ((2, 128, 196), (2, 300, 49)):
        x = make_input("relu", shape, dtype)
        v, dy = (make_input("randn", (*shape[:2], 9), dtype, seed=seed) for seed in (1, 2))
        check_sci("cpu", x, 1 + spread * v, dy)


def test_where_the_largest_weights_stand_is_checked() -> None:
    """What a saved tensor comes back as is not ours to say: nothing beyond x may be read."""
    x = make_input("diffuse", (2, 40, 6))
    y, _, row_sum, rest = torch.ops.cin_fast.cpu_sci(x, None, -1.0)
    for where in (1e12, -3.0, NAN):
        dx, _ = torch.ops.cin_fast.cpu_sci_backward(
            y, x, None, y, torch.full((2, 40), where), row_sum, rest, -1.0
        )
        assert dx.shape == x.shape


@pytest.mark.slow
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("k", [None, 9])
def test_the_rule_at_the_papers_size(dtype: torch.dtype, k: int | None) -> None:
    # The gradient of |M| jumps where M = 0, and of 8 million entries some are nearer to it than
    # float32 can tell. With these eta, none is.
    eta = torch.tensor([-0.5, -0.2])
    found = []
    for kind in INPUT_KINDS:
        x = make_input(kind, (2, 2048, 196), dtype)
        v = None if k is None else make_input("randn", (2, 2048, k), dtype, seed=2)
        dy = make_input("randn", (x if v is None else v).shape, dtype, seed=1)
        found.append(Case(x, v, dy, torch.tensor([1, 0]), eta))
    check_both(found)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.just(4), st.integers(1, 300), st.integers(1, 260)),
    k=st.none() | st.integers(1, 70),
    kind=st.sampled_from(INPUT_KINDS),
    dtype=st.sampled_from(KERNEL_DTYPES),
)
def test_any_shape(shape, k, kind, dtype):
    x, v, dy, partner, eta = draws(shape, k, kind, dtype)
    exact = [t if t is None else t.double() for t in (x, v, dy, partner, eta)]
    with poisoned_memory():
        actual = evaluate_cci(x, partner, eta, v, dy, backend="cpu").results
        actual_sci = evaluate_sci(x, v, dy, backend="cpu").results
    x, v, dy, _, eta = exact
    expected = evaluate_cci(x, partner, eta, v, dy, backend="torch").results
    expected_sci = evaluate_sci(x, v, dy, backend="torch").results
    # A few numbers' largest error is chance, and a random shape may have few numbers, or a weight
    # on the jump of |M|'s gradient: the rule itself is kept at fixed shapes, above.
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for name, found in actual_sci.items():
        assert relative_error(found, expected_sci[name]) < tolerance, f"sci {name}"
    assert relative_error(actual["y"], expected["y"]) < tolerance
    assert relative_error(actual["dx"], expected["dx"]) < 30 * tolerance


def relative_error(actual: Tensor, exact: Tensor) -> float:
    error = (actual.double() - exact).norm() / exact.norm().clamp_min(1e-12)
    return error.item()


def everything(x: Tensor, v: Tensor | None = None, partner: Tensor | None = None) -> list[Tensor]:
    """Values and gradients of both operators."""
    x = x.detach().requires_grad_()
    leaves = [x] if v is None else [x, v.detach().requires_grad_()]
    even, eta = make_pairs(len(x))
    eta.requires_grad_()
    y = cin_fast.sci(*leaves, backend="cpu")
    dy = make_input("randn", y.shape, y.dtype, seed=5)
    y_pair = cin_fast.cci(x, even if partner is None else partner, eta, *leaves[1:], backend="cpu")
    gradients = torch.autograd.grad(y, leaves, dy)
    return [y, y_pair, *gradients, *torch.autograd.grad(y_pair, [*leaves, eta], dy)]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize(("isa", "dtype"), ISA_DTYPES, indirect=["isa"], ids=str)
def test_same_bits_at_every_run_whatever_memory_held(isa: str, dtype: torch.dtype) -> None:
    for k in (None, 9):
        x, v, *_ = draws((1, 200, 49), k, "relu", dtype)
        first = everything(x, v)
        with poisoned_memory():
            assert same_bits(first, everything(x, v))
        for _ in range(3):
            assert same_bits(first, everything(x, v))


@pytest.mark.parametrize(("isa", "dtype"), ISA_DTYPES, indirect=["isa"], ids=str)
@pytest.mark.parametrize("k", [None, 9])
def test_cci_gives_the_same_bits_where_no_gradient_is_asked_for(
    isa: str, dtype: torch.dtype, k: int | None
) -> None:
    for shape in ((1, 65, 33), (1, 130, 196)):
        x, v, _, partner, eta = draws(shape, k, "relu", dtype)
        with poisoned_memory():
            alone = cin_fast.cci(x, partner, eta, v, backend="cpu")
        y = cin_fast.cci(x.requires_grad_(), partner, eta, v, backend="cpu")
        assert y.requires_grad
        assert not alone.requires_grad
        assert torch.equal(alone, y)


@pytest.mark.parametrize(
    ("stem", "which"), [("sci", "x"), ("sci", "v"), ("cci", "x"), ("cci", "eta"), ("cci", "v")]
)
def test_what_a_gradient_needs_is_left_out_only_where_none_is_asked_for(
    stem: str, which: str
) -> None:
    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.names.append(function.name())
            return function(*arguments, **(keywords or {}))

    def call() -> Tensor:
        if stem == "sci":
            return cin_fast.sci(x, v, backend="cpu")
        return cin_fast.cci(x, partner, eta, v, backend="cpu")

    x, v, _, partner, eta = draws((1, 9, 6), 3, "relu", torch.bfloat16)
    leaf = {"x": x, "eta": eta, "v": v}[which].requires_grad_()
    values = f"cin_fast::cpu_{stem}_values"
    with Seen() as seen:
        y = call()
    assert values not in seen.names
    assert torch.autograd.grad(y.sum(), leaf)[0].isfinite().all()
    for without in (torch.no_grad, torch.inference_mode):
        seen.names.clear()
        with seen, without():
            alone = call()
        assert values in seen.names
        assert torch.equal(alone, y)


def test_an_image_does_not_depend_on_the_batch_around_it() -> None:
    x = make_input("relu", (32, 70, 20))
    alone = torch.cat([cin_fast.sci(x[i : i + 1], backend="cpu") for i in range(32)])
    torch.testing.assert_close(cin_fast.sci(x, backend="cpu"), alone, rtol=1e-6, atol=1e-6)


def test_strides_do_not_matter() -> None:
    x, v = make_input("relu", (4, 33, 20)), make_input("randn", (4, 33, 5), seed=3)
    strided_x = torch.empty(20, 4, 66)[..., ::2].permute(1, 2, 0).copy_(x)
    strided_v = torch.empty(4, 5, 33).mT.copy_(v)
    assert not strided_x.is_contiguous()
    assert not strided_v.is_contiguous()
    assert same_bits(everything(x), everything(strided_x))
    assert same_bits(everything(x, v), everything(strided_x, strided_v))


def test_saved_tensors_may_come_back_in_other_strides() -> None:
    x, v = make_input("relu", (4, 33, 20)), make_input("randn", (4, 33, 5), seed=3)
    expected = everything(x), everything(x, v)
    with other_strides():
        assert same_bits(everything(x), expected[0])
        assert same_bits(everything(x, v), expected[1])


def test_an_expanded_gradient() -> None:
    x = make_input("relu", (2, 9, 6)).requires_grad_()
    (grad,) = torch.autograd.grad(cin_fast.sci(x, backend="cpu").sum(), x)
    (expected,) = torch.autograd.grad(cin_fast.sci(x, backend="reference").sum(), x)
    torch.testing.assert_close(grad, expected)


def test_any_involution() -> None:
    x, v = make_input("diffuse", (5, 40, 12)), make_input("randn", (5, 40, 9), seed=3)
    for partner in ([4, 1, 3, 2, 0], [0, 1, 2, 3, 4], [2, 4, 0, 3, 1]):
        check_cci("cpu", x, torch.tensor(partner), torch.linspace(-1, 2, 5), v, torch.ones_like(v))


def test_an_empty_batch() -> None:
    results = everything(torch.zeros(0, 5, 6), torch.zeros(0, 5, 3))
    assert [tuple(t.shape) for t in results[:2]] == [(0, 5, 3), (0, 5, 3)]


def test_equal_rows_share_their_weights_equally(isa: str) -> None:
    row = make_input("randn", (1, 1, 30))
    x = row.expand(2, 150, 30)
    torch.testing.assert_close(cin_fast.sci(x, backend="cpu"), x, rtol=1e-6, atol=1e-6)
    assert all(t.isfinite().all() for t in everything(x))


def test_weights_that_cancel_to_zero_have_no_sign() -> None:
    x = make_input("relu", (1, 20, 6)).requires_grad_()
    own = torch.zeros(1, dtype=torch.int64)
    y = cin_fast.cci(x, own, torch.ones(1), backend="cpu")
    assert not y.any()
    assert not torch.autograd.grad(y.sum(), x)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 1e18, 1e-30])
def test_constant_inputs_stay_finite(isa: str, value: float, dtype: torch.dtype) -> None:
    x = torch.full((2, 70, 20), value, dtype=dtype)
    y = cin_fast.sci(x, backend="cpu")
    torch.testing.assert_close(y, x, rtol=max(1e-6, torch.finfo(dtype).eps), atol=0)
    assert cin_fast.cci(x, *make_pairs(2), backend="cpu").isfinite().all()


@pytest.mark.parametrize(("isa", "dtype"), ISA_DTYPES, indirect=["isa"], ids=str)
def test_padding_has_no_part_in_gradients(isa: str, dtype: torch.dtype) -> None:
    # Rows of nothing, beyond the last channel, would have all the weight where logits are at -320.
    x = torch.full((2, 71, 20), 4.0, dtype=dtype)
    assert all(t.isfinite().all() for t in everything(x))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_huge_activations_do_not_overflow(isa: str, dtype: torch.dtype) -> None:
    x = (1e4 * make_input("randn", (2, 70, 20))).to(dtype)
    assert all(t.isfinite().all() for t in everything(x)[:2])
    x, v, dy, *_ = draws((2, 70, 20), None, "randn", torch.float32)
    check_sci("cpu", 30 * x, v, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [None, 9])
def test_nan_stays_where_it_belongs(isa: str, k: int | None, dtype: torch.dtype) -> None:
    x = make_input("relu", (4, 150, 21), dtype)
    v = None if k is None else make_input("randn", (4, 150, k), dtype, seed=3)
    x[1, 77, 3] = NAN
    results = everything(x, v)
    sci_y, cci_y, sci_dx = results[0], results[1], results[2]
    # A channel's NaN reaches every logit of its image: of that image alone, and of its partner.
    assert sci_y[1].isnan().all()
    assert cci_y[:2].isnan().all()
    assert sci_dx[1].isnan().all()
    for clean in (sci_y[[0, 2, 3]], sci_dx[[0, 2, 3]], cci_y[2:]):
        assert clean.isfinite().all()


def test_nan_in_v_or_dy_reaches_its_column() -> None:
    x, v = make_input("relu", (2, 150, 20)), make_input("randn", (2, 150, 9), seed=3)
    v[0, 5, 4] = NAN
    y = cin_fast.sci(x, v, backend="cpu")
    assert y[0, :, 4].isnan().all()
    y[0, :, 4] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("scale", [-1.0, 1.0])
def test_infinities_do_as_in_torch(
    isa: str, value: float, scale: float, dtype: torch.dtype
) -> None:
    x = make_input("relu", (2, 150, 20), dtype) + 0.1
    x[1, 77, 3] = value
    y = cin_fast.sci(x, scale=scale, backend="cpu")
    expected = cin_fast.sci(x, scale=scale, backend="reference")
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y[0], expected[0])


def test_opcheck() -> None:
    x = make_input("relu", (2, 5, 6)).requires_grad_()
    v = make_input("randn", (2, 5, 3)).requires_grad_()
    partner, eta = make_pairs(2)
    eta.requires_grad_()
    for values in (None, v):
        torch.library.opcheck(torch.ops.cin_fast.cpu_sci, (x, values, -1.0))
        halves = [t if t is None else t.detach().bfloat16() for t in (x, values)]
        torch.library.opcheck(torch.ops.cin_fast.cpu_sci, (*halves, -1.0))
        torch.library.opcheck(torch.ops.cin_fast.cpu_cci, (x, partner, eta, values, -1.0))
        with torch.no_grad():
            alone = (x.detach(), partner, eta.detach(), values, -1.0)
            torch.library.opcheck(torch.ops.cin_fast.cpu_cci_values, alone)
            torch.library.opcheck(torch.ops.cin_fast.cpu_sci_values, (x.detach(), values, -1.0))


def test_compiles_as_one_graph() -> None:
    x = make_input("relu", (2, 5, 6)).requires_grad_()

    def call(x: Tensor) -> Tensor:
        return cin_fast.sci(x).square().sum()

    (expected,) = torch.autograd.grad(call(x), x)
    (actual,) = torch.autograd.grad(torch.compile(call, fullgraph=True)(x), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_made_for_values_can_be_differentiated(dtype: torch.dtype) -> None:
    """As one that was exported for inference, and is trained on."""
    x, v, dy, partner, eta = draws((1, 20, 9), 3, "relu", dtype)
    for values in (None, v):
        dy = torch.ones_like(x if values is None else values)
        for stem, inputs in (("sci", (x, values)), ("cci", (x, partner, eta, values))):
            leaves = [t if t is None or t.dtype == torch.int64 else t.detach().requires_grad_()
                      for t in inputs]  # fmt: skip
            wanted = [t for t in leaves if t is not None and t.requires_grad]
            ys = [
                getattr(torch.ops.cin_fast, f"cpu_{stem}")(*leaves, -1.0)[0],
                getattr(torch.ops.cin_fast, f"cpu_{stem}_values")(*leaves, -1.0),
            ]
            assert torch.equal(*ys)
            expected, actual = (torch.autograd.grad(y, wanted, dy) for y in ys)
            assert all(map(torch.equal, actual, expected))


def test_compiled_cci_knows_whether_a_gradient_is_asked_for() -> None:
    x, (partner, eta) = make_input("relu", (2, 5, 6)), make_pairs(2)
    compiled = torch.compile(lambda x: cin_fast.cci(x, partner, eta, backend="cpu"), fullgraph=True)
    values = compiled(x)
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    assert torch.equal(values, y)
    (actual,) = torch.autograd.grad(y.sum(), leaf)
    (expected,) = torch.autograd.grad(
        cin_fast.cci(leaf, partner, eta, backend="reference").sum(), leaf
    )
    torch.testing.assert_close(actual, expected)


def test_the_cpu_takes_it_by_itself() -> None:
    x = make_input("relu", (2, 5, 6))
    assert cin_fast.dispatch.choose(x) == "cpu"


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIN_FAST_CPU_ISA", "mmx")
    with pytest.raises(
        RuntimeError, match=r"CIN_FAST_CPU_ISA: expected plain, .* avx512_bf16, found mmx"
    ):
        cin_fast.sci(torch.ones(1, 2, 3), backend="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), None, -1.0), r"x.*\[2, 3\]"),
        ((torch.ones(1, 2, 3), torch.ones(1, 3, 3), -1.0), r"v.*\[1, 3, 3\]"),
        ((torch.ones(1, 2, 3).double(), None, -1.0), "x: expected float32.*Double"),
    ],
)
def test_kernels_check_what_they_are_handed(arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cin_fast.cpu_sci(*arguments)


PEAK = """
import resource, sys, torch, cin_fast
torch.set_num_threads(2)
c, operator = int(sys.argv[1]), sys.argv[2]
x = torch.relu(torch.randn(2, c, 9)).requires_grad_()
small = x.detach()[:, :8].requires_grad_()
def call(x):
    if operator == "sci":
        return cin_fast.sci(x, backend="cpu")
    return cin_fast.cci(x, torch.tensor([1, 0]), torch.rand(2), backend="cpu")
call(small).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(x).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux alone")
@pytest.mark.parametrize("operator", ["sci", "cci"])
def test_no_matrix_of_channels_is_held(operator: str) -> None:
    channels = 6000
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(channels), operator],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    matrix = channels**2 * 4 / 1024
    assert int(run.stdout) < matrix / 6
