"""Measure the network's loss with single layers truncated, at points of their curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cobla_onnx.calibration.evaluation.parallel import SpreadProbe
from cobla_onnx.calibration.evaluation.probe import Pair
from cobla_onnx.graph.layers import Layer
from cobla_onnx.runtime.cache import Arrays, Cache, digest, fetch
from cobla_onnx.variants.base import Form, LayerVariants
from cobla_onnx.variants.from_data import FromData

__all__ = ["Point", "PointLosses"]


@dataclass(frozen=True)
class Point:
    """Levels on one curve of a layer at which the loss is wanted."""

    layer: int
    curve: int
    levels: tuple[int, ...]


class PointLosses:
    """Mean losses on some samples, above that of the original.

    Parameters
    ----------
    variants : sequence of LayerVariants
    from_data : FromData
    probe : SpreadProbe
        Evaluates the loss on samples of the calibration split.
    cache : Cache, optional
        Losses are read from there and stored there, under `key`, which identifies the model
        and the samples and options of the probe.

    Attributes
    ----------
    samples : int
        Samples on which they are measured; known once there is a loss.
    """

    def __init__(
        self,
        variants: Sequence[LayerVariants],
        from_data: FromData,
        probe: SpreadProbe,
        cache: Cache | None = None,
        key: str = "",
    ) -> None:
        self.variants = variants
        self._from_data, self._probe = from_data, probe
        self._cache, self._key = cache, key
        self._floor: float | None = None
        self.samples = 0

    def at(self, points: Sequence[Point]) -> Iterator[list[float]]:
        """Yield the losses at each point."""
        keys = [self._key_of(point) for point in points]
        known = [None if self._cache is None else self._cache.get("loss", key) for key in keys]
        floor = self._least()
        open_points = (point for point, found in zip(points, known, strict=True) if found is None)
        measured = self._probe.mean_losses(map(self._candidates, open_points))
        for key, found in zip(keys, known, strict=True):
            if found is None:
                losses = [max(loss - floor, 0.0) for loss in next(measured)]
                if self._cache is not None:
                    self._cache.put("loss", key, {"losses": np.array(losses)})
            else:
                losses = found["losses"].tolist()
            yield losses

    def _least(self) -> float:
        """Loss of the original, measured once; also sets the number of samples."""
        if self._floor is None:
            found = fetch(
                self._cache, "loss", digest(self._key, "original"), self._measure_original
            )
            self._floor, self.samples = float(found["losses"][0]), int(found["samples"])
        return self._floor

    def _measure_original(self) -> Arrays:
        loss, samples = self._probe.original()
        return {"losses": np.array([loss]), "samples": np.array(samples)}

    def _candidates(self, point: Point) -> tuple[int, list[Pair]]:
        layer, form = self._at(point)
        found = self._from_data.approximate(layer, form, point.levels)
        return point.layer, [(a.weight, a.bias) for a in found]

    def _key_of(self, point: Point) -> str:
        if self._cache is None:
            return ""
        layer, form = self._at(point)
        return digest(self._key, layer.name, form, point.levels)

    def _at(self, point: Point) -> tuple[Layer, Form]:
        variants = self.variants[point.layer]
        return variants.layer, variants.forms[point.curve]
