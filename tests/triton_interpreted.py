"""The Triton kernels on CPU tensors: cases that run in a process with Triton's interpreter.

Whether Triton interprets or compiles is settled when it is imported, so test_triton_kernels.py
starts this file once, sends it the names of cases, a line each, and gets a line of JSON for each:
what went wrong, or null.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from unittest import mock

import torch
from strides import other_strides
from torch import Tensor

from cin_fast import dispatch, ops
from cin_fast.kernels.configs import AMPERE, HOPPER
from cin_fast.testing import (
    INPUT_KINDS,
    KERNEL_DTYPES,
    SHAPES,
    assert_exact_as_torch,
    check_pair,
    check_sci,
    evaluate_cci,
    evaluate_sci,
    make_input,
    make_pair_inputs,
    make_pairs,
)

SMALL = tuple(shape for shape in SHAPES if shape[1] * shape[2] <= 65 * 65)
LARGE = ((1, 130, 196),)
CASES: dict[str, Callable[[], None]] = {}

Draw = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]


def draw(shape: tuple[int, ...], columns: int | None, kind: str, dtype: torch.dtype) -> Draw:
    """x, v, dy, partner and eta."""
    x = make_input(kind, shape, dtype)
    v = None if columns is None else make_input("randn", (*shape[:2], columns), dtype, seed=1)
    dy = make_input("randn", (x if v is None else v).shape, dtype, seed=2)
    return x, v, dy, *make_pairs(shape[0])


def check(draws: Iterable[Draw], scale: float = -1.0) -> None:
    """The rule for both operators; for d eta, one number an image, over all draws together.

    The largest error of few numbers is chance.
    """
    detas = []
    for x, v, dy, partner, eta in draws:
        double = [None if t is None else t.double() for t in (x, v, dy, eta)]
        with poisoned():
            check_sci("triton", x, v, dy, scale)
            actual = evaluate_cci(x, partner, eta, v, dy, scale, backend="triton").results
        plain = evaluate_cci(x, partner, eta, v, dy, scale, backend="torch").results
        x, v, dy, eta = double
        exact = evaluate_cci(x, partner, eta, v, dy, scale, backend="torch").results
        detas.append([results.pop("deta") for results in (actual, plain, exact)])
        for name, found in actual.items():
            assert_exact_as_torch(f"cci {name}", found, plain[name], exact[name])
    assert_exact_as_torch("cci deta", *(torch.cat(parts) for parts in zip(*detas, strict=True)))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch.empty and its kin hand out holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def everything(x: Tensor, v: Tensor | None = None) -> list[Tensor]:
    """Values and gradients of both operators."""
    partner, eta = make_pairs(len(x))
    dy = make_input("randn", (x if v is None else v).shape, x.dtype, seed=2)
    one = evaluate_sci(x, v, dy, backend="triton")
    two = evaluate_cci(x, partner, eta, v, dy, backend="triton")
    return [*one.results.values(), *two.results.values()]


def same_bits(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(one, two, strict=True))


def rule(
    shapes: tuple[tuple[int, ...], ...], columns: int | None, kind: str, dtype: str, chip: int
) -> None:
    """The rule, by the rows of a chip's table."""
    draws = [draw(shape, columns, kind, getattr(torch, dtype)) for shape in shapes]
    # A tile costs the interpreter the same at any size: float32's own are met in one kind only.
    tiles = contextlib.nullcontext() if shapes != LARGE and kind == "randn" else large_tiles()
    with tiles, mock.patch("cin_fast.kernels.launch.chip_of", return_value=chip):
        check(draws)


@contextlib.contextmanager
def large_tiles() -> Iterator[None]:
    """float32 in blocks of 128 rows."""
    from cin_fast.kernels import configs, plan

    before = dict(configs.CONFIGS)
    for key in before:
        if key[1] == "single":
            configs.CONFIGS[key] = configs.Config(128, 128, 4, 2, 128, 0, 64)
    plan.plan.cache_clear()
    try:
        yield
    finally:
        configs.CONFIGS.update(before)
        plan.plan.cache_clear()


