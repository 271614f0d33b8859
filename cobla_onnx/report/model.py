"""The report of a compression: what was decided and measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cobla_onnx.calibration.evaluation.outputs import OutputComparison
from cobla_onnx.calibration.evaluation.quality import Quality
from cobla_onnx.distillation.record import Distillation
from cobla_onnx.report.arithmetic import ArithmeticReport
from cobla_onnx.report.costs import Cost, Sizes
from cobla_onnx.report.serialise import Exported
from cobla_onnx.text import finite

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cobla_onnx.allocation.bound import Front
    from cobla_onnx.allocation.sqp import Step

__all__ = [
    "BudgetUse",
    "CalibrationReport",
    "Forecast",
    "LatencyReport",
    "LayerLatency",
    "LayerReport",
    "Report",
    "SolverReport",
    "Spectrum",
    "Spread",
]


@dataclass(frozen=True)
class BudgetUse:
    """A budget: its limit (a fraction, None if not set), the fraction reached, absolute costs."""

    limit: float | None
    reached: float | None
    before: int | None
    after: int | None


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a layer, thinned out for drawing.

    Attributes
    ----------
    scheme : str
        The scheme under which the weight was unfolded.
    ranks : tuple of int
        Indices of these singular values, starting with 1.
    values : tuple of float
        Relative to the largest; singular values of the weight or, with data, of the output.
    """

    scheme: str
    ranks: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    ``decision`` is ``whole`` (considered), ``skipped``, or what was done to it, such as
    ``factorised`` or ``stored in fewer bits``. ``rank`` is that of its factors, None if it has
    none; ``bits`` are those of each number that is stored, None for as the model has them.
    ``folded``: the factors are multiplied out when a session opens, so that the layer has the MACs
    that it had. ``predicted_loss`` is what the objective has for the layer alone, before refit;
    None if it was not computed.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    decision: str
    scheme: str | None
    rank: int | None
    full_rank: int | None
    params: Cost
    macs: Cost
    error: float | None
    reason: str
    spectrum: Spectrum | None = None
    bits: int | None = None
    folded: bool = False
    predicted_loss: float | None = None

    @property
    def replaced(self) -> bool:
        """Whether the layer is not as it was."""
        return self.decision not in ("whole", "skipped")


