"""Follow data into the branches of Ifs: where all samples take the same, it stands in its place.

Moments, losses and gradients are then those of a model without the If. What is written keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx

from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.graph.inventory import Inventory, Layer, Reason, Skipped
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.settling import branching, settled
from cobla_onnx.graph.subgraph import prefix
from cobla_onnx.graph.tensors import tensor_array
from cobla_onnx.runtime.session import Feeds, open_session, run_session
from cobla_onnx.text import quoted
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.rewrite import rewrite

__all__ = ["Followed", "follow", "taken_branches"]

# Conditions may depend on how many samples run together.
TOGETHER, BATCHES = 8, 2


@dataclass(frozen=True)
class Followed:
    """A model, and the same one as the data sees it.

    Attributes
    ----------
    original : ModelProto
        What is written, with other weights; see `opening.opened`.
    model : ModelProto
        Without the Ifs whose branch is known: what layers are found in and measured on.
    taken : dict of str to bool
        Whether the condition of an If holds, by its first output.
    saved : int
        Bytes that were stored more than once, and are not any more.
    """

    original: onnx.ModelProto
    model: onnx.ModelProto
    taken: Mapping[str, bool] = field(default_factory=dict)
    saved: int = 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of all weights, those of the other branches included."""
        return stored_bytes(self.original)

    @cached_property
    def inventory(self) -> Inventory:
        """Layers of the model, and why nodes are skipped, those of the other branches included."""
        found = find_layers(self.model)
        if not self.taken:
            return found
        layers, skipped = [], list(found.skipped)
        named = {item.name for item in skipped}
        matched = set()
        for layer in found.layers:
            its = self._as_written(layer)
            matched.add(its.name)
            if len(its.uses) == len(layer.uses):
                layers.append(layer)
            else:
                detail = "shared with a branch that the data never takes"
                skipped.append(
                    Skipped(its.name, layer.op, Reason.NOT_FOLLOWED, detail, layer.params)
                )
        whole = find_layers(self.original)
        skipped += [
            Skipped(layer.name, layer.op, Reason.NEVER_RUN, "", layer.params)
            for layer in whole.layers
            if layer.name not in matched
        ]
        skipped += [item for item in whole.skipped if item.name not in named]
        return Inventory(tuple(layers), tuple(skipped))

    def for_writing(self, replacements: Sequence[Replacement]) -> list[Replacement]:
        """Replacements of the same layers where they stand in the original."""
        if not self.taken:
            return list(replacements)
        return [replace(each, layer=self._as_written(each.layer)) for each in replacements]

    def rewritten(self, replacements: Sequence[Replacement]) -> onnx.ModelProto:
        """Return the original with these replacements; itself if there are none."""
        made = self.for_writing(replacements)
        return rewrite(self.original, made) if made else self.original

    def as_seen(self, written: onnx.ModelProto) -> onnx.ModelProto:
        """Return what is written as the data sees it."""
        return settled(written, self.taken) if self.taken else written

    @property
    def notes(self) -> tuple[str, ...]:
        """Say which branches are taken."""
        names = {node.output[0]: node.name for node in self.original.graph.node if node.output}
        return tuple(
            f"all samples take the {'then' if taken else 'else'} branch of "
            f"{quoted(names.get(output) or output)}: layers of the other one stay whole"
            for output, taken in self.taken.items()
        )

    @cached_property
    def _written(self) -> dict[str, Layer]:
        layers = find_layers(self.original).layers
        return {use.output: layer for layer in layers for use in layer.uses}

    def _as_written(self, layer: Layer) -> Layer:
        return self._written[layer.uses[0].output]


def follow(model: onnx.ModelProto, dataset: Dataset | None, threads: int) -> Followed:
    """Find out which branches all samples take; without samples, none is known."""
    if dataset is None or not branching(model):
        return Followed(model, model)

    def batches() -> Iterable[Feeds]:
        samples = sorted((*dataset.calibration, *dataset.selection))
        yield from dataset.batches(samples, 1)
        yield from dataset.batches(samples[: TOGETHER * BATCHES], TOGETHER)

    taken = taken_branches(model, batches, threads)
    return Followed(model, settled(model, taken) if taken else model, taken)


def taken_branches(
    model: onnx.ModelProto, batches: Callable[[], Iterable[Feeds]], threads: int
) -> dict[str, bool]:
    """Conditions of Ifs that may hold layers and are the same for all batches.

    Those of Ifs in a branch are looked at once the branch is known.

    Returns
    -------
    dict of str to bool
        By the first output of the If.
    """
    taken: dict[str, bool] = {}
    seen: set[str] = set()
    current = model
    while True:
        wanted = {out: name for out, name in branching(current).items() if out not in seen}
        if not wanted:
            return taken
        seen.update(wanted)
        values = _values(current, set(wanted.values()), batches, threads)
        known = {out: values[name] for out, name in wanted.items() if len(values[name]) == 1}
        if not known:
            return taken
        taken.update((out, next(iter(value))) for out, value in known.items())
        current = settled(model, taken)


def _values(
    model: onnx.ModelProto,
    names: Iterable[str],
    batches: Callable[[], Iterable[Feeds]],
    threads: int,
) -> dict[str, set[bool]]:
    """All values that conditions have over batches."""
    stored = {t.name: t for t in model.graph.initializer}
    found: dict[str, set[bool]] = {name: set() for name in sorted(names)}
    for name in found.keys() & stored.keys():
        found[name].add(_truth(tensor_array(stored[name], f"condition {quoted(name)}")))
    computed = prefix(model, [name for name in found if name not in stored])
    session = open_session(computed, threads, optimized=True) if computed.graph.output else None
    read = {value.name for value in computed.graph.input} - stored.keys()
    for feeds in batches():
        given = {name: value for name, value in feeds.items() if name in read}
        values = {**feeds, **({} if session is None else run_session(session, given))}
        for name in found.keys() - stored.keys():
            found[name].add(_truth(values[name]))
    return found


def _truth(value: np.ndarray) -> bool:
    return bool(np.asarray(value).all())
