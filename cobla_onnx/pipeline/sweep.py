"""Many budgets on one analysis: `sweep` finds the Pareto front of a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cobla_onnx.allocation import Budget
from cobla_onnx.allocation.budget import check_budget
from cobla_onnx.errors import BudgetError, UsageError, WriteError
from cobla_onnx.graph.io.disk import bytes_of, files_of
from cobla_onnx.graph.io.model_file import write_atomically
from cobla_onnx.graph.io.save import ExternalData
from cobla_onnx.options import Settings
from cobla_onnx.options.signatures import SearchOptions, takes_options
from cobla_onnx.pipeline.alternatives import alternatives
from cobla_onnx.pipeline.inputs import ModelSource
from cobla_onnx.pipeline.open_session import open_session
from cobla_onnx.pipeline.session import Session
from cobla_onnx.pipeline.timed import check_arithmetic
from cobla_onnx.report.amounts import budget_name
from cobla_onnx.report.sweep import Sweep, SweepPoint
from cobla_onnx.report.sweep_page import check_page
from cobla_onnx.text import numbered
from cobla_onnx.wording import either, option_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["sweep", "writable_folder"]


@takes_options("sweep")
def sweep(
    model: ModelSource,
    budgets: Iterable[Budget],
    *,
    out_dir: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    compare_with: Literal["onnxruntime"] | None = None,
    external_data: ExternalData = "auto",
    **options: Unpack[SearchOptions],
) -> Sweep:
    """Compress a model to many budgets; it is analysed once.

    Each point is verified as `compress` does, and is what `compress` would give; but where one
    budget limits MACs, ``rank_multiple="auto"`` holds for all of them, and where one limits
    latency, its candidates are those of all.

    Parameters
    ----------
    model : ModelProto or path
    budgets : iterable of Budget
    out_dir : path, optional
        A folder for the models, named by their budgets, with ``front.csv`` and ``front.svg``; it
        is made if it is missing.
    report : path, optional
        An ``.html`` page with the front; beside each model in `out_dir` its own page, to which it
        has links. See `Sweep.save_report`.
    compare_with : {'onnxruntime'}, optional
        Onnxruntime's quantisers make models with the same data, which are points beside those of
        the budgets, measured on the same samples; those that fail say why. Needs data.
    external_data : {'auto', 'always', 'never'}
        See `Result.save`.
    solver, objective, input_shapes, include, exclude, min_size, deduplicate, scheme, data
        As those of `compress`.
    samples, batch, memory_limit, images, labels, loss, outputs, refit, distil, augment, time_limit
        As those of `compress`.
    precision, arithmetic, storage, rank_multiple, provider, profile, measure_latency
        As those of `compress`.
    seed, threads, workers, executor
        As those of `compress`.
    dask, cache, progress
        As those of `compress`.

    Returns
    -------
    Sweep
        With a point for each budget; those out of reach say so.

    Raises
    ------
    BudgetError
        If all budgets are out of reach.
    UsageError, ModelError, DataError, VerificationError, WriteError
        See `cobla_onnx.errors`.

    Examples
    --------
    >>> from cobla_onnx import Budget, sweep
    >>> found = sweep("models/digits.onnx", [Budget(mem=m) for m in (0.3, 0.6)], solver="milp")
    >>> [point.mem <= point.budget.mem for point in found.points]
    [True, True]
    >>> found.save_csv("front.csv")  # doctest: +SKIP
    """
    wanted = list(budgets) if isinstance(budgets, Iterable) else [budgets]
    for budget in wanted:
        check_budget(budget)
    if not wanted:
        some = either(
            python="some, e.g. [Budget(mem=0.3), Budget(mem=0.6)]",
            command="--mem or --mac, e.g. --mem 0.3:0.9:7",
        )
        raise UsageError(f"no budgets: give {some}")
    timed = any(budget.latency is not None for budget in wanted)
    measured = options.get("measure_latency", False) or timed
    settings = Settings.of("sweep", options, measure_latency=measured)
    _check_comparable(settings, compare_with)
    check_arithmetic(settings, all(budget.latency is not None for budget in wanted))
    if report is not None:
        check_page(Path(report))
    folder = None if out_dir is None else writable_folder(Path(out_dir))
    macs_needed = any(budget.mac is not None for budget in wanted)
    with ExitStack() as stack:
        try:
            opened = open_session(
                model, settings, macs_needed=macs_needed, times_needed=timed, budgets=wanted
            )
            session = stack.enter_context(opened)
        except BudgetError as error:
            raise _none_within_reach(error) from error
        points = _points(session, wanted, folder, external_data)
        if compare_with is not None:
            try:
                points += alternatives(session, folder, _stem(session), external_data)
            except KeyboardInterrupt:
                raise _interrupted(points, folder) from None
        found = _found(session, points)
    if folder is not None:
        found.save_csv(folder / "front.csv")
        write_atomically(folder / "front.svg", found.to_svg().encode())
    if report is not None:
        found.save_report(report)
    return found


def _check_comparable(settings: Settings, other: str | None) -> None:
    if other not in (None, "onnxruntime"):
        raise UsageError(
            f"{option_name('compare_with', other)}: is not known; give "
            f"{option_name('compare_with', 'onnxruntime')}"
        )
    if other is not None and settings.data is None:
        raise UsageError(
            f"{option_name('compare_with', other)}: others are measured on the same samples as our "
            f"results; give {option_name('data')} too"
        )


def _found(session: Session, points: Sequence[SweepPoint]) -> Sweep:
    source = session.source
    return Sweep(
        None if source is None else str(source),
        session.objective,
        _with_front(points),
        None if source is None else bytes_of(files_of(source)),
    )


def _stem(session: Session) -> str:
    """Return how names of models' files begin."""
    return "model" if session.source is None else session.source.stem


