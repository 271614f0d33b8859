"""Open calibration data in any of the supported formats."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from cobla_onnx.calibration.data.arrays import array_samples, evenly, open_npy, open_npz
from cobla_onnx.calibration.data.dataset import Dataset, InputSpec, Record
from cobla_onnx.calibration.data.fitting import as_array
from cobla_onnx.calibration.data.images import (
    IMAGE_TYPES,
    ImageOptions,
    find_images,
    read_image,
    target_size,
)
from cobla_onnx.calibration.data.implied import implied
from cobla_onnx.errors import DataError, UsageError
from cobla_onnx.wording import either, option_name

__all__ = ["ImageOptions", "open_data"]


def open_data(
    data: Any,
    specs: Sequence[InputSpec],
    *,
    samples: int | None = None,
    images: ImageOptions | None = None,
) -> Dataset:
    """Read samples into a `Dataset`.

    Parameters
    ----------
    data : path, mapping, iterable or CalibrationDataReader
        A path to an ``.npz`` file with an array for each input, whose first axis is samples; to an
        ``.npy`` file for a model with one input; to a folder of images; to a folder of
        ONNX ``test_data_set_*`` folders, or one such folder. Or arrays by input name; an
        iterable of dicts, or of arrays for a model with one input; an object with
        ``get_next()``.
    specs : sequence of InputSpec
    samples : int, optional
        Most samples to use: of arrays and images evenly spread, else the first ones.
    images : ImageOptions, optional
        How pixels are converted to inputs.

    Raises
    ------
    UsageError
        If the path does not exist, or its kind cannot be told, or `images` are no options, or are
        given for data that are no images.
    DataError
        If the data is damaged or does not fit the model.
    """
    if images is not None and not isinstance(images, ImageOptions):
        raise UsageError(
            f"images: is a {type(images).__name__}; give e.g. ImageOptions(scale=1 / 255)"
        )
    if isinstance(data, (str, Path)):
        return _open_path(Path(data), specs, samples, images or ImageOptions())
    _refuse_images(images, "data")
    if isinstance(data, Mapping):
        given = _by_input_name(data)
        arrays = {name: as_array(value, f"data: input {name!r}") for name, value in given.items()}
        return array_samples("data", arrays, specs, samples)
    if hasattr(data, "get_next"):
        return Dataset("data", _named(iter(data.get_next, None), specs), specs, samples)
    if not isinstance(data, Iterable):
        raise UsageError(
            f"data: is a {type(data).__name__}; give a path, arrays by input name, an iterable "
            "of dicts, or an object with get_next()"
        )
    return Dataset("data", _named(data, specs), specs, samples)


def _open_path(
    path: Path, specs: Sequence[InputSpec], samples: int | None, images: ImageOptions
) -> Dataset:
    # A name that the system cannot have is none of a file; Path.is_dir raises an error there.
    if os.path.isdir(path):
        sets = sorted((p for p in path.glob("test_data_set_*") if p.is_dir()), key=_number)
        if sets or any(path.glob("input_*.pb")):
            _refuse_images(images, str(path))
            return Dataset(str(path), _test_data(sets or [path], specs), specs, samples)
        return _open_images(path, specs, samples, images)
    if not os.path.exists(path):
        raise UsageError(f"{option_name('data', path)}: does not exist; check the path")
    _refuse_images(images, str(path))
    if path.suffix == ".npz":
        return open_npz(path, specs, samples)
    if path.suffix == ".npy":
        return open_npy(path, specs, samples)
    raise UsageError(
        f"{option_name('data', path)}: is neither .npz nor .npy, nor a folder of images or "
        "test_data_set_*; give one of these"
    )


def _refuse_images(images: ImageOptions | None, source: str) -> None:
    """Refuse options of images for what is taken as it is."""
    if images not in (None, ImageOptions()):
        what = either(python="images", command="options of images")
        raise UsageError(
            f"{what}: say how images become inputs, and {source} is no folder of images; leave "
            "them out, and give numbers as the model wants them"
        )


def _number(folder: Path) -> tuple[int, str]:
    """By what folders are ordered: the number in which a name ends, else the name."""
    digits = folder.name.rpartition("_")[2]
    return (int(digits) if digits.isdecimal() else -1), folder.name


def _named(items: Iterable[Any], specs: Sequence[InputSpec]) -> Iterator[Record]:
    for item in items:
        if isinstance(item, Mapping):
            yield _by_input_name(item)
        elif len(specs) == 1:
            yield {specs[0].name: item}
        else:
            raise DataError(
                f"data: gives a {type(item).__name__}, the model has {len(specs)} inputs; give "
                "dicts of arrays by input name"
            )


def _by_input_name(arrays: Mapping[Any, Any]) -> Mapping[str, Any]:
    """Return the mapping, all of whose keys can be names of inputs."""
    for name in arrays:
        if not isinstance(name, str):
            raise DataError(
                f"data: has an entry named by a {type(name).__name__}; give arrays by input name, "
                "which is a text"
            )
    return arrays


def _open_images(
    folder: Path, specs: Sequence[InputSpec], samples: int | None, options: ImageOptions
) -> Dataset:
    pictures, notes = find_images(folder)
    if not pictures:
        raise DataError(
            f"{folder}: holds neither images ({', '.join(IMAGE_TYPES)}) nor test_data_set_* "
            "folders; check the path"
        )
    if len(specs) != 1:
        raise DataError(f"{folder}: holds images, the model has {len(specs)} inputs; give an .npz")
    size = target_size(specs[0], options)
    positions = evenly(len(pictures), samples)
    chosen = [pictures[i] for i in positions]
    records = (
        {specs[0].name: read_image(folder / name, *size, options)[None].astype(specs[0].dtype)}
        for name in chosen
    )
    dataset = Dataset(
        str(folder),
        records,
        specs,
        samples,
        # A picture is a sample, even if the graph does not say so.
        whole=specs[0].first == "other",
        positions=positions,
        source_samples=len(pictures),
        names=chosen,
        source_names=pictures,
    )
    dataset.notes += notes
    if specs[0].dtype.kind == "f" and options.as_they_are:
        dataset.notes += (
            f"{folder}: pixels go in as they are, from 0 to 255; for a model that takes 0 to 1 "
            "give --scale 0.00392157, for others --mean and --std too",
        )
    return dataset


def _test_data(folders: Sequence[Path], specs: Sequence[InputSpec]) -> Iterator[Record]:
    for folder in folders:
        record: dict[str, Any] = {}
        for number, spec in enumerate(specs):
            path = folder / f"input_{number}.pb"
            tensor = onnx.TensorProto()
            try:
                tensor.ParseFromString(path.read_bytes())
                record[tensor.name or spec.name] = onnx.numpy_helper.to_array(tensor)
            except FileNotFoundError as error:
                # Of a decoder with a cache, token ids are enough.
                if implied(record, specs):
                    break
                raise DataError(
                    f"{folder}: has no {path.name}, the model has {len(specs)} inputs; "
                    "complete the set or remove it"
                ) from error
            except Exception as error:
                raise DataError(f"{path}: is not an ONNX tensor; write it again") from error
        # Names in the files may differ from those of the graph; the order does not.
        names = {spec.name for spec in specs}
        if set(record) != names and len(record) == len(specs):
            record = dict(zip((spec.name for spec in specs), record.values(), strict=True))
        yield record
