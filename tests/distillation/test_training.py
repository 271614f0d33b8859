"""Adam finds what it is to find, and steps that explode are undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.distillation import passes
from cobla_onnx.distillation.adam import Adam
from cobla_onnx.distillation.passes import learn
from cobla_onnx.distillation.training import MOST_UNDONE, Trainer, one_cycle


@dataclass
class Bowl:
    """Squared distance from a point that differs a little from sample to sample.

    Gradients of the steps in `spoilt` are not finite; so are losses farther away than `cliff`.
    """

    samples: int = 64
    spoilt: frozenset[int] = frozenset()
    cliff: float = np.inf
    asked: int = 0
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self._points = (np.ones(5) + 0.1 * rng.standard_normal((self.samples, 5))).astype("f")

    def gradient(self, values: np.ndarray, chosen: Sequence[int]) -> tuple[float, np.ndarray]:
        self.asked += 1
        self.seen.append(tuple(chosen))
        apart = values - self._points[list(chosen)]
        found = (2 * apart.mean(axis=0)).astype(np.float32)
        if self.asked in self.spoilt:
            found[0] = np.nan
        return float(np.square(apart).sum(axis=1).mean()), found

    def held_back(self, values: np.ndarray) -> np.ndarray:
        apart = np.square(values - np.linspace(0.9, 1.1, 20)[:, None]).sum(axis=1)
        return np.where(apart < self.cliff, apart, np.inf)


def trainer(bowl: Bowl, **options) -> Trainer:
    start = np.full(5, 2.0, np.float32)
    return Trainer(bowl, start, np.full(5, 2.0, np.float32), **options)


def test_a_cycle_gets_there_and_the_best_state_is_remembered():
    made = trainer(Bowl())
    made.cycle("one", made.first, 40, 0.03)
    assert made.best.loss < 0.02 * made.first.loss
    np.testing.assert_allclose(made.best.values, 1, atol=0.1)
    assert made.gain.mean > 0
    assert made.best.loss == min(point.held_back for point in made.checkpoints if point.held_back)
    assert made.passes == 40
    assert made.steps == 80


def test_every_sample_is_seen_once_in_a_pass_and_orders_differ():
    bowl = Bowl()
    made = trainer(bowl)
    made.cycle("one", made.first, 2, 0.01)
    passes_seen = [bowl.seen[0] + bowl.seen[1], bowl.seen[2] + bowl.seen[3]]
    assert [sorted(order) for order in passes_seen] == [list(range(64))] * 2
    assert passes_seen[0] != passes_seen[1]


def test_a_gradient_that_is_not_finite_is_undone_with_half_of_the_rate():
    made = trainer(Bowl(spoilt=frozenset([5])))
    state = made.cycle("one", made.first, 30, 0.03)
    assert made.undone == 1
    assert np.isfinite(state.values).all()
    assert made.best.loss < 0.1 * made.first.loss


def test_gradients_that_are_never_finite_end_at_the_start():
    made = trainer(Bowl(spoilt=frozenset(range(1000))))
    assert made.cycle("one", made.first, 30, 0.03) is made.first
    assert made.undone == MOST_UNDONE + 1
    assert made.best is made.first


def test_a_state_that_exploded_is_undone():
    """At this rate the first pass is thrown far beyond the cliff."""
    made = trainer(Bowl(cliff=40.0))
    made.cycle("one", made.first, 30, 10.0)
    assert made.undone > 0
    assert np.isfinite(made.best.losses).all()
    assert made.best.loss <= made.first.loss


def test_the_rate_is_tried_and_one_that_explodes_is_not_taken():
    made = trainer(Bowl())
    rate = learn(made, 16)
    assert rate in passes.RATES
    assert made.best.loss < made.first.loss
    worse = trainer(Bowl(spoilt=frozenset(range(1, 5))))
    assert learn(worse, 8) < passes.RATES[0]


def test_cycles_get_longer_as_long_as_they_gain():
    made = trainer(Bowl())
    learn(made, "auto")
    stages = [point.stage for point in made.checkpoints]
    first, second = stages.count("cycle 1"), stages.count("cycle 2")
    assert first * made.steps_of_pass >= passes.FIRST_STEPS
    assert second == 2 * first


def test_an_interrupt_keeps_the_best_so_far():
    class Interrupted(Bowl):
        def gradient(self, values, chosen):
            if self.asked == 50:
                raise KeyboardInterrupt
            return super().gradient(values, chosen)

    made = trainer(Interrupted())
    learn(made, 100)
    assert made.steps == 50
    assert made.best.loss < made.first.loss


@given(st.floats(0, 0.99))
def test_the_rate_rises_for_a_tenth_and_then_falls(done):
    assert 0 < one_cycle(done) <= 1
    assert one_cycle(0.1) == pytest.approx(1)
    if done >= 0.1:
        assert one_cycle(done + 0.01) < one_cycle(done)
    elif done <= 0.09:
        assert one_cycle(done + 0.01) > one_cycle(done)


@given(st.integers(0, 5), st.floats(-3, 3), st.floats(-3, 3))
def test_the_first_step_is_the_rate_times_the_size_whatever_the_units(seed, of_loss, of_values):
    rng = np.random.default_rng(seed)
    gradient = (10**of_loss * rng.standard_normal(7)).astype(np.float32)
    sizes = np.full(7, 10**of_values, np.float32)
    step = Adam(sizes).step(gradient, 0.01)
    np.testing.assert_allclose(step, -0.01 * sizes * np.sign(gradient), rtol=1e-4)


def test_what_has_no_gradient_stays():
    adam = Adam(np.ones(3, np.float32))
    step = adam.step(np.array([0, 1, 0], np.float32), 0.1)
    assert step[0] == step[2] == 0
