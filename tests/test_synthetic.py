"""The drawn birds: what a class is, what it is not, and that a seed gives the same everywhere."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from cin_fast.data import build_dataset
from cin_fast.data.synthetic import (
    MAX_CLASSES,
    TEST_PER_CLASS,
    TRAIN_PER_CLASS,
    SyntheticBirds,
    draw_bird,
    species,
)

# What draw_bird(species()[2], "0/train/125", 64) is like, 4 x 4 RGB.
GOLDEN = [
    [73, 171, 219],
    [84, 180, 226],
    [75, 176, 225],
    [105, 199, 144],
    [106, 188, 204],
    [123, 163, 182],
    [141, 173, 188],
    [110, 192, 183],
    [173, 205, 155],
    [132, 126, 120],
    [180, 201, 154],
    [178, 223, 96],
    [199, 222, 164],
    [195, 219, 139],
    [215, 226, 135],
    [215, 226, 135],
]


def parts_that_differ(a, b):
    return sum(x != y for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True))


def pixels(kind, key="0/train/0", size=64):
    return np.asarray(draw_bird(kind, key, size), dtype=np.int16)


def test_classes_share_parts_and_differ_in_two_at_least():
    kinds = species(MAX_CLASSES)
    distances = Counter(parts_that_differ(a, b) for a, b in itertools.combinations(kinds, 2))
    assert min(distances) == 2
    assert max(distances) <= 5
    assert len({kind.name for kind in kinds}) == MAX_CLASSES


def test_no_part_names_a_default_class():
    # Each kind of each part is seen in four of the twelve classes.
    for choices in zip(*(dataclasses.astuple(kind) for kind in species()), strict=True):
        assert set(Counter(choices).values()) == {4}


@pytest.mark.parametrize("part", ["crown", "beak", "wing", "tail", "breast"])
def test_each_part_is_seen_and_small(part):
    base = species()[0]
    values = {getattr(kind, part) for kind in species()}
    for value in values - {getattr(base, part)}:
        shares = []
        for number in range(12):
            one, other = (
                pixels(kind, f"0/train/{number}")
                for kind in (base, dataclasses.replace(base, **{part: value}))
            )
            shares.append((np.abs(one - other).max(axis=2) > 24).mean())
        # Of the picture: enough to be found at 64 pixels, and far from the whole bird.
        assert 0.002 < np.mean(shares) < 0.06


def test_the_whole_picture_says_nothing_about_the_class():
    # The same key gives the same pose, colours and background to every class.
    corners = {pixels(kind)[:4, :4].tobytes() for kind in species()}
    assert len(corners) == 1
    assert len({pixels(kind).tobytes() for kind in species()}) == 12


def test_pictures_of_a_class_vary_strongly():
    images = np.stack([pixels(species()[1], f"0/train/{i}") for i in range(16)]).astype(float)
    for one, other in itertools.combinations(images, 2):
        assert np.abs(one - other).mean() > 15


def test_another_process_draws_the_same():
    code = (
        "from cin_fast.data.synthetic import draw_bird, species; import hashlib;"
        "print(hashlib.sha256(draw_bird(species()[5], '3/test/7', 48).tobytes()).hexdigest())"
    )
    import hashlib

    here = hashlib.sha256(draw_bird(species()[5], "3/test/7", 48).tobytes()).hexdigest()
    for hash_seed in ("0", "1"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == here


def test_the_drawing_is_the_one_it_always_was():
    # Coarse, because versions of Pillow may place single pixels differently.
    coarse = draw_bird(species()[2], "0/train/125", 64).reduce(16)
    assert np.asarray(coarse).shape == (4, 4, 3)
    np.testing.assert_allclose(np.asarray(coarse).reshape(16, 3), GOLDEN, atol=3)


def test_splits_seeds_and_images_differ():
    drawn = {
        pixels(species()[0], f"{seed}/{split}/{index}").tobytes()
        for seed, split, index in itertools.product((0, 1), ("train", "test"), (0, 1))
    }
    assert len(drawn) == 8


@pytest.mark.parametrize("train", [True, False])
def test_the_dataset_is_balanced_and_normalised(train):
    dataset = build_dataset("synthetic", None, train=train, image_size=32)
    per_class = TRAIN_PER_CLASS if train else TEST_PER_CLASS
    assert Counter(dataset.labels) == dict.fromkeys(range(12), per_class)
    assert len(dataset) == 12 * per_class
    assert dataset.skipped == ()
    image, label = dataset[len(dataset) - 1]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert label == 11
    stack = torch.stack([dataset[i][0] for i in range(0, len(dataset), 7)])
    assert stack.mean().abs() < 0.5
    assert 0.6 < stack.std() < 1.4


def test_names_say_which_picture_it_is():
    dataset = build_dataset("synthetic", None, train=False, image_size=32)
    assert dataset.name(3) == f"synthetic/test/{dataset.classes[0]}/00003"
    assert len({dataset.name(i) for i in range(len(dataset))}) == len(dataset)


def test_kept_drawings_are_the_drawings():
    small = SyntheticBirds(np.asarray, train=True, size=24, classes=2, images_per_class=2)
    large = SyntheticBirds(np.asarray, train=True, size=200, classes=2, images_per_class=2)
    assert small.drawings is not None
    assert large.drawings is None
    for dataset in (small, large):
        for index in range(4):
            np.testing.assert_array_equal(dataset[index][0], np.asarray(dataset.draw(index)))


@pytest.mark.parametrize("count", [0, MAX_CLASSES + 1])
def test_a_number_of_classes_that_cannot_be_drawn_is_refused(count):
    with pytest.raises(ValueError, match=f"expected 1 to {MAX_CLASSES}, found {count}"):
        species(count)
