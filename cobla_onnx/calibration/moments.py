"""Accumulate second moments of layer inputs in one streaming pass with bounded memory.

Batches run through onnxruntime, the tensors that layers read are added to the outputs
("tapped"), and products of their vectors are summed in float64. Tensors are tapped in groups,
so that neither they nor the sums exceed a memory limit; finished sums are kept in a temporary
file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.batching import TapLimit
from cobla_onnx.calibration.moment import Moment
from cobla_onnx.calibration.positions import (
    LEAST,
    NUMBERS,
    choose_positions,
    enough_positions,
    sample_seeds,
)
from cobla_onnx.calibration.sums import MomentSum
from cobla_onnx.errors import DataError, ModelError
from cobla_onnx.graph.health import EXPORT_AGAIN, unhealthy_weight
from cobla_onnx.graph.operators.patches import Patch
from cobla_onnx.graph.subgraph import prefix
from cobla_onnx.runtime.cache import Arrays, Cache, digest
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.session import Feeds, open_session, run_session
from cobla_onnx.runtime.temporary import ArrayFile, Place
from cobla_onnx.runtime.transfer import Shared
from cobla_onnx.text import quoted
from cobla_onnx.wording import option_name

__all__ = [
    "ALL_UNITS",
    "LIMIT",
    "MomentStore",
    "Moments",
    "Remainder",
    "Taps",
    "collect_moments",
    "parts_of",
]

Batch = TypeVar("Batch")

# Most bytes of sums held by one unit of work, and by all units on this machine.
LIMIT = 1 << 28
ALL_UNITS = 1 << 30
# Batches that are summed as one unit of work. Sums of units are added in order, so that the
# result does not depend on how units are distributed.
BATCHES_PER_UNIT = 2
# Vectors for each of their entries, over all samples, that a second moment is made from: what is
# fitted under it has an excess error of about 1 / `VECTORS`.
VECTORS = 128


class MomentStore:
    """Moments by patch, in an unnamed temporary file; equal patches share a moment."""

    def __init__(self) -> None:
        self._file = ArrayFile()
        self._places: dict[Patch, tuple[Place, Place, Place, int, float]] = {}

    def put(self, patch: Patch, moment: Moment) -> None:
        """Keep a moment."""
        arrays = moment.second, moment.mean, moment.effective
        second, mean, effective = (self._file.put(array) for array in arrays)
        self._places[patch] = second, mean, effective, moment.count, moment.share

    def get(self, patches: Sequence[Patch]) -> Moment:
        """Return the moment over all given patches, which are those of one layer's uses."""
        found = [self._read(patch) for patch in patches]
        if len(found) == 1:
            return found[0]
        count = sum(moment.count for moment in found)
        shares = [moment.count / max(count, 1) for moment in found]
        second = sum(share * moment.second for share, moment in zip(shares, found, strict=True))
        mean = sum(share * moment.mean for share, moment in zip(shares, found, strict=True))
        # The uses see the same samples, so effective numbers do not add up.
        effective = np.max([moment.effective for moment in found], axis=0)
        share = min(moment.share for moment in found)
        return Moment(np.asarray(second), np.asarray(mean), count, effective, share)

    def _read(self, patch: Patch) -> Moment:
        *places, count, share = self._places[patch]
        second, mean, effective = (self._file.get(place) for place in places)
        return Moment(second, mean, count, effective, share)

    def close(self) -> None:
        """Free the disk space; this happens by itself when the store is no longer used."""
        self._file.close()


class Moments(Protocol):
    """Moments that can be asked for by patch."""

    def get(self, patches: Sequence[Patch]) -> Moment:
        """Return the moment over all given patches, which are those of one layer's uses."""
        ...

    def close(self) -> None:
        """Free the disk space."""
        ...


@dataclass(frozen=True)
class Remainder:
    """Moments of the samples that are in one store and not in another, by subtraction.

    Attributes
    ----------
    whole, part : Moments
        The samples of `part` are among those of `whole`.
    """

    whole: Moments
    part: Moments

    def get(self, patches: Sequence[Patch]) -> Moment:
        """Return the moment over all given patches, which are those of one layer's uses."""
        return self.whole.get(patches).without(self.part.get(patches))

    def close(self) -> None:
        """Free the disk space of the part."""
        self.part.close()


class Taps:
    """A session that returns inner tensors of a model, including inputs.

    Parameters
    ----------
    model : ModelProto
    names : iterable of str
    threads : int
    extra_weights : mapping of str to array, optional
        Initializers in addition to those in the model.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        names: Iterable[str],
        threads: int,
        extra_weights: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self._names = list(dict.fromkeys(names))
        inputs = {value.name for value in model.graph.input}
        inner = [name for name in self._names if name not in inputs]
        # onnxruntime does not open a graph without nodes.
        self._session = (
            open_session(
                model, threads, inner, extra_weights, optimized=True, part="what layers see"
            )
            if inner
            else None
        )

    def run(self, feeds: Feeds) -> dict[str, Any]:
        """Return the tensors of one batch; several threads may call it."""
        values = {} if self._session is None else run_session(self._session, feeds)
        return {name: values[name] if name in values else feeds[name] for name in self._names}


def _open_taps(model: onnx.ModelProto, names: Sequence[str]) -> Taps:
    """Open only the part of the model that leads to the tensors `names`."""
    return Taps(prefix(model, names), names, 1)


@dataclass(frozen=True)
class _Unit:
    model: Shared
    patches: tuple[Patch, ...]
    batches: list[Feeds]
    samples: int | None


def _add_up(unit: _Unit) -> list[MomentSum]:
    """Sum over a unit's batches, for each of its patches."""
    # What is not finite is refused by name once everything is added.
    with np.errstate(over="ignore", invalid="ignore"):
        return _added_up(unit)


