"""Bugs planted in the CUDA kernels, one at a time: the emulation has to see each of them.

Only the bfloat16 instance of one file is compiled, beside the session's other objects.
"""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import dataclass, replace
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
    # With v of 9 columns, or v = x.
    is_thin: bool = False
    # One: no block is halved.
    multiprocessors: int = 1


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


BACKWARD, FORWARD = "cci_wgmma_backward.cu", "cci_wgmma_forward.cu"
TIED = "cci_wgmma_tied_backward.cu"


def of_warp_groups(
    name: str, file: str, old: str, new: str, symptom: str, kernels: str = "sci_wgmma.cu"
) -> Mutation:
    return Mutation(name, file, old, new, symptom, kernels, 0)


def of_half_blocks(
    name: str, file: str, old: str, new: str, symptom: str, is_thin: bool = False
) -> Mutation:
    """Where both consumers of a block share 64 rows."""
    mutation = of_warp_groups(name, file, old, new, symptom)
    return replace(mutation, is_thin=is_thin, multiprocessors=132)


def of_a_pair(
    name: str, file: str, old: str, new: str, symptom: str, is_thin: bool = True
) -> Mutation:
    """Of cci, where both images of a pair share a block."""
    kernels = file if file.endswith(".cu") else BACKWARD if is_thin else TIED
    return replace(of_warp_groups(name, file, old, new, symptom, kernels), is_thin=is_thin)


def of_tied_gradients(name: str, file: str, old: str, new: str, symptom: str) -> Mutation:
    return of_a_pair(name, file, old, new, symptom, is_thin=False)


