"""Plans near the chosen one are others, and within its budget."""

from __future__ import annotations

from itertools import islice

import numpy as np

from cobla_onnx import Budget


def test_neighbours_differ_and_keep_the_budget(tools, tmp_path):
    neighbours, tasks = tools("neighbours"), tools("benchmark_tasks")
    digits = next(task for task in tasks.TASKS if task.name == "digits")
    bench = tasks.Bench(digits, tmp_path, tmp_path, threads=1)
    bench.calibration = bench.calibration[:40]
    ours = tools("benchmark").prepare(bench, "ours")
    constraints = ours.analysis.constraints(Budget(mem=0.4))
    found = list(islice(neighbours.plans(ours, constraints, 3, 0.5), 4))
    assert len(set(found)) == 4
    whole = ours.analysis.mem_total
    for choices in found:
        saved = 0
        for decision in ours.analysis.plan(choices).decisions:
            if decision.scheme is not None:
                layer, scheme, rank = ours.analysis.resolve(decision)
                saved += layer.stored_bytes - 4 * rank * scheme.params_per_rank()
        assert whole - saved <= 0.4 * whole


def test_a_bench_measures_on_other_images_and_keeps_its_own(tools, tmp_path):
    neighbours, tasks = tools("neighbours"), tools("benchmark_tasks")
    digits = next(task for task in tasks.TASKS if task.name == "digits")
    bench = tasks.Bench(digits, tmp_path, tmp_path, threads=1)
    other = neighbours.with_images(bench, bench.calibration[:30])
    assert other.figures(bench.model)["samples"] == 30
    assert len(bench.expected) == len(bench.test) == 400
    np.testing.assert_array_equal(other.outputs(bench.model), other.expected)
