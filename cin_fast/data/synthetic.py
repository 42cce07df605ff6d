"""The embedded default: cartoon birds whose classes differ in a few small parts only.

A class is one choice for each of five parts: crown, beak, wing, tail and breast. Any two classes
share some of them and differ in at least two, so no single part decides. Pose, size, place,
colours and background vary strongly and say nothing about the class. Everything is drawn here,
from a seed, the same on every machine.
"""

from __future__ import annotations

import cmath
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from cin_fast.data.base import ImageDataset

CLASSES = 12
TRAIN_PER_CLASS = 60
TEST_PER_CLASS = 25

CROWNS = ("plain", "cap", "crest")
BEAKS = ("cone", "long", "hook")
WINGS = ("plain", "bars", "patch")
TAILS = ("fan", "forked", "streamer")
BREASTS = ("plain", "spots", "band")
MAX_CLASSES = 81

# Up to this side all drawings are made once and kept: under 100 MB for the default set.
_KEPT_SIDE = 192
_SUPERSAMPLING = 2
# Coprime to 81, and so that the first 12 classes use every kind of every part four times.
_STRIDE = 22
_CIRCLE = [cmath.rect(1, 2 * math.pi * i / 24) for i in range(24)]

Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Species:
    """What a class is: one choice for each part."""

    crown: str
    beak: str
    wing: str
    tail: str
    breast: str

    @property
    def name(self) -> str:
        """A name such as Crested-Banded-Forktail-Snipe; the wing follows from the other parts."""
        words = (
            {"plain": "", "cap": "Capped", "crest": "Crested"}[self.crown],
            {"plain": "", "spots": "Spotted", "band": "Banded"}[self.breast],
            {"fan": "", "forked": "Forktail", "streamer": "Longtail"}[self.tail],
            {"cone": "Finch", "long": "Snipe", "hook": "Hawk"}[self.beak],
        )
        return "-".join(word for word in words if word)


def species(count: int = CLASSES) -> tuple[Species, ...]:
    """The first ``count`` classes, 1 to 81; any two differ in at least two parts.

    Raises:
        ValueError: for another number.
    """
    if not 1 <= count <= MAX_CLASSES:
        raise ValueError(f"classes: expected 1 to {MAX_CLASSES}, found {count}")
    return tuple(_species(i * _STRIDE % MAX_CLASSES) for i in range(count))


class SyntheticBirds(ImageDataset):
    """The drawn set.

    Args:
        transform: from a PIL image to what the network sees.
        train: the training split; the test split has other birds.
        size: side of the drawings in pixels.
        seed: another seed gives other drawings of the same classes.
        classes, images_per_class: how many; by default 12 classes, 60 and 25 images of each.
    """

    def __init__(
        self,
        transform: Callable[[Image.Image], Tensor],
        *,
        train: bool,
        size: int,
        seed: int = 0,
        classes: int = CLASSES,
        images_per_class: int | None = None,
    ) -> None:
        self.species = species(classes)
        super().__init__((), [one.name for one in self.species], transform)
        self.split = "train" if train else "test"
        self.size = size
        self.seed = seed
        per_class = images_per_class or (TRAIN_PER_CLASS if train else TEST_PER_CLASS)
        self.labels = tuple(label for label in range(classes) for _ in range(per_class))
        # One array, not a list of pictures: worker processes that are forked share its memory.
        self.drawings: np.ndarray | None = None
        if size <= _KEPT_SIDE:
            self.drawings = np.stack([np.asarray(self.draw(i)) for i in range(len(self))])

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        label = self.labels[index]
        return f"synthetic/{self.split}/{self.classes[label]}/{index:05d}"

    def draw(self, index: int) -> Image.Image:
        """The picture before any transform."""
        key = f"{self.seed}/{self.split}/{index}"
        return draw_bird(self.species[self.labels[index]], key, self.size)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.drawings is None:
            picture = self.draw(index)
        else:
            picture = Image.fromarray(self.drawings[index])
        return self.transform(picture), self.labels[index]


def draw_bird(kind: Species, key: str, size: int) -> Image.Image:
    """One bird of a species, (size, size) RGB; ``key`` decides everything else about it."""
    dice = _Dice(key)
    side = _SUPERSAMPLING * size
    scene = _background(dice, side)
    _Bird(kind, dice, scene).draw_all()
    if dice.odds(0.5):
        scene = scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return scene.reduce(_SUPERSAMPLING)


