"""The plan: what becomes of each layer. Plain JSON, which can be edited and applied again."""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from cobla_onnx.errors import UsageError
from cobla_onnx.graph.io.model_file import write_atomically
from cobla_onnx.text import quoted, safe_text
from cobla_onnx.variants.coded_factors.form import coded_name, split_name
from cobla_onnx.variants.storage.precision import FORMATS
from cobla_onnx.wording import either

__all__ = ["Decision", "FactorsFrom", "Plan"]

FactorsFrom: TypeAlias = Literal["data", "weights"]
# How messages name what writes a plan.
PLAN_OUT = either(python="Plan.save()", command="--plan-out")
# The second one has numbers of bits; plans without them are still written as the first.
VERSIONS = (1, 2)


@dataclass(frozen=True)
class Decision:
    """Replace a layer's weight, or keep it whole: `scheme` and `rank` are None.

    Attributes
    ----------
    layer : str
    scheme : str or None
        Such as ``channel`` for two factors, ``channel@4`` for two factors in 4 bits, ``stored`` for
        a weight and ``rows`` for a table in fewer bits.
    rank : int or None
        Of the factors; with ``stored`` and ``rows``, the number of bits.
    folded : bool
        Whether factors are multiplied out when a session opens: the layer then computes what it
        did, and takes as long.

    Raises
    ------
    UsageError
        If a field is none of its type, or there is a scheme without a rank, or a rank without one.
    """

    layer: str
    scheme: str | None = None
    rank: int | None = None
    folded: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str):
            raise UsageError(f'plan: "layer" is {_json(self.layer)}; write the name of a layer')
        where = f"plan: layer {quoted(self.layer)}"
        if not isinstance(self.scheme, str | None):
            raise UsageError(f'{where}: "scheme" is {_json(self.scheme)}; write the name of one')
        _check_switch(where, "folded", self.folded)
        if self.rank is not None:
            # As JSON has it, too: of another type of numbers, or 8.0.
            object.__setattr__(self, "rank", _level_of(where, "rank", self.rank))
        if (self.scheme is None) != (self.rank is None):
            raise UsageError(f'{where}: needs "scheme" and "rank", or neither to keep it whole')

    @property
    def bits(self) -> int | None:
        """Bits in which each number of the layer is stored; None: as the model has them."""
        if self.scheme is None:
            return None
        return self.rank if _level(self.scheme) == "bits" else split_name(self.scheme)[1]


