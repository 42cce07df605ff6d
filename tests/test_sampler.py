"""ClassBalancedPairSampler: batches of classes, split at random into pairs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cin_fast.data import ClassBalancedPairSampler

EVEN = [label for label in range(10) for _ in range(30)]
UNEVEN = [0] * 1 + [1] * 3 + [2] * 5 + [3] * 7 + [4] * 12 + [5] * 31


def epoch(labels, number=0, **options):
    sampler = ClassBalancedPairSampler(labels, **options)
    sampler.set_epoch(number)
    return list(sampler)


def test_a_batch_is_four_classes_of_five_images():
    for batch in epoch(EVEN):
        assert len(batch) == 20
        assert Counter(Counter(EVEN[i] for i in batch).values()) == {5: 4}
        assert len(set(batch)) == 20


def test_an_even_set_is_covered_exactly_once():
    batches = epoch(EVEN)
    assert len(batches) == 300 // 20
    assert sorted(i for batch in batches for i in batch) == list(range(300))


def test_pairs_are_split_at_random_over_the_whole_batch():
    # Of the 190 pairs that 4 x 5 images can form 40 are positive: 10 * 40 / 190 a batch.
    sampler = ClassBalancedPairSampler(EVEN)
    counts = []
    for number in range(20):
        sampler.set_epoch(number)
        for batch in sampler:
            labels = [EVEN[i] for i in batch]
            counts.append(sum(a == b for a, b in zip(labels[::2], labels[1::2], strict=True)))
    mean = sum(counts) / len(counts)
    assert mean == pytest.approx(40 / 19, abs=0.25)


def test_the_seed_and_the_epoch_decide_everything():
    assert epoch(EVEN, 3, seed=7) == epoch(EVEN, 3, seed=7)
    assert epoch(EVEN, 3, seed=7) != epoch(EVEN, 4, seed=7)
    assert epoch(EVEN, 3, seed=7) != epoch(EVEN, 3, seed=8)


def test_classes_of_any_size_are_covered():
    batches = epoch(UNEVEN)
    assert {i for batch in batches for i in batch} == set(range(len(UNEVEN)))
    # 1 + 1 + 1 + 2 + 3 + 7 groups of five would fit in four batches, but class 5 needs seven.
    assert len(batches) == 7
    for batch in batches:
        assert Counter(Counter(UNEVEN[i] for i in batch).values()) == {5: 4}


def test_a_class_repeats_images_only_where_it_has_to():
    for batch in epoch(UNEVEN):
        for label in {UNEVEN[i] for i in batch}:
            repeats = Counter(i for i in batch if UNEVEN[i] == label)
            size = UNEVEN.count(label)
            assert len(repeats) == min(5, size)
            assert max(repeats.values()) == max(1, -(-5 // size))


def test_labels_may_be_a_tensor():
    labels = [n % 4 for n in range(20)]
    given = ClassBalancedPairSampler(torch.tensor(labels), 2, 5)
    assert list(given) == list(ClassBalancedPairSampler(labels, 2, 5))


def test_what_fills_up_a_batch_is_drawn_from_all_classes():
    labels = [0] * 60 + [label for label in range(1, 13) for _ in range(5)]
    batches = [batch for number in range(30) for batch in epoch(labels, number)]
    drawn = Counter(label for batch in batches for label in {labels[i] for i in batch})
    assert drawn[0] == len(batches)
    others = [drawn[label] for label in range(1, 13)]
    assert min(others) > 0.5 * max(others)


@given(
    sizes=st.lists(st.integers(1, 23), min_size=2, max_size=9),
    classes=st.integers(1, 9),
    images=st.integers(1, 6),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_any_set_is_covered_by_all_processes_together(sizes, classes, images, world_size, seed):
    classes = min(classes, len(sizes))
    if classes * images % 2:
        images += 1
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    samplers = [
        ClassBalancedPairSampler(
            labels, classes, images, seed=seed, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    epochs = [list(sampler) for sampler in samplers]
    assert len({len(sampler) for sampler in samplers}) == 1
    assert [len(batches) for batches in epochs] == [len(sampler) for sampler in samplers]
    assert {i for batches in epochs for batch in batches for i in batch} == set(range(len(labels)))
    for batches in epochs:
        for batch in batches:
            assert Counter(Counter(labels[i] for i in batch).values()) == {images: classes}


def test_processes_share_one_epoch():
    whole = epoch(EVEN, 2, seed=5)
    # 15 batches on two processes: one is added.
    parts = [epoch(EVEN, 2, seed=5, rank=rank, world_size=2) for rank in (0, 1)]
    assert [len(part) for part in parts] == [8, 8]
    assert len(whole) == 15
    first, second = ({i for batch in part[:7] for i in batch} for part in parts)
    assert not first & second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes_per_batch": 3, "images_per_class": 5}, "3 classes x 5 images is odd"),
        ({"classes_per_batch": 12}, "12 were asked for.*images of 10 classes"),
        ({"classes_per_batch": 0}, "found 0 x 5"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 to 1, found 2"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClassBalancedPairSampler(EVEN, **options)
