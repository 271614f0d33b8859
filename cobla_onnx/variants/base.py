"""What may take the place of a layer's weight: the interface that all variants share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from cobla_onnx.allocation import LayerCurves, VariantCurve
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.allocation.resources import known_costs
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.inventory import Refusal
from cobla_onnx.graph.layers import Layer
from cobla_onnx.graph.macs import Shape
from cobla_onnx.runtime.cache import Cache
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.replacement import Replacement

if TYPE_CHECKING:
    from cobla_onnx.calibration.statistics import Seen
    from cobla_onnx.variants.low_rank.ranks import RankRule

__all__ = [
    "Approximate",
    "Approximation",
    "Asked",
    "Candidate",
    "ErrorUnit",
    "Form",
    "LayerCosts",
    "LayerVariants",
    "Maker",
    "Measured",
    "OnlyForm",
    "Proposal",
    "Refitted",
    "VariantFamily",
]


class Form(Protocol):
    """One way in which a layer's weight may be replaced, at any of its levels.

    Its family says what a level is: for low rank, forms are matricisations and levels ranks.
    """

    @property
    def name(self) -> str:
        """Name in plans and reports; it belongs to one family alone."""
        ...


@dataclass(frozen=True)
class OnlyForm:
    """The form of a family that has no other."""

    name: str


@dataclass(frozen=True)
class Asked:
    """What a person asked of the variants.

    Attributes
    ----------
    scheme : {'auto', 'spatial', 'channel', 'input'}
        Which matricisations of convolutions to consider.
    ranks : RankRule
        Which ranks to consider.
    bits : tuple of int
        In how many bits weights may be stored; none for as they are.
    computed : tuple of str
        Operators that will compute in 8 bits, whose weights are stored so then, and not in `bits`.
    """

    scheme: str
    ranks: RankRule
    bits: tuple[int, ...] = ()
    computed: tuple[str, ...] = ()

    def of(self, layer: Layer) -> Asked:
        """Return what is asked for one layer."""
        single = layer.type == layer.stored_type == TensorProto.FLOAT
        return replace(self, bits=()) if single and layer.op in self.computed else self


@dataclass(frozen=True)
class LayerCosts:
    """What a family must know of a model to count the costs of a layer's variants.

    Attributes
    ----------
    macs : int or None
        MACs of the whole layer over all its uses; None where they are not known.
    shapes : mapping of str to Shape
        Of the model's tensors, as far as known.
    folding : bool
        Whether weights may be made from what is stored when a session opens where that is no
        slower, which gives up what a variant saves of MACs.
    quick : bool
        Whether what is likely to be slower than the layer is left out, where it cannot be made so.
    """

    macs: int | None
    shapes: Mapping[str, Shape]
    folding: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Proposal:
    """A form of a layer, with the levels from which the allocation may choose.

    Attributes
    ----------
    form : Form
    levels : int64 array, shape (candidates,)
        Ascending, each at least 1; a higher one loses less and costs more.
    most : int
        Level at which nothing would be lost.
    """

    form: Any
    levels: NDArray[np.int64]
    most: int


@dataclass(frozen=True)
class Candidate:
    """A layer with what is proposed for it, before any error is known.

    Attributes
    ----------
    layer : Layer
    costs : LayerCosts
    proposals : tuple of Proposal
        Of all families, one family after the other.
    refusal : Refusal
        Why there are none; None if there are some, or if no family said why.
    """

    layer: Layer
    costs: LayerCosts
    proposals: tuple[Proposal, ...]
    refusal: Refusal | None = None

    def curves(self, curves: Sequence[VariantCurve]) -> LayerCurves:
        """Return curves of the proposals beside the costs of the whole layer."""
        whole = known_costs(mem=self.layer.stored_bytes, mac=self.costs.macs)
        return LayerCurves(self.layer.name, whole, tuple(curves))


@dataclass(frozen=True)
class LayerVariants:
    """A layer with the cost and the loss of all that may become of it.

    Attributes
    ----------
    layer : Layer
    macs : int or None
        MACs of the whole layer over all its uses; None where they are not known.
    curves : LayerCurves
    forms : tuple of Form
        In the order of the curves.
    """

    layer: Layer
    macs: int | None
    curves: LayerCurves
    forms: tuple[Form, ...]


class Approximation(Protocol):
    """A weight that is close to a layer's own, and its bias.

    That is all that losses, gradients and the comparison of candidates see of a variant.
    """

    @property
    def weight(self) -> NDArray[Any]:
        """The weight, shape ``layer.shape``."""
        ...

    @property
    def bias(self) -> Float64 | None:
        """The bias, corrected to keep the mean of the output; None leaves it as it is.

        From calibration data it is there wherever the layer has a bias of its own.
        """
        ...


class Refitted(Approximation, Protocol):
    """An approximation that can be given another bias."""

    def with_bias(self, bias: Float64) -> Refitted:
        """Return the same weight with another bias."""
        ...


Approximate: TypeAlias = "Callable[[Layer, Form, Sequence[int]], Sequence[Approximation]]"
"""Returns approximations of a layer under a form at the given levels."""


class Maker(Protocol):
    """Makes a family's approximations from the statistics of one set of samples."""

    def approximate(
        self, layer: Layer, form: Any, levels: Sequence[int]
    ) -> Sequence[Approximation]:
        """Return the best approximations at the given levels."""
        ...