def long_rows(dtype: str) -> None:
    """Rows too long to be held are met in chunks, whole ones and a part."""
    cases = ((300, None), (320, None), (300, 9))
    check(draw((2, 18, length), k, "diffuse", getattr(torch, dtype)) for length, k in cases)


def wide_values(dtype: str) -> None:
    """More columns of v than a program makes: spans of them."""
    check([draw((2, 33, 20), 300, "diffuse", getattr(torch, dtype))])


def scales(scale: float) -> None:
    check([draw((2, 33, 20), columns, "diffuse", torch.float32) for columns in (None, 9)], scale)


def large_activations(dtype: str) -> None:
    x, v, dy, partner, eta = draw((2, 33, 20), None, "randn", getattr(torch, dtype))
    x = x * (1e4 if dtype == "float32" else 100)
    check([(x, v, dy, partner, eta)])


def nearly_one_weight(columns: int | None, chip: int) -> None:
    """dP - delta is a small difference of large numbers."""
    with mock.patch("cin_fast.kernels.launch.chip_of", return_value=chip):
        for dtype in (torch.bfloat16, torch.float16):
            x, v, dy, _, _ = draw((2, 190, 32), columns, "randn", dtype)
            check_sci("triton", x * 1.5, v, dy, scale=1.0)


def one_weight(factor: int) -> None:
    """Where all rows have one weight, all of dP - delta cancels."""
    for columns in (None, 9):
        x, v, dy, _, _ = draw((2, 70, 20), columns, "randn", torch.float16)
        check_sci("triton", x * factor, v, dy)


def identical_rows(dtype: str) -> None:
    x = make_input("relu", (2, 1, 20), getattr(torch, dtype)).expand(2, 33, 20)
    _, v, dy, partner, eta = draw((2, 33, 20), None, "relu", x.dtype)
    check([(x, v, dy, partner, eta)])
    torch.testing.assert_close(ops.sci(x, backend="triton"), x.contiguous())


def strided(dtype: str) -> None:
    """Any strides give the bits that contiguous tensors give."""
    x = make_input("relu", (2, 33, 20), getattr(torch, dtype))
    v = make_input("randn", (2, 33, 7), getattr(torch, dtype))
    transposed = x.mT.contiguous().mT
    every_other = v.repeat_interleave(2, dim=2)[..., ::2]
    assert not transposed.is_contiguous()
    assert not every_other.is_contiguous()
    expected = everything(x, v)
    assert same_bits(everything(transposed, every_other), expected)
    with other_strides():
        assert same_bits(everything(x, v), expected)


def repeatable(dtype: str) -> None:
    x = make_input("randn", (2, 35, 20), getattr(torch, dtype))
    assert same_bits(everything(x), everything(x))


def any_partners() -> None:
    """Partners far apart, images that are their own, and the order of a pair."""
    x, v, dy, _, _ = draw((5, 18, 20), None, "diffuse", torch.float32)
    eta = torch.tensor([0.3, -0.7, 1.2, 0.5, 0.9])
    involutions = (torch.tensor([4, 1, 3, 2, 0]), torch.arange(5))
    check([(x, v, dy, partner, eta) for partner in involutions])


def pairs(dtype: str) -> None:
    """cci takes its rows' numbers from sci."""
    with poisoned(), mock.patch("cin_fast.kernels.launch.KERNELS", without("row_numbers")):
        for shape in ((16, 17, 5), (2, 70, 20)):
            inputs = make_pair_inputs(shape, 9, "relu", getattr(torch, dtype), bias=-0.6)
            check_pair("triton", *inputs)


def without(kernel: str) -> dict[str, object]:
    from cin_fast.kernels import launch

    return {name: one for name, one in launch.KERNELS.items() if name != kernel}


