"""Bugs planted in the warp groups of cci, where both images of a pair share a block."""

from __future__ import annotations

import pytest
from emulation import HOPPER, Emulator
from mutations import Mutation, expect_seen, run, unchanged

BACKWARD, FORWARD = "cci_wgmma_backward.cu", "cci_wgmma_forward.cu"
TIED = "cci_wgmma_tied_backward.cu"


def of_a_pair(
    name: str, file: str, old: str, new: str, symptom: str, is_thin: bool = True
) -> Mutation:
    """With as many channels as make the ring of tiles go round."""
    return Mutation(
        name,
        file,
        old,
        new,
        symptom,
        kernels=file if file.endswith(".cu") else BACKWARD if is_thin else TIED,
        chip=HOPPER,
        shared_limit=None,
        is_thin=is_thin,
        channels=200,
    )


def of_tied_gradients(name: str, file: str, old: str, new: str, symptom: str) -> Mutation:
    return of_a_pair(name, file, old, new, symptom, is_thin=False)


MUTATIONS = (
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
        "magnitudes[2][kWidth / 16][4];\n    ring.wait(tile);",
        "magnitudes[2][kWidth / 16][4];",
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
        "start_nn(acc, weights, own_x[tile - 1]);",
        "start_nn(acc, weights, x.first[tile - 1]);",
        "error",
        is_thin=False,
    ),
    of_a_pair(
        "eta of the partner",
        FORWARD,
        "p.eta[pair.image(own)]",
        "p.eta[pair.first]",
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
    of_a_pair(
        "statistics' own tile not first",
        FORWARD,
        "walk(divide_up(channels, kWidth), block.row / kWidth)",
        "walk(divide_up(channels, kWidth))",
        "error",
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
        TIED,
        "encode(&maps.dy, x_dy.second)",
        "encode(&maps.dy, x_dy.first)",
        "error",
    ),
    of_tied_gradients(
        "turn of the columns before",
        "warpgroup.cuh",
        "load(map, barrier, tile * kWidth / kTurn, image)",
        "load(map, barrier, (tile > 0 ? tile - 1 : 0) * kWidth / kTurn, image)",
        "error",
    ),
    of_tied_gradients(
        "turns longer than their consumer's columns",
        TIED,
        "shape.positions, kStackedTurn, &x_dy",
        "shape.positions, 2 * kStackedTurn, &x_dy",
        "error",
    ),
    of_tied_gradients(
        "panels' height of one operand alone",
        "panels.cuh",
        "height = 2 * round_up(shape.channels, turn)",
        "height = round_up(shape.channels, turn)",
        "error|global buffer",
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


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_seen(mutant: Emulator, mutation: Mutation) -> None:
    expect_seen(mutant, mutation)


@pytest.mark.parametrize("mutation", unchanged(MUTATIONS), ids=str)
def test_without_a_mutation_nothing_is_seen(mutant: Emulator, mutation: Mutation) -> None:
    run(mutant, mutation)
