"""The plan: what becomes of each layer. Plain JSON, which can be edited and applied again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cobla_onnx.errors import UsageError

__all__ = ["Decision", "Plan"]


@dataclass(frozen=True)
class Decision:
    """Factorise a layer under `scheme` at `rank`, or keep it whole: both None."""

    layer: str
    scheme: str | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Plan:
    """One decision per layer; layers that are not named are kept whole.

    Examples
    --------
    >>> plan = Plan((Decision("conv1", "channel", 8), Decision("conv2")))
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    decisions: tuple[Decision, ...]

    def to_json(self) -> str:
        """Return the plan as JSON."""
        layers = [
            {"layer": d.layer, "keep": True}
            if d.scheme is None
            else {"layer": d.layer, "scheme": d.scheme, "rank": d.rank}
            for d in self.decisions
        ]
        return json.dumps({"version": 1, "layers": layers}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises
        ------
        UsageError
            If the text is not a plan; the message names the entry.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UsageError(f"plan: is not JSON ({error}); write one with Plan.to_json") from error
        if not isinstance(content, dict) or content.get("version") != 1:
            raise UsageError('plan: has no "version": 1; write one with Plan.to_json')
        layers = content.get("layers")
        if not isinstance(layers, list):
            raise UsageError('plan: has no list "layers"; write one with Plan.to_json')
        plan = cls(tuple(_decision(number, entry) for number, entry in enumerate(layers)))
        names = [decision.layer for decision in plan.decisions]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"plan: layer {twice[0]!r} stands there twice; leave one")
        return plan


def _decision(number: int, entry: Any) -> Decision:
    where = f"plan: layers[{number}]"
    if not isinstance(entry, dict) or not isinstance(entry.get("layer"), str):
        raise UsageError(f'{where}: needs a "layer", the name of a layer')
    if entry.get("keep") is True:
        return Decision(entry["layer"])
    scheme, rank = entry.get("scheme"), entry.get("rank")
    if not isinstance(scheme, str) or not isinstance(rank, int) or isinstance(rank, bool):
        raise UsageError(f'{where}: needs "scheme" and a whole "rank", or "keep": true')
    return Decision(entry["layer"], scheme, rank)
