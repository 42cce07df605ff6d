"""The paper's images: resize to 600, crop 448, at random with flips in training; scaled."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from cin_fast.data.transforms import image_transform, resized_side

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def ramp(width, height):
    """Red grows to the right and green to the bottom, so that a crop shows where it was taken."""
    image = Image.new("RGB", (width, height))
    image.putdata(
        [
            (round(255 * x / (width - 1)), round(255 * y / (height - 1)), 0)
            for y in range(height)
            for x in range(width)
        ]
    )
    return image


def colours(tensor):
    return tensor * DEVIATION + MEAN


@pytest.mark.parametrize(("size", "side"), [(448, 600), (224, 300), (128, 171), (96, 129), (7, 9)])
def test_the_paper_sizes_scale(size, side):
    assert resized_side(size) == side
    assert image_transform(size, train=False)(Image.new("RGB", (50, 31))).shape == (3, size, size)


def test_pixels_are_normalised_as_imagenet():
    for train in (True, False):
        tensor = image_transform(8, train=train)(Image.new("RGB", (20, 20), (255, 0, 51)))
        expected = torch.tensor([1.0, 0.0, 0.2])[:, None, None].expand(3, 8, 8)
        torch.testing.assert_close(colours(tensor), expected, rtol=0, atol=1e-6)


def test_the_test_crop_is_the_centre_of_the_squared_image():
    # 64 of 86: from 11/86 to 75/86 of the image in both directions, whatever its shape.
    for shape in ((172, 86), (86, 258)):
        image = colours(image_transform(64, train=False)(ramp(*shape)))
        for channel, axis in ((0, 0), (1, 1)):
            line = image[channel].mean(axis)
            assert line[0].item() == pytest.approx(11.5 / 86, abs=0.01)
            assert line[-1].item() == pytest.approx(74.5 / 86, abs=0.01)


def test_the_test_crop_is_always_the_same():
    transform = image_transform(32, train=False)
    assert torch.equal(transform(ramp(60, 60)), transform(ramp(60, 60)))


def test_training_crops_move_and_flip():
    transform = image_transform(64, train=True)
    image = ramp(86, 86)
    lefts, flips = set(), 0
    for _ in range(60):
        red = colours(transform(image))[0].mean(0)
        flips += bool(red[0] > red[-1])
        lefts.add(round(min(red[0].item(), red[-1].item()) * 85))
    assert 15 < flips < 45
    assert min(lefts) <= 3
    assert max(lefts) >= 19
    assert max(lefts) <= 22


def test_training_crops_follow_the_seed():
    transform = image_transform(32, train=True)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(transform(ramp(60, 60)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
