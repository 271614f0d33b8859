"""Open and check models, samples and labels before any work starts."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.data.dataset import Dataset, input_specs
from cobla_onnx.calibration.data.labels import Labels, align_labels, read_labels
from cobla_onnx.calibration.data.readers import open_data
from cobla_onnx.calibration.evaluation.targets import IGNORED
from cobla_onnx.distillation.augmentation import Augmentation
from cobla_onnx.errors import DataError, ModelError, PartError, UsageError, WriteError
from cobla_onnx.graph.check.structure import check_structure
from cobla_onnx.graph.io.external import is_external
from cobla_onnx.graph.io.model_file import load_in_order
from cobla_onnx.graph.order import Order, is_sorted, sort_nodes
from cobla_onnx.graph.tensors import all_tensors
from cobla_onnx.options import Settings
from cobla_onnx.text import safe_text
from cobla_onnx.wording import option_name

__all__ = [
    "ModelSource",
    "available_cores",
    "file_of",
    "known_shapes",
    "naming",
    "naming_full_folder",
    "open_in_order",
    "open_model",
    "open_samples",
    "sample_labels",
]

# A full disk, an exceeded quota, a limit of the shell.
NO_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)

ModelSource: TypeAlias = "onnx.ModelProto | str | os.PathLike[str]"


def open_model(model: ModelSource) -> onnx.ModelProto:
    """Load a model, or check one that is already in memory; see `open_in_order`."""
    return open_in_order(model)[0]


def open_in_order(model: ModelSource) -> tuple[onnx.ModelProto, Order]:
    """Load a model, or check one that is already in memory, and sort its nodes.

    Returns
    -------
    ModelProto
        The object that was passed in if its nodes are sorted, else a copy.
    Order
        The original order of the nodes, for `restore_order`.

    Raises
    ------
    UsageError, ModelError
        If it cannot be read or is damaged.
    """
    return _checked(model) if isinstance(model, onnx.ModelProto) else load_in_order(model)


def file_of(model: ModelSource) -> Path | None:
    """Return the path of a model's file; None if it is in memory.

    Raises
    ------
    UsageError
        If it is neither.
    """
    if isinstance(model, onnx.ModelProto):
        return None
    if not isinstance(model, str | os.PathLike):
        raise UsageError(
            f"the model: is of type {type(model).__name__}; give a path or an onnx.ModelProto"
        )
    return Path(model)


def _checked(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Order]:
    """Check a model that was not loaded by this package."""
    order: Order = {}
    if not is_sorted(model.graph):
        whole, model = model, onnx.ModelProto()
        model.CopyFrom(whole)
        order = sort_nodes(model.graph)
    with naming(None):
        check_structure(model)
        for held in all_tensors(model):
            if is_external(held.tensor):
                raise ModelError(
                    f"{held.label}: its external data is not loaded; pass the path of the file "
                    "instead of the model, or load it with its data"
                )
    return model, order


@contextmanager
def naming(source: Path | None) -> Iterator[None]:
    """Add the name of the file to errors about the model, and do as `naming_full_folder`."""
    shown = "the model" if source is None else safe_text(str(source), 300)
    try:
        with naming_full_folder():
            yield
    except PartError as error:
        raise PartError(f"{error.message} ({shown})") from error
    except ModelError as error:
        raise ModelError(f"{shown}: {error.message}") from error
    except MemoryError as error:
        raise ModelError(
            f"{shown}: needs more memory than there is; use a machine with more, or give "
            f"smaller {option_name('input_shapes')}"
        ) from error


@contextmanager
def naming_full_folder() -> Iterator[None]:
    """Name the folder of temporary files where it has no room for one."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise WriteError(
            f"{safe_text(tempfile.gettempdir(), 300)}: has no room for temporary files "
            f"({error.strerror}); free some space, or name another folder in TMPDIR"
        ) from error


@contextmanager
def open_samples(model: onnx.ModelProto, settings: Settings) -> Iterator[Dataset | None]:
    """Open the calibration data, if there is any, for as long as it is needed."""
    if settings.data is None:
        yield None
        return
    specs = input_specs(model, settings.input_shapes or {})
    with open_data(
        settings.data, specs, samples=settings.samples, images=settings.images
    ) as dataset:
        if settings.augment is not None:
            # What cannot vary is refused before the work.
            Augmentation.of(settings.augment).images(dataset.shapes())
        yield dataset


def known_shapes(
    settings: Settings, dataset: Dataset | None
) -> tuple[dict[str, Sequence[int]], tuple[str, ...]]:
    """Shapes of inputs, as given or else as in the samples, and notes.

    If samples differ, the most common shape is used, and a note says so.
    """
    given = dict(settings.input_shapes or {})
    if dataset is None:
        return given, ()
    shapes = dataset.shapes()
    if any(tuple(given[name]) != shapes.get(name) for name in given):
        # Shapes of the samples would not fit these.
        return given, ()
    if dataset.uniform:
        return {**shapes}, ()
    shown = ", ".join(
        f"{safe_text(name)} {'x'.join(map(str, shape)) or 'scalar'}"
        for name, shape in shapes.items()
    )
    note = (
        f"samples differ in shape; MACs are of the commonest, {shown}; --input-shape sets another"
    )
    return {**shapes}, (note,)


def sample_labels(
    labels: Labels | str | os.PathLike[str] | None, dataset: Dataset
) -> NDArray[np.int64] | None:
    """Read labels, if they are in a file, and put them in the order of the samples.

    Samples without a label that counts are excluded from the dataset's splits, with a note.

    Raises
    ------
    DataError
        See `read_labels` and `align_labels`; also if fewer than two samples have labels.
    """
    if isinstance(labels, (str, os.PathLike)):
        labels = read_labels(Path(labels))
    if labels is None:
        return None
    aligned = align_labels(labels, dataset)
    empty = np.flatnonzero((aligned == IGNORED).reshape(len(aligned), -1).all(axis=1))
    if len(aligned) - len(empty) < 2:
        raise DataError(
            f"{option_name('labels')}: are {IGNORED}, which does not count, for all but "
            f"{len(aligned) - len(empty)} samples; give labels for at least 2"
        )
    if len(empty):
        dataset.leave_out(map(int, empty))
        what = "1 sample has" if len(empty) == 1 else f"{len(empty)} samples have"
        dataset.notes += (f"{what} no label that counts, only {IGNORED}: left out of the data",)
    return aligned


def available_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
