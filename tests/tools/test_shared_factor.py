"""The least errors with shared first factors, against cases of which the answer is known."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest


@pytest.fixture
def tool(tools):
    return tools("shared_factor")


def product(tool, weight, price=1.0, data="x"):
    return tool.Measured(data, weight, np.eye(len(weight))[None], price)


def at(points, numbers):
    return float(np.interp(numbers, *np.transpose(points)))


def test_all_ways_to_group(tool):
    found = list(tool.partitions("abc"))
    assert len(found) == 5
    assert all(sorted(chain.from_iterable(groups)) == list("abc") for groups in found)


def test_a_hull_has_no_point_below_it(tool):
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.random((30, 2))]
    corners = tool.hull(points)
    least = min(y for _, y in points)
    assert corners[-1][1] == least
    assert all(y >= at(corners, x) - 1e-12 for x, y in points)


def test_sums_of_hulls_are_the_least_sums(tool):
    first, second = [(0.0, 4.0), (1.0, 1.0), (3.0, 0.0)], [(0.0, 2.0), (2.0, 0.0)]
    found = tool.added([first, second])
    assert found == [(0.0, 6.0), (1.0, 3.0), (3.0, 1.0), (5.0, 0.0)]


def test_weights_with_one_row_space_share_it_without_loss(tool):
    generator = np.random.default_rng(1)
    base = generator.normal(size=(24, 4))
    members = [product(tool, base @ generator.normal(size=(4, 24))) for _ in range(3)]
    shared = 4 * (24 + 3 * 24)
    apart = tool.added([tool.error_hull([each]) for each in members])
    assert at(tool.best_hull(members), shared) == pytest.approx(0, abs=1e-9)
    assert at(apart, shared) > 1


def test_sharing_is_never_worse_than_not(tool):
    rng = np.random.default_rng(2)
    members = [product(tool, rng.normal(size=(12, 12)), price) for price in (1.0, 5.0, 0.1)]
    apart = tool.added([tool.error_hull([each]) for each in members])
    best = tool.best_hull(members)
    assert all(at(best, x) <= y + 1e-9 for x, y in apart)


def test_a_table_has_a_gain_for_each_share(tool):
    rng = np.random.default_rng(3)
    base = rng.normal(size=(24, 4))
    pair = [product(tool, base @ rng.normal(size=(4, 24))) for _ in range(2)]
    alone = product(tool, rng.normal(size=(24, 24)), data="y")
    rows = tool.table([*pair, alone]).splitlines()
    assert len(rows) == 2 + 6
    gains = [float(cell.strip(" %")) for cell in rows[4].split("|")[2:-1]]
    assert len(gains) == len(tool.SHARES)
    assert max(gains) > 0
    assert min(gains) >= 0
    assert tool.table([alone]) == "No two products read the same tensor."
