"""Open calibration data of any of the kinds that people have."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.dataset import Dataset, InputSpec, Record
from cobla_onnx.calibration.images import IMAGE_TYPES, ImageOptions, read_image, target_size
from cobla_onnx.errors import DataError, UsageError

__all__ = ["ImageOptions", "open_data"]

# Arrays of an .npz that are not inputs, but often lie beside them.
IGNORED = ("labels", "label", "y")


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
        A path to an ``.npz`` file with an array for each input, first axis samples; to an
        ``.npy`` file for a model with one input; to a folder of images; to a folder of
        ONNX ``test_data_set_*`` folders, or one such folder. Or arrays by input name; an
        iterable of dicts, or of arrays for a model with one input; an object with
        ``get_next()``.
    specs : sequence of InputSpec
    samples : int, optional
        Use at most as many, spread evenly where their number is known, else the first.
    images : ImageOptions, optional
        How pixels become inputs.

    Raises
    ------
    UsageError
        If the path does not exist, or it is not clear what lies there.
    DataError
        If the data is damaged or does not fit the model.
    """
    if isinstance(data, (str, Path)):
        return _open_path(Path(data), specs, samples, images or ImageOptions())
    if isinstance(data, Mapping):
        arrays = {name: np.asarray(value) for name, value in data.items()}
        rows = _Rows("data", {n: (_array_rows(a), a.shape) for n, a in arrays.items()}, specs)
        return rows.dataset(specs, samples)
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
    if path.is_dir():
        sets = sorted(p for p in path.glob("test_data_set_*") if p.is_dir())
        if sets or any(path.glob("input_*.pb")):
            return Dataset(str(path), _test_data(sets or [path], specs), specs, samples)
        return _open_images(path, specs, samples, images)
    if not path.exists():
        raise UsageError(f"--data {path}: does not exist; check the path")
    if path.suffix == ".npz":
        return _open_npz(path, specs, samples)
    if path.suffix == ".npy":
        return _open_npy(path, specs, samples)
    raise UsageError(
        f"--data {path}: is neither .npz nor .npy, nor a folder of images or test_data_set_*; "
        "give one of these"
    )


def _named(items: Iterable[Any], specs: Sequence[InputSpec]) -> Iterator[Record]:
    for item in items:
        if isinstance(item, Mapping):
            yield item
        elif len(specs) == 1:
            yield {specs[0].name: item}
        else:
            raise DataError(
                f"data: gives a {type(item).__name__}, the model has {len(specs)} inputs; give "
                "dicts of arrays by input name"
            )


def _array_rows(array: NDArray[Any]) -> Any:
    """Rows of an array by their index."""
    return lambda wanted: (array[index] for index in wanted)


class _Rows:
    """Arrays whose first axis is samples, read row by row.

    Parameters
    ----------
    source : str
    arrays : mapping of str to (rows, shape)
        ``rows`` gives an iterator over the rows of ascending indices.
    specs : sequence of InputSpec
    """

    def __init__(
        self,
        source: str,
        arrays: Mapping[str, tuple[Any, tuple[int, ...]]],
        specs: Sequence[InputSpec],
    ) -> None:
        ignored = [n for n in IGNORED if n in arrays and n not in {s.name for s in specs}]
        self._arrays = {name: v for name, v in arrays.items() if name not in ignored}
        self._source = source
        # Each row a whole feed where there is an axis more than the input has.
        self._whole = {
            spec.name
            for spec in specs
            if spec.shape is not None
            and spec.name in self._arrays
            and len(self._arrays[spec.name][1]) == len(spec.shape) + 1
        }
        fixed = {s.shape[0] for s in specs if s.shape and s.name not in self._whole}
        self._together = next(iter(fixed)) if len(fixed) == 1 else None

    def dataset(self, specs: Sequence[InputSpec], samples: int | None) -> Dataset:
        """Read rows, at most so many samples of them, spread evenly."""
        each = self._together or 1
        count = self._count() // each
        chosen = _spread(count, samples)
        return Dataset(
            self._source,
            self._records(chosen, each),
            specs,
            samples,
            positions=chosen,
            source_samples=count,
        )

    def _count(self) -> int:
        shapes = [shape for _, shape in self._arrays.values()]
        if any(not shape for shape in shapes) or not shapes:
            raise DataError(f"{self._source}: its arrays need a first axis of samples")
        counts = {shape[0] for shape in shapes}
        if len(counts) > 1:
            sizes = ", ".join(f"{n!r}: {v[1][0]}" for n, v in self._arrays.items())
            raise DataError(
                f"{self._source}: inputs have different numbers of samples ({sizes}); "
                "give as many for each"
            )
        return counts.pop()

    def _records(self, chosen: Sequence[int], each: int) -> Iterator[Record]:
        # A fixed batch takes its rows together.
        wanted = [start * each + row for start in chosen for row in range(each)]
        iterators = {name: rows(wanted) for name, (rows, _) in self._arrays.items()}
        for _ in range(0, len(wanted), each):
            yield {name: self._record(name, rows, each) for name, rows in iterators.items()}

    def _record(self, name: str, rows: Iterator[NDArray[Any]], each: int) -> NDArray[Any]:
        taken = list(itertools.islice(rows, each))
        return taken[0] if name in self._whole else np.stack(taken)