@dataclass(frozen=True)
class Plan:
    """One decision per layer; layers that are not named are kept whole.

    Attributes
    ----------
    decisions : tuple of Decision
    factors : {'data', 'weights'}
        What factors are made to keep: what layers give on the data, where there are any, or
        the weights themselves whatever is given.

    Raises
    ------
    UsageError
        If a field is none of its type, or a layer is listed twice.

    Examples
    --------
    >>> plan = Plan((Decision("conv1", "channel", 8), Decision("conv2")))
    >>> Plan.from_json(plan.to_json()) == plan
    True

    Ranks may be edited, and the plan applied again:

    >>> from dataclasses import replace
    >>> from cobla_onnx import Budget, compress
    >>> plan = compress("models/digits.onnx", Budget(mem=0.5)).plan
    >>> kept = [replace(d, scheme=None, rank=None) for d in plan.decisions if d.layer == "hidden"]
    >>> edited = Plan(tuple(d for d in plan.decisions if d.layer != "hidden") + tuple(kept))
    >>> compress("models/digits.onnx", plan=edited).plan == edited
    True
    """

    decisions: tuple[Decision, ...]
    factors: FactorsFrom = "data"

    def __post_init__(self) -> None:
        if not isinstance(self.decisions, tuple | list):
            kind = type(self.decisions).__name__
            raise UsageError(f"plan: its decisions are a {kind}; give a tuple of Decision")
        object.__setattr__(self, "decisions", tuple(self.decisions))
        for number, decision in enumerate(self.decisions):
            if not isinstance(decision, Decision):
                kind = type(decision).__name__
                raise UsageError(f"plan: decisions[{number}] is a {kind}; give a Decision")
        if not isinstance(self.factors, str) or self.factors not in get_args(FactorsFrom):
            allowed = ", ".join(get_args(FactorsFrom))
            raise UsageError(f'plan: "factors" is {_json(self.factors)}; allowed are {allowed}')
        counted = Counter(decision.layer for decision in self.decisions)
        twice = sorted(name for name, count in counted.items() if count > 1)
        if twice:
            raise UsageError(f"plan: layer {quoted(twice[0])} is listed twice; leave one")

    @property
    def bits(self) -> tuple[int, ...]:
        """Numbers of bits that some layer is stored in, ascending; those alone that there are."""
        return tuple(sorted({d.bits for d in self.decisions if d.bits in FORMATS} - {None}))

    def to_json(self) -> str:
        """Return the plan as JSON."""
        layers = [
            {"layer": d.layer, "keep": True}
            if d.scheme is None
            else {"layer": d.layer, **_written(d)}
            for d in self.decisions
        ]
        # Readers of the first version do not know bits, and have to say so.
        head: dict[str, Any] = {"version": 2 if any("bits" in entry for entry in layers) else 1}
        if self.factors != "data":
            head["factors"] = self.factors
        return json.dumps({**head, "layers": layers}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; ``plan.schema.json`` in this package says what it may hold.

        Raises
        ------
        UsageError
            If the text is not a plan; the message names the entry, the field, and what is
            allowed there.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"plan: is not JSON ({error}); write one with {PLAN_OUT}") from error
        if not isinstance(content, dict) or _whole(content.get("version")) not in VERSIONS:
            raise UsageError(f'plan: has no "version" of 1 or 2; write one with {PLAN_OUT}')
        _check_names("plan", content, ("$schema", "version", "factors", "layers"))
        layers = content.get("layers")
        if not isinstance(layers, list):
            raise UsageError(f'plan: has no list "layers"; write one with {PLAN_OUT}')
        decisions = tuple(_decision(number, entry) for number, entry in enumerate(layers))
        return cls(decisions, content.get("factors", "data"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically.

        Raises
        ------
        WriteError
            If it cannot be written.
        """
        write_atomically(path, (self.to_json() + "\n").encode())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a file.

        Raises
        ------
        UsageError
            If it cannot be read or is not a plan; the message names the file.
        """
        shown = safe_text(os.fspath(path), 300)
        try:
            # Some editors write a byte-order mark first.
            return cls.from_json(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{shown}: cannot be read ({error}); check the path") from error
        except UsageError as error:
            raise UsageError(f"{shown}: {error.message}") from error


def _check_names(where: str, entry: dict[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(entry) - set(known))
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise UsageError(f"{where}: there is no field {quoted(unknown[0])}; {hint}")


def _decision(number: int, entry: Any) -> Decision:
    where = f"plan: layers[{number}]"
    if not isinstance(entry, dict) or not isinstance(entry.get("layer"), str):
        raise UsageError(f'{where}: needs a "layer", the name of a layer')
    where += f", {quoted(entry['layer'])}"
    scheme, keep = entry.get("scheme"), entry.get("keep", False)
    level = _level(scheme)
    folded = entry.get("folded", False)
    # Whole weights have no factors to fold.
    known = ("layer", "keep", "scheme", level, *(("folded",) if level == "rank" else ()), "bits")
    _check_names(where, entry, tuple(dict.fromkeys(known)))
    _check_switch(where, "keep", keep)
    _check_switch(where, "folded", folded)
    if "scheme" in entry and scheme not in _schemes():
        allowed = ", ".join(_schemes())
        raise UsageError(f'{where}: "scheme" is {_json(scheme)}; allowed are {allowed}')
    if "bits" in entry:
        _check_bits(where, entry["bits"])
    rank = _level_of(where, level, entry[level]) if level in entry else None
    if keep:
        return Decision(entry["layer"])
    if scheme is None or rank is None:
        raise UsageError(f'{where}: needs "scheme" and "{level}", or "keep": true')
    if level != "bits" and "bits" in entry:
        scheme = coded_name(scheme, int(entry["bits"]))
    return Decision(entry["layer"], scheme, rank, folded)


def _written(decision: Decision) -> dict[str, Any]:
    """Fields of a decision to replace a layer; the bits of two factors stand beside their rank."""
    scheme = decision.scheme or ""
    plain, bits = split_name(scheme)
    fields: dict[str, Any] = {"scheme": plain, _level(scheme): decision.rank}
    if bits is not None:
        fields["bits"] = bits
    return {**fields, "folded": True} if decision.folded else fields


def _check_switch(where: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UsageError(f'{where}: "{name}" is {_json(value)}; write true or false')


def _level_of(where: str, name: str, value: Any) -> int:
    """Return a rank or a number of bits, which `name` says."""
    level = _whole(value)
    if level is None or level < 1:
        raise UsageError(f'{where}: "{name}" is {_json(value)}; write a whole number of at least 1')
    return level


def _check_bits(where: str, bits: Any) -> None:
    if _whole(bits) not in FORMATS:
        allowed = ", ".join(map(str, FORMATS))
        raise UsageError(f'{where}: "bits" is {_json(bits)}; allowed are {allowed}')


def _schemes() -> list[str]:
    """Return the schemes that a plan may name; bits stand in a field of their own."""
    # Loaded late, see `_level`.
    from cobla_onnx.variants.registry import schemes

    return [scheme for scheme in schemes() if split_name(scheme)[1] is None]


def _level(scheme: Any) -> str:
    """Return what a level of a scheme is called, ``rank`` for low rank."""
    # Loaded when a plan is read or written: the families bring onnxruntime and more.
    from cobla_onnx.variants.registry import family_of

    found = family_of(scheme) if isinstance(scheme, str) else None
    return "rank" if found is None else found.level


def _whole(value: Any) -> int | None:
    """Return a number that is whole, as JSON has it: 3.0 is, true is not; else None."""
    if isinstance(value, bool) or not isinstance(value, Integral | float):
        return None
    # Neither infinity nor NaN, which Python's reader takes, is one.
    return int(value) if isinstance(value, Integral) or value.is_integer() else None


def _json(value: Any) -> str:
    return safe_text(json.dumps(value, default=repr), 60)
