"""Bugs planted in the CUDA kernels, one at a time: the emulation has to see each of them.

The tables of bugs stand in test_cuda_mutations*.py. Of a file with a bug only the instances that
its test runs are compiled; all else is the session's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from emulation import AMPERE, EmulationError, Emulator, rebuild

from cin_fast.testing import check_cci, check_sci, make_input, make_pairs


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` in a file; whoever runs ``kernels`` then must read ``symptom``.

    ``kernels`` is the file that is compiled again, with the mutation in it or in what it includes.
    """

    name: str
    file: str
    old: str
    new: str
    symptom: str
    kernels: str = "sci.cu"
    # So little that operands stream, or enough for them to stay; None: the chip's.
    shared_limit: int | None = 72 * 1024
    chip: int = AMPERE
    # With v of 9 columns, or v = x.
    is_thin: bool = False
    # One: no block is halved.
    multiprocessors: int = 1
    # Of x.
    images: int = 2
    channels: int = 70
    positions: int = 72
    kind: str = "diffuse"
    scale: float = -1.0

    def __str__(self) -> str:
        return self.name

    @property
    def instance(self) -> str:
        """What is compiled and run, in words."""
        halves = " by halves" if self.multiprocessors > 1 else ""
        shape = f"{self.images}x{self.channels}x{self.positions}"
        return f"{self.kernels}{' thin' if self.is_thin else ''}{halves} {shape} {self.kind}"


def unchanged(mutations: Iterable[Mutation]) -> list[Mutation]:
    """What the mutations run, once each, with nothing mutated: without them no symptom shows."""
    controls = {replace(m, name="", file=m.kernels, old="", new="", symptom="") for m in mutations}
    return sorted((replace(one, name=one.instance) for one in controls), key=str)


def build(mutation: Mutation, csrc: Path, library: Path, folder: Path) -> Path:
    """``library``: the emulation of ``csrc`` as it stands; the result lies in ``folder``."""
    cuda = plant(csrc, folder, mutation.file, mutation.old, mutation.new)
    keep_one_instance(cuda, mutation)
    return rebuild(cuda / mutation.kernels, library, folder)


def plant(csrc: Path, folder: Path, file: str, old: str, new: str) -> Path:
    """The kernels of a copy in ``folder``, with ``old`` become ``new`` in one of their files."""
    shutil.copytree(csrc, folder / "csrc")
    path = folder / "csrc" / "cuda" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path.parent


def expect_seen(emulator: Emulator, mutation: Mutation) -> None:
    with pytest.raises((EmulationError, AssertionError), match=mutation.symptom):
        run(emulator, mutation)


def run(emulator: Emulator, mutation: Mutation) -> None:
    emulator.choose(mutation.chip)
    emulator.multiprocessors = mutation.multiprocessors
    if mutation.shared_limit is not None:
        emulator.shared_limit = mutation.shared_limit
    shape = (mutation.images, mutation.channels, mutation.positions)
    x = make_input(mutation.kind, shape, torch.bfloat16)
    thin = make_input("randn", (*shape[:2], 9), torch.bfloat16, seed=2)
    v = thin if mutation.is_thin else None
    dy = make_input("randn", (x if v is None else v).shape, torch.bfloat16, seed=1)
    if mutation.kernels.startswith("cci"):
        check_cci("cuda", x, *make_pairs(len(x)), v, dy, mutation.scale)
    else:
        check_sci("cuda", x, v, dy, mutation.scale)
    assert emulator.conflicts == 0, f"{emulator.conflicts} bank conflicts"


def keep_one_instance(cuda: Path, mutation: Mutation) -> None:
    """Of the mutation's kernels those of bfloat16, of wide rows, with v thin or v = x."""
    host = cuda / "host.cuh"
    text = host.read_text()
    for unused in ("HalfProducts<__half>{}", "Tf32Products{}", "IeeeProducts{}"):
        assert unused in text
        text = text.replace(unused, "HalfProducts<__nv_bfloat16>{}")
    tied = "false" if mutation.is_thin else "true"
    text, count = re.subn(
        r"  if \(shape\.positions <= kNarrow\)\n.*?;\n.*?;\n",
        f"  return body.template operator()<kWide, {tied}>();\n",
        text,
        flags=re.DOTALL,
    )
    assert count == 1
    host.write_text(text)
    kernels = cuda / mutation.kernels
    instances = r"^(?:template cudaError_t [^;]*<__half>[^;]*;|CIN_FAST_\w+\(__half\))$"
    kernels.write_text(re.sub(instances, "", kernels.read_text(), flags=re.MULTILINE))
