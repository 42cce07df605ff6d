"""The paper's images: resize to 600, crop 448 (at random, with flips, in training), normalise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
_RESIZED, _CROPPED = 600, 448


def resized_side(image_size: int) -> int:
    """The side that an image is resized to before the crop."""
    return round(image_size * _RESIZED / _CROPPED)


def image_transform(image_size: int, *, train: bool) -> Callable[[Image.Image], Tensor]:
    """From a PIL image to a normalised (3, image_size, image_size) tensor.

    The image is resized to 600/448 of ``image_size`` on both sides, as NTS does, then cropped.
    """
    resized = resized_side(image_size)
    crop = v2.RandomCrop(image_size) if train else v2.CenterCrop(image_size)
    flip = [v2.RandomHorizontalFlip()] if train else []
    return v2.Compose(
        [
            v2.Resize((resized, resized), antialias=True),
            crop,
            *flip,
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION),
        ]
    )
