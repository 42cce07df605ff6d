"""What Triton's compiler makes of the kernels for sm_80 and sm_90; needs no GPU.

Every row of the tuning table is compiled, each for the shapes that `make triton-report` lists.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cin_fast.kernels import report
from cin_fast.kernels.configs import AMPERE, HOPPER, Maps, choose, out_of, pieces, table_of
from cin_fast.kernels.plan import plan

pytestmark = pytest.mark.triton
JOBS = report.jobs()
CHIPS = (AMPERE, HOPPER)
# Nothing else spills. Why these may, as timed on an H100 with triton 3.6; report.SPILLS: how much.
SPILL = {
    "sci_backward bf16 C 2048 L 196 v = x sm_90": "508 us (triton 3.9 alone spills); sm_80's 2649",
    "cci_backward bf16 C 2048 L 196 v = x sm_90": "2118 us; sm_80's row 18817",
    "cci_backward bf16 C 2048 L 196 K 9 sm_90": "631 us; the fastest without spills 1935",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, report.Compiled]:
    """Every job by its key. The cache is this run's own: what is read was compiled by this tree."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton)")
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    try:
        return {one.job.key: one for one in report.compile_all(JOBS)}
    finally:
        os.environ.pop("TRITON_CACHE_DIR")
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before


@pytest.mark.parametrize("chip", CHIPS)
def test_every_row_of_a_chip_is_compiled_for_it(chip: int) -> None:
    used = {(job.launch.kernel, job.launch.config) for job in JOBS if job.chip == chip}
    assert used == {(key[0], config) for key, config in table_of(chip).items()}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=str)
def test_it_fits_the_chip(compiled: dict[str, report.Compiled], job: report.Job) -> None:
    one = compiled[job.key]
    assert one.problem == "", one
    if str(job) not in SPILL:
        assert (one.stack, one.local) == (0, 0), f"spills: {one}"
    assert 0 < one.shared <= report.SHARED_LIMIT[job.chip]
    threads = 32 * job.launch.config.warps
    assert one.registers * threads <= 65_536


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=str)
def test_products_use_the_units_they_mean(
    compiled: dict[str, report.Compiled], job: report.Job
) -> None:
    """16-bit products on the tensor cores, by wgmma on sm_90; IEEE float32 never on them."""
    one = compiled[job.key]
    if job.dtype == "fp32" and job.launch.constants["PRECISION"] == "ieee":
        assert one.matrix == 0
        return
    assert one.matrix > 0
    if job.dtype != "fp32" and job.chip == 90:
        assert one.wgmma > 0
        assert one.matrix == one.hgmma, "a product is left to mma.sync"
    # Two stages or more: the next rows are on their way while these are multiplied.
    if job.launch.config.stages > 1:
        assert one.async_copies > 0


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("kernel", "products"),
    # Of rows, and over rows j: one a tile of y, and, as v = x, two a tile of dx.
    [
        ("sci_forward", 1 + 1),
        ("sci_delta", 2),
        ("sci_backward", 3 + 2 * 3),
        ("cci_forward", 2 + 2),
        ("cci_delta", 4),
        ("cci_backward", 6 + 2),
    ],
)
def test_float32_is_summed_in_blocks(kernel: str, products: int, chip: int) -> None:
    """Each block of a product begins at 0 and is added to the total, in the compiler's own words.

    Left alone, the compiler makes the total the accumulator: one long sum, much less exact.
    """
    jobs = report.jobs((chip,), [("fp32", "ieee", report.Shape(512, 784))])
    (job,) = (job for job in jobs if job.launch.kernel == kernel)
    code = report.build(job).asm["ttgir"]
    starts = re.findall(r"= tt\.dot \S+, \S+, (\S+)", code)
    assert len(starts) == products
    for start in starts:
        assert re.search(rf"{re.escape(start)} = arith\.constant dense<0\.0+e\+00>", code)