def _spread(count: int, samples: int | None) -> list[int]:
    """Indices of so many of `count` samples, evenly spread."""
    if samples is None or samples >= count:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, samples).round()]


def _open_npy(path: Path, specs: Sequence[InputSpec], samples: int | None) -> Dataset:
    if len(specs) != 1:
        raise DataError(
            f"{path}: holds one array, the model has {len(specs)} inputs; give an .npz with an "
            "array for each"
        )
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: is no .npy file of numbers ({error}); save it again") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: is no .npy file; give it the ending that it deserves")
    rows = _Rows(str(path), {specs[0].name: (_array_rows(array), array.shape)}, specs)
    return rows.dataset(specs, samples)


def _open_npz(path: Path, specs: Sequence[InputSpec], samples: int | None) -> Dataset:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            wanted = {spec.name for spec in specs} | set(members) - set(IGNORED)
            arrays = {
                name: (_member_rows(archive, members[name]), _header(path, archive, members[name]))
                for name in sorted(wanted & set(members))
            }
            shapes = {name: (rows, header[0]) for name, (rows, header) in arrays.items()}
            rows = _Rows(str(path), shapes, specs)
            return rows.dataset(specs, samples)
    except (zipfile.BadZipFile, EOFError, zipfile.LargeZipFile, NotImplementedError) as error:
        raise DataError(f"{path}: is no .npz file, or a damaged one; save it again") from error


def _header(
    path: Path, archive: zipfile.ZipFile, member: str
) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Read shape, type and order of an array in an .npz, and check them against its size."""
    with archive.open(member) as file:
        try:
            shape, fortran, dtype = _read_header(file)
        except ValueError as error:
            raise DataError(f"{path}: {member!r} is no array; save it again") from error
        if dtype.hasobject:
            raise DataError(
                f"{path}: {member!r} holds Python objects, which are not read; save numbers, "
                "or texts as an array of dtype str"
            )
        size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
        if file.tell() + size != archive.getinfo(member).file_size:
            raise DataError(f"{path}: {member!r} is not as long as it says; save it again")
    return shape, dtype, fortran


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _member_rows(archive: zipfile.ZipFile, member: str) -> Any:
    """Rows of an array in an .npz by ascending index, without reading it as a whole."""

    def rows(wanted: Sequence[int]) -> Iterator[NDArray[Any]]:
        with archive.open(member) as file:
            shape, fortran, dtype = _read_header(file)
            if fortran and len(shape) > 1:
                # Its rows do not lie together.
                content = np.frombuffer(file.read(), dtype).reshape(shape, order="F")
                yield from (content[index] for index in wanted)
                return
            size = int(np.prod(shape[1:])) * dtype.itemsize
            place = 0
            for index in wanted:
                _skip(file, (index - place) * size)
                yield np.frombuffer(file.read(size), dtype).reshape(shape[1:])
                place = index + 1

    return rows


def _skip(file: Any, count: int) -> None:
    while count > 0:
        count -= len(file.read(min(count, 1 << 20)))


def _open_images(
    folder: Path, specs: Sequence[InputSpec], samples: int | None, options: ImageOptions
) -> Dataset:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    pictures = [p for p in files if p.suffix.lower() in IMAGE_TYPES]
    if not pictures:
        raise DataError(
            f"{folder}: holds neither images ({', '.join(IMAGE_TYPES)}) nor test_data_set_* "
            "folders; check the path"
        )
    if len(specs) != 1:
        raise DataError(f"{folder}: are images, the model has {len(specs)} inputs; give an .npz")
    channels, height, width = target_size(specs[0], options)
    positions = _spread(len(pictures), samples)
    chosen = [pictures[i] for i in positions]
    records = (
        {specs[0].name: read_image(path, channels, height, width, options)[None]} for path in chosen
    )
    dataset = Dataset(
        str(folder),
        records,
        specs,
        samples,
        positions=positions,
        source_samples=len(pictures),
        names=[path.name for path in chosen],
    )
    if len(pictures) < len(files):
        dataset.notes += (f"{folder}: {len(files) - len(pictures)} files are no images",)
    return dataset


def _test_data(folders: Sequence[Path], specs: Sequence[InputSpec]) -> Iterator[Record]:
    for folder in folders:
        record = {}
        for number, spec in enumerate(specs):
            path = folder / f"input_{number}.pb"
            tensor = onnx.TensorProto()
            try:
                tensor.ParseFromString(path.read_bytes())
                record[tensor.name or spec.name] = onnx.numpy_helper.to_array(tensor)
            except FileNotFoundError as error:
                raise DataError(
                    f"{folder}: has no {path.name}, the model has {len(specs)} inputs; "
                    "complete the set or remove it"
                ) from error
            except Exception as error:
                raise DataError(f"{path}: is no ONNX tensor; write it again") from error
        # Names in the files need not be those of the graph; the order is.
        names = {spec.name for spec in specs}
        if set(record) != names and len(record) == len(specs):
            record = dict(zip((spec.name for spec in specs), record.values(), strict=True))
        yield record
