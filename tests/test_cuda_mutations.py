"""Bugs planted in the CUDA kernels, one at a time: the emulation has to see each of them.

Only the bfloat16 instance of one file is compiled, beside the session's other objects.
"""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulation import HOPPER, EmulationError, Emulator, build, build_probe, registered
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


def on_hopper(name: str, file: str, old: str, new: str, symptom: str) -> Mutation:
    return Mutation(name, file, old, new, symptom, "sci_wgmma.cu", 0)


HOPPER_MUTATIONS = (
    on_hopper(
        "full stage unawaited",
        "warpgroup.cuh",
        "ptx::mbarrier_wait(full(tile), tile / kStages % 2);",
        "",
        "in flight|never written|has not waited",
    ),
    on_hopper(
        "empty stage unawaited",
        "warpgroup.cuh",
        "ptx::mbarrier_wait(empty(tile), (tile / kStages + 1) % 2);",
        "",
        "in flight|may still be read|more arrivals",
    ),
    on_hopper(
        "parity flipped",
        "warpgroup.cuh",
        "ptx::mbarrier_wait(full(tile), tile / kStages % 2);",
        "ptx::mbarrier_wait(full(tile), (tile / kStages + 1) % 2);",
        "in flight|never written|has not waited",
    ),
    on_hopper(
        "a piece of the bytes unexpected",
        "warpgroup.cuh",
        "ptx::mbarrier_arrive_expect(full(tile), bytes);",
        "ptx::mbarrier_arrive_expect(full(tile), bytes - 16);",
        "deadlock.* at an mbarrier .*bytes of bulk copies",
    ),
    on_hopper(
        "a panel's bytes unexpected",
        "warpgroup.cuh",
        "ptx::mbarrier_arrive_expect(full(tile), bytes);",
        "ptx::mbarrier_arrive_expect(full(tile), bytes - 64 * 32);",
        "in flight|has not waited|deadlock",
    ),
    on_hopper(
        "too few arrivals expected",
        "warpgroup.cuh",
        "kConsumers * kGroupThreads / 32",
        "kConsumers",
        "more arrivals|may still be read|in flight|deadlock",
    ),
    on_hopper(
        "barriers hidden from the copies",
        "warpgroup.cuh",
        "ptx::fence_mbarrier_init();",
        "",
        "no fence_mbarrier_init",
    ),
    on_hopper(
        "barriers used before all know them",
        "warpgroup.cuh",
        "    }\n    __syncthreads();",
        "    }",
        "no barrier between|no mbarrier",
    ),
    on_hopper(
        "wait loosened",
        "sci_wgmma.cu",
        "ptx::wgmma_wait<1>();",
        "ptx::wgmma_wait<2>();",
        "before its wait|error",
    ),
    on_hopper(
        "no fence before wgmma",
        "sci_wgmma.cu",
        "ring.wait(tile);\n    ptx::wgmma_fence();",
        "ring.wait(tile);",
        "wgmma_fence",
    ),
    on_hopper(
        "sums scaled while under way",
        "sci_wgmma.cu",
        "ptx::wgmma_wait<0>();\n    ring.release(tile - 1);\n    softmax.rescale(acc, shrink);",
        "softmax.rescale(acc, shrink);\n    ptx::wgmma_wait<0>();\n    ring.release(tile - 1);",
        "before its wait|error",
    ),
    on_hopper(
        "stage released too early",
        "sci_wgmma.cu",
        "ptx::wgmma_wait<0>();\n    ring.release(tile - 1);",
        "ring.release(tile - 1);\n    ptx::wgmma_wait<0>();",
        "may still be read",
    ),
    on_hopper(
        "swizzle wrong",
        "warpgroup.cuh",
        "row * kPanelRow, ptx::Swizzle::k128Bytes",
        "row * kPanelRow, ptx::Swizzle::k32Bytes",
        "error|never written|in flight",
    ),
    on_hopper(
        "stride wrong",
        "warpgroup.cuh",
        "ptx::Swizzle::k128Bytes, 8 * kPanelRow, 16",
        "ptx::Swizzle::k128Bytes, 4 * kPanelRow, 16",
        "error|never written|in flight",
    ),
    on_hopper(
        "next panel wrong",
        "warpgroup.cuh",
        "8 * kPanelRow, kPanelBytes)",
        "8 * kPanelRow, kPanelBytes / 2)",
        "error|never written|in flight",
    ),
    on_hopper(
        "tile off by a row",
        "warpgroup.cuh",
        "barrier, tile * kWidth, image",
        "barrier, tile * kWidth + 1, image",
        "error",
    ),
    on_hopper(
        "more registers than there are",
        "warpgroup.cuh",
        "kProducerRegisters = 24",
        "kProducerRegisters = 40",
        "65536",
    ),
)


@pytest.mark.parametrize("mutation", MUTATIONS + HOPPER_MUTATIONS, ids=lambda m: m.name)
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

    # On Hopper as many tiles of 128 columns as make the ring go round.
    shape = (1, 390, 72) if mutation in HOPPER_MUTATIONS else (2, 70, 72)
    x = make_input("diffuse", shape, torch.bfloat16)
    dy = make_input("randn", shape, torch.bfloat16, seed=1)
    with (
        registered(library, monkeypatch) as emulator,
        pytest.raises((EmulationError, AssertionError), match=mutation.symptom),
    ):
        run(emulator, mutation, x, dy)


def run(emulator: Emulator, mutation: Mutation, x: Tensor, dy: Tensor) -> None:
    if mutation in HOPPER_MUTATIONS:
        emulator.choose(HOPPER)
    else:
        emulator.shared_limit = mutation.shared_limit
    if mutation.kernels.startswith("cci"):
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


def test_unfenced_stores_are_seen(repository: Path, tmp_path: Path) -> None:
    """The kernels store no operand themselves; the probes of the wrappers do."""
    shutil.copytree(repository / "csrc", tmp_path / "csrc")
    probe = tmp_path / "tests" / "ptx_probe.cu"
    probe.parent.mkdir()
    text = (repository / "tests" / "ptx_probe.cu").read_text()
    assert "ptx::fence_proxy_async();" in text
    probe.write_text(text.replace("ptx::fence_proxy_async();", ""))
    library = ctypes.CDLL(str(build_probe(tmp_path, tmp_path)))
    library.emulation_error.restype = ctypes.c_char_p
    a, b, c = torch.zeros(64, 32), torch.zeros(32, 16), torch.zeros(64, 16)
    fields = torch.tensor([3, 256, 16], dtype=torch.int32)
    library.emulation_reset(0, 48 * 1024)
    library.probe_wgmma_rs_16_32_bf16(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, c, fields)))
    assert b"no fence.proxy.async" in library.emulation_error()