@dataclass(frozen=True)
class Measured:
    """Result of an `ErrorUnit`: an entry for each proposal, and the cache's notes.

    Attributes
    ----------
    errors : list of (float64 array, shape (most + 1,), or None)
        Squared relative error at levels 0 to `Proposal.most`, descending to 0, and infinite at
        those that cannot be written, which drops them; None if it cannot be measured, or written
        at no level, which drops the proposal.
    spectra : list of (float64 array or None)
        Singular values, descending, where the family has any.
    notes : list of str
    """

    errors: list[Float64 | None]
    spectra: list[Float64 | None]
    notes: list[str]


class ErrorUnit(Protocol):
    """A unit of work that measures the errors of a layer's proposals; it can be pickled."""

    def measure(self) -> Measured:
        """Measure all levels of all proposals."""
        ...


class VariantFamily(Protocol):
    """A kind of variant: what it proposes, what that costs and loses, and how it is written.

    Methods with a body here are defaults that a family may leave as they are.

    Attributes
    ----------
    name : str
    level : str
        What a level is called in plans and messages, such as ``rank``.
    outcome : str
        What a report says of a layer that it replaces, such as ``factorised``.
    schemes : tuple of str
        Names of all its forms; no other family has one of them.
    refits : bool
        Whether it has a `refit`.
    needs_bits : bool
        Whether it proposes only what was asked for in fewer bits.
    """

    name: str
    level: str
    outcome: str
    schemes: tuple[str, ...]
    refits: bool
    needs_bits: bool = False

    def forms(self, layer: Layer) -> Sequence[Form]:
        """Return all forms that apply to a layer, also those that save nothing."""
        ...

    def most(self, layer: Layer, form: Any) -> int:
        """Return the level at which nothing is lost."""
        ...

    def check_level(self, layer: Layer, form: Any, level: int | None) -> int:
        """Return a level that a plan gives, if there is such a one.

        Raises
        ------
        UsageError
            If there is not.
        """
        most = self.most(layer, form)
        if level is None or not 1 <= level <= most:
            raise UsageError(
                f"plan: layer {layer.name!r} has {self.level}s 1 to {most}, not {level}"
            )
        return level

    def propose(
        self, layer: Layer, costs: LayerCosts, asked: Asked
    ) -> Sequence[Proposal] | Refusal:
        """Propose at least one form and level at which the layer costs less; else say why not."""
        ...

    def curve(
        self,
        layer: Layer,
        costs: LayerCosts,
        proposal: Proposal,
        errors: Float64,
        spectrum: Float64 | None,
    ) -> VariantCurve:
        """Put costs and errors of a proposal together for the allocation."""
        ...

    def params(self, layer: Layer, form: Any, level: int) -> int:
        """Count the numbers that are stored in place of the weight."""
        ...

    def macs(self, layer: Layer, form: Any, level: int, costs: LayerCosts) -> int | None:
        """Count the MACs over all uses, as the level is written; None where they are not known."""
        ...

    def can_fold(self, layer: Layer, form: Any) -> bool:
        """Whether its replacements have an `as_folded`."""
        return False

    def folds(self, layer: Layer, form: Any, level: int, costs: LayerCosts) -> bool:
        """Whether a level is written folded."""
        return False

    def unit(
        self,
        layer: Layer,
        proposals: Sequence[Proposal],
        weight: Carried,
        cache: Cache | None,
        maker: Any,
    ) -> ErrorUnit:
        """Collect the input for measuring errors: of the outputs or, without `maker`, the weight.

        Parameters
        ----------
        maker : Maker or None
            One of this family's own.
        """
        ...

    def maker(self, seen: Seen) -> Maker:
        """Make approximations from calibration data."""
        ...

    def from_weights(
        self, layer: Layer, form: Any, level: int, weight: NDArray[Any], cache: Cache | None
    ) -> Approximation:
        """Approximate a weight without data; this may happen in a worker."""
        ...

    def refit(
        self,
        layer: Layer,
        form: Any,
        level: int,
        weight: Float64,
        second: Float64,
        importance: Float64 | None,
    ) -> Refitted:
        """Approximate a weight that was fitted to the inputs after compression, without a bias.

        It is asked of families alone that say so (`refits`).

        Parameters
        ----------
        weight : float64 array, shape ``layer.shape``
        second : float64 array, shape (groups, size, size)
            Second moment, or covariance, of these inputs.
        importance : float64 array, shape (groups * outputs,), optional
            How much the squared error of each output counts.
        """
        message = f"family {self.name!r} has no refit"
        raise NotImplementedError(message)

    def replace(self, layer: Layer, form: Any, approximation: Any) -> Replacement:
        """Turn one of this family's approximations into what is stored, and its nodes.

        Raises
        ------
        ModelError
            If a number overflows the type in which it is stored.
        """
        ...

    def stand_in(self, layer: Layer, form: Any, level: int) -> Replacement:
        """Return random numbers that take the bytes and the time of a real replacement."""
        ...

    def allowed(
        self, layer: Layer, form: Any, levels: NDArray[np.int64], costs: LayerCosts, ranks: RankRule
    ) -> NDArray[np.int64]:
        """Return those of the levels that a rule for ranks allows."""
        return levels