def _added_up(unit: _Unit) -> list[MomentSum]:
    sums = [MomentSum(patch.groups, patch.size, patch.parts) for patch in unit.patches]
    taps = unit.model.built(_open_taps, tuple(patch.data for patch in unit.patches))
    for feeds in unit.batches:
        values, seeds = taps.run(feeds), sample_seeds(feeds)
        for patch, total in zip(unit.patches, sums, strict=True):
            data = values[patch.data]
            most = None if unit.samples is None else enough_positions(patch, unit.samples, VECTORS)
            chosen = choose_positions(patch, data, seeds, most)
            phases, done = patch.phases(data, chosen.index), 0
            for vectors in patch.vectors(data, chosen.index, chosen.each):
                its = None if phases is None else phases[done : done + vectors.shape[2]]
                total.add(vectors, chosen.each, chosen.share, its)
                done += vectors.shape[2]
    return sums


def _sum_bytes(patch: Patch) -> int:
    """Bytes of a patch's sums."""
    parts = patch.parts
    squares = patch.groups * patch.size**2 if parts is None else sum(len(p) ** 2 for p in parts)
    return 8 * squares


def collect_moments(
    model: onnx.ModelProto,
    patches: Iterable[Patch],
    batches: Callable[[], Iterable[Feeds]],
    *,
    pool: Pool,
    cache: Cache | None = None,
    key: str = "",
    limit: int = LIMIT,
    together: int = ALL_UNITS,
    taps: TapLimit | None = None,
    samples: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MomentStore:
    """Accumulate the second moment of each patch over all batches.

    Parameters
    ----------
    batches : callable
        Returns a fresh iterator over the batches; called once for each group of taps.
    pool : Pool
        Runs units of a few batches each.
    cache : Cache, optional
        Moments are read from and stored there under `key`, which identifies model and batches.
    limit : int
        Most bytes of sums held by a unit of work; a single larger moment is its own group.
    together : int
        Most bytes of sums held by all units on this machine.
    taps : TapLimit, optional
        Limits the tensors that are read from a run.
    samples : int, optional
        Number of samples of which the vectors of each are to be enough together.

    Raises
    ------
    DataError, ModelError
        If a layer reads what is not finite; of the model, if a weight is not.
    """
    store = MomentStore()
    wanted = []
    for patch in dict.fromkeys(patches):
        found = None if cache is None else cache.get("moment", _patch_key(key, patch, samples))
        if found is None:
            wanted.append(patch)
        else:
            store.put(patch, _moment(found))
    groups = _groups(wanted, limit)
    if taps is not None:
        groups = [part for group in groups for part in taps.cut(group, lambda patch: patch.data)]
    shared = pool.share(model)
    for number, group in enumerate(groups):
        progress(number, len(groups))
        # The session of the group before, and what it keeps for a run.
        shared.rest()
        units = (_Unit(shared, tuple(group), part, samples) for part in parts_of(batches()))
        sums: list[MomentSum] = []
        for found_sums in pool.map(_add_up, units, _units_at_a_time(pool, group, together)):
            for total, more in zip(sums, found_sums, strict=False):
                total.merge(more)
            sums = sums or found_sums
        for patch, total in zip(group, sums, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                moment = total.moment()
            _check(model, patch, moment)
            store.put(patch, moment)
            if cache is not None:
                cache.put("moment", _patch_key(key, patch, samples), _arrays(moment))
    progress(len(groups), len(groups))
    return store


def _check(model: onnx.ModelProto, patch: Patch, moment: Moment) -> None:
    if not np.isfinite(moment.second).all():
        cause = unhealthy_weight(model)
        if cause:
            raise ModelError(
                f"tensor {quoted(patch.data)}: is not finite, and {cause}; {EXPORT_AGAIN}, or "
                f"leave out the layers that read the tensor by {option_name('exclude')}"
            )
        raise DataError(
            f"tensor {quoted(patch.data)}: is not finite (NaN or infinite) for some of the "
            "calibration data; leave these samples out, or the layers that read it by "
            f"{option_name('exclude')}"
        )


def parts_of(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Group batches into units of work, always in the same way."""
    rest = iter(batches)
    while part := list(itertools.islice(rest, BATCHES_PER_UNIT)):
        yield part


def _arrays(moment: Moment) -> Arrays:
    return {
        "second": moment.second,
        "mean": moment.mean,
        "effective": moment.effective,
        "count": np.array(moment.count),
        "share": np.array(moment.share),
    }


def _moment(arrays: Arrays) -> Moment:
    count, share = int(arrays["count"]), float(arrays["share"])
    return Moment(arrays["second"], arrays["mean"], count, arrays["effective"], share)


def _patch_key(key: str, patch: Patch, samples: int | None) -> str:
    return digest("moment", key, patch, BATCHES_PER_UNIT, NUMBERS, LEAST, samples, VECTORS)


def _units_at_a_time(pool: Pool, patches: Sequence[Patch], together: int) -> int | None:
    size = sum(map(_sum_bytes, patches))
    return max(1, min(pool.runs_at_most, together // size)) if pool.shares_memory else None


def _groups(patches: Sequence[Patch], limit: int) -> list[list[Patch]]:
    groups: list[list[Patch]] = []
    room = 0
    for patch in patches:
        size = _sum_bytes(patch)
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(patch)
        room -= size
    return groups
