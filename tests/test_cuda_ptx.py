"""Each wrapper of csrc/cuda/ptx.cuh against plain arithmetic: on a GPU, and under the emulation.

The emulation computes what a wrapper's name says, so an error in the real wrapper's PTX can show
only on a GPU: run these there (``make gpu``) before trusting the emulation's verdict.
"""

from __future__ import annotations

import ctypes
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
        library = folder / "libprobe.so"
        chip = "{}{}".format(*torch.cuda.get_device_capability())
        compile_probe(source, library, "90a" if chip == "90" else chip)
        return Probe(library, "cuda")
    built = request.getfixturevalue("emulation_library")
    return Probe(emulation.build_probe(source, built, folder), "cpu")


def compile_probe(source: Path, library: Path, chip: str) -> None:
    target = f"-gencode=arch=compute_{chip},code=sm_{chip}"
    flags = ["-std=c++20", target, "-shared", "-Xcompiler=-fPIC"]
    emulation.run(["nvcc", *flags, str(source), "-o", str(library)])


def test_probes_compile(repository: Path, tmp_path: Path) -> None:
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH")
    compile_probe(repository / "tests" / "ptx_probe.cu", tmp_path / "libprobe.so", "90a")


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_gives_the_same_digits_from_either_side(probe: Probe, dtype: torch.dtype) -> None:
    """What cancels in sci's gradient counts on it: dY . v and v . dY are one number."""
    name = "mma_bf16" if dtype == torch.bfloat16 else "mma_fp16"
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    one = probe(name, a, b[:8], torch.zeros(16, 8))[2]
    turned = probe(name, b, a[:8], torch.zeros(16, 8))[2]
    assert torch.equal(one[:8], turned[:8].T)


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


def test_named_barrier(probe: Probe) -> None:
    numbers = torch.randn(64)
    _, traded = probe("named_barrier", numbers, torch.zeros(64))
    assert torch.equal(traded, numbers.roll(32))


def test_turns(probe: Probe) -> None:
    numbers = torch.randn(64)
    assert torch.equal(probe("turns", numbers, torch.zeros(64))[1], numbers * 8)


# Numbered as in the descriptor: 32 bytes.
SWIZZLE = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def skip_unless_hopper(probe: Probe) -> None:
    if probe.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma and its copies exist on compute capability 9.0 alone")


def multiply(probe: Probe, name: str, a: Tensor, b: Tensor, columns: int, *fields: int) -> Tensor:
    c = torch.full((64, columns), float("nan"))
    # Read by the host's side of the probe.
    described = torch.tensor(fields, dtype=torch.int32)
    copies = [t.to(probe.device) for t in (a, b, c)]
    if probe.device == "cpu":
        probe._library.emulation_reset(0, 48 * 1024)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*copies, described)]
    getattr(probe._library, f"probe_{name}")(*pointers)
    return copies[2].cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 32, 64, 128])
def test_wgmma_along_rows(probe: Probe, columns: int, dtype: str) -> None:
    """Both operands in shared memory, the depth along their rows."""
    skip_unless_hopper(probe)
    a = torch.randint(-8, 9, (64, 16)).to(DTYPES[dtype])
    b = torch.randint(-8, 9, (columns, 16)).to(DTYPES[dtype])
    expect(probe, f"wgmma_{columns}_{dtype}", a, b, a.float() @ b.float().T, 16, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wgmma_gives_the_same_digits_wherever_a_product_is_made(probe: Probe, dtype: str) -> None:
    """From either side, in any row and column, in a product of any width: see above."""
    skip_unless_hopper(probe)
    a, b = (torch.randn(64, 16).to(DTYPES[dtype]) for _ in "ab")

    def product(left: Tensor, right: Tensor) -> Tensor:
        columns = len(right)
        return multiply(
            probe, f"wgmma_{columns}_{dtype}", left, right, columns, SWIZZLE, 8 * 32, 16, 0
        )

    one = product(a, b)
    assert one.isfinite().all()
    assert torch.equal(product(b, a).T, one)
    assert torch.equal(product(a.roll(5, 0), b.roll(9, 0)), one.roll((5, 9), (0, 1)))
    assert torch.equal(product(a, torch.cat([a, b]))[:, 64:], one)
    assert torch.equal(product(a, b[:16]), one[:, :16])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 64, 208])
def test_wgmma_down_panels(probe: Probe, columns: int, dtype: str) -> None:
    """The left operand in registers, the depth down the rows of the right one's panels."""
    skip_unless_hopper(probe)
    a = torch.randint(-8, 9, (64, 32)).to(DTYPES[dtype])
    b = torch.randint(-8, 9, (32, columns)).to(DTYPES[dtype])
    expect(probe, f"wgmma_{columns}_{dtype}", a, b, a.float() @ b.float(), 32 * 32, 1)


def expect(
    probe: Probe, name: str, a: Tensor, b: Tensor, exact: Tensor, leading: int, from_registers: int
) -> None:
    """On failure says which descriptor would have been right, if one is."""
    columns, stride = exact.shape[1], 8 * 32
    described = (SWIZZLE, stride, leading)
    if torch.equal(multiply(probe, name, a, b, columns, *described, from_registers), exact):
        return
    right = [
        f"swizzle {mode}, stride {s}, leading {lead}"
        for mode in range(4)
        for s in (16, 128, 256, 512, 1024, 2048)
        for lead in (16, 128, 256, 512, 1024, 2048)
        if torch.equal(multiply(probe, name, a, b, columns, mode, s, lead, from_registers), exact)
    ]
    pytest.fail(f"{name}: wrong; right with: {'; '.join(right) or 'no descriptor tried'}")


def test_bulk_copy(probe: Probe) -> None:
    """Boxes inside, over each edge, and beyond: zeros where the tensor is not."""
    skip_unless_hopper(probe)
    images, panels, turns, groups, step = 2, 3, 3, 2, 4
    source = torch.randint(1, 999, (images, panels, turns * step, 256), dtype=torch.int16)
    # Of a turn the first two groups; then room for a box over the edge.
    kept = source.view(images, panels, turns, step, 256)[:, :, :, :groups]
    padded = torch.nn.functional.pad(kept, (0, 0, 0, 0, 0, 4, 0, 4))
    for box_turns, box_panels, turn, image in ((2, 2, 0, 0), (1, 4, 1, 1), (4, 1, 2, 1)):
        to = torch.zeros(2048, dtype=torch.int16, device=probe.device)
        extents = (images, panels, turns, groups, turns * step, step)
        described = torch.tensor((*extents, box_turns, box_panels, turn, image), dtype=torch.int32)
        from_ = source.to(probe.device)
        if probe.device == "cpu":
            probe._library.emulation_reset(0, 48 * 1024)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (from_, to, described)]
        assert probe._library.probe_bulk_copy(*pointers) == 0
        expected = padded[image, :box_panels, turn : turn + box_turns]
        assert torch.equal(to.cpu(), expected.flatten())


def test_bulk_copy_of_bytes(probe: Probe) -> None:
    skip_unless_hopper(probe)
    numbers = torch.randn(128)
    _, copied = probe("bulk_copy_bytes", numbers, torch.full((128,), float("nan")))
    assert torch.equal(copied, numbers)


def test_grid_dependency(probe: Probe) -> None:
    """The second kernel starts during the first, and yet sees what that one writes at its end."""
    skip_unless_hopper(probe)
    numbers, nothing = torch.randn(32), torch.full((32,), float("nan"))
    assert torch.equal(probe("grid_dependency", numbers, nothing, nothing)[2], numbers)
