"""Bugs planted in the CUDA kernels that run on every chip, and in the probes of the wrappers."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from emulation import Emulator, build_probe
from mutations import Mutation, expect_seen, run, unchanged

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
        "higher[half] = further(higher[half], __shfl_xor_sync(~0u, higher[half], 2));",
        "",
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
        "rest left out of the terms",
        "sci.cu",
        "  stream.product(product, dy, row, p.y_rest.image(image), row);\n",
        "",
        "error",
        positions=32,
        channels=190,
        kind="randn",
        scale=1.0,
        is_thin=True,
    ),
    Mutation(
        "terms of other rows",
        "sci.cu",
        "dy, row, p.y.image(image), row);",
        "dy, row, p.y.image(image), 0);",
        "error",
    ),
    Mutation(
        "exchange overwritten",
        "cci_backward.cu",
        "// All have taken the weights; now dM.\n    __syncthreads();",
        "",
        "race",
        "cci_backward.cu",
        166912,
    ),
    Mutation(
        "barrier in one group",
        "cci_forward.cu",
        "exchange.give(weights);\n    __syncthreads();",
        "exchange.give(weights);\n    if (group_id() == 0) __syncthreads();",
        "divergence|never written",
        "cci_forward.cu",
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


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_seen(mutant: Emulator, mutation: Mutation) -> None:
    expect_seen(mutant, mutation)


@pytest.mark.parametrize("mutation", unchanged(MUTATIONS), ids=str)
def test_without_a_mutation_nothing_is_seen(mutant: Emulator, mutation: Mutation) -> None:
    run(mutant, mutation)


def test_unfenced_stores_are_seen(
    emulation_library: Path, repository: Path, tmp_path: Path
) -> None:
    """The kernels store no operand themselves; the probes of the wrappers do."""
    shutil.copytree(repository / "csrc", tmp_path / "csrc")
    probe = tmp_path / "tests" / "ptx_probe.cu"
    probe.parent.mkdir()
    text = (repository / "tests" / "ptx_probe.cu").read_text()
    assert "ptx::fence_proxy_async();" in text
    probe.write_text(text.replace("ptx::fence_proxy_async();", ""))
    library = ctypes.CDLL(str(build_probe(probe, emulation_library, tmp_path)))
    library.emulation_error.restype = ctypes.c_char_p
    a, b, c = torch.zeros(64, 32), torch.zeros(32, 16), torch.zeros(64, 16)
    # A swizzle of 32 bytes, its stride, one panel; the left operand comes from registers.
    fields = torch.tensor([3, 256, 16, 1], dtype=torch.int32)
    library.emulation_reset(0, 48 * 1024)
    library.probe_wgmma_16_bf16(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, c, fields)))
    assert b"no fence.proxy.async" in library.emulation_error()
