"""The whole story: load, find layers, factorise, allocate, rewrite, verify, save."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from cobla_onnx.allocation import Allocation, Budget, WeightError, allocate
from cobla_onnx.analysis import Analysis, analyse
from cobla_onnx.calibrated import Calibrated
from cobla_onnx.calibration.dataset import Dataset, input_specs
from cobla_onnx.calibration.labels import Labels, align_labels, read_labels
from cobla_onnx.calibration.loss import LossName
from cobla_onnx.calibration.readers import ImageOptions, open_data
from cobla_onnx.calibration.seen import Seen
from cobla_onnx.errors import BudgetError, ModelError, UsageError
from cobla_onnx.graph.checks import check_structure
from cobla_onnx.graph.external import is_external
from cobla_onnx.graph.layers import Layer, read_weight
from cobla_onnx.graph.model_file import load_model, stored_bytes
from cobla_onnx.graph.tensors import all_tensors
from cobla_onnx.lowrank.factorize import factorize
from cobla_onnx.names import safe_text
from cobla_onnx.plan import Decision, Plan
from cobla_onnx.progress import Progress
from cobla_onnx.reporting import make_report
from cobla_onnx.reproduce import call_text
from cobla_onnx.result import Result
from cobla_onnx.rewrite import Replacement, make_replacement, rewrite
from cobla_onnx.spill import Spill
from cobla_onnx.verify import verify

__all__ = ["compress"]

ObjectiveName: TypeAlias = Literal["auto", "weights", "output", "loss"]


def compress(
    model: onnx.ModelProto | str | os.PathLike[str],
    budget: Budget,
    *,
    solver: Literal["slsqp", "milp"] = "slsqp",
    objective: ObjectiveName = "auto",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_size: int = 0,
    scheme: Literal["auto", "spatial", "channel", "input"] = "auto",
    data: Any = None,
    samples: int | None = None,
    batch: int = 16,
    images: ImageOptions | None = None,
    labels: Labels | str | os.PathLike[str] | None = None,
    loss: LossName = "auto",
    refit: bool = True,
    time_limit: float | None = None,
    plan: Plan | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Compress a model so that it fits a budget, and verify it in onnxruntime.

    Parameters
    ----------
    model : ModelProto or path
        It is not changed.
    budget : Budget
        Fractions of the original's weight bytes and MACs to keep at most.
    solver : {'slsqp', 'milp'}
        ``slsqp`` relaxes the masks, solves and rounds (COBLA); ``milp`` solves the
        separable integer problem alone.
    objective : {'auto', 'weights', 'output', 'loss'}
        What is minimised. ``weights``: the relative weight error, summed over layers.
        ``output``: the measured loss of truncating each layer alone, summed; it needs
        data. ``loss``: the network's loss itself, by its gradient, starting from the
        answer for ``output``; it takes longer. ``auto`` is ``output`` with data and
        ``weights`` without.
    input_shapes : mapping of str to sequence of int, optional
        Shapes of inputs with unknown axes; a symbolic batch counts as 1.
    include, exclude : sequence of str
        Glob patterns for names of layers.
    min_size : int
        Layers with fewer weights are left whole.
    scheme : {'auto', 'spatial', 'channel', 'input'}
        Matricisation of convolutions; ``auto`` lets the solver choose for each.
    data : path, mapping, iterable or CalibrationDataReader, optional
        Samples of what the model will see, without labels: an ``.npz`` (an array for each
        input) or ``.npy`` file, a folder of images, a folder of ONNX ``test_data_set_*``
        folders, arrays by input name, an iterable of dicts, or an object with
        ``get_next()``. A fifth is held back: it chooses between plans, and verifies.
    samples : int, optional
        How many samples to use at most.
    batch : int
        How many to run at a time.
    images : ImageOptions, optional
        How images become inputs.
    labels : path, sequence of int, or mapping of str to int, optional
        Classes of the samples, in their order or by file name, or a ``.csv``, ``.npy`` or
        ``.npz`` file of them. The loss is then the cross-entropy.
    loss : {'auto', 'kl', 'mse', 'ce'}
        How outputs are compared with the original's; see `choose_kinds`.
    refit : bool
        Refit factors to the inputs that they get after compression; needs data.
    time_limit : float, optional
        Seconds that the search by the network's loss may take. The result then depends on
        the machine's speed.
    plan : Plan, optional
        Apply these decisions instead of solving; the budget still holds.
    seed : int
        For the random inputs of the verification.
    threads : int, optional
        For linear algebra and onnxruntime; as many as there are cores.
    progress : callable, optional
        Called with (stage, done, total).

    Returns
    -------
    Result

    Raises
    ------
    UsageError, ModelError, DataError, BudgetError, VerificationError
        See `cobla_onnx.errors`.

    Examples
    --------
    >>> from cobla_onnx import Budget, compress
    >>> result = compress("models/digits.onnx", Budget(mem=0.5))
    >>> result.report.budget["mem"].reached <= 0.5
    True
    """
    call = call_text(compress, locals())
    started = time.perf_counter()
    source = None if isinstance(model, onnx.ModelProto) else Path(model)
    proto = _checked(model) if isinstance(model, onnx.ModelProto) else load_model(model)
    threads = threads or _cores()
    notify = progress or (lambda stage, done, total: None)
    needed = _objective(objective, data)
    if labels is not None and data is None:
        raise UsageError("--labels: are those of the data; give --data too")
    shapes = input_shapes or {}
    with (
        _naming(source),
        threadpool_limits(threads),
        _opened(proto, shapes, data, samples, images) as dataset,
    ):
        analysis = analyse(
            proto,
            input_shapes=shapes,
            include=include,
            exclude=exclude,
            min_size=min_size,
            scheme=scheme,
            macs_needed=budget.mac is not None,
            threads=threads,
            progress=notify,
            see=None if dataset is None else _see(proto, dataset, batch, threads, notify),
            weigh=needed != "weights",
        )
        calibrated = None
        if dataset is not None:
            classes = _labels(labels, dataset)
            measure: LossName = loss if classes is None else "ce"
            calibrated = Calibrated(
                proto, analysis, dataset, batch, measure, threads, notify, classes, refit
            )
        allocation: Allocation | None = None
        if plan is None:
            constraints = analysis.constraints(budget)
            if needed == "weights" or calibrated is None:
                notify("allocate", 0, 1)
                allocation = allocate(
                    analysis.curves, WeightError(analysis.curves), constraints, solver=solver
                )
            else:
                allocation = calibrated.choose(constraints, solver, needed, time_limit)
            plan = analysis.plan(allocation.choices)
        if calibrated is None:
            replacements = _factorise(proto, analysis, plan, notify)
        else:
            replacements = calibrated.factorise(plan)
        spill = Spill()
        replacements = spill.replacements(replacements)
        compressed = rewrite(proto, replacements) if replacements else proto
        _check_budget(analysis, budget, plan, compressed)
        verification = None
        if replacements:
            notify("verify", 0, 1)
            verification = verify(
                proto,
                compressed,
                replacements,
                analysis.input_shapes,
                data=None if calibrated is None else calibrated.held_back(),
                seed=seed,
                threads=threads,
            )
            notify("verify", 1, 1)
        if analysis.seen is not None:
            analysis.seen.close()
    history = () if calibrated is None else tuple(calibrated.history)
    report = make_report(
        analysis,
        budget,
        plan,
        allocation,
        verification,
        None if calibrated is None else calibrated.report(),
        source=source,
        mem_after=stored_bytes(compressed),
        seconds=time.perf_counter() - started,
        seed=seed,
        threads=threads,
        command=call,
        history=history,
    )
    external = any(map(is_external, proto.graph.initializer))
    return Result(compressed, plan, report, source, spill, external, history)


