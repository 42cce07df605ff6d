"""Bugs planted in the warp groups of sci, and in what all kernels of warp groups share."""

from __future__ import annotations

from dataclasses import replace

import pytest
from emulation import HOPPER, Emulator
from mutations import Mutation, expect_seen, run, unchanged


def of_warp_groups(
    name: str, file: str, old: str, new: str, symptom: str, channels: int = 390
) -> Mutation:
    """With as many channels as make the backward pass's ring of tiles go round.

    The forward pass's does not: nothing but its own waits orders what its consumers do at the end.
    """
    return Mutation(
        name,
        file,
        old,
        new,
        symptom,
        "sci_wgmma.cu",
        chip=HOPPER,
        shared_limit=None,
        images=1,
        channels=channels,
    )


def of_half_blocks(
    name: str,
    file: str,
    old: str,
    new: str,
    symptom: str,
    is_thin: bool = False,
    channels: int = 390,
) -> Mutation:
    """Where both consumers of a block share 64 rows."""
    mutation = of_warp_groups(name, file, old, new, symptom, channels)
    return replace(mutation, is_thin=is_thin, multiprocessors=132)


def of_panels(
    name: str, old: str, new: str, symptom: str, positions: int = 72, file: str = "panels.cu"
) -> Mutation:
    """Where an operand is laid out anew: as whole pieces of 8 bytes, or number by number."""
    mutation = of_warp_groups(name, file, old, new, symptom, channels=70)
    return replace(mutation, kernels="panels.cu", positions=positions)


def of_terms(
    name: str,
    file: str,
    old: str,
    new: str,
    symptom: str,
    positions: int = 32,
    is_thin: bool = False,
) -> Mutation:
    """Where rows' terms are made of the result: rows of nearly one weight, in a last block none."""
    mutation = of_warp_groups(name, file, old, new, symptom, channels=190)
    return replace(
        mutation, images=2, positions=positions, kind="randn", scale=1.0, is_thin=is_thin
    )


