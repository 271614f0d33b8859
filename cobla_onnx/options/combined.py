"""Options that mean nothing without another one are refused: they would be ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cobla_onnx.errors import UsageError
from cobla_onnx.options.values import check_augment
from cobla_onnx.wording import either, option_name

if TYPE_CHECKING:
    from cobla_onnx.options.settings import Settings

__all__ = ["check_combined"]


def check_combined(settings: Settings) -> None:
    """Refuse options that need others.

    Raises
    ------
    UsageError
        With the one to add.
    """
    useless = next(_of_data(settings), None) if settings.data is None else None
    if useless is not None:
        option, what = useless
        raise UsageError(f"{option}: {what} {option_name('data')} too")
    if settings.loss in ("kl", "mse") and settings.labels is not None:
        raise UsageError(
            f"{option_name('loss', settings.loss)}: with labels the loss is the cross-entropy; "
            f"leave out it or {option_name('labels')}"
        )
    if settings.time_limit is not None and settings.objective != "loss" and not settings.distil:
        raise UsageError(
            f"{option_name('time_limit', settings.time_limit)}: limits the search of "
            f"{option_name('objective', 'loss')}, and {option_name('distil', 'auto')}; give one "
            "of them too"
        )
    check_augment(settings.augment, settings.distil, settings.labels)
    if settings.profile is not None and not settings.measure_latency:
        raise UsageError(
            f"{option_name('profile')}: is of times; give {option_name('latency')} or "
            f"{option_name('measure_latency', True)} too"
        )


def _of_data(settings: Settings) -> Iterator[tuple[str, str]]:
    """Name the options that mean nothing without data, and what they are."""
    if settings.labels is not None:
        yield option_name("labels"), "are those of the data; give"
    if settings.outputs:
        yield option_name("outputs"), "says how data is compared; give"
    if settings.loss != "auto":
        yield option_name("loss", settings.loss), "compares outputs on samples; give"
    if settings.samples is not None:
        yield option_name("samples", settings.samples), "are of the data; give"
    images = settings.images
    if images is not None and images != type(images)():
        option = either(python="images", command="options of images")
        yield option, "say how images become inputs; give a folder of them by"
    if settings.arithmetic != "keep":
        option = option_name("arithmetic", settings.arithmetic)
        yield option, "ranges of 8-bit numbers follow from samples; give"
    if settings.distil is not None:
        option = option_name("distil", settings.distil)
        yield option, "learns from the original's outputs on samples; give"
