"""Approximations of layers from calibration data, by whatever family the form belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from cobla_onnx.allocation.problem import Float64
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.layers import Layer
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.variants.base import Approximation, Form, Maker, VariantFamily
from cobla_onnx.variants.registry import require_family

__all__ = ["FromData"]


class FromData:
    """Makes approximations from the statistics of one set of samples.

    Parameters
    ----------
    seen : Seen

    Attributes
    ----------
    key : str
        Identifies the model and the samples.
    importance : mapping of str to float64 array
        Weights of a layer's outputs, by the layer's name.
    """

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._makers: dict[str, Maker] = {}

    @property
    def key(self) -> str:  # noqa: D102
        return self._seen.key

    @property
    def importance(self) -> Mapping[str, Float64]:  # noqa: D102
        return self._seen.importance

    def close(self) -> None:
        """Free the disk space of the statistics."""
        self._seen.close()

    def in_others(
        self, layers: Sequence[Layer], batches: Callable[[], Iterable[Feeds]]
    ) -> FromData:
        """Do the same for some layers on other samples."""
        return FromData(self._seen.in_others(layers, batches))

    def without(self, part: FromData) -> FromData:
        """Do the same for the samples that `part`, made by `in_others`, has not seen."""
        return FromData(self._seen.without(part._seen))

    def maker(self, family: VariantFamily) -> Maker:
        """Return what makes a family's approximations; it may keep what it computes."""
        if family.name not in self._makers:
            # Another thread may have come first.
            self._makers.setdefault(family.name, family.maker(self._seen))
        return self._makers[family.name]

    def approximate(
        self, layer: Layer, form: Form, levels: Sequence[int]
    ) -> Sequence[Approximation]:
        """Return the best approximations of a layer at the given levels."""
        return self.maker(require_family(form.name)).approximate(layer, form, levels)
