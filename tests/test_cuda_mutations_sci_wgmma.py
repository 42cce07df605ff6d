"""Bugs planted in the warp groups of sci, and in what all kernels of warp groups share."""

from __future__ import annotations

from dataclasses import replace

import pytest
from emulation import HOPPER, Emulator
from mutations import Mutation, expect_seen, run, unchanged


def of_warp_groups(name: str, file: str, old: str, new: str, symptom: str) -> Mutation:
    """With as many channels as make the ring of tiles go round."""
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
        channels=390,
    )


def of_half_blocks(
    name: str, file: str, old: str, new: str, symptom: str, is_thin: bool = False
) -> Mutation:
    """Where both consumers of a block share 64 rows."""
    mutation = of_warp_groups(name, file, old, new, symptom)
    return replace(mutation, is_thin=is_thin, multiprocessors=132)


def of_pieces(name: str, file: str, old: str, new: str, symptom: str) -> Mutation:
    """Where the producer brings rows that start on 8 bytes, but not on 16."""
    return replace(of_warp_groups(name, file, old, new, symptom), reads_pieces=True, positions=76)


MUTATIONS = (
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
    of_warp_groups(
        "not waited for the kernel before",
        "warpgroup.cuh",
        "  ptx::grid_dependency_wait();\n",
        "",
        "no grid_dependency_wait",
    ),
    of_pieces(
        "pieces unfenced",
        "warpgroup.cuh",
        "    ptx::fence_proxy_async();\n    __syncwarp();",
        "    __syncwarp();",
        "no fence.proxy.async",
    ),
    of_pieces(
        "published before it landed",
        "warpgroup.cuh",
        "ring.template publish<kStages - 1>(ring.full(0));",
        "ring.template publish<kStages>(ring.full(0));",
        "race",
    ),
    of_pieces(
        "a warp publishes for its lanes unasked",
        "warpgroup.cuh",
        "    ptx::fence_proxy_async();\n    __syncwarp();",
        "    ptx::fence_proxy_async();",
        "race",
    ),
    of_pieces(
        "pieces over a tile in use",
        "warpgroup.cuh",
        "    ring.wait_empty(tile);\n    x.load(tile);",
        "    x.load(tile);",
        "deadlock|wgmma|race",
    ),
    of_pieces(
        "pieces' swizzle",
        "wgmma_tiles.cuh",
        "(byte ^ row % 8 * 16)",
        "(byte ^ row % 4 * 16)",
        "error",
    ),
    of_pieces(
        "one arrival of four",
        "sci_wgmma.cu",
        "kPieces ? kGroupThreads / 32 : 1",
        "1",
        "deadlock|arrivals",
    ),
    of_pieces(
        "pieces' rows unchecked",
        "wgmma_tiles.cuh",
        "row + first + i < rows",
        "0 < rows",
        "global buffer",
    ),
    of_pieces(
        "pieces' registers",
        "warpgroup.cuh",
        "kProducerRegistersByPieces = 40",
        "kProducerRegistersByPieces = 48",
        "65536",
    ),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_seen(mutant: Emulator, mutation: Mutation) -> None:
    expect_seen(mutant, mutation)


@pytest.mark.parametrize("mutation", unchanged(MUTATIONS), ids=str)
def test_without_a_mutation_nothing_is_seen(mutant: Emulator, mutation: Mutation) -> None:
    run(mutant, mutation)
