"""Each wrapper of csrc/cuda/ptx.cuh against plain arithmetic: on a GPU, and under the emulation.

The emulation computes what a wrapper's name says, so an error in the real wrapper's PTX can show
only on a GPU: run these there (``make gpu``) before trusting the emulation's verdict.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
from pathlib import Path

import emulation
import pytest
import torch
from torch import Tensor


class Probe:
    """The probes built for one device."""

    def __init__(self, library: Path, device: str) -> None:
        self._library = ctypes.CDLL(str(library))
        self.device = device

    def __call__(self, name: str, *tensors: Tensor) -> list[Tensor]:
        """Runs a probe on copies; returns the copies, results among them."""
        copies = [t.to(self.device, copy=True) for t in tensors]
        if self.device == "cpu":
            self._library.emulation_reset(0, 48 * 1024)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in copies]
        assert getattr(self._library, f"probe_{name}")(*pointers) == 0
        if self.device == "cpu":
            self._library.emulation_error.restype = ctypes.c_char_p
            assert self._library.emulation_error() == b""
        return [t.cpu() for t in copies]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def probe(
    request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Probe:
    folder = tmp_path_factory.mktemp("ptx")
    source = repository / "tests" / "ptx_probe.cu"
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device is visible: the PTX itself is not tested here")
        if not shutil.which("nvcc"):
            pytest.skip("no nvcc on PATH")
        chip = "sm_{}{}".format(*torch.cuda.get_device_capability())
        library = folder / "libprobe.so"
        flags = ["-std=c++20", f"-arch={chip}", "-shared", "-Xcompiler=-fPIC"]
        emulation.run(["nvcc", *flags, str(source), "-o", str(library)])
        return Probe(library, "cuda")
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("the emulation of CUDA needs g++ and an x86-64 processor")
    return Probe(emulation.build_probe(repository, folder), "cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "depth"),
    [
        ("mma_bf16", torch.bfloat16, 16),
        ("mma_fp16", torch.float16, 16),
        ("mma_tf32", torch.float32, 8),
    ],
)
def test_mma(probe: Probe, name: str, dtype: torch.dtype, depth: int) -> None:
    """Small integers, so that every product and sum is exact."""
    a = torch.randint(-8, 9, (16, depth)).to(dtype)
    b = torch.randint(-8, 9, (8, depth)).to(dtype)
    c = torch.randint(-99, 100, (16, 8)).float()
    result = probe(name, a, b, c)[2]
    assert torch.equal(result, c + a.float() @ b.float().T)


@pytest.mark.parametrize("name", ["ldmatrix", "ldmatrix_trans"])
def test_ldmatrix(probe: Probe, name: str) -> None:
    """Lane 4 g + t gets elements 2 t and 2 t + 1 of row g, or of column g, of each matrix."""
    matrices = torch.randint(0, 2**15, (4, 8, 8), dtype=torch.int16)
    lanes = probe(name, matrices, torch.zeros(32, 4, dtype=torch.int32))[1]
    read = matrices.mT if name == "ldmatrix_trans" else matrices
    expected = read.reshape(4, 32, 2).permute(1, 0, 2).contiguous().view(torch.int32).squeeze(-1)
    assert torch.equal(lanes, expected)


def test_cp_async(probe: Probe) -> None:
    source = torch.randn(2, 32, 4)
    copied = probe("cp_async", source, torch.full((2, 32, 4), float("nan")))[1]
    assert torch.equal(copied[0], source[0])
    assert torch.equal(copied[1, ::2], source[1, ::2])
    assert not copied[1, 1::2].any()


def test_scalars(probe: Probe) -> None:
    values = torch.cat([torch.randn(28) * 8, torch.tensor([0.0, 1.0, -float("inf"), -200.0])])
    _, powers, rounded = probe(
        "scalars", values, torch.zeros(32), torch.zeros(32, dtype=torch.int32)
    )
    torch.testing.assert_close(powers[:30], torch.exp2(values[:30]), rtol=2**-21, atol=0)
    assert not powers[30:].any()
    finite = torch.arange(32) != 30
    as_float = rounded.view(torch.float32)
    assert not (rounded & 0x1FFF)[finite].any()
    assert ((as_float - values).abs() <= values.abs() * 2**-11)[finite].all()
