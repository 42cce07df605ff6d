"""Bugs planted in the CUDA kernels, one at a time: the emulation has to see each of them.

Only the bfloat16 instance of one file is compiled, beside the session's other objects.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulation import EmulationError, Emulator, build, registered
from torch import Tensor

from cin_fast.testing import check_cci, check_sci, make_input, make_pairs


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` in a file; whoever runs ``kernels`` then must read ``symptom``."""

    name: str
    file: str
    old: str
    new: str
    symptom: str
    kernels: str = "sci.cu"
    # So little shared memory that operands stream, or enough for them to stay.
    shared_limit: int = 72 * 1024


WAIT = "ptx::cp_async_wait<1>();"
MUTATIONS = (
    Mutation(
        "no barrier after the wait", "tiles.cuh", "}\n      __syncthreads();\n", "}\n", "race"
    ),
    Mutation("wait loosened", "tiles.cuh", WAIT, "ptx::cp_async_wait<2>();", "in flight"),
    Mutation("last wait gone", "tiles.cuh", "ptx::cp_async_wait<0>();", "", "in flight"),
    Mutation(
        "stage overwritten",
        "tiles.cuh",
        "divide_up(depth, Products::kStep));",
        "divide_up(depth, Products::kStep)); if (panel >= 0) continue;",
        "race",
    ),
    Mutation("rows unchecked", "tiles.cuh", "row + r < from.rows &&", "", "global buffer"),
    Mutation(
        "column off by a piece", "products.cuh", "8 % 2 * 8;", "8 % 2 * 8 + 8;", "error|never"
    ),
    Mutation("no padding", "products.cuh", "kPad = 8;", "kPad = 0;", "bank conflicts"),
    Mutation(
        "half the quad",
        "softmax.cuh",
        "return fmaxf(value, __shfl_xor_sync(~0u, value, 2));",
        "return value;",
        "error",
    ),
    Mutation(
        "values overwritten",
        "sci.cu",
        "// The next tile of v lands where this one lies.\n    __syncthreads();",
        "",
        "race",
    ),
    Mutation(
        "mirror image unmasked", "sci.cuh", "p_mirrored * minus_delta", "p * minus_delta", "error"
    ),
    Mutation(
        "exchange overwritten",
        "cci.cu",
        "// All have taken the weights; now dM.\n    __syncthreads();",
        "",
        "race",
        "cci.cu",
        166912,
    ),
    Mutation(
        "barrier in one group",
        "cci.cu",
        "exchange.give(weights);\n    __syncthreads();",
        "exchange.give(weights);\n    if (group_id() == 0) __syncthreads();",
        "divergence|never written",
        "cci.cu",
        shared_limit=166912,
    ),
    Mutation(
        "next tile awaited too early",
        "sci_resident.cu",
        "  __syncthreads();\n}",
        "}",
        "race",
        "sci_resident.cu",
        166912,
    ),
    Mutation(
        "tile overwritten",
        "sci_resident.cu",
        "// The next tiles but one land where these lie.\n    __syncthreads();",
        "",
        "race",
        "sci_resident.cu",
        166912,
    ),
    Mutation(
        "stages confused",
        "sci_resident.cu",
        "tiles + column / kWidth % 2",
        "tiles + (column / kWidth + 1) / 2 % 2",
        "in flight|race|error",
        "sci_resident.cu",
        166912,
    ),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_seen(
    mutation: Mutation,
    emulation_library: Path,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(repository / "csrc", csrc)
    path = csrc / "cuda" / mutation.file
    text = path.read_text()
    assert mutation.old in text
    path.write_text(text.replace(mutation.old, mutation.new))
    keep_bfloat16_alone(csrc / "cuda" / "host.cuh")
    objects = tmp_path / "objects"
    shutil.copytree(emulation_library.parent, objects)
    library = build(csrc, objects, only=mutation.kernels)

    x = make_input("diffuse", (2, 70, 72), torch.bfloat16)
    dy = make_input("randn", (2, 70, 72), torch.bfloat16, seed=1)
    with (
        registered(library, monkeypatch) as emulator,
        pytest.raises((EmulationError, AssertionError), match=mutation.symptom),
    ):
        run(emulator, mutation, x, dy)


def run(emulator: Emulator, mutation: Mutation, x: Tensor, dy: Tensor) -> None:
    emulator.shared_limit = mutation.shared_limit
    if mutation.kernels == "cci.cu":
        check_cci("cuda", x, *make_pairs(len(x)), None, dy)
    else:
        check_sci("cuda", x, None, dy)
    assert emulator.conflicts == 0, f"{emulator.conflicts} bank conflicts"


def keep_bfloat16_alone(host: Path) -> None:
    text = host.read_text()
    for unused in ("HalfProducts<__half>{}", "Tf32Products{}", "IeeeProducts{}"):
        assert unused in text
        text = text.replace(unused, "HalfProducts<__nv_bfloat16>{}")
    host.write_text(text)
