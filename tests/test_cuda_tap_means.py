"""``tap_means`` of the ``cuda`` backend against float64: emulated, with planted bugs; on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulation import EmulationError, Emulator, rebuild, registered
from mutations import plant

import cin_fast
from cin_fast import dispatch
from cin_fast.reference import tap_rectangles
from cin_fast.testing import KERNEL_DTYPES, make_input

# Blocks of 32 channels and less; whole pieces, rows that break them, maps of one row or column.
SHAPES = (
    *((2, 33, 14, 14), (3, 64, 7, 7), (1, 5, 1, 1), (2, 31, 5, 9), (1, 40, 1, 6), (2, 3, 4, 1)),
    *((1, 2, 28, 28), (1, 3, 30, 2), (0, 8, 3, 3), (2, 0, 3, 3)),
)
FORMATS = (torch.contiguous_format, torch.channels_last)
KERNELS = "tap_means.cu"
# Old and new code of the kernel, and what is then seen.
BUGS = {
    "no barrier before the sums are added": ("  __syncthreads();\n", "", "race|never written"),
    "a channel too many": ("first + mine < map.channels", "true", "global buffer"),
    "a row too many": ("h < map.height;", "h <= map.height;", "not close|global buffer"),
    "the last column is no inner one": ("column == width - 1)", "column == width)", "not close"),
    "a tap sees the last row": ("!is_bottom", "true", "not close"),
    "half of the gradient unwritten": ("i += kStep)", "i += 2 * kStep)", "not close"),
    "the gradient of the row before": ("map, ++row)", "map, row++)", "not close"),
}


def check(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format,
          device: str = "cpu") -> None:  # fmt: skip
    """Value and gradient, each as near to float64 as its dtype tells numbers apart."""
    x = make_input("relu", shape, dtype, device).contiguous(memory_format=memory_format)
    v = torch.ops.cin_fast.cuda_tap_means(x)
    u = tap_rectangles(*shape[2:], device=x.device, dtype=torch.float64)
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(v.double(), x.double().flatten(2) @ u, **rounding)
    dv = make_input("randn", v.shape, dtype, device, seed=1)
    dx = torch.ops.cin_fast.cuda_tap_means_backward(dv, *shape[2:])
    torch.testing.assert_close(dx.double().flatten(2), dv.double() @ u.mT, **rounding)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_emulated(
    emulator: Emulator, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    for shape in SHAPES:
        check(shape, dtype, memory_format)
        assert not shape[0] * shape[1] or emulator.launched == ["tap_means_backward"]


def test_emulated_of_views(emulator: Emulator) -> None:
    """Rows that start where no piece may, and channels that are far apart."""
    x = make_input("relu", (2, 9, 4, 15), torch.bfloat16)
    for view in (x[:, 1:, :, 1:13], x[:, ::2], x.mT):
        dense = torch.ops.cin_fast.cuda_tap_means(view.contiguous())
        assert torch.equal(torch.ops.cin_fast.cuda_tap_means(view), dense)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(
    bug: str,
    repository: Path,
    emulation_library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new, symptom = BUGS[bug]
    cuda = plant(repository / "csrc", tmp_path, KERNELS, old, new)
    library = rebuild(cuda / KERNELS, emulation_library, tmp_path)
    with (
        registered(library, monkeypatch),
        pytest.raises((EmulationError, AssertionError), match=symptom),
    ):
        check((2, 33, 14, 14), torch.bfloat16, torch.contiguous_format)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_on_a_gpu(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    if reason := dispatch.unavailable("cuda"):
        pytest.skip(f"the cuda backend is off: {reason}")
    for shape in (*SHAPES, (20, 2048, 14, 14)):
        check(shape, dtype, memory_format, "cuda")
    x = make_input("relu", (2, 64, 14, 14), dtype, "cuda").requires_grad_()
    torch.library.opcheck(torch.ops.cin_fast.cuda_tap_means, (x,))
    assert torch.equal(cin_fast.tap_means(x), torch.ops.cin_fast.cuda_tap_means(x))
