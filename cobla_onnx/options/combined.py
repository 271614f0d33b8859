"""Options that mean nothing without another one are refused: they would be ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cobla_onnx.errors import UsageError
from cobla_onnx.options.values import check_augment, check_passes
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
    if settings.labels is not None and settings.data is None:
        raise UsageError(
            f"{option_name('labels')}: are those of the data; give {option_name('data')} too"
        )
    if settings.outputs and settings.data is None:
        raise UsageError(
            f"{option_name('outputs')}: says how data is compared; give {option_name('data')} too"
        )
    if settings.loss != "auto" and settings.data is None:
        raise UsageError(
            f"{option_name('loss', settings.loss)}: compares outputs on samples; give "
            f"{option_name('data')} too"
        )
    if settings.loss in ("kl", "mse") and settings.labels is not None:
        raise UsageError(
            f"{option_name('loss', settings.loss)}: with labels the loss is the cross-entropy; "
            f"leave out it or {option_name('labels')}"
        )
    if settings.samples is not None and settings.data is None:
        raise UsageError(
            f"{option_name('samples', settings.samples)}: are of the data; give "
            f"{option_name('data')} too"
        )
    images = settings.images
    if images is not None and images != type(images)() and settings.data is None:
        raise UsageError(
            f"{either(python='images', command='options of images')}: say how images become "
            f"inputs; give a folder of them by {option_name('data')} too"
        )
    if settings.time_limit is not None and settings.objective != "loss" and not settings.distil:
        raise UsageError(
            f"{option_name('time_limit', settings.time_limit)}: limits the search of "
            f"{option_name('objective', 'loss')}, and {option_name('distil', 'auto')}; give one "
            "of them too"
        )
    if settings.arithmetic != "keep" and settings.data is None:
        raise UsageError(
            f"{option_name('arithmetic', settings.arithmetic)}: ranges of 8-bit numbers follow "
            f"from samples; give {option_name('data')} too"
        )
    check_passes(settings.distil, settings.data)
    check_augment(settings.augment, settings.distil, settings.labels)
    if settings.profile is not None and not settings.measure_latency:
        raise UsageError(
            f"{option_name('profile')}: is of times; give {option_name('latency')} or "
            f"{option_name('measure_latency', True)} too"
        )
