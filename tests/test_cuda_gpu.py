"""The ``cuda`` backend on a GPU: the rule for numbers, streams, graphs, devices. ``make gpu``."""

from __future__ import annotations

import pytest
import torch
from strides import other_strides
from torch import Tensor

from cin_fast import dispatch, ops
from cin_fast.testing import (
    INPUT_KINDS,
    KERNEL_DTYPES,
    SHAPES,
    check_cci,
    check_pair,
    check_sci,
    evaluate_cci,
    evaluate_sci,
    make_input,
    make_pair_inputs,
    make_pairs,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> torch.device:
    reason = dispatch.unavailable("cuda")
    if reason:
        pytest.skip(f"the cuda backend is off: {reason}")
    return torch.device("cuda")


def draw(
    kind: str,
    shape: tuple[int, int, int],
    columns: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, v of so many columns or None, and dy."""
    x = make_input(kind, shape, dtype, device)
    v = make_input("randn", (*shape[:2], columns), dtype, device, 1) if columns else None
    return x, v, make_input("randn", (*shape[:2], columns or shape[2]), dtype, device, 2)


@pytest.mark.parametrize("columns", [None, 9, 20, 215])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_rule(device: torch.device, kind: str, dtype: torch.dtype, columns: int | None) -> None:
    for shape in (*SHAPES, (1, 100, 784), (2, 2048, 196)):
        x, v, dy = draw(kind, shape, columns, dtype, device)
        check_sci("cuda", x, v, dy)
        check_cci("cuda", x, *make_pairs(shape[0], device), v, dy)


@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rule_beyond_the_first_wave(
    device: torch.device, dtype: torch.dtype, columns: int | None
) -> None:
    """More blocks than multiprocessors: on Hopper whole ones, and halves in the last wave."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    shape = (multiprocessors // 2 + 2, 200, 196)
    x, v, dy = draw("diffuse", shape, columns, dtype, device)
    check_sci("cuda", x, v, dy)
    check_cci("cuda", x, *make_pairs(shape[0], device), v, dy)


@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rule_without_wgmma(
    device: torch.device,
    dtype: torch.dtype,
    columns: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Hopper GPU on the kernels of older ones: where only one path fails, it is that path."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("this GPU has one path")
    monkeypatch.setenv("CIN_FAST_CUDA_PATH", "sm80")
    x, v, dy = draw("diffuse", (2, 500, 196), columns, dtype, device)
    check_sci("cuda", x, v, dy)
    check_cci("cuda", x, *make_pairs(2, device), v, dy)


@pytest.mark.parametrize("path", ["", "sm80"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_rule_for_pairs(
    device: torch.device, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("this GPU has one path")
    monkeypatch.setenv("CIN_FAST_CUDA_PATH", path)
    for shape in ((16, 17, 5), (5, 300, 49), (20, 512, 196)):
        inputs = make_pair_inputs(shape, 9, "relu", dtype, bias=-0.6)
        check_pair("cuda", *(t.to(device) for t in inputs))


@pytest.mark.parametrize("path", ["", "sm80"])
@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_with_one_weight(
    device: torch.device,
    dtype: torch.dtype,
    columns: int | None,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or nearly one: dP - delta has to cancel, which counts on how the hardware sums."""
    if path and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("this GPU has one path")
    monkeypatch.setenv("CIN_FAST_CUDA_PATH", path)
    for shape, factor, scale in (
        ((2, 70, 20), 4.0, -1.0),
        ((2, 70, 20), 100.0, -1.0),
        ((2, 190, 32), 1.5, 1.0),
        ((2, 190, 196), 1.0, 1.0),
    ):
        x, v, dy = draw("randn", shape, columns, dtype, device)
        check_sci("cuda", x * factor, v, dy, scale)


@pytest.mark.parametrize("columns", [None, 9])
def test_saved_tensors_may_come_back_in_other_strides(
    device: torch.device, columns: int | None
) -> None:
    x, v, dy = draw("relu", (4, 100, 49), columns, torch.bfloat16, device)
    partner, eta = make_pairs(4, device)

    def everything() -> list[Tensor]:
        one = evaluate_sci(x, v, dy, backend="cuda")
        other = evaluate_cci(x, partner, eta, v, dy, backend="cuda")
        return [*one.results.values(), *other.results.values()]

    expected = everything()
    with other_strides():
        assert all(map(torch.equal, everything(), expected))


def test_same_bits_on_any_stream_and_in_a_graph(device: torch.device) -> None:
    x = make_input("relu", (4, 512, 196), torch.bfloat16, device)
    expected = ops.sci(x, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = ops.sci(x, backend="cuda")
    torch.cuda.synchronize()
    assert torch.equal(on_stream, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.sci(x, backend="cuda")
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_another_device_than_the_current_one(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = make_input("relu", (1, 64, 49), torch.float16, "cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(ops.sci(x, backend="cuda").cpu(), ops.sci(x.to("cuda:0")).cpu())


def test_float32_follows_the_setting(device: torch.device) -> None:
    x = make_input("diffuse", (1, 256, 196), device=device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        ieee = ops.sci(x, backend="cuda")
        torch.set_float32_matmul_precision("high")
        tf32 = ops.sci(x, backend="cuda")
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(ieee, tf32)
    torch.testing.assert_close(ieee, tf32, rtol=1e-2, atol=1e-2)
