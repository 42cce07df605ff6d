"""The ``matmul`` backend: the rule for numbers, groups of images, and how much memory they take."""

from __future__ import annotations

import weakref

import pytest
import torch

import cin_fast
from cin_fast import matmul
from cin_fast.testing import (
    INPUT_KINDS,
    KERNEL_DTYPES,
    SHAPES,
    check_cci,
    check_sci,
    make_input,
    make_pairs,
)


@pytest.fixture(params=[0, 3, 1 << 20], ids=["one by one", "by groups", "all at once"])
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one, of three images with 17 channels and three matrices, of all."""
    monkeypatch.setattr(matmul, "WORKSPACE", request.param * 3 * 4 * 17**2)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_the_rule(kind: str, dtype: torch.dtype, columns: int | None) -> None:
    for shape in (*SHAPES, (7, 17, 30)):
        x = make_input(kind, shape, dtype)
        v = make_input("randn", (*shape[:2], columns), dtype, seed=1) if columns else None
        dy = make_input("randn", (*shape[:2], columns or shape[2]), dtype, seed=2)
        check_sci("matmul", x, v, dy)
        check_cci("matmul", x, *make_pairs(shape[0]), v, dy)


@pytest.mark.usefixtures("workspace")
def test_partners_of_another_group() -> None:
    x, dy = (make_input(kind, (4, 17, 30)) for kind in ("relu", "randn"))
    check_cci(
        "matmul", x, torch.tensor([3, 1, 2, 0]), torch.tensor([0.7, -0.4, 1.0, 0.0]), None, dy
    )


@pytest.mark.parametrize("scale", [-0.25, 1.0])
def test_scale_and_float64(scale: float) -> None:
    x = make_input("diffuse", (3, 8, 10), torch.float64).requires_grad_()
    results = []
    for backend in ("reference", "matmul"):
        y = cin_fast.sci(x, scale=scale, backend=backend)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_autocast_rounds_the_inputs_alone() -> None:
    x = make_input("diffuse", (2, 16, 20))
    with torch.autocast("cpu", torch.bfloat16):
        y = cin_fast.sci(x, backend="matmul")
    assert torch.equal(y, cin_fast.sci(x.bfloat16(), backend="matmul"))


def test_opcheck() -> None:
    x = make_input("diffuse", (2, 8, 10)).requires_grad_()
    partner, eta = make_pairs(2)
    eta.requires_grad_()
    for v in (None, make_input("randn", (2, 8, 3)).requires_grad_()):
        torch.library.opcheck(torch.ops.cin_fast.matmul_sci, (x, v, -1.0))
        torch.library.opcheck(torch.ops.cin_fast.matmul_cci, (x, partner, eta, v, -1.0))


def test_no_more_matrices_than_the_workspace_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where they are made: of eight images, so many at a time; of cci whole pairs."""
    made = []
    product = matmul._product
    monkeypatch.setattr(matmul, "WORKSPACE", 6 * 4 * 17**2)
    monkeypatch.setattr(matmul, "_product", lambda a, b: made.append(len(a)) or product(a, b))
    x = make_input("relu", (8, 17, 5)).requires_grad_()
    y = cin_fast.sci(x, backend="matmul")
    assert made == [3, 3, 2]
    made.clear()
    y.sum().backward()
    assert set(made) == {2}
    made.clear()
    cin_fast.cci(x, *make_pairs(8), backend="matmul").sum().backward()
    assert set(made) == {2}


def test_no_two_groups_matrices_are_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alive whenever another is made: logits and their gradient, of as many images as there may
    be, and maps of theirs."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive = []
    product = matmul._product

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        result = product(a, b)
        made.append(weakref.ref(result))
        alive.append(sum(t.numel() for one in made if (t := one()) is not None))
        return result

    monkeypatch.setattr(matmul, "WORKSPACE", 8 * 4 * 17**2)
    monkeypatch.setattr(matmul, "_product", watched)
    x = make_input("relu", (8, 17, 5)).requires_grad_()
    cin_fast.sci(x, backend="matmul").sum().backward()
    cin_fast.cci(x, *make_pairs(8), backend="matmul").sum().backward()
    assert max(alive) <= 2 * 2 * 17**2 + 3 * 2 * 17 * 5


@pytest.mark.parametrize(
    "partner", [[3, 1, 2, 0, 4], [0, 1, 2], [1, 0, 3, 2], [0], [2, 4, 0, 3, 1]]
)
def test_pairs_stay_together(partner: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "WORKSPACE", 0)
    found = []
    for images, places in matmul._pairs(torch.zeros(len(partner), 3, 1), torch.tensor(partner), 1):
        assert [partner[i] for i in images] == images[places].tolist()
        found += images.tolist()
    assert sorted(found) == list(range(len(partner)))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [None, 9])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_on_a_gpu(kind: str, dtype: torch.dtype, columns: int | None) -> None:
    """There products of half precision leave the library in float32."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    for shape in ((3, 65, 33), (2, 130, 784), (5, 2048, 196)):
        x = make_input(kind, shape, dtype, "cuda")
        v = make_input("randn", (*shape[:2], columns), dtype, "cuda", 1) if columns else None
        dy = make_input("randn", (*shape[:2], columns or shape[2]), dtype, "cuda", 2)
        check_sci("matmul", x, v, dy)
        check_cci("matmul", x, *make_pairs(shape[0], "cuda"), v, dy)
