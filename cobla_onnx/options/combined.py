"""Options that mean nothing without another one are refused, but for switches and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cobla_onnx.errors import UsageError
from cobla_onnx.options.values import check_augment
from cobla_onnx.wording import either, option_name

if TYPE_CHECKING:
    from cobla_onnx.calibration.data.readers import ImageOptions
    from cobla_onnx.options.settings import Settings

__all__ = ["check_combined", "check_without_data"]


def check_combined(settings: Settings) -> None:
    """Refuse options that need others.

    Raises
    ------
    UsageError
        With the one to add.
    """
    if settings.data is None:
        _refuse_first(_of_data(settings))
    if settings.loss in ("kl", "mse") and settings.labels is not None:
        raise UsageError(
            f"{option_name('loss', settings.loss)}: with labels the loss is the cross-entropy; "
            f"leave it out, or {option_name('labels')}"
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


def check_without_data(samples: int | None, images: ImageOptions | None) -> None:
    """Refuse options of samples where none are given.

    Raises
    ------
    UsageError
    """
    _refuse_first(_of_samples(samples, images))


def _refuse_first(useless: Iterator[tuple[str, str]]) -> None:
    for option, what in useless:
        raise UsageError(f"{option}: {what} {option_name('data')} too")


def _of_data(settings: Settings) -> Iterator[tuple[str, str]]:
    """Name the options that mean nothing without data, and what they are."""
    if settings.labels is not None:
        yield option_name("labels"), "are those of the data; give"
    if settings.outputs:
        yield option_name("outputs"), "says how data is compared; give"
    if settings.loss != "auto":
        yield option_name("loss", settings.loss), "compares outputs on samples; give"
    yield from _of_samples(settings.samples, settings.images)
    if settings.arithmetic != "keep":
        option = option_name("arithmetic", settings.arithmetic)
        yield option, "ranges of 8-bit numbers follow from samples; give"
    if settings.distil is not None:
        option = option_name("distil", settings.distil)
        yield option, "learns from the original's outputs on samples; give"


def _of_samples(samples: int | None, images: ImageOptions | None) -> Iterator[tuple[str, str]]:
    if samples is not None:
        yield option_name("samples", samples), "are of the data; give"
    if images is not None and images != type(images)():
        option = either(python="images", command="options of images")
        yield option, "say how images become inputs; give a folder of them by"