@pytest.mark.parametrize(
    ("capability", "chip"), [((8, 0), AMPERE), ((9, 0), HOPPER), ((12, 0), 120)]
)
def test_a_device_takes_the_table_of_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chip: int
) -> None:
    launch = pytest.importorskip("cin_fast.kernels.launch", exc_type=ImportError)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert launch.chip_of.__wrapped__(torch.device("cuda", 0)) == chip
    assert launch.chip_of.__wrapped__(torch.device("cpu")) == AMPERE
    assert (table_of(chip) == table_of(AMPERE)) == (chip != HOPPER)


def test_positions_are_not_padded_to_a_power_of_two() -> None:
    assert [piece.width for piece in pieces(196, 196)] == [128, 64, 16]
    assert [piece.width for piece in pieces(9, 16)] == [16]
    for count in range(1, 300):
        covered = sum(piece.width for piece in pieces(count, count))
        assert count <= covered < count + 64


def test_a_thin_v_is_not_padded_to_positions() -> None:
    maps = Maps(1, 2048, 196, 9, False, 2)
    (launch,) = plan("sci", maps, AMPERE)
    assert [piece.width for piece in launch.constants["OUT"].pieces] == [16]
    backward = plan("sci_backward", maps, AMPERE)[-1]
    assert [piece.width for piece in backward.constants["OUT_V"].pieces] == [16]
    assert backward.constants["OUT_X"].spans == 1


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("positions", [1, 49, 196, 361, 784, 4096])
@pytest.mark.parametrize("operator", report.OPERATORS)
def test_spans_cover_every_column(operator: str, positions: int, chip: int) -> None:
    for itemsize in (2, 4):
        for columns in (None, 9, 40, 600):
            maps = Maps(2, 65, positions, columns or positions, columns is None, itemsize)
            for launch in plan(operator, maps, chip):
                assert launch.config == choose(launch.kernel, maps, chip)
                for name, of in (("OUT", "V"), ("OUT_X", "X"), ("OUT_V", "V")):
                    out = launch.constants.get(name)
                    if out and out.pieces:
                        assert out.width * out.spans >= launch.constants[of].count
                        assert out.width == sum(piece.width for piece in out.pieces)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("operator", ["sci_backward", "cci_backward"])
def test_delta_and_backward_sum_a_row_in_one_order(operator: str, itemsize: int, chip: int) -> None:
    """Else dP - delta, exactly 0 where there is one channel, is not."""
    for positions, columns in (
        *((49, None), (196, None), (256, None), (257, None), (784, None)),
        *((196, 9), (196, 40), (257, 9), (784, 9)),
    ):
        maps = Maps(2, 65, positions, columns or positions, columns is None, itemsize)
        cuts = {
            (one.constants["V"].pieces, one.constants["V"].chunk)
            for one in plan(operator, maps, chip)
        }
        held = {pieces for pieces, _ in cuts}
        assert len(held) == 1
        assert held != {()} or len(cuts) == 1


def test_an_output_at_hand_is_not_loaded_again() -> None:
    (launch,) = plan("sci", Maps(1, 2048, 196, 196, True, 2), AMPERE)
    assert launch.constants["OUT"].is_panel
    columns, config = launch.constants["V"], launch.config
    assert not out_of(columns, config, at_hand=False).is_panel


def test_importing_the_package_imports_no_triton(repository: Path) -> None:
    code = "import sys, cin_fast, cin_fast.kernels, cin_fast.kernels.plan; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert "cin_fast.kernels.plan" in result.stdout.split()
    assert not [name for name in result.stdout.split() if name.split(".")[0] == "triton"]


@pytest.mark.slow
def test_the_report_prints_a_table(repository: Path) -> None:
    command = [sys.executable, "-m", "cin_fast.kernels.report", "--target", "80"]
    command += ["--kernel", "row_numbers", "--dtype", "bf16"]
    result = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"}
    )
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("| row_numbers")]
    assert rows
    assert all(
        re.search(r"\| sm_80 \| .* \| 0 \| [\d,]+ \| \d+ \| [\d.]+% \|$", row) for row in rows
    )
