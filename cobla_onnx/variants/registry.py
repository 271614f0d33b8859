"""All families of variants; a new one is added here."""

from __future__ import annotations

from cobla_onnx.graph.layers import Layer
from cobla_onnx.variants.base import Form, VariantFamily
from cobla_onnx.variants.coded_factors.family import CodedFactorsFamily
from cobla_onnx.variants.low_rank.family import LowRankFamily
from cobla_onnx.variants.low_rank.table_family import LowRankTables
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.storage.family import StorageFamily
from cobla_onnx.variants.storage.rows_family import RowStorageFamily

__all__ = ["FAMILIES", "family_of", "forms_of", "level_of", "require_family", "schemes", "stand_in"]

# By name, in the order in which they propose.
FAMILIES: dict[str, VariantFamily] = {
    family.name: family
    for family in (
        LowRankFamily(),
        StorageFamily(),
        CodedFactorsFamily(),
        LowRankTables(),
        RowStorageFamily(),
    )
}


def family_of(scheme: str) -> VariantFamily | None:
    """Return the family that has a scheme of this name; None if there is none."""
    return next((f for f in FAMILIES.values() if scheme in f.schemes), None)


def schemes() -> tuple[str, ...]:
    """Return the names of all forms of all families."""
    return tuple(name for family in FAMILIES.values() for name in family.schemes)


def require_family(scheme: str) -> VariantFamily:
    """Return the family of a scheme that is known to have one."""
    found = family_of(scheme)
    assert found is not None, scheme
    return found


def level_of(scheme: str) -> str:
    """Return what the levels of a scheme that is known are: ranks or bits."""
    return require_family(scheme).level


def forms_of(layer: Layer) -> dict[str, Form]:
    """Return all forms of all families that apply to a layer, by name."""
    return {form.name: form for family in FAMILIES.values() for form in family.forms(layer)}


def stand_in(layer: Layer, form: Form, level: int) -> Replacement:
    """Return random numbers that take the bytes and the time of a real replacement."""
    return require_family(form.name).stand_in(layer, form, level)
