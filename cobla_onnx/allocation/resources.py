"""The resources that a budget may limit, one entry for each."""

from __future__ import annotations

from dataclasses import dataclass

from cobla_onnx.wording import option_name

__all__ = ["RESOURCES", "Resource", "known_costs"]


@dataclass(frozen=True)
class Resource:
    """Something that a model costs, added up over its layers, in whole units.

    Attributes
    ----------
    name : str
        In `Budget`, in the costs of layers and curves, in reports, and of the option that limits
        it.
    label : str
        For people.
    nothing : str
        Said of a model of which the cost is 0, so that nothing can be saved.
    unknown : str
        What to do where the cost of the model is not known; empty if it always is.
    counted : bool
        Whether it is counted exactly, and not measured.
    """

    name: str
    label: str
    nothing: str
    unknown: str = ""
    counted: bool = True


RESOURCES = (
    Resource("mem", "memory", "stores no weights"),
    Resource(
        "mac",
        "MACs",
        "does no multiply-accumulate operations that are counted",
        f"the MACs of the model are not known; give {option_name('input_shapes')}",
    ),
    Resource(
        "latency",
        "time",
        "has no layer that takes time",
        "the layers were not timed; use `compress`",
        counted=False,
    ),
)


def known_costs(**costs: int | None) -> dict[str, int]:
    """Return the costs that are known, by the name of the resource.

    Examples
    --------
    >>> known_costs(mem=100, mac=None)
    {'mem': 100}
    """
    return {name: cost for name, cost in costs.items() if cost is not None}
