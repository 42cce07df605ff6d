"""What nvcc made of the CUDA kernels: no spills, within the chips' limits, on the tensor cores.

Reads the build that ``python setup.py build_ext --inplace`` left; needs no GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest

CHIPS = ("sm_80", "sm_90a")
REGISTERS_OF_A_MULTIPROCESSOR = 65536
COPIES_WITHOUT_WAITING = "LDGSTS"
# Of the kernels of warp groups, the one whose blocks are one, without a producer.
ALONE = "sci_wgmma_terms"
# How each kind of product shows in machine code.
PRODUCTS = {"HalfProducts": "HMMA.16816", "Tf32Products": "HMMA.1688", "IeeeProducts": "FFMA"}


@dataclass(frozen=True)
class Kernel:
    """One kernel for one chip, as ptxas reports it."""

    name: str
    chip: str
    registers: int
    stack: int
    spills: int


@pytest.fixture(scope="module")
def library(repository: Path) -> Path:
    record = repository / "cin_fast" / "_build.json"
    if not record.exists():
        pytest.skip("nothing is built here (python setup.py build_ext --inplace)")
    built = json.loads(record.read_text())
    if not built.get("cuda"):
        pytest.skip(f"the CUDA kernels are not built: {built['reasons'].get('cuda', 'old build')}")
    return repository / "cin_fast" / "_C.abi3.so"


@pytest.fixture(scope="module")
def reports(library: Path, repository: Path) -> list[str]:
    """ptxas's lie beside each object."""
    logs = sorted(repository.glob("build/temp*/csrc/cuda/*.log"), key=lambda p: p.stat().st_mtime)
    sources = {path.name for path in (repository / "csrc/cuda").glob("*.cu")}
    newest = {log.name: log for log in logs if log.stem in sources}
    if not newest:
        pytest.skip("the build's reports are gone (rm -r build and build again)")
    return [log.read_text() for log in newest.values()]


@pytest.fixture(scope="module")
def kernels(reports: list[str]) -> list[Kernel]:
    found = [kernel for report in reports for kernel in parse(report)]
    chips = {kernel.chip for kernel in found}
    if chips != set(CHIPS):
        pytest.skip(f"built for {', '.join(sorted(chips))} (TORCH_CUDA_ARCH_LIST)")
    return found


def parse(report: str) -> list[Kernel]:
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<chip>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return [
        Kernel(
            m["name"],
            m["chip"],
            int(m["registers"]),
            int(m["stack"]),
            int(m["stores"]) + int(m["loads"]),
        )
        for m in pattern.finditer(report)
    ]


def test_every_kernel_is_compiled_for_every_chip(kernels: list[Kernel]) -> None:
    stems = {f"{op}_{what}" for op in ("sci", "cci") for what in ("forward", "backward", "terms")}
    for chip in CHIPS:
        names = " ".join(kernel.name for kernel in kernels if kernel.chip == chip)
        for stem, products in product(stems, PRODUCTS):
            if stem == "sci_terms" and products != "HalfProducts":
                stem = "sci_sweep"
            assert re.search(rf"{stem}_kernel\w*{products}", names), (stem, products, chip)
        for what, path in product(("forward", "backward"), ("resident", "wgmma")):
            found = re.findall(rf"\w+sci_{path}_{what}_kernel\w+", names)
            assert len(found) == 8, (path, what, chip)
        assert len(re.findall(r"\w+sci_wgmma_terms_kernel\w+", names)) == 6, chip
        for what in (
            *("statistics", "forward", "terms", "backward"),
            *("tied_forward", "tied_terms", "tied_backward"),
        ):
            assert len(re.findall(rf"\w+cci_wgmma_{what}_kernel\w+", names)) == 4, (what, chip)


def test_nothing_spills(kernels: list[Kernel]) -> None:
    spilling = [kernel for kernel in kernels if kernel.spills or kernel.stack]
    assert not spilling


