"""Convert image files to a model's inputs. Needs Pillow, the extra ``images``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.data.dataset import InputSpec
from cobla_onnx.errors import DataError, UsageError
from cobla_onnx.wording import either, option_name

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGE_TYPES", "ImageOptions", "find_images", "read_image", "target_size"]

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
# Files that operating systems leave in folders, apart from hidden ones.
LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")

# How messages name the options of channels.
CHANNEL_OPTIONS = either(python="ImageOptions' mean, std, scale", command="--mean, --std, --scale")
EXAMPLE = either(
    python="scale=0.00392157, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)",
    command="--scale 0.00392157 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
)


@dataclass(frozen=True)
class ImageOptions:
    """How pixels are converted to inputs: (pixel * scale - mean) / std, with pixels from 0 to 255.

    Inputs of type uint8 get the pixels as they are.

    Attributes
    ----------
    mean, std : tuple of float
        One number, or one for each channel in the model's order.
    scale : float
    channel_order : {'rgb', 'bgr'}
        Order of the model's channels.
    layout : {'nchw', 'nhwc'}
        Order of the model's axes.

    Raises
    ------
    UsageError
        If `mean` or `std` is no tuple of numbers, a number is not finite, or `std` is 0.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1.0
    channel_order: Literal["rgb", "bgr"] = "rgb"
    layout: Literal["nchw", "nhwc"] = "nchw"

    def __post_init__(self) -> None:
        try:
            fine = np.isfinite([*self.mean, *self.std, self.scale]).all() and 0 not in self.std
        except (TypeError, ValueError):
            # A number alone, or what is none.
            fine = False
        if not fine:
            raise UsageError(
                f"{CHANNEL_OPTIONS}: have to be finite numbers, and {option_name('std')} not 0; "
                f"write e.g. {EXAMPLE}"
            )

    @property
    def as_they_are(self) -> bool:
        """Whether pixels keep their values."""
        return set(self.mean) == {0.0} and set(self.std) == {1.0} and self.scale == 1.0


def find_images(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """Find the images in and below a folder, following links to other folders.

    Hidden files (names starting with a dot) and files left by operating systems are skipped.

    Returns
    -------
    paths : list of str
        Relative to the folder, with forward slashes, sorted folder by folder.
    notes : tuple of str
        About files that are not images, and broken links.
    """
    found: list[str] = []
    others, broken = 0, []
    for path in _files(folder, (os.path.realpath(folder),)):
        if not path.exists():
            broken.append(path)
        elif path.suffix.lower() not in IMAGE_TYPES or not path.is_file():
            others += 1
        else:
            found.append(path.relative_to(folder).as_posix())
    notes: tuple[str, ...] = (f"{folder}: {others} files are no images",) if others else ()
    if broken:
        rest = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
        notes += (f"{min(broken)}: is a link that leads nowhere{rest}; left out",)
    return found, notes


def _files(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """Files in and below a folder, by name; `above` are the true paths of the folders above."""
    for path in sorted(folder.iterdir()):
        if _passed_over(path.name):
            continue
        if not path.is_dir():
            yield path
        elif (true := os.path.realpath(path)) not in above:
            # Otherwise a link leads back to a folder above.
            yield from _files(path, (*above, true))


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def target_size(spec: InputSpec, options: ImageOptions) -> tuple[int, int, int]:
    """Channels, height and width that an input takes.

    Raises
    ------
    DataError
        If the input does not take images, or its size is not known.
    UsageError
        If the options do not fit it.
    """
    _check_type(spec, options)
    sizes = spec.filled
    if sizes is None or len(sizes) != 4:
        raise DataError(
            f"input {spec.name!r}: does not take images, which have 4 axes; give an .npz instead"
        )
    axes = (1, 2, 3) if options.layout == "nchw" else (3, 1, 2)
    channels, height, width = (sizes[axis] for axis in axes)
    if height is None or width is None:
        raise DataError(
            f"input {spec.name!r}: its height and width are not fixed; give them by "
            f"{option_name('input_shapes')}"
        )
    channels = 3 if channels is None else channels
    if channels not in (1, 3):
        raise DataError(
            f"input {spec.name!r}: has {channels} channels along axis {axes[0]}, images 1 or 3; "
            f"try the other {option_name('layout')}"
        )
    for name, values in (("mean", options.mean), ("std", options.std)):
        if len(values) not in (1, channels):
            raise UsageError(
                f"{option_name(name)}: has {len(values)} numbers, the model {channels} channels"
            )
    return channels, height, width


def _check_type(spec: InputSpec, options: ImageOptions) -> None:
    """Check that an input takes pixels, and is not to be normalised if it takes them raw."""
    if spec.dtype.kind == "f":
        return
    if spec.dtype != np.uint8:
        raise DataError(
            f"input {spec.name!r}: is {spec.dtype}, and how to convert pixels to that is not "
            "known; give an .npz of the model's inputs"
        )
    if not options.as_they_are:
        raise UsageError(
            f"{CHANNEL_OPTIONS}: input {spec.name!r} is uint8 and gets pixels as they are; "
            "leave these options out"
        )


def read_image(
    path: Path, channels: int, height: int, width: int, options: ImageOptions
) -> NDArray[np.float32]:
    """Read an image, resize it to cover the input, crop the centre, normalise.

    It is rotated as its EXIF entry says, 16 bits are reduced to 8, and transparent pixels are
    composited on white.

    Returns
    -------
    float32 array, shape (channels, height, width), or (height, width, channels)

    Raises
    ------
    DataError
        If the file is not an image, or far too large.
    UsageError
        If Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UsageError(
            f"{option_name('data')}: reading images needs Pillow; pip install 'cobla-onnx[images]'"
        ) from error
    try:
        with warnings.catch_warnings():
            # Pillow warns about decompression bombs, and refuses only larger ones.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                picture = _upright(opened).convert("RGB" if channels == 3 else "L")
    except (
        UnidentifiedImageError, OSError, ValueError, SyntaxError,
        Image.DecompressionBombError, Image.DecompressionBombWarning,
    ) as error:  # fmt: skip
        raise DataError(
            f"{path}: cannot be read as an image ({error}); remove or replace it"
        ) from error
    ratio = max(height / picture.height, width / picture.width)
    size = (max(round(picture.width * ratio), width), max(round(picture.height * ratio), height))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    pixels = np.asarray(picture, np.float32).reshape(height, width, channels)
    if options.channel_order == "bgr":
        pixels = pixels[:, :, ::-1]
    mean, std = np.array(options.mean, np.float32), np.array(options.std, np.float32)
    values = (pixels * np.float32(options.scale) - mean) / std
    ordered: NDArray[np.float32] = values if options.layout == "nhwc" else values.transpose(2, 0, 1)
    return ordered


def _upright(picture: Image) -> Image:
    """Return a picture as people see it: upright, in 8 bits and without transparency."""
    from PIL import Image, ImageOps

    turned = ImageOps.exif_transpose(picture)
    if turned.mode == "I" or turned.mode.startswith("I;16"):
        # 16-bit grey, which Pillow would clip at 255. Colours it reduces to 8 bits itself.
        levels = np.asarray(turned, np.float64) / 257
        return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if turned.mode == "F":
        raise ValueError("it holds floating-point numbers")
    if turned.has_transparency_data:
        clear = turned.convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(white, clear)
    return turned
