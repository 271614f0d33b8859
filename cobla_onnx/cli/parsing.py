"""Values of options that are written as text, as the API takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cobla_onnx.errors import UsageError

if TYPE_CHECKING:
    from cobla_onnx.calibration.readers import ImageOptions
    from cobla_onnx.cli.options import ChannelOrder, Layout

__all__ = ["image_options", "input_shapes"]


def input_shapes(entries: list[str] | None) -> dict[str, tuple[int, ...]]:
    """Parse ``name:1,3,224,224``; the name itself may hold colons."""
    shapes = {}
    for entry in entries or ():
        name, colon, sizes = entry.rpartition(":")
        parts = sizes.split(",")
        if not colon or not name or not all(p.isdecimal() and int(p) > 0 for p in parts):
            raise UsageError(
                f"--input-shape {entry}: is not NAME:SIZE,SIZE,...; write e.g. image:1,3,224,224"
            )
        shapes[name] = tuple(int(part) for part in parts)
    return shapes


def image_options(
    mean: str | None, std: str | None, scale: float, order: ChannelOrder, layout: Layout
) -> ImageOptions:
    """Put the options of images together."""
    from cobla_onnx.calibration.readers import ImageOptions

    return ImageOptions(
        mean=_numbers("--mean", mean, 0.0),
        std=_numbers("--std", std, 1.0),
        scale=scale,
        channel_order=order.value,
        layout=layout.value,
    )


def _numbers(option: str, text: str | None, default: float) -> tuple[float, ...]:
    if text is None:
        return (default,)
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{option} {text}: is not a number, or one for each channel separated by commas; "
            f"write e.g. {option} 104,117,123"
        ) from error
