"""Layers by what they lose for each byte that they give: a table, and a CSV for ``--exclude``."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cobla_onnx.report.amounts import count_text
from cobla_onnx.text import short_names

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["COLUMNS", "LayerSensitivity", "LeverLoss", "Sensitivity"]

COLUMNS = (
    "layer", "op", "bytes", "ranks_loss_per_mb", "ranks_loss", "ranks_saved", "ranks",
    "bits_loss_per_mb", "bits_loss", "bits_saved", "bits",
)  # fmt: skip


@dataclass(frozen=True)
class LeverLoss:
    """What one lever loses where a layer gives a set share of its bytes.

    Attributes
    ----------
    variant : str
        The way that loses least, such as ``channel 12``.
    loss : float
        Predicted.
    saved : int
        Bytes that the layer gives.
    per_megabyte : float
        Loss for each million of them.
    """

    variant: str
    loss: float
    saved: int
    per_megabyte: float


@dataclass(frozen=True)
class LayerSensitivity:
    """A layer, and what it loses by each lever; None where that lever has nothing for it."""

    name: str
    op: str
    bytes: int
    ranks: LeverLoss | None
    bits: LeverLoss | None


@dataclass(frozen=True)
class Sensitivity:
    """Layers by the loss for each byte by ranks, most first; those without ranks are last.

    Attributes
    ----------
    measured_by : {'weights', 'loss'}
        Whether losses are squared relative errors of the weights, which are no measure of quality,
        or, with data, losses of the network that follow from those measured for each layer alone.
    samples : int
        Samples on which they were measured; 0 without data.
    kept : dict of str to float
        For ``ranks`` and ``bits``, the share of its bytes that each layer keeps at most.
    layers : tuple of LayerSensitivity
    """

    measured_by: Literal["weights", "loss"]
    samples: int
    kept: dict[str, float]
    layers: tuple[LayerSensitivity, ...]

    def to_csv(self) -> str:
        """Return a CSV row for each layer; its first column is what ``--exclude @FILE`` takes."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for layer in self.layers:
            cells = [*_csv_cells(layer.ranks), *_csv_cells(layer.bits)]
            writer.writerow([layer.name, layer.op, layer.bytes, *cells])
        return text.getvalue()

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
        table.add_column("layer", overflow="fold", min_width=12)
        table.add_column("bytes", justify="right", no_wrap=True)
        for lever in ("ranks", "bits"):
            table.add_column(f"loss/MB by {lever}", justify="right", no_wrap=True)
            table.add_column("as", no_wrap=True)
        names = short_names([layer.name for layer in self.layers], 28)
        for layer in self.layers:
            cells = (*_cells(layer.ranks), *_cells(layer.bits))
            table.add_row(Text(names[layer.name]), count_text(layer.bytes), *cells)
        return Group(table, *map(Text, self._legend()))

    def _legend(self) -> list[str]:
        shares = (
            f"where a layer keeps at most {self.kept['ranks']:g} of its bytes by ranks, "
            f"or {self.kept['bits']:g} by bits"
        )
        if self.measured_by == "loss":
            return [
                "loss/MB: predicted loss for each million bytes that the layer alone saves,",
                f"{shares}; from {self.samples} samples",
            ]
        return [
            "loss/MB: squared relative error of the weight for each million bytes saved,",
            shares,
            "weight errors say little of the answers; --data says more",
        ]


def _csv_cells(found: LeverLoss | None) -> list[object]:
    if found is None:
        return [""] * 4
    return [found.per_megabyte, found.loss, found.saved, found.variant]


def _cells(found: LeverLoss | None) -> tuple[str, str]:
    return ("-", "") if found is None else (f"{found.per_megabyte:.2g}", found.variant)