def _checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """Check a model that did not come from a file of ours."""
    with _naming(None):
        check_structure(model)
        for held in all_tensors(model):
            if is_external(held.tensor):
                raise ModelError(
                    f"{held.label}: its external data is not loaded; pass the path of the file "
                    "instead of the model, or load it with its data"
                )
    return model


@contextmanager
def _naming(source: Path | None) -> Iterator[None]:
    """Put the name of the file before errors about the model."""
    shown = "the model" if source is None else safe_text(str(source), 300)
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{shown}: {error}") from error
    except MemoryError as error:
        raise ModelError(
            f"{shown}: needs more memory than there is; use a machine with more, or give "
            "smaller --input-shape"
        ) from error


def _objective(objective: ObjectiveName, data: Any) -> Literal["weights", "output", "loss"]:
    if objective in ("output", "loss") and data is None:
        raise UsageError(
            f"--objective {objective}: needs data; give --data, or --objective weights"
        )
    if objective == "auto":
        return "weights" if data is None else "output"
    return objective


def _labels(
    labels: Labels | str | os.PathLike[str] | None, dataset: Dataset
) -> NDArray[np.int64] | None:
    if isinstance(labels, (str, os.PathLike)):
        labels = read_labels(Path(labels))
    return None if labels is None else align_labels(labels, dataset)


@contextmanager
def _opened(
    model: onnx.ModelProto,
    shapes: Mapping[str, Sequence[int]],
    data: Any,
    samples: int | None,
    images: ImageOptions | None,
) -> Iterator[Dataset | None]:
    """Open the calibration data, if there is any, for as long as it is needed."""
    if data is None:
        yield None
        return
    with open_data(data, input_specs(model, shapes), samples=samples, images=images) as dataset:
        yield dataset


def _see(
    model: onnx.ModelProto, dataset: Dataset, batch: int, threads: int, progress: Progress
) -> Callable[[Sequence[Layer]], Seen]:
    def see(layers: Sequence[Layer]) -> Seen:
        return Seen(
            model,
            layers,
            lambda: dataset.batches(dataset.calibration, batch),
            threads=threads,
            progress=partial(progress, "second moments"),
        )

    return see


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _factorise(
    model: onnx.ModelProto, analysis: Analysis, plan: Plan, progress: Progress
) -> list[Replacement]:
    chosen: list[Decision] = [d for d in plan.decisions if d.scheme is not None]
    replacements = []
    for number, decision in enumerate(chosen):
        progress("factorise", number, len(chosen))
        layer, scheme, rank = analysis.resolve(decision)
        factors = factorize(scheme.matrix(read_weight(model, layer)), rank)
        replacements.append(make_replacement(layer, scheme, factors))
    progress("factorise", len(chosen), len(chosen))
    return replacements


def _check_budget(
    analysis: Analysis, budget: Budget, plan: Plan, compressed: onnx.ModelProto
) -> None:
    """Count again, from the result itself: budgets are hard."""
    reached = {"mem": stored_bytes(compressed), "mac": analysis.macs_after(plan)}
    for name, limit in analysis.limits(budget).items():
        cost = reached[name]
        if cost is None or cost > limit:
            raise BudgetError(
                f"--{name}: the plan costs {cost}, the budget allows {limit}; "
                "lower its ranks or raise the budget"
            )
