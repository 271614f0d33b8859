"""Which stages are kept, and what is said of those that are not."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from cobla_onnx.allocation.paired import paired_gain
from cobla_onnx.distillation.passes import Choice
from cobla_onnx.distillation.record import BLOCKS, NETWORK
from cobla_onnx.distillation.stages import Tried, train

BEFORE = np.array([1.0, 1.2, 0.8, 1.1])


def tried(name: str, *, gained: bool, allowed: bool) -> Tried:
    """Return what trials found: they gain or lose, and the stated loss falls or rises."""
    after = BEFORE - (0.5 if gained else -0.5)
    choice = Choice(2, 0.01, (), paired_gain(BEFORE, after), BEFORE.mean(), after.mean())
    return Tried(name, choice, BEFORE + (-0.1 if allowed else 0.1), BEFORE)


def learning(*, explodes: bool = False) -> SimpleNamespace:
    end = SimpleNamespace(values=np.ones(1, np.float32), losses=BEFORE, whole=True)
    trainer = SimpleNamespace(
        first=SimpleNamespace(losses=BEFORE), cycle=lambda *_: None if explodes else end
    )
    return SimpleNamespace(values=np.zeros(1, np.float32), trainer=lambda name: trainer)


@pytest.mark.parametrize(
    ("blocks", "network", "kept", "higher"),
    [
        # The network makes up for what blocks raised.
        ((True, False), (True, True), (True, True), (False, False)),
        ((True, True), (True, False), (True, False), (False, True)),
        ((True, False), (True, False), (False, False), (True, True)),
        ((True, False), (False, True), (False, False), (True, False)),
        ((False, True), (True, True), (False, True), (False, False)),
        ((False, False), (False, False), (False, False), (False, False)),
    ],
)
def test_stages_are_kept_as_far_as_the_stated_loss_allows(blocks, network, kept, higher):
    own = learning()
    pairs = zip((BLOCKS, NETWORK), (blocks, network), strict=True)
    stages = train(own, [tried(name, gained=g, allowed=a) for name, (g, a) in pairs])
    assert tuple(stage.kept for stage in stages) == kept
    assert tuple(stage.stated_loss_is_higher for stage in stages) == higher
    assert not any(stage.went_wrong for stage in stages)
    assert own.values[0] == any(kept)


@pytest.mark.parametrize("gained", [True, False])
def test_only_what_gained_in_trials_can_go_wrong_in_the_training(gained):
    found = [tried(BLOCKS, gained=True, allowed=True), tried(NETWORK, gained=gained, allowed=True)]
    own = learning(explodes=True)
    stages = train(own, found)
    assert [stage.went_wrong for stage in stages] == [True, gained]
    assert not any(stage.kept for stage in stages)
    assert own.values[0] == 0
