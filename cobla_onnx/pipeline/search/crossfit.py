"""Cross-fitting: the loss of a plan on all samples, each under factors made without it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cobla_onnx.allocation.paired import PairedGain, paired_gain
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.distillation.distil import LEAST_HALF, Part
from cobla_onnx.distillation.lessons import Split
from cobla_onnx.graph.layers import Layer
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.pipeline.search.refit import replacements_for
from cobla_onnx.plan import Plan
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.variants.base import Approximate, Approximation, Form
from cobla_onnx.variants.from_data import FromData

__all__ = ["CrossFit"]

# The held-back samples and two halves.
PARTS = 3


@dataclass
class CrossFit:
    """The halves of the calibration split, each judged under the factors of the other.

    After Chernozhukov et al. 2018, Double/debiased machine learning, definition 3.1. The
    held-back samples are judged under the factors of the whole calibration split. A layer's
    statistics on each half are collected when a plan first factorises it, and kept for later plans.

    Parameters
    ----------
    finisher : Finisher
    """

    finisher: Finisher
    _made: list[tuple[frozenset[str], Sequence[FromData]]] = field(default_factory=list)
    _probes: list[Probe] = field(default_factory=list)
    _losses: dict[tuple[Plan, int], Float64] = field(default_factory=dict)

    def by(self, finisher: Finisher) -> CrossFit:
        """Return it for another budget: statistics of the halves depend on the layers alone."""
        return replace(self, finisher=finisher)

    @property
    def halves(self) -> tuple[Sequence[int], Sequence[int]]:
        """Samples of the calibration split at even places, and at odd places."""
        made = self.finisher.judge.dataset.calibration
        return made[::2], made[1::2]

    @property
    def is_possible(self) -> bool:
        """Whether the halves are large enough to mean anything."""
        return min(map(len, self.halves)) >= LEAST_HALF

    def gain(self, before: Plan, after: Plan) -> PairedGain:
        """Compare two plans, part by part, as long as the second is ahead on the samples so far."""
        for parts in range(1, PARTS + 1):
            found = paired_gain(self.losses(before, parts), self.losses(after, parts))
            if found.mean <= 0:
                break
        return found

    def losses(self, plan: Plan, parts: int = PARTS) -> Float64:
        """Loss that decisions follow, for each sample of the first parts, before refit.

        The parts are the held-back samples, then both halves.
        """
        for number in range(parts):
            if (plan, number) not in self._losses:
                losses = self._on_half(plan, number - 1) if number else self._held_back(plan)
                self._losses[plan, number] = losses
        return np.concatenate([self._losses[plan, number] for number in range(parts)])

    def parts(self, plan: Plan, refit: bool) -> list[Part]:
        """Make a plan's replacements from each half, for the other one to judge.

        There are none if the halves are too small to mean anything.

        Parameters
        ----------
        refit : bool
            Whether they are refitted, to their half; which refits are kept, the held-back samples
            decide, as they do for all of them.
        """
        if not self.is_possible:
            return []
        if plan.factors == "data":
            self._collect({d.layer for d in plan.decisions if d.scheme is not None})
        return [self._part(plan, refit, number) for number in range(len(self.halves))]

    def _part(self, plan: Plan, refit: bool, number: int) -> Part:
        learned, judged = self.halves[number], self.halves[1 - number]
        chosen = self.finisher.chosen(plan, self._of_half(number))
        made: Sequence[Approximation] = [entry.approximation for entry in chosen]
        if refit and plan.factors == "data":
            made, _ = self.finisher.refitted_to(learned, chosen, "refit to a half")
        return Part(Split(learned, judged), replacements_for(chosen, made))

    def _held_back(self, plan: Plan) -> Float64:
        found = self.finisher.held_back(plan)
        # Sessions hold the memory of their largest run: one is open at a time.
        self.finisher.judge.followed.rest()
        return found

    def _on_half(self, plan: Plan, number: int) -> Float64:
        self._collect({d.layer for d in plan.decisions if d.scheme is not None})
        if not self._probes:
            for half in self.halves:
                self._probes.append(self.finisher.judge.on(half))
                self._probes[-1].rest()
        probe = self._probes[number]
        found = probe.losses(self.finisher.weights(plan, self._of_half(1 - number)))
        probe.rest()
        return found

    def _collect(self, names: set[str]) -> None:
        missing = names.difference(*(known for known, _ in self._made))
        layers = [layer for layer in self.finisher.analysis.layers if layer.name in missing]
        if layers:
            whole = self.finisher.analysis.from_data
            assert whole is not None
            first = whole.in_others(layers, self._first_half)
            self._made.append((frozenset(missing), (first, whole.without(first))))

    def _first_half(self) -> Iterable[Feeds]:
        return self.finisher.judge.batches(self.halves[0])

    def _of_half(self, number: int) -> Approximate:
        def approximate(layer: Layer, form: Form, levels: Sequence[int]) -> Sequence[Approximation]:
            halves = next(halves for names, halves in self._made if layer.name in names)
            return halves[number].approximate(layer, form, levels)

        return approximate
