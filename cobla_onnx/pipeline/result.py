"""Result of a compression: the model and its report, and how they are written."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from cobla_onnx.allocation.resources import RESOURCES
from cobla_onnx.allocation.sqp import Step
from cobla_onnx.errors import UsageError, VerificationError, WriteError
from cobla_onnx.graph.io.disk import bytes_of, files_of, zipped_bytes_of
from cobla_onnx.graph.io.model_file import load_in_order, stored_bytes, write_atomically
from cobla_onnx.graph.io.save import ExternalData, save_model, saved_bytes
from cobla_onnx.graph.order import restore_order
from cobla_onnx.plan import Plan
from cobla_onnx.report.costs import Cost
from cobla_onnx.report.files import report_writer
from cobla_onnx.report.model import Report
from cobla_onnx.report.provenance import command_text
from cobla_onnx.runtime.providers import execution_provider
from cobla_onnx.runtime.session import open_session
from cobla_onnx.variants.offload import Spill
from cobla_onnx.wording import option_name

__all__ = ["Result", "check_paths", "check_written"]

BUDGETS = tuple(resource.name for resource in RESOURCES)


@dataclass
class Result:
    """A verified compressed model, with its plan and the report.

    Attributes
    ----------
    model : onnx.ModelProto
        The object that was passed in, if nothing had to change and its nodes were sorted.
        Nodes are in the order of the original.
    plan : Plan
    report : Report
    source : Path or None
        File of the original.
    history : tuple of Step
        Every evaluation of the search by the network's loss.
    """

    model: onnx.ModelProto
    plan: Plan
    report: Report
    source: Path | None = None
    _spill: Spill | None = field(default=None, repr=False)
    _external: bool = field(default=False, repr=False)
    history: tuple[Step, ...] = field(default=(), repr=False)

    def save(self, path: str | os.PathLike[str], *, external_data: ExternalData = "auto") -> None:
        """Write the model atomically: a file at `path` stays until the new one is complete.

        An unchanged model is copied byte for byte. A changed one is read back, its costs are
        counted, and it is opened in onnxruntime before it replaces the file.

        Parameters
        ----------
        external_data : {'auto', 'always', 'never'}
            Whether weights go into a data file beside the model, named by its content.
            ``auto``: if the original had external data, or one file cannot hold them.

        Raises
        ------
        WriteError
            If it cannot be written.
        UsageError
            If 'never' is asked for and one file cannot hold the model, or the path is that of a
            file with the original's weights.
        VerificationError
            If the file on disk differs from the verified model.
        """
        beside = () if self.source is None else _weights_beside(self.source, [Path(path)])
        if _identity(Path(path)) in map(_identity, beside):
            raise UsageError(f"{path}: holds weights of {self.source}; give another path")
        before = _on_disk(self.source)
        copied = self._copied(external_data)
        if copied is not None:
            write_atomically(path, copied.read_bytes())
        else:
            save_model(self.model, path, self._apart(external_data), self._check)
        file, zipped = map(Cost, before, _on_disk(Path(path)))
        sizes = replace(self.report.sizes, file=file, zipped=zipped)
        self.report = replace(self.report, output=os.fspath(path), sizes=sizes)

    def file_bytes(self, external_data: ExternalData = "auto") -> int:
        """Count the bytes that `save` would write, external data among them."""
        copied = self._copied(external_data)
        if copied is not None:
            return copied.stat().st_size
        return saved_bytes(self.model, self._apart(external_data))

    def _apart(self, external_data: ExternalData) -> ExternalData:
        """Whether weights go into a file beside the model: where they were, too."""
        return "always" if self._external and external_data == "auto" else external_data

    def _copied(self, external_data: ExternalData) -> Path | None:
        """File of which the result is a copy, byte by byte; None if it is written anew."""
        plain = self.report.unchanged and not self._external and external_data != "always"
        return self.source if plain else None

    def _check(self, written: Path) -> None:
        model, order = load_in_order(written)
        if stored_bytes(model) != self.report.budget["mem"].after:
            raise VerificationError(f"{written}: holds other weights than were verified")
        if not self.report.unchanged:
            with execution_provider(self.report.provider):
                restore_order(model.graph, order)
                open_session(model, self.report.threads)

    def save_report(
        self, path: str | os.PathLike[str], arguments: Sequence[str] | None = None
    ) -> None:
        """Write the report as JSON, HTML or Markdown, by the extension of `path`, atomically.

        Parameters
        ----------
        arguments : sequence of str, optional
            The command line to show, as in ``sys.argv``; by default the report shows how
            `compress` was called.

        Raises
        ------
        UsageError
            If the extension is not ``.json``, ``.html`` or ``.md``.
        WriteError
            If the file cannot be written.
        """
        report = self.report
        if arguments is not None:
            report = replace(report, command=command_text(arguments))
        write_atomically(path, report_writer(path)(report).encode())

    def save_history(self, path: str | os.PathLike[str]) -> None:
        """Write the history as CSV, atomically, with a line for each evaluation.

        Columns: ``step``, ``stage``, ``loss`` (that the search follows, on the calibration
        split), ``selection_loss`` (where masks are 0 or 1), ``mem``, ``mac`` and ``latency``
        (fractions of the original, for the budgets that were set), ``seconds``. After them comes a
        line for each block and pass of a distillation, whose stages begin with ``distil``; the
        selection loss there is the one that is followed, too.

        Raises
        ------
        WriteError
            If the file cannot be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", "stage", "loss", "selection_loss", *BUDGETS, "seconds"])
        for step in self.history:
            costs = [step.costs.get(name, "") for name in BUDGETS]
            selection = "" if step.selection is None else step.selection
            writer.writerow(
                [step.number, step.stage, step.loss, selection, *costs, round(step.seconds, 3)]
            )
        calibration = self.report.calibration
        learned = None if calibration is None else calibration.distillation
        for point in () if learned is None else learned.checkpoints:
            number, stage = len(self.history) + point.number, f"distil, {point.stage}"
            costs = [""] * len(BUDGETS)
            losses = ["" if loss is None else loss for loss in (point.loss, point.held_back)]
            writer.writerow([number, stage, *losses, *costs, round(point.seconds, 3)])
        write_atomically(path, text.getvalue().encode())


