"""What every test gets: fixed seeds, few threads, and fixtures that skip with a reason."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import platform
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import cpu_isas
import emulation
import mutations
import numpy as np
import pytest
import torch

from cin_fast import schemas

REPOSITORY = Path(__file__).resolve().parent.parent
# Files that take minutes start first: at the end, a process would be left alone with one of them.
_LONG = ("test_triton_", "test_cuda_", "test_bench", "test_gpu_script")


def pytest_configure(config: pytest.Config) -> None:
    # Processes that share the tests share the cores, too.
    usual = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    torch.set_num_threads(int(os.environ.get("CIN_FAST_TEST_THREADS", usual)))
    # torch.compile keeps graphs on disk, and takes one for an operator of the same name and another
    # schema.
    digest = hashlib.sha256(repr([schemas.COMPILED, schemas.PAIR]).encode()).hexdigest()[:12]
    kept = Path(tempfile.gettempdir()) / f"cin_fast_{os.getuid()}_{digest}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.stem.startswith(_LONG))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what goes another way with one thread than with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=cpu_isas.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this processor runs, forced one after the other."""
    if not cpu_isas.runs(request.param):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("CIN_FAST_CPU_ISA", request.param)
    return request.param


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout; skips where the tests run without one."""
    if not (REPOSITORY / "setup.py").exists():
        pytest.skip("needs the checkout that the tests came from")
    return REPOSITORY


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of bench/ that needs nothing of its conftest."""
    monkeypatch.syspath_prepend(str(repository / "bench"))
    return importlib.import_module


@pytest.fixture(scope="session")
def grocery_root() -> Path:
    """5,421 real photographs in CUB's layout."""
    default = REPOSITORY.parent / "shared" / "data" / "grocery"
    root = Path(os.environ.get("CIN_FAST_GROCERY", default))
    if not (root / "images.txt").exists():
        pytest.skip(f"no photographs: {root} has no images.txt (set CIN_FAST_GROCERY)")
    return root


@pytest.fixture(scope="session")
def cpu_extension() -> str:
    """The name of the compiled CPU backend, once it is known to run here."""
    from cin_fast import dispatch

    reason = dispatch.why_not(torch.empty(1, 1, 1), "cpu")
    if reason:
        pytest.skip(f"the cpu backend is off: {reason}")
    return "cpu"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder dataset: three colours, eight training and four test pictures each."""
    # Here, so that the kernels' tests run where there is no Pillow.
    from PIL import Image

    root = tmp_path_factory.mktemp("colours")
    for split, count in (("train", 8), ("test", 4)):
        for label, colour in enumerate(["red", "green", "blue"]):
            folder = root / split / colour
            folder.mkdir(parents=True)
            for number in range(count):
                shade = [20 + 9 * number + len(split)] * 3
                shade[label] = 255 - 9 * number
                Image.new("RGB", (40, 36), tuple(shade)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def emulation_library(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernels compiled for the CPU, by one of the processes that share the tests."""
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("the emulation of CUDA needs g++ and an x86-64 processor")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "emulation"
    folder.mkdir(exist_ok=True)
    library = folder / "libemulation.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return library if library.exists() else emulation.build(repository / "csrc", folder)


@pytest.fixture
def emulator(
    emulation_library: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[emulation.Emulator]:
    """The emulated kernels as the ``cuda`` backend of CPU tensors."""
    with emulation.registered(emulation_library, monkeypatch) as emulator:
        yield emulator


@pytest.fixture
def mutant(
    mutation: mutations.Mutation,
    repository: Path,
    emulation_library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[emulation.Emulator]:
    """The same with the mutation of the test's parameter."""
    library = mutations.build(mutation, repository / "csrc", emulation_library, tmp_path)
    with emulation.registered(library, monkeypatch) as emulator:
        yield emulator
