"""Result of `advise`: what each lever would lose at a handful of budgets, and what to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cobla_onnx.report.amounts import count_text, elsewhere_text
from cobla_onnx.report.serialise import Exported
from cobla_onnx.text import safe_text, short_names

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Advice", "LayerShare", "Outlook", "Suggestion"]


@dataclass(frozen=True)
class Outlook:
    """What a budget is predicted to lose, by the lever that meets it; None where it cannot.

    Attributes
    ----------
    resource : {'mem', 'mac'}
    kept : float
        The fraction to keep at most.
    ranks, bits, both : float or None
        With low rank alone, with storage in fewer bits alone, and with the choice of either, or of
        factors in fewer bits, for each layer. Of bounds from below: rounding to whole ranks loses
        a little more.
    """

    resource: Literal["mem", "mac"]
    kept: float
    ranks: float | None
    bits: float | None
    both: float | None


@dataclass(frozen=True)
class LayerShare:
    """A layer that loses much of what a suggested budget loses: the share, and its bytes."""

    name: str
    share: float
    bytes: int


@dataclass(frozen=True)
class Suggestion:
    """A command that is worth running, and why; `predicted` is its loss, where there is one."""

    command: str
    reason: str
    predicted: float | None = None


@dataclass(frozen=True)
class Advice(Exported):
    """Result of `advise`.

    Attributes
    ----------
    input : str or None
        The file.
    mem_total : int
        Bytes of all weights.
    mac_total : int or None
        Multiply-accumulates of one run; None if they are not known.
    bytes_by_operator, macs_by_operator : dict of str to int
        Of layers that can be compressed, most first; no MACs where they are not known.
    elsewhere : dict of str to int
        Bytes of weights that cannot be compressed, by the operator that reads them.
    measured_by : {'weights', 'loss'}
        Whether outlooks are sums of squared relative errors of the weights, which are no measure
        of quality, or, with data, losses of the network measured layer by layer.
    samples : int
        Samples on which the losses were measured; 0 without data.
    outlooks : tuple of Outlook
    limiting : tuple of LayerShare
        Where the first suggested budget loses most; empty without data.
    suggestions : tuple of Suggestion
    notes : tuple of str
    """

    input: str | None
    mem_total: int
    mac_total: int | None
    bytes_by_operator: dict[str, int]
    macs_by_operator: dict[str, int]
    elsewhere: dict[str, int]
    measured_by: Literal["weights", "loss"]
    samples: int
    outlooks: tuple[Outlook, ...]
    limiting: tuple[LayerShare, ...]
    suggestions: tuple[Suggestion, ...]
    notes: tuple[str, ...]

    def commands(self) -> str:
        """Return the commands that are worth running, each with its reason, for people.

        They stand beside the table: a terminal must not break them into lines, since they are
        copied.
        """
        return "".join(
            f"\n{safe_text(each.command, 300)}\n    {each.reason}" for each in self.suggestions
        )

    def __rich__(self) -> RenderableType:
        return _render(self)


def _render(found: Advice) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    above = [_held("memory", found.mem_total, found.bytes_by_operator, "can be compressed")]
    # Biases are in every model, and negligible.
    if sum(found.elsewhere.values()) > found.mem_total / 100:
        above.append(_held("of it", sum(found.elsewhere.values()), found.elsewhere, "cannot"))
    if found.mac_total is not None:
        above.append(_held("MACs", found.mac_total, found.macs_by_operator, "can be cut"))
    if not found.outlooks:
        above.append("`cobla-onnx inspect` tells why, node by node")
        return Group(*map(Text, above), *map(Text, _notes(found)))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("budget", no_wrap=True)
    for heading in ("ranks", "bits", "both"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in found.outlooks:
        losses = (each.ranks, each.bits, each.both)
        table.add_row(f"--{each.resource} {each.kept:g}", *map(_loss_text, losses))
    below = ["", *_legend(found)]
    if found.limiting:
        names = short_names([each.name for each in found.limiting], 28)
        parts = [f"{names[each.name]} {each.share:.0%}" for each in found.limiting]
        below.append(f"at the first command most of the loss is in {', '.join(parts)}")
    below.extend(_notes(found))
    return Group(*map(Text, [*above, ""]), table, *map(Text, below))


def _notes(found: Advice) -> list[str]:
    return [f"note: {safe_text(note, 300)}" for note in found.notes]


def _loss_text(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.2g}"


def _held(what: str, total: int, parts: dict[str, int], verdict: str) -> str:
    return f"{what}: {count_text(total)}; {elsewhere_text(parts) or 'nothing'} {verdict}"


def _legend(found: Advice) -> list[str]:
    if found.measured_by == "weights":
        return [
            "predicted: squared relative errors of the weights, summed over layers; this says",
            "little of the answers, --data says more",
        ]
    return [
        f"predicted: loss against the original on {found.samples} samples, measured by layer",
        "and summed, before refit; ranks: --precision keep, both: --precision auto",
    ]
