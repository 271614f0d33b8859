"""Find the smallest model that is good enough: a search over budgets on one analysis."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from numbers import Real

import scipy

from cobla_onnx.allocation import Budget
from cobla_onnx.calibration.data.evidence import all_alike
from cobla_onnx.calibration.evaluation.quality import Quality
from cobla_onnx.errors import BudgetError, UsageError
from cobla_onnx.pipeline.budget_errors import explain
from cobla_onnx.pipeline.session import Session, Solution
from cobla_onnx.text import numbered, quoted
from cobla_onnx.wording import either, option_name

__all__ = ["check_max_drop", "smallest"]

# Numbers of budgets tried over the whole range, and then between the two around the answer.
COARSE, FINE = 5, 4


@dataclass(frozen=True)
class _Trial:
    """A memory budget, and the quality that was reached under it."""

    mem: float
    quality: Quality


@dataclass
class _Search:
    """Budgets tried so far; of the solutions only the best is kept."""

    session: Session
    limits: Budget
    max_drop: float
    expected: int
    trials: list[_Trial] = field(default_factory=list)
    best: tuple[_Trial, Solution] | None = None

    def good(self, mem: float) -> bool:
        """Try a budget; it fails if it cannot be met together with the other limits."""
        self.session.notify(f"search: memory {mem:.3f}", len(self.trials), self.expected)
        try:
            solution = self.session.solve(replace(self.limits, mem=mem))
        except BudgetError:
            return False
        assert solution.calibration is not None
        trial = _Trial(mem, solution.calibration.quality)
        self.trials.append(trial)
        if trial.quality.drop > self.max_drop:
            return False
        if self.best is None or mem < self.best[0].mem:
            self.best = trial, solution
        return True


def check_max_drop(max_drop: float) -> None:
    """Check that max_drop lies in [0, 1).

    Raises
    ------
    UsageError
    """
    if not isinstance(max_drop, Real) or not 0 <= max_drop < 1:
        raise UsageError(
            f"{option_name('max_drop', max_drop)}: is not a fraction from 0 up to 1; write e.g. "
            f"{either(python='0.01', command='1% or 0.01')}"
        )


def smallest(session: Session, max_drop: float, limits: Budget | None = None) -> Solution:
    """Find the smallest memory whose quality on the selection split drops by at most `max_drop`.

    A few budgets over the whole range are tried first, then the gap below the smallest one
    that was good enough is halved. Quality need not be monotone in memory, so the answer is the
    smallest budget that was tried and found good enough, never an interpolated one. Samples that
    are all alike cannot tell what is lost: then nothing is saved beyond the limits.

    Parameters
    ----------
    session : Session
        Must have data.
    max_drop : float
        Drop of accuracy or agreement, as a fraction of samples, or relative error of outputs.
    limits : Budget, optional
        Further limits that must be met.

    Raises
    ------
    BudgetError
        If the limits cannot be met, or no model that was tried is both smaller than the
        original and good enough.
    UsageError
        If there is no data.
    """
    check_max_drop(max_drop)
    if session.evidence is None:
        raise UsageError(
            f"{option_name('max_drop')}: is measured on samples; give {option_name('data')} too"
        )
    hard = limits or Budget(mem=1.0)
    alike = all_alike(session.evidence.dataset)
    if alike:
        return _unjudged(session.solve(hard), max_drop, alike, limits)
    high = 1.0 if hard.mem is None else hard.mem
    low = session.least_memory()
    if low >= 1.0:
        cause = f"{option_name('max_drop', max_drop)}: the model cannot be made smaller"
        error = BudgetError(cause, {"mem": 1.0}, "let more layers be compressed")
        raise explain(error, session.written, session.analysis, session.settings, session.rule)
    if low > high:
        # The usual error names the least of the model's layers, which in 8 bits is an estimate.
        session.solve(replace(hard, mem=high))
        low = high
    # The upper end is the original itself, unless other limits apply.
    free = hard == Budget(mem=1.0)
    # The sum may round to above the upper end.
    steps = (min(high, low + (high - low) * k / COARSE) for k in range(1, COARSE + (not free)))
    grid = list(dict.fromkeys(steps))
    search = _Search(session, hard, max_drop, len(grid) + FINE)
    passed = [mem for mem in grid if search.good(mem)]
    if not passed and not free:
        raise _refusal(max_drop, search, limits)
    above = min(passed, default=high)
    below = max([mem for mem in grid if mem < above], default=low)
    for _ in range(FINE if below < above else 0):
        middle = (below + above) / 2
        below, above = (below, middle) if search.good(middle) else (middle, above)
    session.notify("search", search.expected, search.expected)
    if search.best is None:
        raise _refusal(max_drop, search, limits)
    return _noting(*search.best, max_drop, search.trials, limits)


def _unjudged(solution: Solution, max_drop: float, alike: str, limits: Budget | None) -> Solution:
    """Say why a solution is no smaller than its limits: any model would look good."""
    assert solution.allocation is not None
    note = (
        f"--max-drop {max_drop:g}: {alike}, so that nothing can be judged by them; the model is "
        "no smaller than it must be; give samples of the real kind"
    )
    return replace(solution, allocation=solution.allocation.noting(note), budget=limits)


def _noting(
    best: _Trial,
    solution: Solution,
    max_drop: float,
    trials: list[_Trial],
    limits: Budget | None,
) -> Solution:
    quality = best.quality
    note = (
        f"--max-drop {max_drop:g}: {quality.measure} {quality.after:.4g} (of the original "
        f"{quality.before:.4g}) on {quality.counted}, the smallest of "
        f"{numbered(len(trials), 'budget')} tried"
    )
    worse = [trial for trial in trials if trial.mem < best.mem]
    if worse:
        next_one = max(worse, key=lambda trial: trial.mem)
        note += f"; memory {next_one.mem:.3f} would lose {next_one.quality.drop:.4g}"
    allocation = solution.allocation
    assert allocation is not None
    allocation = allocation.noting(note)
    if quality.measure == "agreement":
        allocation = allocation.noting(
            f"a true drop of up to {_upper_bound(quality):.2g} can look like that on "
            f"{quality.samples} samples (95 %), and the search took the best; measure on others"
        )
    step = 1 / (quality.positions or quality.samples)
    if quality.measure != "relative error" and 0 < max_drop < step:
        allocation = allocation.noting(
            f"one of {quality.counted} is {step:.2g}: a drop of {max_drop:g} cannot be told "
            "from none, give more data"
        )
    return replace(solution, allocation=allocation, budget=limits)


def _upper_bound(quality: Quality) -> float:
    """Upper end of Clopper and Pearson's one-sided 95 % interval for a proportion."""
    wrong = round(quality.drop * quality.samples)
    if wrong >= quality.samples:
        return 1.0
    return float(scipy.special.betaincinv(wrong + 1, quality.samples - wrong, 0.95))


def _refusal(max_drop: float, search: _Search, limits: Budget | None) -> BudgetError:
    trials = search.trials
    limited = "" if limits is None else " within the limits"
    if not trials:
        return BudgetError(
            f"{option_name('max_drop', max_drop)}: no budget below the original can be "
            f"met{limited}; raise the limits, or let more layers be compressed"
        )
    best = min(trials, key=lambda trial: trial.quality.drop)
    quality = best.quality
    settled = _settled(quality)
    return BudgetError(
        f"{option_name('max_drop', max_drop)}: no smaller model keeps it{limited}; of "
        f"{len(trials)} budgets tried the best, memory {best.mem:.3f}, loses {quality.drop:.4g} of "
        f"{quality.measure} on {quality.counted}; raise {option_name('max_drop')}, or give more "
        f"data{settled}"
    )


def _settled(quality: Quality) -> str:
    """Advice on how to declare an output whose kind is not known."""
    if not quality.undecided:
        return ""
    name = quality.output
    option = either(
        python=f"outputs={{{name!r}: 'classes'}} or 'values'",
        command=f"--output {name}=classes or =values",
    )
    return f"; {quoted(name)} is held to be both classes and values, {option} settles it"
