"""Many budgets on one analysis: `sweep` finds the Pareto front of a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cobla_onnx.allocation import Budget
from cobla_onnx.errors import BudgetError, UsageError, WriteError
from cobla_onnx.graph.io.save import ExternalData
from cobla_onnx.options import Settings
from cobla_onnx.options.signatures import SearchOptions, takes_options
from cobla_onnx.pipeline.inputs import ModelSource
from cobla_onnx.pipeline.open_session import open_session
from cobla_onnx.pipeline.session import Session
from cobla_onnx.pipeline.timed import check_arithmetic
from cobla_onnx.report.amounts import budget_name
from cobla_onnx.report.sweep import Sweep, SweepPoint
from cobla_onnx.wording import either, option_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["sweep"]


@takes_options("sweep")
def sweep(
    model: ModelSource,
    budgets: Iterable[Budget],
    *,
    out_dir: str | os.PathLike[str] | None = None,
    external_data: ExternalData = "auto",
    **options: Unpack[SearchOptions],
) -> Sweep:
    """Compress a model to many budgets; it is analysed once.

    Each point is verified as `compress` does, and is what `compress` would give; but where one
    budget limits MACs, ``rank_multiple="auto"`` holds for all of them.

    Parameters
    ----------
    model : ModelProto or path
    budgets : iterable of Budget
    out_dir : path, optional
        A folder for the models, named by their budgets; it is made if it is missing.
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
    wanted = list(budgets)
    if not wanted:
        some = either(
            python="some, e.g. [Budget(mem=0.3), Budget(mem=0.6)]",
            command="--mem or --mac, e.g. --mem 0.3:0.9:7",
        )
        raise UsageError(f"no budgets: give {some}")
    timed = any(budget.latency is not None for budget in wanted)
    measured = options.get("measure_latency", False) or timed
    settings = Settings.of("sweep", options, measure_latency=measured)
    check_arithmetic(settings, all(budget.latency is not None for budget in wanted))
    folder = None if out_dir is None else _folder(Path(out_dir))
    macs_needed = any(budget.mac is not None for budget in wanted)
    with ExitStack() as stack:
        try:
            opened = open_session(
                model, settings, macs_needed=macs_needed, times_needed=timed, budgets=wanted
            )
            session = stack.enter_context(opened)
        except BudgetError as error:
            raise _none_within_reach(error) from error
        points: list[SweepPoint] = []
        refusal: BudgetError | None = None
        for number, budget in enumerate(wanted):
            session.notify(f"sweep: {budget_name(budget)}", number, len(wanted))
            try:
                points.append(_point(session, budget, folder, external_data))
            except BudgetError as error:
                refusal = error
                points.append(SweepPoint(budget, refused=error.in_flags()))
            except KeyboardInterrupt:
                raise _interrupted(points, folder) from None
        session.notify("sweep", len(wanted), len(wanted))
        chosen = session.objective
    if refusal is not None and all(point.refused for point in points):
        raise _none_within_reach(refusal)
    source = None if session.source is None else str(session.source)
    return Sweep(source, chosen, _with_front(points))


def _none_within_reach(last: BudgetError) -> BudgetError:
    return BudgetError(f"no budget of the sweep is within reach: {last.message}")


def _folder(path: Path) -> Path:
    shown = option_name("out_dir", path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{shown}: cannot be made ({error}); give another") from error
    if not os.access(path, os.W_OK):
        raise WriteError(f"{shown}: cannot be written to; give another")
    return path


def _interrupted(points: Sequence[SweepPoint], folder: Path | None) -> KeyboardInterrupt:
    """Say which models had been written before somebody interrupted."""
    count = sum(point.file is not None for point in points)
    if not count:
        return KeyboardInterrupt()
    return KeyboardInterrupt(f"interrupted; {count} models, finished before, are in {folder}")


def _point(
    session: Session, budget: Budget, folder: Path | None, external_data: ExternalData
) -> SweepPoint:
    result = session.compress(budget)
    report = result.report
    file = None
    if folder is not None:
        stem = "model" if session.source is None else session.source.stem
        file = folder / f"{stem}-{budget_name(budget).replace(' ', '-')}.onnx"
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
