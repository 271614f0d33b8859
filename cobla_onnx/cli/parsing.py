"""Values of options that are written as text, as the API takes them."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cobla_onnx.errors import UsageError

if TYPE_CHECKING:
    from cobla_onnx.calibration.data.readers import ImageOptions

__all__ = [
    "fraction",
    "image_options",
    "input_shapes",
    "layer_names",
    "numbers",
    "spread",
    "whole_or_auto",
    "word_or_wholes",
]

# Digits of a whole number. No option takes nearly as many, and Python refuses some thousands.
MOST_DIGITS = 100
# Budgets of a sweep in one direction.
MOST_POINTS = 1000


def input_shapes(option: str, entries: list[str]) -> dict[str, tuple[int, ...]]:
    """Parse ``name:1,3,224,224``; the name itself may hold colons.

    An axis may be empty, as the past of a decoder is at its first step.
    """
    shapes = {}
    for entry in entries:
        name, colon, sizes = entry.rpartition(":")
        parts = sizes.split(",")
        if not colon or not name or not all(map(_is_whole, parts)):
            raise UsageError(
                f"{option} {entry}: is not NAME:SIZE,SIZE,...; write e.g. image:1,3,224,224"
            )
        shapes[name] = tuple(int(part) for part in parts)
    return shapes


def layer_names(option: str, entries: list[str]) -> tuple[str, ...]:
    """Return names and patterns of layers; ``@FILE`` stands for those in a file.

    They are its lines, or in a ``.csv`` the first column below its heading, as `inspect` writes
    it. A layer whose own name begins with ``@`` is written ``[@]name``.
    """
    found: list[str] = []
    for entry in entries:
        found.extend(_from_file(option, Path(entry[1:])) if entry.startswith("@") else [entry])
    return tuple(found)


def _from_file(option: str, path: Path) -> list[str]:
    shown = f"{option} @{path}"
    try:
        # Spreadsheets and some editors write a byte-order mark first.
        with path.open(newline="", encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".csv":
                names = [row[0] for row in csv.reader(file) if row][1:]
            else:
                names = file.read().splitlines()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{shown}: cannot be read ({error}); give a file of names") from error
    names = [name for name in names if name.strip()]
    if not names:
        raise UsageError(f"{shown}: names no layer; give one in each line")
    return names


def whole_or_auto(option: str, text: str) -> Literal["auto"] | int:
    """Parse ``auto`` or a whole number of at least 1."""
    if text == "auto":
        return "auto"
    if not _is_whole(text) or int(text) < 1:
        raise UsageError(f"{option} {text}: give auto, or a whole number of at least 1")
    return int(text)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS


def word_or_wholes(option: str, text: str) -> str | tuple[int, ...]:
    """Parse a word, or whole numbers separated by commas; which word is for others to check."""
    if text.isalpha():
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{option} {text}: is neither a word nor whole numbers separated by commas; write "
            f"e.g. {option} 8,4"
        ) from error


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Parse one number, or some separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{option} {text}: is not a number, or one for each channel separated by commas; "
            f"write e.g. {option} 104,117,123"
        ) from error


def image_options(**parts: Any) -> ImageOptions:
    """Put the options of images together; None is the default."""
    from cobla_onnx.calibration.data.readers import ImageOptions

    return ImageOptions(**{name: value for name, value in parts.items() if value is not None})


def fraction(option: str, text: str | None) -> float | None:
    """Parse ``1%`` or ``0.01``."""
    if text is None:
        return None
    number = text.removesuffix("%")
    try:
        value = float(number) / (1 if number == text else 100)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{option} {text}: is not a fraction; write e.g. 1% or 0.01")
    return value


def spread(option: str, text: str | None) -> tuple[float, ...] | None:
    """Parse numbers and ``LOW:HIGH:COUNT``, separated by commas."""
    if text is None:
        return None
    try:
        parts = [part.split(":") for part in text.split(",")]
        values = [value for part in parts for value in _spread(*part)]
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{option} {text}: is neither LOW:HIGH:COUNT nor numbers separated by commas, of at "
            f"most {MOST_POINTS} points; write e.g. {option} 0.3:0.9:7"
        ) from error
    return tuple(dict.fromkeys(values))


def _spread(low: str, high: str | None = None, count: str = "") -> list[float]:
    if high is None:
        return [float(low)]
    start, stop, points = float(low), float(high), int(count)
    if not 2 <= points <= MOST_POINTS:
        raise ValueError(points)
    step = (stop - start) / (points - 1)
    return [round(start + step * number, 10) for number in range(points)]