def _on_disk(path: Path | None) -> tuple[int | None, int | None]:
    """Bytes of a model's files, as they are and zipped; None for a model in memory."""
    if path is None:
        return None, None
    files = files_of(path)
    return bytes_of(files), zipped_bytes_of(files)


def check_paths(
    source: Path,
    target: Path,
    written: Iterable[tuple[str, Path | None]] = (),
    read: Iterable[tuple[str, Path]] = (),
    *,
    in_place: bool = False,
) -> None:
    """Check the paths before any work is done.

    Parameters
    ----------
    source, target : Path
        The model to read and the one to write.
    written, read : iterable of (str, Path)
        Other files to write and to read, each with its option.

    Raises
    ------
    UsageError
        If two paths are the same, unless `in_place` allows that of the output and the input.
    WriteError
        If a folder to write to does not exist or is not writable.
    """
    _check_writable(target)
    # A name that the system cannot have is one of no file: reading it says so.
    same = os.path.exists(source) and target.exists() and target.samefile(source)
    if same and not in_place:
        raise UsageError(
            f"{target}: is the input itself; give another path, or {option_name('in_place', True)}"
        )
    check_written(source, written if same else [("", target), *written], read)


def check_written(
    source: Path,
    written: Iterable[tuple[str, Path | None]],
    read: Iterable[tuple[str, Path]] = (),
) -> None:
    """Check that files can be written, and that none is the model, or read, or written twice.

    Parameters
    ----------
    source : Path
        The model that is read.
    written, read : iterable of (str, Path)
        As for `check_paths`; the model to write has no option.

    Raises
    ------
    UsageError, WriteError
        See `check_paths`.
    """
    files = [(option, path) for option, path in written if path is not None]
    taken = {_identity(source): "is a model's path"}
    taken |= {_identity(path): f"is what {option} reads" for option, path in read}
    beside = _weights_beside(source, [path for _, path in files])
    taken |= {_identity(path): f"holds weights of {source}" for path in beside}
    for option, path in files:
        _check_writable(path)
        use = taken.get(_identity(path))
        if use is not None:
            raise UsageError(f"{option} {path}: {use}; give another one".strip())
        taken[_identity(path)] = f"is that of {option} too" if option else "is a model's path"


def _identity(path: Path) -> Hashable:
    """Tell files apart by what they are, whatever links lead to them; others by their paths."""
    try:
        known = path.stat()
    except OSError:
        return path.resolve()
    return known.st_dev, known.st_ino


def _weights_beside(source: Path, written: Iterable[Path]) -> frozenset[Path]:
    """Files with a model's weights; not looked for unless a file to write is there already."""
    if not os.path.isfile(source) or not any(map(os.path.isfile, written)):
        return frozenset()
    try:
        return files_of(source) - {source.resolve()}
    except DecodeError:
        # No weights of it are anywhere; whoever opens it says so.
        return frozenset()


def _check_writable(path: Path) -> None:
    try:
        _check_place(path)
    except OSError as error:
        # Such as a name that is too long, or a folder that may not be searched.
        raise WriteError(f"{path}: {error.strerror}; give another path") from error


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise WriteError(f"{path}: is a directory; give the path of a file")
    if path.exists() and not path.is_file():
        raise WriteError(f"{path}: is not a regular file; give another path")
    if not path.parent.is_dir():
        raise WriteError(f"{path}: its folder does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise WriteError(f"{path}: its folder cannot be written to; give another path")
