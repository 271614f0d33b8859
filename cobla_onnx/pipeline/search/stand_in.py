"""A model under a plan before anything is computed for it: what it takes, its numbers at random."""

from __future__ import annotations

import onnx

from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.eight_bits import spared_outputs, stand_in_eight_bits
from cobla_onnx.plan import Plan
from cobla_onnx.variants.registry import stand_in
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.rewrite import rewrite
from cobla_onnx.variants.writing import Storage, Writing

__all__ = ["stand_in_model", "stand_ins"]


def stand_ins(
    model: onnx.ModelProto, analysis: Analysis, plan: Plan, storage: Storage = "auto"
) -> list[Replacement]:
    """Return what replaces the layers of a plan, with random numbers, as it is written."""
    writing = Writing.into(model, storage)
    chosen = [d for d in plan.decisions if d.scheme is not None]
    return [stand_in(*analysis.resolve(d)).written(writing) for d in chosen]


def stand_in_model(
    model: onnx.ModelProto,
    analysis: Analysis,
    plan: Plan,
    storage: Storage = "auto",
    *,
    eight_bits: bool = False,
    head: int = 0,
) -> onnx.ModelProto:
    """Return a model of the bytes and the running time that a model has under a plan.

    Parameters
    ----------
    model : ModelProto
        The original; it is what is returned where nothing changes.
    analysis : Analysis
    plan : Plan
    storage : {'auto', 'cast', 'qdq'}
        How fewer bits are written.
    eight_bits : bool
        Whether its nodes compute in 8 bits, in ranges of no meaning.
    head : int
        Nodes from the first on that stay in floating point beside these.
    """
    replaced = stand_ins(model, analysis, plan, storage)
    made = rewrite(model, replaced) if replaced else model
    if not eight_bits:
        return made
    return stand_in_eight_bits(made, spared_outputs(model, analysis), head)
