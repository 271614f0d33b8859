"""Pictures of shapes with their boxes: what the detector is trained, calibrated and tested on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CALIBRATION", "CLASSES", "SIZE", "TEST", "TRAINING", "Scenes", "draw_scenes"]

TRAINING, CALIBRATION, TEST = 0, 1, 2
"""Seeds of pictures that have nothing in common."""

SIZE = 96
CLASSES = ("disc", "square", "triangle", "cross")
MOST = 5
"""Most shapes in a picture."""

_ROWS, _COLUMNS = np.mgrid[:SIZE, :SIZE].astype(np.float32)


@dataclass(frozen=True)
class Scenes:
    """Pictures and the truth about them.

    Attributes
    ----------
    images
        RGB in [0, 1], float32, (pictures, 3, SIZE, SIZE).
    boxes
        Left, top, right and bottom in pixels, float32, (pictures, MOST, 4).
    labels
        Places in CLASSES, (pictures, MOST); -1 where there is no shape.
    """

    images: NDArray[np.float32]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


def draw_scenes(count: int, seed: int) -> Scenes:
    """Draw pictures; the same seed gives the same pictures."""
    images = np.empty((count, 3, SIZE, SIZE), np.float32)
    boxes = np.zeros((count, MOST, 4), np.float32)
    labels = np.full((count, MOST), -1)
    for number, generator in enumerate(np.random.default_rng(seed).spawn(count)):
        images[number] = _background(generator)
        taken: list[NDArray[np.float32]] = []
        for _ in range(generator.integers(1, MOST + 1)):
            label = int(generator.integers(len(CLASSES)))
            cover = _shape(CLASSES[label], generator)
            box = _extent(cover)
            if any(_intersect(box, other) for other in taken):
                continue
            _paint(images[number], cover, generator)
            boxes[number, len(taken)], labels[number, len(taken)] = box, label
            taken.append(box)
        images[number] += generator.normal(0, generator.uniform(0.01, 0.08), (3, SIZE, SIZE))
    return Scenes(np.clip(images, 0, 1, out=images), boxes, labels)


def _background(generator: np.random.Generator) -> NDArray[np.float32]:
    """A slope of colours, and spots or stripes on it."""
    ends = generator.uniform(0.1, 0.9, (2, 3, 1, 1))
    angle = generator.uniform(0, 2 * np.pi)
    along = (np.cos(angle) * _COLUMNS + np.sin(angle) * _ROWS) / SIZE
    waves = np.zeros((SIZE, SIZE))
    for _ in range(4):
        x, y = generator.uniform(-0.6, 0.6, 2)
        waves += np.sin(x * _COLUMNS + y * _ROWS + generator.uniform(0, 2 * np.pi))
    texture = generator.uniform(0, 0.06) * waves
    return (ends[0] + (ends[1] - ends[0]) * along + texture).astype(np.float32)


def _shape(kind: str, generator: np.random.Generator) -> NDArray[np.float32]:
    """Cover of each pixel by a shape, between 0 and 1; edges are one pixel wide."""
    radius = generator.uniform(6, 19)
    x0, y0 = generator.uniform(radius, SIZE - radius, 2)
    angle = generator.uniform(-0.4, 0.4)
    x, y = _COLUMNS + 0.5 - x0, _ROWS + 0.5 - y0
    x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    if kind == "disc":
        inside = radius - np.hypot(x, y)
    elif kind == "square":
        inside = 0.75 * radius - np.maximum(abs(x), abs(y))
    elif kind == "triangle":
        inside = np.minimum(radius / 2 - y, radius / 2 + y / 2 - np.sqrt(0.75) * abs(x))
    else:
        arm, reach = 0.3 * radius, 0.85 * radius
        across = np.minimum(arm - abs(y), reach - abs(x))
        inside = np.maximum(across, np.minimum(arm - abs(x), reach - abs(y)))
    return np.clip(inside + 0.5, 0, 1)


def _extent(cover: NDArray[np.float32]) -> NDArray[np.float32]:
    """Left, top, right and bottom of the pixels that are covered by half."""
    rows, columns = ((cover > 0.5).any(axis).nonzero()[0] for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _intersect(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return bool((np.maximum(a[:2], b[:2]) < np.minimum(a[2:], b[2:])).all())


def _paint(
    image: NDArray[np.float32], cover: NDArray[np.float32], generator: np.random.Generator
) -> None:
    """Lay a colour over the covered pixels that differs from what is below."""
    below = (image * cover).sum((1, 2)) / cover.sum()
    colour = generator.uniform(0, 1, 3)
    while np.abs(colour - below).max() < 0.25:
        colour = generator.uniform(0, 1, 3)
    image += cover * (colour.astype(np.float32)[:, None, None] - image)
