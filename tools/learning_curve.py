"""How many passes over how many samples are too many, where blocks learn from the original.

    pip install ".[images]"
    python tools/learning_curve.py run curve.jsonl --assets ../shared
    python tools/learning_curve.py table curve.jsonl --write docs/experiments.md

After ranks and refit, blocks learn at one rate for as many passes as a row says, without trials,
from the calibration split; then they are judged on what they learned from, on the samples that are
held back, and on test images that nothing has seen. Rows that are there are not measured again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parent))
import benchmark
import field
from benchmark_tasks import ROOT, TASKS, Bench

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
TASK, MEMORY, RATE = "ResNet-20", 0.3, 3e-3
SAMPLES, PASSES = (256, 1000, 3000), (0, 2, 8, 32)
BEGIN = "<!-- measured by tools/learning_curve.py -->"
END = "<!-- end of what tools/learning_curve.py measured -->"

Row = dict[str, Any]


@dataclass
class Learner:
    """A model after refit, from some samples, and what judges it."""

    bench: Bench
    judge: Any
    replacements: Any

    @classmethod
    def of(cls, samples: int, assets: Path, threads: int) -> Learner:
        """Choose ranks and refit."""
        from cobla_onnx import Budget
        from cobla_onnx.pipeline.search.data import make_factors

        task = next(task for task in TASKS if task.name == TASK)
        bench = Bench(replace(task, calibration=samples), assets, Path(), threads)
        ours = benchmark.prepare(bench, "ours")
        finisher, plan = ours.planned(Budget(mem=MEMORY))
        factors = make_factors(finisher, plan, True)
        return cls(bench, ours.evidence.judge, factors.replacements())

    def rows(self, passes: Sequence[int], varied: bool) -> Iterator[Row]:
        """Let blocks learn, from the same state for each number of passes."""
        from cobla_onnx.distillation.augmentation import Augmentation
        from cobla_onnx.distillation.block_training import BlockTrainer, cuts_of
        from cobla_onnx.distillation.lessons import Lessons, Split, taught_by
        from cobla_onnx.distillation.parameters import Parameters
        from cobla_onnx.runtime.pool import open_pool
        from cobla_onnx.variants.rewrite import rewrite

        how = self.bench.task.augment if varied else None
        augmentation = None if how is None else Augmentation.of(how)
        taught = taught_by(self.judge, augmentation)
        parameters = Parameters(taught.model, self.replacements)
        seen = self.judge.dataset.calibration
        with open_pool(self.bench.threads) as pool:
            lessons = Lessons(self.judge, taught, parameters, pool)
            learned = Lessons(self.judge, taught, parameters, pool, Split(seen, seen))
            cuts, start = cuts_of(lessons), parameters.start()
            for count in passes:
                began, values = time.perf_counter(), start
                if count:
                    state = BlockTrainer(lessons, cuts, start, each=False).cycle(count, RATE)
                    if state is None:
                        raise typer.BadParameter(f"{count} passes explode")
                    values = state.values
                seconds = time.perf_counter() - began
                model = rewrite(self.bench.model, parameters.replacements(values))
                figures = self.bench.figures(model)
                yield {
                    "passes": count,
                    "varied": varied,
                    "seconds": seconds,
                    "learned": float(learned.stated(values).mean()),
                    "held back": float(lessons.stated(values).mean()),
                    **{name: figures[name] for name in ("loss", "agreement", "top1")},
                }


@app.command()
def run(
    results: Path,
    assets: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = ROOT
    / "../shared",
    threads: int = 2,
) -> None:
    """Measure what is not measured yet."""
    for samples in SAMPLES:
        done = {
            (row["passes"], row["varied"])
            for row in benchmark.lines_of(results)
            if row["samples"] == samples
        }
        wanted = {
            varied: [count for count in PASSES if (count, varied) not in done]
            for varied in (False, True)
        }
        if not any(wanted.values()):
            continue
        learner = Learner.of(samples, assets, threads)
        for varied, passes in wanted.items():
            for row in learner.rows(passes, varied):
                benchmark.append(results, {"samples": samples, **row})


@app.command()
def table(results: Path, page: field.Page = None) -> None:
    """Print the table, or put it between the markers of a page."""
    lines = [
        "| samples | passes | loss on those | held back | others | agreement | top-1 | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(
        benchmark.lines_of(results), key=lambda r: (r["samples"], r["varied"], r["passes"])
    ):
        cells = (
            str(row["passes"]),
            *(f"{row[name]:.3f}" for name in ("learned", "held back", "loss")),
            *(f"{row[name]:.1%}" for name in ("agreement", "top1")),
            f"{row['seconds']:.0f}",
        )
        varied = ", varied" if row["varied"] else ""
        lines.append(field.line(f"{row['samples']}{varied}", cells))
    field.publish("\n".join(lines), page, BEGIN, END)


if __name__ == "__main__":
    app()