def _none_within_reach(last: BudgetError) -> BudgetError:
    return BudgetError(f"no budget of the sweep is within reach: {last.message}")


def writable_folder(path: Path) -> Path:
    """Make a folder if it is missing.

    Raises
    ------
    WriteError
        If it cannot be made or written to.
    """
    shown = option_name("out_dir", path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{shown}: cannot be made ({error}); give another") from error
    if not os.access(path, os.W_OK):
        raise WriteError(f"{shown}: cannot be written to; give another")
    return path


def _points(
    session: Session,
    budgets: Sequence[Budget],
    folder: Path | None,
    external_data: ExternalData,
) -> list[SweepPoint]:
    """Compress to each budget; a point out of reach says so, unless all are."""
    points: list[SweepPoint] = []
    refusal: BudgetError | None = None
    for number, budget in enumerate(budgets):
        session.notify(f"sweep: {budget_name(budget)}", number, len(budgets))
        try:
            points.append(_point(session, budget, folder, external_data))
        except BudgetError as error:
            refusal = error
            points.append(SweepPoint(budget, refused=error.in_flags()))
        except KeyboardInterrupt:
            raise _interrupted(points, folder) from None
    session.notify("sweep", len(budgets), len(budgets))
    if refusal is not None and all(point.refused for point in points):
        raise _none_within_reach(refusal)
    return points


def _interrupted(points: Sequence[SweepPoint], folder: Path | None) -> KeyboardInterrupt:
    """Say which models had been written before somebody interrupted."""
    count = sum(point.file is not None for point in points)
    if not count:
        return KeyboardInterrupt()
    return KeyboardInterrupt(f"interrupted; written before: {numbered(count, 'model')} in {folder}")


def _point(
    session: Session, budget: Budget, folder: Path | None, external_data: ExternalData
) -> SweepPoint:
    result = session.compress(budget)
    report = result.report
    file = None
    if folder is not None:
        file = folder / f"{_stem(session)}-{budget_name(budget).replace(' ', '-')}.onnx"
        result.save(file, external_data=external_data)
        report = result.report
    calibration = report.calibration
    value = None if report.solver is None else report.solver.value
    return SweepPoint(
        budget=budget,
        mem=report.budget["mem"].reached,
        mac=report.budget["mac"].reached,
        latency=report.budget["latency"].reached,
        loss=value if calibration is None else calibration.loss,
        quality=None if calibration is None else calibration.quality,
        plan=result.plan,
        report=report,
        file=None if file is None else str(file),
        file_bytes=result.file_bytes(external_data) if file is None else report.sizes.file.after,
    )


def _with_front(points: Sequence[SweepPoint]) -> tuple[SweepPoint, ...]:
    """Mark the points that no other one dominates."""
    found = [
        (point.mem or 0.0, point.mac or 0.0, point.loss or 0.0)
        for point in points
        if not point.refused
    ]

    def dominated(point: SweepPoint) -> bool:
        own = (point.mem or 0.0, point.mac or 0.0, point.loss or 0.0)
        return any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in found
        )

    return tuple(
        point if point.refused else replace(point, front=not dominated(point)) for point in points
    )
