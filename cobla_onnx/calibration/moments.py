"""Second moments of what layers see, in one streaming pass of bounded memory.

For a layer y = W x the second moment S = E[x x^T] is all that its output error depends on:
E||(W - W') x||^2 = tr((W - W') S (W - W')^T). Batches run through onnxruntime, the tensors
that layers read are tapped as outputs, and products of their vectors are added up in
float64. Tensors are tapped in groups, so that neither they nor the sums outgrow a limit;
finished sums wait in a temporary file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.cache import Cache, digest
from cobla_onnx.calibration.patches import Patch
from cobla_onnx.carrying import Shared
from cobla_onnx.parallel import Pool
from cobla_onnx.runtime import Feeds, open_session, run_session
from cobla_onnx.scratch import ArrayFile, Place

__all__ = [
    "LIMIT",
    "Moment",
    "MomentStore",
    "MomentSum",
    "Taps",
    "collect_moments",
    "parts_of",
]

Batch = TypeVar("Batch")

# Bytes of sums that each unit of work holds at a time, and all units on this machine.
LIMIT = 1 << 28
ALL_UNITS = 1 << 30
# Batches that are added up as one unit of work. Sums of units are added in their order, so
# that the result does not depend on who adds what.
BATCHES_PER_UNIT = 2


@dataclass(frozen=True)
class Moment:
    """Second moment and mean of the vectors that a layer multiplies.

    Attributes
    ----------
    second : float64 array, shape (groups, size, size)
        E[x x^T] over all positions of all samples.
    mean : float64 array, shape (groups, size)
        E[x].
    count : int
        Vectors seen.
    """

    second: NDArray[np.float64]
    mean: NDArray[np.float64]
    count: int

    def covariance(self) -> NDArray[np.float64]:
        """E[(x - E x) (x - E x)^T]: what matters where a bias can absorb the mean."""
        return self.second - self.mean[:, :, None] * self.mean[:, None, :]


class MomentSum:
    """Adds vectors up to a `Moment`."""

    def __init__(self, groups: int, size: int) -> None:
        self._second = np.zeros((groups, size, size))
        self._total = np.zeros((groups, size))
        self._count = 0

    def add(self, vectors: NDArray[Any]) -> None:
        """Add vectors of shape (groups, size, positions)."""
        for group, block in enumerate(vectors):
            # Contiguous double precision: numpy then uses the symmetric product.
            wide = np.ascontiguousarray(block, np.float64)
            self._second[group] += wide @ wide.T
            self._total[group] += wide.sum(axis=1)
        self._count += vectors.shape[2]

    def merge(self, other: MomentSum) -> None:
        """Add what another sum has added up."""
        self._second += other._second
        self._total += other._total
        self._count += other._count

    def moment(self) -> Moment:
        """Return the mean over what was added."""
        count = max(self._count, 1)
        return Moment(self._second / count, self._total / count, self._count)


class MomentStore:
    """Moments by patch, in an unnamed temporary file; equal patches share one."""

    def __init__(self) -> None:
        self._file = ArrayFile()
        self._places: dict[Patch, tuple[Place, Place, int]] = {}

    def __contains__(self, patch: Patch) -> bool:
        return patch in self._places

    def put(self, patch: Patch, moment: Moment) -> None:
        """Keep a moment."""
        places = self._file.put(moment.second), self._file.put(moment.mean)
        self._places[patch] = (*places, moment.count)

    def get(self, patches: Sequence[Patch]) -> Moment:
        """Return the moment over all the given patches, those of one layer's uses."""
        found = [self._read(patch) for patch in patches]
        if len(found) == 1:
            return found[0]
        count = sum(moment.count for moment in found)
        shares = [moment.count / max(count, 1) for moment in found]
        second = sum(share * moment.second for share, moment in zip(shares, found, strict=True))
        mean = sum(share * moment.mean for share, moment in zip(shares, found, strict=True))
        return Moment(np.asarray(second), np.asarray(mean), count)

    def _read(self, patch: Patch) -> Moment:
        second, mean, count = self._places[patch]
        return Moment(self._file.get(second), self._file.get(mean), count)

    def close(self) -> None:
        """Give the disk space back; happens by itself when nobody holds the store."""
        self._file.close()