def test_registers_suffice_for_a_block(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        threads = 256 if re.search("cci_|repack|tap_means|softmax_rows", kernel.name) else 128
        if "wgmma" in kernel.name and ALONE not in kernel.name and kernel.chip == "sm_90a":
            # What setmaxnreg then shares out, 24 to the producer's threads and 240 to the others':
            # at least as many have to be there.
            threads = 384
            assert kernel.registers * threads >= 128 * 24 + 256 * 240, kernel
        assert kernel.registers * threads <= REGISTERS_OF_A_MULTIPROCESSOR, kernel
        assert kernel.registers <= 255, kernel


@cache
def machine_code(library: Path) -> dict[tuple[str, str], str]:
    """(kernel, chip) -> its instructions."""
    tool = cuobjdump()
    if not tool:
        pytest.skip("no cuobjdump: neither on PATH nor in the triton package")
    text = subprocess.run(
        [tool, "-sass", str(library)], capture_output=True, text=True, check=True
    ).stdout
    code = {}
    for part in text.split("arch = ")[1:]:
        chip = part.split(maxsplit=1)[0]
        for function in part.split("Function : ")[1:]:
            name, body = function.split("\n", 1)
            code[name.strip(), chip] = body
    return code


def cuobjdump() -> str | None:
    triton = find_spec("triton")
    bundled = (
        Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        if triton and triton.origin
        else None
    )
    return shutil.which("cuobjdump") or (
        str(bundled) if bundled is not None and bundled.exists() else None
    )


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("products", PRODUCTS)
def test_products_use_the_units_they_mean(library: Path, products: str, chip: str) -> None:
    """Every product on its unit; IEEE products never on the tensor cores."""
    code = {name: body for (name, on), body in machine_code(library).items() if on == chip}
    # Resident operands are 16-bit always, and their kernels do not say so.
    resident = "sci_resident" if products == "HalfProducts" else products
    meant = {name: body for name, body in code.items() if products in name or resident in name}
    assert len(meant) >= 10
    for name, body in meant.items():
        assert PRODUCTS[products] in body, name
        assert COPIES_WITHOUT_WAITING in body, name
        assert ("HMMA" in body) == (products != "IeeeProducts"), name


def test_warp_groups_use_the_units_they_mean(library: Path) -> None:
    """On the chip that has them; for another, these kernels are empty and never launched."""
    for (name, chip), body in machine_code(library).items():
        if "wgmma" not in name:
            continue
        for instruction in ("HGMMA", "UTMALDG", "USETMAXREG", "SYNCS.PHASECHK"):
            meant = chip == "sm_90a" and not (ALONE in name and instruction == "USETMAXREG")
            assert (instruction in body) == meant, (name, chip, instruction)
        assert "HMMA.16816" not in body, name


def test_nothing_makes_wgmma_wait(reports: list[str]) -> None:
    """ptxas says so where it cannot leave a wgmma under way, or ignores setmaxnreg."""
    for report in reports:
        assert not re.search(r"C75\d\d|serializ", report)


def test_the_binary_names_no_unstable_symbol(library: Path) -> None:
    """Only C functions of torch's stable ABI: any torch from 2.11 on can load it."""
    if not shutil.which("nm"):
        pytest.skip("no nm (apt-get install binutils)")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    unstable = [
        line for line in symbols.splitlines() if re.search(r"_ZN\w*(2at|3c10|5torch)", line)
    ]
    assert not unstable
    # What would be null unless the linker happened to see libtorch_cuda.so.
    assert not [line for line in symbols.splitlines() if re.search(r"\sw aoti", line)]
    assert "PyInit" not in symbols
    assert not re.search(r"\bPy[A-Z_]", symbols)


def test_torch_tells_its_stream_to_who_asks_at_run_time(repository: Path) -> None:
    """As binding.cpp finds the function: in a library that Python has loaded for itself alone."""
    import torch

    if not torch.backends.cuda.is_built():
        pytest.skip("this torch is built without CUDA")
    source = (repository / "csrc/cuda/binding.cpp").read_text()
    library = re.search(r'dlopen\("([\w.]+)"', source)
    function = re.search(r'dlsym\(library, "(\w+)"', source)
    assert library
    assert function
    assert hasattr(ctypes.CDLL(library[1], mode=os.RTLD_NOLOAD), function[1])


def test_the_operators_register_without_a_gpu(library: Path) -> None:
    import torch

    from cin_fast import ops  # noqa: F401  (defines the schemas)

    torch.ops.load_library(str(library))
    for stem in ("sci", "sci_backward", "cci", "cci_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cin_fast::cuda_{stem}", "CUDA")


def test_copies_have_all_their_loads_under_way(library: Path) -> None:
    """A store between two loads would make the second wait for the first."""
    code = machine_code(library).items()
    copies = [body for (name, _), body in code if "repack_kernel" in name]
    assert len(copies) == 2 * 6
    for body in copies:
        accesses = re.findall(r"\b(?:LDG|STG)\b", body)
        assert accesses[:8] == ["LDG"] * 8
        assert set(accesses[8:16]) == {"STG"}
    into_panels = [(name, body) for (name, _), body in code if "repack_panels" in name]
    assert len(into_panels) == 2 * 4
    for name, body in into_panels:
        panels, whole = (13 if "Li13E" in name else 1), "Lb1E" in name
        accesses = re.findall(r"\b(?:LDG|STG)\b", body)
        loads = panels if whole else 4 * panels
        first = accesses.index("LDG")
        assert accesses[first : first + loads] == ["LDG"] * loads, name
        assert accesses.count("LDG") == loads, name


def test_weights_are_computed_while_the_tile_before_is_multiplied(library: Path) -> None:
    """The exponentials of a tile stand between its own wait and that for the other product."""
    forward = {
        name: body
        for (name, chip), body in machine_code(library).items()
        if "sci_wgmma_forward" in name and chip == "sm_90a"
    }
    assert len(forward) == 8
    for name, body in forward.items():
        found = re.findall(r"\b(?:WARPGROUP\.DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2)", body)
        # As many as a thread has elements of a tile, whole and halved.
        for elements in (64, 32):
            between = ["MUFU.EX2"] * (elements + 2)
            expected = ["WARPGROUP.DEPBAR.LE gsb0, 0x1", *between, "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
            starts = [i for i, one in enumerate(found) if one.endswith("0x1")]
            assert expected in [found[i : i + len(expected)] for i in starts], (name, elements)


def test_kernels_that_start_early_wait(library: Path) -> None:
    """For the kernel before them, which says when; on a chip where none does, nobody asks."""
    for (name, chip), body in machine_code(library).items():
        is_early = "wgmma" in name and chip == "sm_90a"
        says_when = is_early or ("repack" in name and chip == "sm_90a")
        assert ("ACQBULK" in body) == is_early, (name, chip)
        assert ("PREEXIT" in body) == says_when, (name, chip)
