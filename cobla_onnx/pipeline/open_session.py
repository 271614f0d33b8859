"""Open a session: read the model and the samples, analyse the model, time its layers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import onnx
from onnx import TensorProto

from cobla_onnx.allocation import Budget
from cobla_onnx.arithmetic.nodes import WEIGHTED
from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.graph.duplicates import Deduplicated, deduplicated
from cobla_onnx.graph.opening import opened
from cobla_onnx.graph.protos import opset_of
from cobla_onnx.latency.profile import Profile
from cobla_onnx.latency.timing import Stopwatch
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.analysis import Analysis, Reach, analyse
from cobla_onnx.pipeline.branches import Followed, follow
from cobla_onnx.pipeline.budget_errors import explain
from cobla_onnx.pipeline.inputs import (
    ModelSource,
    available_cores,
    file_of,
    known_shapes,
    naming,
    open_in_order,
    open_samples,
)
from cobla_onnx.pipeline.looking import Looking, look_through
from cobla_onnx.pipeline.model_times import ModelTimes, open_profile
from cobla_onnx.pipeline.select import Selection
from cobla_onnx.pipeline.session import Session
from cobla_onnx.runtime.cache import Cache
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.machine import convolution_block
from cobla_onnx.runtime.pool import Pool, choose_pool, one_thread
from cobla_onnx.runtime.progress import Progress, silent
from cobla_onnx.runtime.providers import CPU, execution_provider
from cobla_onnx.runtime.run_cache import RunCache
from cobla_onnx.variants.base import Asked
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK, RankRule, rank_rule
from cobla_onnx.variants.low_rank.units import GRAMS, VALUES, VECTORS
from cobla_onnx.variants.storage.precision import decoded, precision_bits, require_decoded
from cobla_onnx.wording import option_name

__all__ = ["open_session"]

# Bytes in floating point for each in 8 bits: four, but for scales and what does not shrink.
IN_FLOATS = 3.0


@dataclass(frozen=True)
class Needs:
    """What the budgets of a session need to know.

    Attributes
    ----------
    macs_needed : bool
        Whether there is a MAC budget: it is an error if MACs are not known, and ranks follow
        the grid for all budgets.
    times_needed : bool
        Whether there is a latency budget: layers are timed, and those that would not be faster
        stay whole. The settings must then measure latency.
    budgets : sequence of Budget
        The budgets that will be asked for, if known. If none can be met, the error is raised
        before anything is run on data; if some need ranks off the grid, they are added.
    bits : tuple of int
        Numbers of bits that a plan has. Those that the settings ask for are considered anyway.
    comparing : bool
        Whether families are compared: then no candidate is left out since another family beats it.
    """

    macs_needed: bool = False
    times_needed: bool = False
    budgets: Sequence[Budget] = ()
    bits: tuple[int, ...] = ()
    comparing: bool = False


@contextmanager
def open_session(
    model: ModelSource,
    settings: Settings,
    *,
    macs_needed: bool = False,
    times_needed: bool = False,
    budgets: Sequence[Budget] = (),
    bits: tuple[int, ...] = (),
    comparing: bool = False,
) -> Iterator[Session]:
    """Load a model and analyse it; the session is valid within the context.

    Parameters
    ----------
    model : ModelProto or path
        It is not changed.
    settings : Settings
    macs_needed, times_needed, budgets, bits, comparing
        See `Needs`.

    Raises
    ------
    UsageError, ModelError, DataError, BudgetError, WriteError
        See `cobla_onnx.errors`.
    """
    started = time.perf_counter()
    source = file_of(model)
    notify: Progress = settings.progress or silent
    needs = Needs(macs_needed, times_needed, budgets, bits, comparing)
    notify("open model and data", 0, 1)
    given, order = open_in_order(model)
    threads = settings.threads or available_cores()
    cache = None if settings.cache is None else Cache(settings.cache)
    with (
        naming(source),
        one_thread,
        choose_pool(threads, settings.workers, settings.executor, settings.dask) as pool,
        execution_provider(settings.provider) as provider,
        open_samples(given, settings) as dataset,
    ):
        single = deduplicated(given) if settings.deduplicate else Deduplicated(given)
        proto = opened(single.model)
        notify("open model and data", 1, 1)
        context = RunContext(threads, pool, cache or _run_cache(dataset, budgets, pool), notify)
        # A profile that does not fit is refused before the work.
        profile = open_profile(settings.profile, threads) if settings.measure_latency else None
        rule = _rule(settings, needs, provider)
        known = known_shapes(settings, dataset)
        followed = replace(follow(proto, dataset, threads), saved=single.nbytes)
        looking = None if dataset is None else look_through(followed, dataset, settings, context)
        analysis = _analysed(followed, single, known, settings, needs, rule, looking, context)
        try:
            times = None
            if profile is not None:
                times = _times(followed.model, analysis, profile, settings, context)
            table = times.table() if times is not None and times_needed else analysis
            evidence = None if looking is None else looking.evidence(table)
            session = Session(
                given=given,
                single=single.model,
                followed=followed,
                analysis=table,
                settings=settings,
                context=context,
                evidence=evidence,
                times=times,
                source=source,
                order=order,
                rule=rule,
            )
            if times_needed:
                grid = _rule(settings, Needs(macs_needed=True), provider)
                session = replace(session, by_macs=_under(session, analysis, grid, looking))
            yield replace(session, seconds=time.perf_counter() - started)
        finally:
            if analysis.from_data is not None:
                analysis.from_data.close()


def _under(
    session: Session, analysis: Analysis, rule: RankRule, looking: Looking | None
) -> Session:
    """Return what a budget of MACs would choose from: it is measured end to end, too."""
    other = analysis.under(rule)
    evidence = None if looking is None else looking.evidence(other)
    return replace(session, analysis=other, evidence=evidence, rule=rule)


def _without_bits(analysis: Analysis, opset: int) -> Iterator[str]:
    """Say so if no layer can be stored in fewer bits."""
    if not decoded(opset):
        yield f"no layer can be stored in fewer bits: operators of opset {opset} decode none"
    elif analysis.layers and all(x.type != TensorProto.FLOAT for x in analysis.layers):
        yield "no layer can be stored in fewer bits: no weight is used in single precision"


def _run_cache(dataset: Dataset | None, budgets: Sequence[Budget], pool: Pool) -> RunCache | None:
    """Return what keeps results without data: what tells errors makes factors, too.

    Factors of one budget serve the next one. Other processes have nothing of it.
    """
    if dataset is not None or not budgets or not pool.inside:
        return None
    return RunCache([VALUES, GRAMS] + [VECTORS] * (len(budgets) > 1))


def _rule(settings: Settings, needs: Needs, provider: str) -> RankRule:
    return rank_rule(
        settings.rank_multiple,
        mac=needs.macs_needed,
        latency=needs.times_needed,
        block=convolution_block(),
        cpu=provider == CPU,
    )


def _times(
    model: onnx.ModelProto,
    analysis: Analysis,
    profile: Profile,
    settings: Settings,
    context: RunContext,
) -> ModelTimes:
    stopwatch = Stopwatch(context.threads)
    return ModelTimes.of(
        model, analysis, profile, stopwatch, settings.seed, context, settings.storage
    )


def _analysed(
    followed: Followed,
    single: Deduplicated,
    known: tuple[dict[str, Sequence[int]], tuple[str, ...]],
    settings: Settings,
    needs: Needs,
    rule: RankRule,
    looking: Looking | None,
    context: RunContext,
) -> Analysis:
    """Analyse the model; with data, by what the layers see of it."""
    shapes, notes = known
    refine, weigh = settings.rank_multiple == "auto", settings.resolved_objective != "weights"
    # All ranks were tried before a refusal then.
    tried = EVERY_RANK if refine else rule
    opset = opset_of(followed.model)
    require_decoded(needs.bits, opset, option_name("plan"))
    bits = sorted({*precision_bits(settings.precision, opset), *needs.bits})
    analysis = analyse(
        followed.model,
        Selection(settings.include, settings.exclude, settings.min_size),
        Asked(settings.scheme, rule, tuple(bits), _computed(settings)),
        context=context,
        input_shapes=shapes,
        macs_needed=needs.macs_needed or needs.times_needed,
        see=looking,
        weigh=weigh,
        reach=Reach(
            _by_floats(needs.budgets, settings),
            refine,
            lambda error, found: explain(error, followed.original, found, settings, tried),
        ),
        comparing=needs.comparing,
        unmeasured=looking.measured.unmeasured if looking is not None and weigh else (),
        followed=followed,
    )
    if settings.precision != "keep":
        notes = (*notes, *_without_bits(analysis, opset))
    if looking is not None:
        notes = (*notes, *followed.notes, *looking.notes)
    return replace(analysis, notes=(*analysis.notes, *single.notes, *notes))


def _computed(settings: Settings) -> tuple[str, ...]:
    """Operators that will compute in 8 bits, as far as that is known before the search."""
    return WEIGHTED if settings.arithmetic == "int8" else ()


def _by_floats(budgets: Sequence[Budget], settings: Settings) -> Sequence[Budget]:
    """Return budgets by what weights take in floating point, if they will be stored in 8 bits.

    What they take then is counted later, so that none is out of reach. But smaller ranks are needed
    where even more bytes would be.
    """
    if settings.arithmetic == "keep":
        return budgets
    about = [replace(b, mem=min(1.0, IN_FLOATS * b.mem)) for b in budgets if b.mem is not None]
    return [*about, *(replace(budget, mem=1.0) for budget in budgets)]
