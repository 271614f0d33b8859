"""What a report says of the nodes that compute in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

from cobla_onnx.calibration.evaluation.quality import Quality

__all__ = ["ArithmeticReport"]


@dataclass(frozen=True)
class ArithmeticReport:
    """Nodes that compute in 8 bits, and what that loses on the samples held back.

    Attributes
    ----------
    nodes : int
        Nodes with stored weights that compute in 8 bits.
    carried : int
        Nodes between them without a weight, that go with them.
    left : tuple of str
        Nodes that could, and compute in floating point, by name or else by what they write: those
        where that takes back much of the loss, and those that would be slower.
    ranges : str
        How ranges of activations follow from the calibration samples; ``dynamic`` where every run
        takes those of its own numbers.
    biases : int
        How many take back what 8 bits change on average; 0 where that gains nothing.
    candidates : dict of str to (float or None)
        Losses on the selection split of all that was compared; None where one is not finite.
    reduced : bool
        Whether weights are rounded to 7 bits, since sums of products saturate on this processor.
    loss_before, loss : float
        On the selection split, before and after: of the model in floating point, and of the result.
    quality_before, quality : Quality
    """

    nodes: int
    carried: int
    left: tuple[str, ...]
    ranges: str
    biases: int
    candidates: dict[str, float | None]
    reduced: bool
    loss_before: float
    loss: float
    quality_before: Quality
    quality: Quality

    @property
    def text(self) -> str:
        """All of it in a sentence or two."""
        nodes = f"{self.nodes} of {self.nodes + len(self.left)} nodes with weights"
        before, after = self.quality_before, self.quality
        reduced = ", weights in 7 bits, as sums saturate on this processor" if self.reduced else ""
        biases = f", {self.biases} biases corrected" if self.biases else ""
        ranges = "of each run" if self.ranges == "dynamic" else f"by {self.ranges}"
        # Outputs that may be classes or values are told by what lost most, which need not be one.
        also = "" if after.measure == before.measure else f"{after.measure} "
        return (
            f"8-bit arithmetic: {nodes}, and {self.carried} between them; ranges {ranges}"
            f"{biases}{reduced}; loss on those held back {self.loss_before:.4g} before, "
            f"{self.loss:.4g} after; {before.measure} {before.after:.4g} before, "
            f"{also}{after.after:.4g} after"
        )