def operators(columns: int | None) -> None:
    """Schema, fake and autograd of the operators agree with what the kernels return."""
    x, v, _, partner, eta = draw((2, 5, 6), columns, "relu", torch.float32)
    leaves = [None if t is None else t.requires_grad_() for t in (x, v, eta)]
    x, v, eta = leaves
    # The first question registers them.
    assert not dispatch.why_not(x, "triton")
    torch.library.opcheck(torch.ops.cin_fast.triton_sci, (x, v, -1.0))
    torch.library.opcheck(torch.ops.cin_fast.triton_cci, (x, partner, eta, v, -1.0))
    if v is not None:
        _, *rows, _ = torch.ops.cin_fast.triton_sci(x.detach(), v.detach(), -1.0)
        arguments = (x, partner, eta, v, *rows, -1.0)
        torch.library.opcheck(torch.ops.cin_fast.triton_cci_after_sci, arguments)


def one_graph() -> None:
    x, _, _, partner, eta = draw((2, 5, 6), None, "relu", torch.float32)
    inputs = (x.requires_grad_(), eta.requires_grad_())

    def call(x: Tensor, eta: Tensor) -> Tensor:
        y = ops.sci(x, backend="triton") + ops.cci(x, partner, eta, backend="triton")
        return y.square().sum()

    expected = torch.autograd.grad(call(*inputs), inputs)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)


def float32_precision() -> None:
    """TF32 is the user's choice, and float32's alone."""
    from cin_fast.kernels.launch import precision

    for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
        torch.set_float32_matmul_precision(setting)
        assert precision(torch.float32) == expected
        assert precision(torch.bfloat16) == "ieee"
    torch.set_float32_matmul_precision("highest")


def bfloat16_is_repaired() -> None:
    """The interpreter's bfloat16: casts that round to the nearest even, NaN among them."""
    from cin_fast.kernels.interpreter import narrowed, widened

    values = torch.cat([make_input("randn", (1000,)), torch.tensor([torch.inf, -0.0, torch.nan])])
    expected = values.bfloat16()
    patterns = narrowed(values.numpy())
    assert torch.equal(torch.from_numpy(widened(patterns))[:-1], expected[:-1].float())
    assert torch.from_numpy(widened(patterns))[-1].isnan()


def add(function: Callable[..., None], *arguments: object, name: str = "") -> None:
    label = name or "-".join(map(str, arguments))
    CASES[f"{function.__name__}-{label}" if label else function.__name__] = partial(
        function, *arguments
    )


def add_rule(
    shapes: tuple[tuple[int, ...], ...], columns: int | None, kind: str, dtype: str, chip: int
) -> None:
    size = "large" if shapes == LARGE else "small"
    name = f"{size}-K{columns}-{kind}-{dtype}-sm_{chip}"
    add(rule, shapes, columns, kind, dtype, chip, name=name)


NAMES = [str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES]
# Both 16-bit types take the same rows: one meets each chip's.
CHIPS = {"float32": AMPERE, "bfloat16": AMPERE, "float16": HOPPER}
for _dtype, _kind, _columns in itertools.product(NAMES, INPUT_KINDS, (None, 9)):
    add_rule(SMALL, _columns, _kind, _dtype, CHIPS[_dtype])
for _dtype in NAMES:
    add_rule(LARGE, None, "randn", _dtype, CHIPS[_dtype])
add_rule(LARGE, 9, "relu", "bfloat16", HOPPER)
for _dtype in NAMES:
    for _columns in (1, 16, 40):
        add_rule(SMALL[2:6], _columns, "relu", _dtype, CHIPS[_dtype])
    for _function in (
        *(long_rows, wide_values, large_activations, identical_rows, strided, repeatable, pairs),
    ):
        add(_function, _dtype)
for _columns, _chip in itertools.product((None, 9), (AMPERE, HOPPER)):
    add(nearly_one_weight, _columns, _chip)
for _factor in (4, 100):
    add(one_weight, _factor)
for _scale in (1.0, -0.3, 0.0):
    add(scales, _scale)
for _function in (any_partners, one_graph, float32_precision, bfloat16_is_repaired):
    add(_function)
for _columns in (None, 9):
    add(operators, _columns)


def main() -> None:
    """Answer each case on standard input."""
    from cin_fast.kernels.interpreter import repair

    torch.set_num_threads(1)
    repair()
    for line in sys.stdin:
        problem = None
        try:
            CASES[line.strip()]()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main()