HOPPER_MUTATIONS = (
    of_warp_groups(
        "full stage unawaited",
        "warpgroup.cuh",
        "ptx::mbarrier_wait(full(tile), tile / kStages % 2);",
        "",
        "in flight|never written|has not waited",
    ),
    of_warp_groups(
        "empty stage unawaited",
        "warpgroup.cuh",
        "ptx::mbarrier_wait(empty(tile), (tile / kStages + 1) % 2);",
        "",
        "in flight|may still be read|more arrivals",
    ),
    of_warp_groups(
        "parity flipped",
        "warpgroup.cuh",
        "ptx::mbarrier_wait(full(tile), tile / kStages % 2);",
        "ptx::mbarrier_wait(full(tile), (tile / kStages + 1) % 2);",
        "in flight|never written|has not waited",
    ),
    of_warp_groups(
        "a piece of the bytes unexpected",
        "warpgroup.cuh",
        "ptx::mbarrier_arrive_expect(full(tile), bytes);",
        "ptx::mbarrier_arrive_expect(full(tile), bytes - 16);",
        "deadlock.* at an mbarrier .*bytes of bulk copies",
    ),
    of_warp_groups(
        "a panel's bytes unexpected",
        "warpgroup.cuh",
        "ptx::mbarrier_arrive_expect(full(tile), bytes);",
        "ptx::mbarrier_arrive_expect(full(tile), bytes - 64 * 32);",
        "in flight|has not waited|deadlock",
    ),
    of_warp_groups(
        "too few arrivals expected",
        "warpgroup.cuh",
        "kReaders * kGroupThreads / 32",
        "kReaders",
        "more arrivals|may still be read|in flight|deadlock",
    ),
    of_warp_groups(
        "barriers hidden from the copies",
        "warpgroup.cuh",
        "ptx::fence_mbarrier_init();",
        "",
        "no fence_mbarrier_init",
    ),
    of_warp_groups(
        "barriers used before all know them",
        "warpgroup.cuh",
        "    }\n    __syncthreads();",
        "    }",
        "no barrier between|no mbarrier",
    ),
    of_warp_groups(
        "wait loosened",
        "sci_wgmma.cu",
        "ptx::wgmma_wait<1>();",
        "ptx::wgmma_wait<2>();",
        "before its wait|error",
    ),
    of_warp_groups(
        "no fence before wgmma",
        "sci_wgmma.cu",
        "ring.wait(tile);\n    ptx::wgmma_fence();",
        "ring.wait(tile);",
        "wgmma_fence",
    ),
    of_warp_groups(
        "sums scaled while under way",
        "sci_wgmma.cu",
        "ptx::wgmma_wait<0>();\n    ring.release(tile - 1);\n    softmax.rescale(acc, shrink);",
        "softmax.rescale(acc, shrink);\n    ptx::wgmma_wait<0>();\n    ring.release(tile - 1);",
        "before its wait|error",
    ),
    of_warp_groups(
        "stage released too early",
        "sci_wgmma.cu",
        "ptx::wgmma_wait<0>();\n    ring.release(tile - 1);",
        "ring.release(tile - 1);\n    ptx::wgmma_wait<0>();",
        "may still be read",
    ),
    of_warp_groups(
        "swizzle wrong",
        "wgmma_tiles.cuh",
        "row * kPanelRow, ptx::Swizzle::k128Bytes",
        "row * kPanelRow, ptx::Swizzle::k32Bytes",
        "error|never written|in flight",
    ),
    of_warp_groups(
        "stride wrong",
        "wgmma_tiles.cuh",
        "ptx::Swizzle::k128Bytes, 8 * kPanelRow, 16",
        "ptx::Swizzle::k128Bytes, 4 * kPanelRow, 16",
        "error|never written|in flight",
    ),
    of_warp_groups(
        "next panel wrong",
        "wgmma_tiles.cuh",
        "8 * kPanelRow, kPanelBytes)",
        "8 * kPanelRow, kPanelBytes / 2)",
        "error|never written|in flight",
    ),
    of_warp_groups(
        "tile off by a row",
        "warpgroup.cuh",
        "barrier, tile * kWidth, image",
        "barrier, tile * kWidth + 1, image",
        "error",
    ),
    of_warp_groups(
        "more registers than there are",
        "warpgroup.cuh",
        "kProducerRegisters = 24",
        "kProducerRegisters = 40",
        "65536",
    ),
    of_warp_groups(
        "rows stored before all have written",
        "wgmma_tiles.cuh",
        "  __syncwarp();\n  row += group_warp() * 16;",
        "  row += group_warp() * 16;",
        "race|never written",
    ),
    of_warp_groups(
        "rows overwritten while others multiply them",
        "wgmma_tiles.cuh",
        "  ptx::named_barrier<kGroupThreads>(1 + threadIdx.x / kGroupThreads);\n",
        "",
        "may still be read",
    ),
    of_warp_groups(
        "row terms given back while others read them",
        "sci_wgmma.cu",
        "    __syncwarp();\n    ring.release(tile);",
        "    ring.release(tile);",
        "race",
    ),
    of_warp_groups(
        "mirror image of the columns before",
        "sci_wgmma.cu",
        "start_nn(acc, weights, both[tile], kWidth);",
        "start_nn(acc, weights, both[tile], 0);",
        "error",
    ),
    of_warp_groups(
        "row terms of the tile before",
        "warpgroup.cuh",
        "terms + tile * kWidth, kStageBytes",
        "terms + (tile > 0 ? tile - 1 : 0) * kWidth, kStageBytes",
        "error",
    ),
    of_half_blocks(
        "half of the columns twice",
        "sci_wgmma.cu",
        "own.is_second() ? kWidth / 2 : 0;",
        "own.is_second() ? 0 : 0;",
        "error",
    ),
    of_half_blocks(
        "sums of one half alone",
        "sci_wgmma.cu",
        "acc[m][i] * mine + merger.at(4 + 4 * m + i) * theirs",
        "acc[m][i] * mine",
        "error",
    ),
    of_half_blocks(
        "halves' peaks not brought together",
        "sci_wgmma.cu",
        "acc[m][i] * mine + merger",
        "acc[m][i] + merger",
        "error",
    ),
    of_half_blocks(
        "tiles overwritten while others multiply them",
        "sci_wgmma.cu",
        "  merger.meet();\n  if (own.is_second()) {\n#pragma",
        "  if (own.is_second()) {\n#pragma",
        "may still be read|race|in flight",
    ),
    of_half_blocks(
        "numbers taken before they are given",
        "sci_wgmma.cu",
        "  merger.meet();\n  if (own.is_second()) return false;",
        "  if (own.is_second()) return false;",
        "race|never written",
    ),
    of_half_blocks(
        "gradients of every other tile alone",
        "sci_wgmma.cu",
        "merger.add_to(acc, 0);",
        "",
        "error",
    ),
    of_half_blocks(
        "thin gradients of every other tile alone",
        "sci_wgmma.cu",
        "thin_merger.add_to(thin, 0);",
        "(void)thin_merger;",
        "error",
        is_thin=True,
    ),
    of_half_blocks(
        "the other's tiles kept",
        "warpgroup.cuh",
        "if (tile + 1 < tiles) ring.pass(tile + 1);",
        "",
        "deadlock",
    ),
    of_a_pair("trade unawaited", BACKWARD, "  trade.meet();\n", "", "race|never written"),
    of_a_pair(
        "trade with oneself",
        "warpgroup.cuh",
        "return at(tile, i, thread() ^ kGroupThreads);",
        "return at(tile, i, thread());",
        "error",
    ),
    of_a_pair(
        "trade's barrier met by one warp group",
        BACKWARD,
        "  trade.meet();\n",
        "  if (consumer_row() == 0) trade.meet();\n",
        "race|never written|deadlock",
    ),
    of_a_pair(
        "trade's barrier for one warp group",
        "warpgroup.cuh",
        "named_barrier<kThreads>(1)",
        "named_barrier<kThreads / 2>(1)",
        "race|never written",
    ),
    of_a_pair(
        "trade's barrier for too many",
        "warpgroup.cuh",
        "named_barrier<kThreads>(1)",
        "named_barrier<kThreads + 32>(1)",
        "deadlock",
    ),
    of_a_pair(
        "one buffer for two trades",
        "warpgroup.cuh",
        "buffers[(tile % 2 * kElements + i)",
        "buffers[(0 * kElements + i)",
        "race",
    ),
    of_a_pair(
        "wait before the elements loosened",
        BACKWARD,
        "ptx::wgmma_wait<0>();\n      contrast_gradients",
        "ptx::wgmma_wait<1>();\n      contrast_gradients",
        "before its wait|error|disagree|not finished",
    ),
    of_a_pair(
        "pair's stage released too early",
        BACKWARD,
        "ptx::wgmma_wait<0>();\n    ring.release(tile);\n  }\n  if (own",
        "ring.release(tile);\n    ptx::wgmma_wait<0>();\n  }\n  if (own",
        "may still be read",
    ),
    of_a_pair(
        "halves of a tile confused",
        BACKWARD,
        "start_nn(acc, ds[1], own_x[tile], kHalf - column);",
        "start_nn(acc, ds[1], own_x[tile], column);",
        "error",
    ),
    of_a_pair(
        "second image's bytes unexpected",
        "warpgroup.cuh",
        "kStageBytes = 2 * Single::kStageBytes;",
        "kStageBytes = Single::kStageBytes;",
        "in flight|has not waited|deadlock|more arrivals",
    ),
    of_a_pair(
        "images confused",
        BACKWARD,
        "start_nt(dm[1], other_dy.rows",
        "start_nt(dm[1], own_dy.rows",
        "error",
    ),
    of_a_pair(
        "weights packed without a fence",
        FORWARD,
        "weights, eta);\n    ptx::wgmma_fence();",
        "weights, eta);",
        "wgmma_fence",
    ),
    of_a_pair(
        "pair's weights before their wait",
        FORWARD,
        "ptx::wgmma_commit();\n    ptx::wgmma_wait<0>();\n#pragma unroll",
        "ptx::wgmma_commit();\n#pragma unroll",
        "before its wait|error",
    ),
    of_a_pair(
        "tile awaited by nobody",
        FORWARD,
        "for_b[2][kWidth / 16][4];\n    ring.wait(tile);",
        "for_b[2][kWidth / 16][4];",
        "in flight|never written|has not waited",
    ),
    of_a_pair(
        "weights' trade unawaited",
        FORWARD,
        "  trade.meet();\n",
        "",
        "race|never written",
        is_thin=False,
    ),
    of_a_pair(
        "values of the partner",
        FORWARD,
        "start_nn(acc, weights, x.first[tile - 1]);",
        "start_nn(acc, weights, x.second[tile - 1]);",
        "error",
        is_thin=False,
    ),
    of_a_pair(
        "weights' tile released before its products end",
        FORWARD,
        "ptx::wgmma_wait<0>();\n    ring.release(tile - 1);",
        "ring.release(tile - 1);\n    ptx::wgmma_wait<0>();",
        "may still be read",
        is_thin=False,
    ),
    of_tied_gradients(
        "terms' tile read by both warp groups",
        TIED,
        "int tile = own; tile < tiles; tile += kConsumers",
        "int tile = 0; tile < tiles; ++tile",
        "more arrivals|in flight|may still be read|error|deadlock",
    ),
    of_tied_gradients(
        "terms' readers miscounted",
        TIED,
        "kReaders = 1;",
        "kReaders = 2;",
        "deadlock",
    ),
    of_tied_gradients(
        "one warp group's sums alone",
        TIED,
        "sums.delta[i][half] + trade.taken(0, half)",
        "sums.delta[i][half]",
        "error",
    ),
    of_tied_gradients(
        "sums' trade unawaited", TIED, "  trade.meet();\n#pragma", "#pragma", "race|never written"
    ),
    of_tied_gradients(
        "turns confused",
        "warpgroup.cuh",
        "image, 2 * r + kTurn);",
        "image, 2 * r + kTurn - 8);",
        "error|never written|in flight|race",
    ),
    of_tied_gradients(
        "turn of the columns before",
        "warpgroup.cuh",
        "const int row = tile * kWidth + r;",
        "const int row = tile * kWidth;",
        "error",
    ),
    of_tied_gradients(
        "boxes larger than their turn",
        TIED,
        "encode_tile_maps(&maps.dy, p.dy, shape.batch, Backward::kHalf)",
        "encode_tile_maps(&maps.dy, p.dy, shape.batch)",
        "more|in flight|race|out of|bytes|error|deadlock",
    ),
    of_tied_gradients(
        "row terms of the other columns",
        TIED,
        "{own_terms[tile] + column, other_terms[tile] + column}",
        "{own_terms[tile] + kHalf - column, other_terms[tile] + kHalf - column}",
        "error",
    ),
    of_tied_gradients(
        "row terms of the other image",
        TIED,
        "const auto own_terms = own == 0 ?",
        "const auto own_terms = own == 1 ?",
        "error",
    ),
    of_tied_gradients(
        "traded halves confused",
        TIED,
        "theirs = kWidth - mine;",
        "theirs = mine;",
        "error",
    ),
    of_tied_gradients(
        "elements before their wait",
        TIED,
        "ptx::wgmma_wait<1>();\n    contrast_gradients",
        "ptx::wgmma_wait<2>();\n    contrast_gradients",
        "before its wait|error|disagree|not finished",
    ),
    of_tied_gradients(
        "gradients' stage released too early",
        TIED,
        "ptx::wgmma_wait<0>();\n    if (tile > 0) ring.release(tile - 1);",
        "if (tile > 0) ring.release(tile - 1);\n    ptx::wgmma_wait<0>();",
        "may still be read",
    ),
    of_tied_gradients(
        "weights taken before the meeting",
        TIED,
        "trade.meet();\n    take(weights[1], trade, tile);",
        "take(weights[1], trade, tile);\n    trade.meet();",
        "race|never written",
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

    # On Hopper as many tiles of 128 columns, or 64, as make the ring go round.
    on_hopper, of_pairs = mutation in HOPPER_MUTATIONS, mutation.kernels.startswith("cci")
    images = 1 if on_hopper and not of_pairs else 2
    channels = (200 if of_pairs else 390) if on_hopper else 70
    x = make_input("diffuse", (images, channels, 72), torch.bfloat16)
    thin = make_input("randn", (images, channels, 9), torch.bfloat16, seed=2)
    v = thin if mutation.is_thin else None
    dy = make_input("randn", (x if v is None else v).shape, torch.bfloat16, seed=1)
    with (
        registered(library, monkeypatch) as emulator,
        pytest.raises((EmulationError, AssertionError), match=mutation.symptom),
    ):
        run(emulator, mutation, x, v, dy)


def run(emulator: Emulator, mutation: Mutation, x: Tensor, v: Tensor | None, dy: Tensor) -> None:
    if mutation in HOPPER_MUTATIONS:
        emulator.choose(HOPPER)
        emulator.multiprocessors = mutation.multiprocessors
    else:
        emulator.shared_limit = mutation.shared_limit
    if mutation.kernels.startswith("cci"):
        check_cci("cuda", x, *make_pairs(len(x)), v, dy)
    else:
        check_sci("cuda", x, v, dy)
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