class Taps:
    """A session that yields inner tensors of a model, inputs included.

    Parameters
    ----------
    model : ModelProto
    names : iterable of str
    threads : int
    extra_weights : mapping of str to array, optional
        Initializers beside those that the model holds.
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
        # onnxruntime opens no graph without nodes.
        self._session = (
            open_session(model, threads, inner, extra_weights, optimized=True) if inner else None
        )

    def run(self, feeds: Feeds) -> dict[str, Any]:
        """Return the tensors of one batch; several threads may call it."""
        values = {} if self._session is None else run_session(self._session, feeds)
        return {name: values[name] if name in values else feeds[name] for name in self._names}


@dataclass(frozen=True)
class _Unit:
    model: Shared
    patches: tuple[Patch, ...]
    batches: list[Feeds]


def _add_up(unit: _Unit) -> list[MomentSum]:
    """Sum over a unit's batches, for each of its patches."""
    sums = [MomentSum(patch.groups, patch.size) for patch in unit.patches]
    taps = unit.model.built(Taps, tuple(patch.data for patch in unit.patches), 1)
    for feeds in unit.batches:
        values = taps.run(feeds)
        for patch, total in zip(unit.patches, sums, strict=True):
            for vectors in patch.vectors(values[patch.data]):
                total.add(vectors)
    return sums


def collect_moments(
    model: onnx.ModelProto,
    patches: Iterable[Patch],
    batches: Callable[[], Iterable[Feeds]],
    *,
    pool: Pool,
    cache: Cache | None = None,
    key: str = "",
    limit: int = LIMIT,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MomentStore:
    """Accumulate the second moment of each patch over all batches.

    Parameters
    ----------
    batches : callable
        Gives a fresh iterator over the batches; called once for each group of taps.
    pool : Pool
        Adds a few batches up at a time.
    cache : Cache, optional
        Moments come from there, and go there, by `key`, which stands for model and batches.
    limit : int
        Bytes of sums held by a unit of work; a single larger moment is a group of its own.
    """
    store = MomentStore()
    wanted = []
    for patch in dict.fromkeys(patches):
        found = None if cache is None else cache.get("moment", _patch_key(key, patch))
        if found is None:
            wanted.append(patch)
        else:
            store.put(patch, Moment(found["second"], found["mean"], int(found["count"])))
    groups = _groups(wanted, limit)
    shared = pool.share(model)
    for number, group in enumerate(groups):
        progress(number, len(groups))
        units = (_Unit(shared, tuple(group), part) for part in parts_of(batches()))
        sums: list[MomentSum] = []
        for found_sums in pool.map(_add_up, units, _units_at_a_time(pool, group, limit)):
            for total, more in zip(sums, found_sums, strict=False):
                total.merge(more)
            sums = sums or found_sums
        for patch, total in zip(group, sums, strict=True):
            moment = total.moment()
            store.put(patch, moment)
            if cache is not None:
                count = np.array(moment.count)
                arrays = {"second": moment.second, "mean": moment.mean, "count": count}
                cache.put("moment", _patch_key(key, patch), arrays)
    progress(len(groups), len(groups))
    return store


def parts_of(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Cut batches into units of work, always the same."""
    rest = iter(batches)
    while part := list(itertools.islice(rest, BATCHES_PER_UNIT)):
        yield part


def _patch_key(key: str, patch: Patch) -> str:
    return digest("moment", key, patch, BATCHES_PER_UNIT)


def _units_at_a_time(pool: Pool, patches: Sequence[Patch], limit: int) -> int | None:
    size = sum(8 * patch.groups * patch.size**2 for patch in patches)
    return (
        max(1, min(pool.runs_at_most, ALL_UNITS * limit // (LIMIT * size)))
        if pool.shares_memory
        else None
    )


def _groups(patches: Sequence[Patch], limit: int) -> list[list[Patch]]:
    groups: list[list[Patch]] = []
    room = 0
    for patch in patches:
        size = 8 * patch.groups * patch.size**2
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(patch)
        room -= size
    return groups
