"""Batches of P classes x K images, split at random into pairs."""

from collections import Counter

import pytest

from cin_fast.data import ClassBalancedPairSampler

LABELS = [label for label in range(7) for _ in range(10)]
UNEVEN = [0] * 3 + [1] * 23 + [2] * 5 + [3] * 1 + [4] * 11 + [5] * 6


def batches(labels=LABELS, p=4, k=5, epoch=0, **options):
    sampler = ClassBalancedPairSampler(labels, p, k, **options)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


@pytest.mark.parametrize("labels", [LABELS, UNEVEN])
def test_every_batch_is_p_classes_of_k_images(labels):
    for batch in batches(labels):
        assert len(batch) == 20
        assert sorted(Counter(labels[i] for i in batch).values()) == [5, 5, 5, 5]


@pytest.mark.parametrize("labels", [LABELS, UNEVEN])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_covers_the_training_set(labels, world):
    found = [batches(labels, rank=rank, world_size=world) for rank in range(world)]
    assert len({len(part) for part in found}) == 1
    assert {i for part in found for batch in part for i in batch} == set(range(len(labels)))


def test_ranks_take_different_batches():
    one, two = batches(rank=0, world_size=2), batches(rank=1, world_size=2)
    assert all(a != b for a, b in zip(one, two, strict=True))


def test_an_image_repeats_only_if_its_class_is_too_small():
    for batch in batches(UNEVEN):
        for index, count in Counter(batch).items():
            assert count == 1 or UNEVEN.count(UNEVEN[index]) < 5


def test_seed_and_epoch_decide_everything():
    assert batches(seed=1, epoch=2) == batches(seed=1, epoch=2)
    assert batches(seed=1, epoch=2) != batches(seed=1, epoch=3)
    assert batches(seed=1, epoch=2) != batches(seed=2, epoch=2)


def test_both_kinds_of_pair_arise_and_are_counted():
    sampler = ClassBalancedPairSampler(LABELS, 4, 5)
    counts = [sampler.pair_counts(batch) for epoch in range(20) for batch in batches(epoch=epoch)]
    assert all(p + n == 10 for p, n in counts)
    # A random partner of an image shares its class with probability 4/19.
    share = sum(p for p, _ in counts) / (10 * len(counts))
    assert 0.16 < share < 0.26


def test_pair_counts_by_hand():
    sampler = ClassBalancedPairSampler([0, 0, 1, 1], 2, 2)
    assert sampler.pair_counts([0, 1, 2, 3]) == (2, 0)
    assert sampler.pair_counts([0, 2, 1, 3]) == (0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 3, "k": 3}, "odd and cannot be split into pairs"),
        ({"p": 8, "k": 5}, "classes per batch: 8 were asked for.* 7 classes"),
        ({"p": 0}, "at least one class"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 to 1, found 2"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        batches(**options)