# Behind a tile's weights: the products of the tile before.
BEHIND = "    ptx::wgmma_wait_behind<0>(softmax.sum[0] + softmax.sum[1]);\n"
OWN_TILE = "walk(divide_up(channels, kWidth), block.row / kWidth)"
MUTATIONS = (
    of_warp_groups(
        "full stage unawaited",
        "warpgroup.cuh",
        "ptx::mbarrier_wait(full(i), round(i) % 2);",
        "",
        "in flight|never written|has not waited",
    ),
    of_warp_groups(
        "empty stage unawaited",
        "warpgroup.cuh",
        "ptx::mbarrier_wait(empty(i), (round(i) + 1) % 2);",
        "",
        "in flight|may still be read|more arrivals",
    ),
    of_warp_groups(
        "parity flipped",
        "warpgroup.cuh",
        "ptx::mbarrier_wait(full(i), round(i) % 2);",
        "ptx::mbarrier_wait(full(i), (round(i) + 1) % 2);",
        "in flight|never written|has not waited",
    ),
    of_warp_groups(
        "a piece of the bytes unexpected",
        "warpgroup.cuh",
        "ptx::mbarrier_arrive_expect(full(i), bytes);",
        "ptx::mbarrier_arrive_expect(full(i), bytes - 16);",
        "deadlock.* at an mbarrier .*bytes of bulk copies",
    ),
    of_warp_groups(
        "a panel's bytes unexpected",
        "warpgroup.cuh",
        "ptx::mbarrier_arrive_expect(full(i), bytes);",
        "ptx::mbarrier_arrive_expect(full(i), bytes - 64 * 32);",
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
        BEHIND + "    ring.release(i - 1);\n    softmax.rescale(acc, shrink);\n",
        "    softmax.rescale(acc, shrink);\n" + BEHIND + "    ring.release(i - 1);\n",
        "before its wait|error",
    ),
    of_warp_groups(
        "stage released too early",
        "sci_wgmma.cu",
        BEHIND + "    ring.release(i - 1);\n",
        "    ring.release(i - 1);\n" + BEHIND,
        "may still be read",
    ),
    of_warp_groups(
        "swizzle wrong",
        "wgmma_tiles.cuh",
        "ptx::kSwizzle32Bytes << 30",
        "(ptx::kSwizzle32Bytes - 1) << 30",
        "error|never written|in flight",
    ),
    of_warp_groups(
        "stride wrong",
        "wgmma_tiles.cuh",
        "kStride = 8 * kPanelRow;",
        "kStride = 4 * kPanelRow;",
        "error|never written|in flight",
    ),
    of_warp_groups(
        "next panel wrong",
        "wgmma_tiles.cuh",
        "row * kPanelRow, kPanelBytes);",
        "row * kPanelRow, kPanelBytes / 2);",
        "error|never written|in flight",
    ),
    of_warp_groups(
        "tile off by a turn",
        "warpgroup.cuh",
        "barrier, tile * kWidth / kTurn, ",
        "barrier, tile * kWidth / kTurn + 1, ",
        "error",
    ),
    of_warp_groups(
        "rows of the turn before",
        "warpgroup.cuh",
        "load(map, barrier, (row + r) / kTurn, image)",
        "load(map, barrier, row / kTurn, image)",
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
    of_warp_groups(
        "not waited for the kernel before",
        "warpgroup.cuh",
        "  ptx::grid_dependency_wait();\n",
        "",
        "no grid_dependency_wait",
    ),
    of_warp_groups(
        "own tile not first",
        "sci_wgmma.cu",
        OWN_TILE,
        "walk(divide_up(channels, kWidth))",
        "error",
    ),
    of_warp_groups(
        "own tile twice", "warpgroup.cuh", "tile = own + i;", "tile = own + i + 1;", "error"
    ),
    of_warp_groups(
        "walk beyond the last tile", "warpgroup.cuh", "tile < tiles ?", "tile <= tiles ?", "error"
    ),
    of_warp_groups(
        "own tile taken for one that passes",
        "warpgroup.cuh",
        "(i == 0 ? -1 : (i - 1) % kStages)",
        "(i == 0 ? 0 : (i - 1) % kStages)",
        "in flight|never written|has not waited",
    ),
    of_warp_groups(
        "rows' bytes unexpected",
        "warpgroup.cuh",
        "(Operands::kRowBytes + ...));",
        "(Operands::kRowBytes + ...) - 512);",
        "in flight|has not waited|deadlock",
    ),
    of_warp_groups(
        "rows counted as a stage",
        "warpgroup.cuh",
        "i < kFirst ? 0 : (i - kFirst) / kStages",
        "i / kStages",
        "deadlock|in flight|never written|has not waited",
    ),
    of_warp_groups(
        "rows take a stage's barrier",
        "warpgroup.cuh",
        "(i < kFirst ? 0 : 1 + (i - kFirst) % kStages)",
        "(1 + i % kStages)",
        "deadlock|more arrivals|in flight|has not waited",
    ),
    of_warp_groups(
        "own rows overwritten while the other consumer multiplies them",
        "sci_wgmma.cu",
        "ring.wait_until_rows_are_free();",
        "",
        "may still be read",
    ),
    of_warp_groups(
        "own rows awaited until a phase that never ends",
        "warpgroup.cuh",
        "ptx::mbarrier_wait(empty(0), 0);",
        "ptx::mbarrier_wait(empty(0), 1);",
        "deadlock.*waits at an mbarrier",
    ),
    of_warp_groups(
        "turn never given",
        "sci_wgmma.cu",
        "turns.end();",
        "",
        "deadlock.*waits at a named barrier",
    ),
    of_warp_groups(
        "no first turn",
        "warpgroup.cuh",
        "if (is_second()) end();",
        "",
        "deadlock.*waits at a named barrier",
    ),
    of_warp_groups(
        "last turn taken by nobody",
        "sci_wgmma.cu",
        "turns.leave();",
        "",
        "nobody waited for 128 threads that arrived at a named barrier",
    ),
    of_warp_groups(
        "turn for oneself",
        "warpgroup.cuh",
        "kFirst + kSecond - own",
        "own",
        "deadlock.*waits at a named barrier",
    ),
    of_warp_groups(
        "no fence in a turn",
        "sci_wgmma.cu",
        "turns.begin();\n    ptx::wgmma_fence();",
        "turns.begin();",
        "wgmma_fence",
    ),
    of_warp_groups(
        "wait behind the weights loosened",
        "sci_wgmma.cu",
        "ptx::wgmma_wait_behind<0>",
        "ptx::wgmma_wait_behind<1>",
        "before its wait|may still be read",
    ),
    of_warp_groups(
        "next step of a product along rows wrong",
        "wgmma_tiles.cuh",
        "step * kPanelBytes + row",
        "(step > 0 ? step - 1 : 0) * kPanelBytes + row",
        "error",
    ),
    of_warp_groups(
        "a warp's memory runs into the next warp's",
        "wgmma_tiles.cuh",
        "byte / kPieceBytes * (Rows::kPanelBytes - kPieceBytes)",
        "0",
        "may still be read|race",
    ),
    of_warp_groups(
        "a column too many",
        "softmax.cuh",
        "n * 8 + e % 2 < own_columns",
        "n * 8 + e % 2 <= own_columns",
        "error",
        # So few that one more counts.
        channels=12,
    ),
    of_half_blocks(
        "a first tile without columns leaves an infinite peak",
        "softmax.cuh",
        "factor < 0.f ? FLT_MAX : -FLT_MAX;",
        "factor < 0.f ? INFINITY : -INFINITY;",
        "error",
        channels=140,
    ),
    of_warp_groups(
        "stacked turns over each other",
        "panels.cuh",
        "panels, turn, 2 * turn, height};",
        "panels, turn, turn, height};",
        "race",
    ),
    of_warp_groups(
        "stacked operands one over the other",
        "panels.cuh",
        "memory + turn * kPanelRow;",
        "memory;",
        "error",
    ),
    of_warp_groups(
        "boxes larger than a tile",
        "panels.cuh",
        "box_rows / panels.turn, box_panels",
        "box_rows / kGroupRows, box_panels",
        "outside the shared arrays",
    ),
    of_panels("panels' swizzle", "row / 4 % 2", "row / 2 % 2", "error", file="panels.cuh"),
    of_panels("panels not swizzled", "row / 4 % 2 * 16", "0", "error", file="panels.cuh"),
    of_panels(
        "rows beyond the tensor left out", "row >= round_up(rows, to.turn)", "row >= rows", "error"
    ),
    of_panels("one tensor twice", "sources.of[blockIdx.y]", "sources.of[0]", "error"),
    of_panels("both in one place", "blockIdx.y * to.turn + ", "", "race"),
    of_terms(
        "rest of the result not taken",
        "sci.cuh",
        "result - widen(narrow<T>(result))",
        "result",
        "error",
    ),
    of_terms(
        "rest undivided",
        "sci.cuh",
        "Products::over(acc[m][e], divisors[e / 2]);",
        "acc[m][e];",
        "error",
    ),
    of_terms(
        "rest left out of the terms",
        "sci_wgmma.cu",
        "  start_nt(product, dy.rows_from(0), rest, 0, true);\n",
        "",
        "error",
        is_thin=True,
    ),
    of_terms(
        "rest in the result's place", "sci_wgmma.cu", "rest, 0, true);", "rest, 0, false);", "error"
    ),
    of_terms(
        "result hidden from wgmma",
        "sci_wgmma.cu",
        "  ptx::fence_proxy_async();\n",
        "",
        "no fence.proxy.async",
    ),
    of_terms(
        "result multiplied before all have stored it",
        "sci_wgmma.cu",
        "  ptx::fence_proxy_async();\n  __syncthreads();\n",
        "  ptx::fence_proxy_async();\n",
        "race|never written|no barrier",
    ),
    of_terms(
        "rows of dY unawaited",
        "sci_wgmma.cu",
        "  ptx::mbarrier_wait(ring.rows_full, 0);\n  float product",
        "  float product",
        "in flight|never written|has not waited",
    ),
    of_terms(
        "terms not waited for",
        "sci_wgmma.cu",
        "wait<0>();\n  take_diagonal",
        "wait<1>();\n  take_diagonal",
        "in flight",
    ),
    of_terms("beside the diagonal", "sci.cuh", "i % 2 == row)", "i % 2 == row + 1)", "error"),
    of_terms(
        "result of the rows before",
        "sci_wgmma.cu",
        "(exists ? (row + r) * from.pitch + column : 0)",
        "(exists ? r * from.pitch + column : 0)",
        "error",
    ),
    of_terms(
        "result's rows beyond the tensor",
        "sci_wgmma.cu",
        "const bool exists = row + r < from.rows;",
        "const bool exists = true;",
        "global buffer",
    ),
    of_terms(
        "result's columns beyond the tensor",
        "sci_wgmma.cu",
        "from.columns - column - first)",
        "kPiece)",
        "error|global buffer",
    ),
    of_terms(
        "pieces read where they do not start",
        "sci_wgmma.cu",
        "p.columns % kPiece == 0 &&",
        "",
        "error|global buffer|aligned",
        positions=33,
    ),
    of_panels("rows beyond the tensor loaded", "row < rows ?", "true ?", "global buffer"),
    of_panels(
        "columns beyond the tensor loaded",
        "return columns > 0 ?",
        "return true ?",
        "error|global buffer",
        file="panels.cuh",
    ),
    of_panels(
        "columns beyond the tensor loaded one by one",
        "if (i < columns)",
        "if (0 < columns)",
        "error|global buffer",
        positions=73,
        file="panels.cuh",
    ),
    of_panels(
        "numbers of a piece confused",
        "<< 16 * i",
        "<< (48 - 16 * i)",
        "error",
        positions=73,
        file="panels.cuh",
    ),
    of_panels("panels beyond the operand's", "panel < to.panels", "true", "global buffer|race"),
    of_panels("turns next to each other", "to.turn * to.step", "to.turn * to.turn", "race"),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_seen(mutant: Emulator, mutation: Mutation) -> None:
    expect_seen(mutant, mutation)


@pytest.mark.parametrize("mutation", unchanged(MUTATIONS), ids=str)
def test_without_a_mutation_nothing_is_seen(mutant: Emulator, mutation: Mutation) -> None:
    run(mutant, mutation)