def _species(code: int) -> Species:
    # Four digits to base 3 and their sum: two codes that differ do so in at least two parts.
    digits = [code // 3**place % 3 for place in range(4)]
    crown, beak, tail, breast = digits
    wing = sum(digits) % 3
    return Species(CROWNS[crown], BEAKS[beak], WINGS[wing], TAILS[tail], BREASTS[breast])


class _Dice:
    """Random choices from Random.random() alone, whose sequence Python promises to keep."""

    def __init__(self, key: str) -> None:
        self._random = random.Random(key).random

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def whole(self, low: int, high: int) -> int:
        """From low up to high, both included."""
        return low + int((high - low + 1) * self._random())

    def odds(self, chance: float) -> bool:
        return self._random() < chance

    def colour(self, low: int, high: int) -> Colour:
        return self.whole(low, high), self.whole(low, high), self.whole(low, high)

    def earth(self, low: int, high: int) -> Colour:
        """From horn to bark."""
        red, green, blue = self.colour(low, high)
        return max(red, green), min(red, green), min(green, blue)


class _Frame:
    """A place, size and angle on the picture to draw at."""

    def __init__(self, canvas: ImageDraw.ImageDraw, origin: complex, turn: complex) -> None:
        self._canvas = canvas
        self._origin = origin
        self._turn = turn

    def inner(self, x: float, y: float, degrees: float) -> _Frame:
        """A frame turned about one of this frame's points."""
        turn = self._turn * cmath.rect(1, math.radians(degrees))
        return _Frame(self._canvas, self._place(x, y), turn)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        self.shape([(x + rx * unit.real, y + ry * unit.imag) for unit in _CIRCLE], colour)

    def shape(self, points: Sequence[Point], colour: Colour) -> None:
        self._canvas.polygon(self._points(points), fill=colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        pixels = max(1, round(width * abs(self._turn)))
        self._canvas.line(self._points(points), fill=colour, width=pixels, joint="curve")

    def _points(self, points: Sequence[Point]) -> list[Point]:
        placed = [self._place(x, y) for x, y in points]
        return [(z.real, z.imag) for z in placed]

    def _place(self, x: float, y: float) -> complex:
        return self._origin + self._turn * complex(x, y)


class _Bird:
    """A bird that looks right, about 230 units long; the body's centre is the origin."""

    def __init__(self, kind: Species, dice: _Dice, scene: Image.Image) -> None:
        self.kind = kind
        plumage = dice.colour(85, 195)
        shade = dice.between(0.6, 0.8)
        self.plumage = plumage
        self.back: Colour = (
            int(plumage[0] * shade), int(plumage[1] * shade), int(plumage[2] * shade),
        )  # fmt: skip
        self.mark: Colour = (22, 20, 26) if dice.odds(0.5) else (248, 244, 232)
        self.horn = dice.earth(140, 240)
        self.girth = dice.between(36, 48)
        self.length = dice.between(56, 66)

        # Within the middle of the picture, so that a crop of 448 from 600 keeps most of every part.
        side = scene.width
        scale = side * dice.between(0.48, 0.72) / 230
        spare = side * 0.05
        centre = complex(side / 2 + dice.between(-spare, spare) - 8 * scale,
                         side / 2 + dice.between(-spare, spare) + 16 * scale)  # fmt: skip
        lean = cmath.rect(scale, math.radians(dice.between(-14, 14)))
        self.stand = _Frame(ImageDraw.Draw(scene), centre, lean)
        self.body = self.stand.inner(0, 0, dice.between(-24, 14))
        neck = dice.between(0, 16)
        self.neck = (50 + 0.4 * neck, -46 - 0.8 * neck)
        self.head = self.body.inner(*self.neck, dice.between(-18, 24))
        self.tail = self.body.inner(-40, 0, dice.between(-16, 16))
        self.wing = self.body.inner(10, -12, dice.between(-12, 10))

    def draw_all(self) -> None:
        """From what lies behind to what lies in front."""
        self._legs()
        self._tail()
        self.body.disc(0, 0, self.length, self.girth, self.plumage)
        self.body.line([(26, -8), self.neck], 48, self.plumage)
        self._breast()
        self._wing()
        self._head()
        self._beak()

    def _legs(self) -> None:
        for x in (-8, 14):
            self.stand.line([(x, 20), (x + 4, 74)], 5, self.horn)
            self.stand.line([(x - 6, 74), (x + 16, 73)], 5, self.horn)

    def _tail(self) -> None:
        points = {
            "fan": [(0, -15), (-50, -28), (-62, -10), (-63, 8), (-52, 25), (0, 17)],
            "forked": [(0, -15), (-78, -38), (-46, 0), (-76, 36), (0, 17)],
            "streamer": [(0, -13), (-60, -9), (-100, -8), (-106, 2), (-100, 9), (-60, 9), (0, 15)],
        }[self.kind.tail]
        self.tail.shape(points, self.back)

    def _breast(self) -> None:
        if self.kind.breast == "band":
            self.body.line([(22, -38), (38, -16), (62, -14), (78, -26)], 14, self.mark)
        elif self.kind.breast == "spots":
            for x, y in ((40, -10), (54, -6), (34, 6), (48, 9), (28, 22), (42, 23), (58, 8)):
                self.body.disc(x, y, 6, 6, self.mark)

    def _wing(self) -> None:
        self.wing.shape(
            [(14, -14), (0, -22), (-30, -20), (-58, 0), (-84, 26), (-48, 24), (-16, 22), (8, 10)],
            self.back,
        )
        if self.kind.wing == "bars":
            for x in (-8, -30):
                self.wing.line([(x, -20), (x - 12, 22)], 10, self.mark)
        elif self.kind.wing == "patch":
            self.wing.disc(-26, 2, 17, 13, self.mark)

    def _head(self) -> None:
        self.head.disc(0, 0, 30, 28, self.plumage)
        if self.kind.crown == "cap":
            upper = [unit for unit in _CIRCLE if unit.imag < 0.1]
            self.head.shape([(31 * unit.real, 29 * unit.imag) for unit in upper], self.mark)
        elif self.kind.crown == "crest":
            self.head.shape(
                [(-27, -6), (-50, -40), (-20, -32), (-16, -62), (2, -30), (18, -22), (4, -14)],
                self.mark,
            )
        self.head.disc(11, -3, 6, 6, (250, 250, 245))
        self.head.disc(12, -3, 3.5, 3.5, (10, 10, 10))

    def _beak(self) -> None:
        points = {
            "cone": [(24, -13), (50, 3), (24, 16)],
            "long": [(26, -6), (92, 9), (92, 12), (25, 9)],
            "hook": [(20, -16), (40, -14), (52, 0), (50, 24), (40, 10), (24, 14)],
        }[self.kind.beak]
        self.head.shape(points, self.horn)


def _background(dice: _Dice, side: int) -> Image.Image:
    """A soft gradient with blurred blobs, and a few twigs."""
    gradient = Image.new("RGB", (1, 2))
    gradient.putpixel((0, 0), dice.colour(60, 235))
    gradient.putpixel((0, 1), dice.colour(60, 235))
    # Painted small and blown up, which is quick and blurs it at once.
    scene = gradient.resize((48, 48), Image.Resampling.BILINEAR)
    painter = _Frame(ImageDraw.Draw(scene), 0j, 1 + 0j)
    for _ in range(dice.whole(4, 11)):
        x, y = dice.between(0, 48), dice.between(0, 48)
        rx, ry = dice.between(3, 11), dice.between(3, 11)
        painter.disc(x, y, rx, ry, dice.colour(30, 245))
    scene = scene.filter(ImageFilter.GaussianBlur(dice.between(0.3, 2.5)))
    scene = scene.resize((side, side), Image.Resampling.BILINEAR)
    painter = _Frame(ImageDraw.Draw(scene), 0j, complex(side))
    for _ in range(dice.whole(1, 3)):
        y, slope = dice.between(0, 1), dice.between(-0.5, 0.5)
        width = dice.between(0.008, 0.035)
        painter.line([(-0.1, y), (1.1, y + slope)], width, dice.earth(30, 160))
    return scene