@dataclass(frozen=True)
class SolverReport:
    """The certificate of the allocation.

    ``value`` is the objective reached, ``lower_bound`` a bound that no choice within the
    budgets can beat, ``gap`` their relative distance. ``multipliers`` are the prices of
    the budgets: how much the objective falls per unit by which the fraction is raised.
    ``fronts`` bound the objective at every fraction, each budget taken alone.
    """

    name: str
    objective: str
    value: float
    lower_bound: float | None
    gap: float | None
    multipliers: dict[str, float]
    relaxed_value: float | None = None
    kkt_residual: float | None = None
    iterations: int = 0
    variables: int = 0
    fronts: dict[str, Front] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """Result of the verification.

    Attributes
    ----------
    data : str
        Source of the inputs; ``random`` says little about real data.
    samples : int
    rewrite_max_error : float
        Largest difference between a layer's factor nodes and its node with the same
        dense weight, relative to the layer's largest output.
    network_error : float or None
        The same for the model's outputs, as relative L2 norm; None if all dense weights
        together would take too much memory.
    outputs : tuple of OutputComparison
    notes : tuple of str
    """

    data: str
    samples: int
    rewrite_max_error: float
    network_error: float | None
    outputs: tuple[OutputComparison, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rival:
    """Another answer to a budget, besides that of the allocation.

    Attributes
    ----------
    origin : str
        The round or nearby problem that it solves; ``weights alone`` uses no data.
    gain : float or None
        Mean decrease, over the samples, of the loss that decisions follow; None if one of the
        two has no finite loss.
    standard_error : float or None
        Of the gain, over the paired samples; None if not known.
    samples : int
        Their number: all, under factors that were made without them, or the held-back ones.
    taken : bool
        Whether it replaced the allocation's answer.
    """

    origin: str
    gain: float | None
    standard_error: float | None
    samples: int
    taken: bool


@dataclass(frozen=True)
class CalibrationReport:
    """The calibration data that was used, and the losses measured with it.

    Attributes
    ----------
    source : str
    calibration_samples, selection_samples : int
        Samples that made the factors, and samples held back to choose and to verify.
    outputs : dict of str to str
        How each output is compared with the original's: a kind of `autodiff.measures.Measure`,
        such as ``logits`` (Kullback-Leibler divergence) or ``mse`` (relative to the power).
    loss, loss_before_refit : float
        On the selection split.
    quality : Quality
        Accuracy, agreement or relative error, on the selection split.
    refitted : int
        Layers whose refit was kept.
    probe_samples : int
        Samples on which layers were truncated one at a time.
    candidates : tuple of (float or None)
        Losses on the selection split of the allocations that were compared, before refit, None
        where they are not finite; the loss is the one that decisions follow (a divergence at a
        temperature, see `soften`).
    temperatures : dict of str to float
        Temperatures of the divergence that decisions follow, by the name of the output.
    rivals : tuple of Rival
        Other answers that came close enough to be compared with the allocation's own.
    distillation : Distillation or None
        None if it was not asked for.
    """

    source: str
    calibration_samples: int
    selection_samples: int
    outputs: dict[str, str]
    loss: float
    loss_before_refit: float
    quality: Quality
    refitted: int = 0
    probe_samples: int = 0
    candidates: tuple[float | None, ...] = ()
    temperatures: dict[str, float] = field(default_factory=dict)
    rivals: tuple[Rival, ...] = ()
    distillation: Distillation | None = None


@dataclass(frozen=True)
class Spread:
    """Times in milliseconds: their median, 10th and 90th percentile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerLatency:
    """Time of a layer run alone, in milliseconds, before and after."""

    name: str
    before_ms: float
    after_ms: float


@dataclass(frozen=True)
class LatencyReport:
    """Measured time of one run in onnxruntime, the two models in turn.

    Attributes
    ----------
    threads : int
    provider : str
    repeats : int
        Runs of each model.
    before_ms, after_ms : Spread
    ratio : float
        Of the medians, and its 95 % interval `ratio_low` to `ratio_high`.
    predicted_ratio : float or None
        Predicted by the table of layer times, before it was corrected; None without a table.
    layers : tuple of LayerLatency
        The ten slowest layers of the original that could be compressed.
    """

    threads: int
    provider: str
    repeats: int
    before_ms: Spread
    after_ms: Spread
    ratio: float
    ratio_low: float
    ratio_high: float
    predicted_ratio: float | None
    layers: tuple[LayerLatency, ...]


@dataclass(frozen=True)
class Forecast:
    """What the separable programme predicts for the same budget; nothing was measured for it.

    Attributes
    ----------
    predicted : float
        Least objective where layers may also be stored in fewer bits (``--precision auto``).
    ranks_alone : float
        Least objective by ranks, under the same model of the loss.
    """

    predicted: float
    ranks_alone: float


@dataclass(frozen=True)
class Report(Exported):
    """What was decided and measured. `to_dict` documents the JSON's keys by its fields.

    Examples
    --------
    >>> from cobla_onnx import Budget, compress
    >>> report = compress("models/digits.onnx", Budget(mem=0.5)).report
    >>> report.budget["mem"].reached <= report.budget["mem"].limit
    True
    >>> report.layers[0].name, report.verification.data
    ('stem/conv', 'random')
    """

    input: str | None
    output: str | None
    budget: dict[str, BudgetUse]
    layers: tuple[LayerReport, ...]
    solver: SolverReport | None
    verification: Verification | None
    calibration: CalibrationReport | None
    seconds: float
    seed: int
    threads: int
    unchanged: bool
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    latency: LatencyReport | None = None
    provider: str = "CPUExecutionProvider"
    machine: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    history: tuple[Step, ...] = ()
    sizes: Sizes = field(default_factory=Sizes)
    forecast: Forecast | None = None
    arithmetic: ArithmeticReport | None = None

    @property
    def has_bits(self) -> bool:
        """Whether any layer is stored in fewer bits."""
        return any(layer.bits is not None for layer in self.layers)

    @property
    def layer_counts(self) -> str:
        """How many layers were compressed, and how, in words."""
        considered = sum(layer.decision != "skipped" for layer in self.layers)
        kinds = Counter(layer.decision for layer in self.layers if layer.replaced)
        what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        total = sum(kinds.values())
        if len(kinds) == 1:
            return f"{total} of {considered} layers {next(iter(kinds))}"
        return f"{total} of {considered} layers compressed{': ' if kinds else ''}{what}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts and lists."""
        result = {"schema_version": self.schema_version, **asdict(self)}
        for layer in result["layers"]:
            layer["shape"] = list(layer["shape"])
        result["layers"] = list(result["layers"])
        result["notes"] = list(self.notes)
        for step in result["history"]:
            # The loss may be NaN at a relaxed step, which JSON cannot express.
            step["loss"] = finite(step["loss"])
        result["history"] = list(result["history"])
        if self.verification is not None:
            result["verification"]["outputs"] = list(result["verification"]["outputs"])
        if self.latency is not None:
            result["latency"]["layers"] = list(result["latency"]["layers"])
        return result

    def to_html(self) -> str:
        """Return the report as one self-contained HTML page."""
        from cobla_onnx.report.html import to_html

        return to_html(self)

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        from cobla_onnx.report.markdown import to_markdown

        return to_markdown(self)

    def __rich__(self) -> RenderableType:
        from cobla_onnx.report.terminal import render

        return render(self)

    def _repr_html_(self) -> str:
        """Show the page in a notebook, in its own frame, so that its style stays inside."""
        from cobla_onnx.report.html import to_frame

        return to_frame(self)
