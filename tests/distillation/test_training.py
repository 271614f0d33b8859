"""Adam finds what it is to find, and steps that explode are undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.distillation import passes, stages
from cobla_onnx.distillation.adam import Adam
from cobla_onnx.distillation.passes import choose
from cobla_onnx.distillation.training import Clock, Trainer, one_cycle


@dataclass
class Bowl:
    """Squared distance from a point that differs a little from sample to sample.

    Gradients of the steps in `spoilt` are not finite; so are losses farther away than `cliff`.
    """

    samples: int = 64
    spoilt: frozenset[int] = frozenset()
    cliff: float = np.inf
    asked: int = 0
    judged: int = 0
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
        self.judged += 1
        apart = np.square(values - np.linspace(0.9, 1.1, 20)[:, None]).sum(axis=1)
        return np.where(apart < self.cliff, apart, np.inf)


def trainer(bowl: Bowl, **options) -> Trainer:
    start = np.full(5, 2.0, np.float32)
    return Trainer(bowl, start, np.full(5, 2.0, np.float32), **options)


def test_a_cycle_gets_there_and_begins_anew_each_time():
    made = trainer(Bowl())
    end = made.cycle(40, 0.03)
    assert end.whole
    assert end.loss < 0.02 * made.first.loss
    np.testing.assert_allclose(end.values, 1, atol=0.1)
    assert made.checkpoints[0].held_back == made.first.loss
    assert made.checkpoints[-1].held_back == end.loss
    assert [point.number for point in made.checkpoints] == list(range(41))
    assert made.steps == 80
    assert made.cycle(40, 0.03).values.tobytes() == end.values.tobytes()


def test_a_cycle_that_is_judged_at_its_end_alone_gets_to_the_same_place():
    often, once = Bowl(), Bowl()
    made = trainer(once, each=False)
    end = made.cycle(7, 0.03)
    assert end.values.tobytes() == trainer(often).cycle(7, 0.03).values.tobytes()
    assert end.whole
    assert (often.judged, once.judged) == (8, 2)
    assert [point.number for point in made.checkpoints] == [0, 7]
    assert trainer(Bowl(cliff=40.0), each=False).cycle(7, 10.0) is None


def test_every_sample_is_seen_once_in_a_pass_and_orders_differ():
    bowl = Bowl()
    trainer(bowl).cycle(2, 0.01)
    passes_seen = [bowl.seen[0] + bowl.seen[1], bowl.seen[2] + bowl.seen[3]]
    assert [sorted(order) for order in passes_seen] == [list(range(64))] * 2
    assert passes_seen[0] != passes_seen[1]


@pytest.mark.parametrize(
    ("bowl", "rate"), [(Bowl(spoilt=frozenset([5])), 0.03), (Bowl(cliff=40.0), 10.0)]
)
def test_what_is_not_finite_or_far_above_the_start_has_no_end(bowl, rate):
    made = trainer(bowl)
    assert made.cycle(30, rate) is None
    assert made.undone == 1
    assert made.steps < 60


def test_a_training_that_explodes_is_begun_again_with_half_of_its_rate():
    tried = choose("network", [trainer(Bowl())], 20, 2)
    made = trainer(Bowl(spoilt=frozenset([5])))
    assert stages._cycled(made, tried) is not None
    assert made.undone == 1
    hopeless = trainer(Bowl(spoilt=frozenset(range(1000))))
    assert stages._cycled(hopeless, tried) is None
    assert hopeless.undone == 1 + stages.MOST_UNDONE


def test_a_training_that_goes_wrong_for_the_held_back_samples_is_not_kept():
    tried = choose("network", [trainer(Bowl())], 20, 2)

    class Slope(Bowl):
        """What it learns leads uphill, by less than an explosion."""

        def held_back(self, values):
            return 1 + 0.5 * np.linspace(0.9, 1.1, 20) * float(values.mean() < 1.9)

    assert stages._cycled(trainer(Slope()), tried) is None


def test_a_rate_is_chosen_that_does_not_explode():
    tried = []
    found = choose("network", [trainer(Bowl()), trainer(Bowl())], 16, 2, tried.append)
    assert found.rate in passes.RATES
    assert found.gain.mean > 0
    assert found.before - found.after == pytest.approx(found.gain.mean)
    # Each rate on the first part, the best of them on the second one.
    assert [trial.part for trial in tried] == [1] * (len(tried) - 1) + [2]
    least = min(trial.loss for trial in tried if trial.part == 1)
    assert least == next(trial.loss for trial in tried if trial.rate == found.rate)
    worse = choose("network", [trainer(Bowl(spoilt=frozenset(range(1, 3))))], 8, 2)
    assert worse.rate < passes.RATES[passes.USUAL]
    assert choose("network", [trainer(Bowl(spoilt=frozenset(range(1000))))], 8, 2) is None


def test_cycles_get_longer_as_long_as_they_gain():
    tried = []
    found = choose("network", [trainer(Bowl())], "auto", 2, tried.append)
    longest = max(trial.passes for trial in tried)
    first = tried[0].passes
    assert first * 2 >= passes.FIRST_STEPS
    assert longest >= 2 * first
    assert found.passes in (longest, longest // 2)


@pytest.mark.parametrize(("limit", "fewer"), [(500, True), (1000, False), (None, False)])
def test_all_rates_and_parts_are_tried_within_the_time(limit, fewer):
    """A step takes a second; at 25 passes there would be no time for the second part."""

    @dataclass
    class Told(Clock):
        spent: float = 0.0

        @property
        def elapsed(self) -> float:
            return self.spent

    class Slow(Bowl):
        def gradient(self, values, chosen):
            clock.spent += 1.0
            return super().gradient(values, chosen)

    clock, tried = Told(limit), []
    parts = [trainer(Slow(), clock=clock, share=0.3) for _ in range(2)]
    found = choose("network", parts, "auto", 2, tried.append)
    assert found is not None
    assert found.gain.mean > 0
    assert all(trial.loss is not None for trial in tried[:4])
    first = next(trial.passes for trial in tried if trial.part == 2)
    assert first == (18 if fewer else 25)
    assert limit is None or clock.spent <= 0.3 * limit + 1


def test_an_interrupt_ends_a_cycle_and_what_comes_after_it():
    class Interrupted(Bowl):
        def gradient(self, values, chosen):
            if self.asked == 50:
                raise KeyboardInterrupt
            return super().gradient(values, chosen)

    made = trainer(Interrupted())
    tried = choose("network", [trainer(Bowl())], 100, 2)
    end = made.cycle(100, 0.03)
    assert made.steps == 50
    assert not end.whole
    assert made.is_over
    again = trainer(Interrupted())
    # What was cut short is kept since it gains on the samples held back.
    assert stages._cycled(again, tried) is not None
    assert choose("network", [trainer(Interrupted())], 100, 2) is None


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


def test_a_gradient_whose_square_overflows_says_where_to_go():
    adam = Adam(np.ones(3, np.float32))
    gradient = np.array([1.0, 1e30, -1e30], np.float32)
    for _ in range(3):
        np.testing.assert_allclose(adam.step(gradient, 0.1), [-0.1, -0.1, 0.1], rtol=1e-5)


def test_what_has_no_gradient_stays():
    adam = Adam(np.ones(3, np.float32))
    step = adam.step(np.array([0, 1, 0], np.float32), 0.1)
    assert step[0] == step[2] == 0
