"""Part of a problem of allocation: some of its layers, with some of their curves and levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cobla_onnx.allocation.objective import OutputError, SeparableError
from cobla_onnx.allocation.problem import Choice, LayerCurves, VariantCurve

__all__ = ["Subproblem"]


@dataclass(frozen=True)
class Subproblem:
    """Layers that are left of a whole problem, and where they and their curves stand in it.

    Layers of which no curve is left are not in it: they stay whole.

    Attributes
    ----------
    layers : tuple of LayerCurves
    places : tuple of int
        Of each layer, its index in the whole problem.
    numbers : tuple of tuple of int
        Of each curve of each layer, its number in the layer of the whole problem.
    """

    layers: tuple[LayerCurves, ...]
    places: tuple[int, ...]
    numbers: tuple[tuple[int, ...], ...]

    @classmethod
    def keeping(
        cls, whole: Sequence[LayerCurves], wanted: Callable[[VariantCurve], bool]
    ) -> Subproblem:
        """Keep the curves that are wanted, with all their levels."""
        kept = [
            replace(layer, curves=tuple(curve for curve in layer.curves if wanted(curve)))
            for layer in whole
        ]
        return cls.found_in(whole, [layer for layer in kept if layer.curves])

    @classmethod
    def found_in(cls, whole: Sequence[LayerCurves], layers: Sequence[LayerCurves]) -> Subproblem:
        """Find layers in the whole problem by their names, and curves by their schemes."""
        index = {layer.name: place for place, layer in enumerate(whole)}
        places = tuple(index[layer.name] for layer in layers)
        numbers = []
        for place, layer in zip(places, layers, strict=True):
            number = {curve.scheme: k for k, curve in enumerate(whole[place].curves)}
            numbers.append(tuple(number[curve.scheme] for curve in layer.curves))
        return cls(tuple(layers), places, tuple(numbers))

    def losses(self, whole: SeparableError) -> SeparableError:
        """Return the losses of the curves that are left."""
        return OutputError(
            [
                [whole.curve(place, number) for number in numbers]
                for place, numbers in zip(self.places, self.numbers, strict=True)
            ]
        )

    def choices(
        self, found: Sequence[Choice | None], whole: Sequence[LayerCurves]
    ) -> tuple[Choice | None, ...]:
        """Return choices of this problem as choices of the whole one."""
        choices: list[Choice | None] = [None] * len(whole)
        for place, numbers, choice in zip(self.places, self.numbers, found, strict=True):
            if choice is not None:
                choices[place] = replace(choice, curve=numbers[choice.curve])
        return tuple(choices)
