"""Variants of images, so that a few of them teach as many would."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.errors import UsageError
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.text import quoted
from cobla_onnx.wording import option_name

__all__ = ["Augmentation"]

# Most channels of an image; an axis of more is a height or a width.
CHANNELS = 4
PART = re.compile(r"(?P<flip>flip)|crop:(?P<crop>[1-9]\d{0,3})")


@dataclass(frozen=True)
class Augmentation:
    """How images may vary without becoming other things.

    Attributes
    ----------
    flip : bool
        Whether left and right are exchanged, in half of the variants.
    crop : int
        Most pixels by which they are moved along each axis; what this uncovers is mirrored.
    """

    flip: bool = False
    crop: int = 0

    @classmethod
    def of(cls, text: str) -> Augmentation:
        """Read ``flip``, ``crop:N`` or both, separated by a comma.

        Raises
        ------
        UsageError
        """
        parts = [PART.fullmatch(part.strip()) for part in str(text).split(",")]
        kinds = [part and part.lastgroup for part in parts]
        if None in kinds or len(set(kinds)) < len(kinds):
            raise UsageError(
                f"{option_name('augment', str(text))}: give flip, crop:N with the most pixels to "
                "move an image by, or both, such as flip,crop:4"
            )
        return cls("flip" in kinds, max(int(part["crop"] or 0) for part in parts if part))

    def images(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
        """Return the inputs that are images, with the axes of their heights and widths.

        Raises
        ------
        UsageError
            If there are none, images differ in size, or are too small to be moved so far.
        """
        found = _images(shapes)
        what = option_name("augment")
        if not found:
            shown = ", ".join(f"{quoted(name)} {tuple(shape)}" for name, shape in shapes.items())
            raise UsageError(
                f"{what}: no input is of images, with four axes of which the second or the last "
                f"one is of at most {CHANNELS} channels, but {shown}; leave it out"
            )
        sizes = {tuple(shapes[name][axis] for axis in axes) for name, axes in found.items()}
        if len(sizes) > 1:
            raise UsageError(
                f"{what}: the images {', '.join(map(quoted, found))} differ in size, and would "
                "not vary together; leave it out"
            )
        if min(min(size) for size in sizes) <= self.crop:
            raise UsageError(
                f"{what}: images of {' x '.join(map(str, next(iter(sizes))))} pixels cannot be "
                f"moved by {self.crop}; give a smaller crop"
            )
        return found

    def vary(self, feeds: Feeds, rng: np.random.Generator) -> Feeds:
        """Return a variant of each sample of a batch; all images of a sample vary alike."""
        result = dict(feeds)
        axes = _images({name: array.shape for name, array in feeds.items()})
        count = {len(feeds[name]) for name in axes}.pop()
        flipped = rng.integers(0, 2, count) if self.flip else np.zeros(count, np.int64)
        moves = rng.integers(-self.crop, self.crop + 1, (count, 2))
        for name, places in axes.items():
            array = feeds[name].copy()
            for number, sample in enumerate(feeds[name]):
                for axis, move in zip(places, moves[number], strict=True):
                    # Rare samples may be smaller than those that were checked.
                    most = array.shape[axis] - 1
                    sample = _moved(sample, axis - 1, max(-most, min(most, int(move))))
                array[number] = np.flip(sample, places[1] - 1) if flipped[number] else sample
            result[name] = array
        return result


def _images(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Return the axes of heights and widths of the inputs that are images."""
    found: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        if len(shape) == 4 and min(shape[1], shape[3]) <= CHANNELS:
            found[name] = (2, 3) if shape[1] <= CHANNELS else (1, 2)
    return found


def _moved(sample: NDArray[Any], axis: int, pixels: int) -> NDArray[Any]:
    """Move a sample along an axis; the pixels that come in mirror those beside them."""
    size = sample.shape[axis]
    places = np.abs(np.arange(size) + pixels)
    return sample.take(np.where(places < size, places, 2 * (size - 1) - places), axis)
