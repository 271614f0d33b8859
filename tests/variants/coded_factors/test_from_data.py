"""Rounded factors from the moments of samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import Asked, LayerCosts
from cobla_onnx.variants.coded_factors.family import CodedFactorsFamily
from cobla_onnx.variants.coded_factors.from_data import PairsFromData
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK
from tests.builders import random_array, small_network


@pytest.mark.parametrize("wide", [5000, 30])
def test_errors_on_the_samples_are_about_those_that_are_predicted(wide: int) -> None:
    model, samples = small_network(), random_array(48, 3, 12, 12, seed=3)

    def batches() -> Iterator[Feeds]:
        yield {"x": samples}

    layers = find_layers(model).layers
    seen = Seen(model, layers, batches, wide=wide)
    maker = PairsFromData(seen)
    family, compared = CodedFactorsFamily(), 0
    for layer in layers:
        asked = Asked("auto", EVERY_RANK, (4, 6))
        proposals = family.propose(layer, LayerCosts(None, {}), asked)
        if not isinstance(proposals, list):
            continue
        weight = read_weight(model, layer)
        measured = family.unit(layer, proposals, Carried(weight, False), None, maker).measure()
        for proposal, errors in zip(proposals, measured.errors, strict=True):
            if errors is None:
                assert seen.is_wide(layer)
                continue
            rank = int(proposal.levels[-1])
            (made,) = maker.approximate(layer, proposal.form, [rank])
            again = maker.approximate(layer, proposal.form, [rank])
            assert again == [made]
            if not seen.is_wide(layer):
                moment = seen.moment(layer)
                second = moment.covariance() if seen.is_centred(layer) else moment.second
                rows = schemes_for(layer)[0].rows_of(weight)
                change = schemes_for(layer)[0].rows_of(weight - made.weight)
                lost = np.einsum("gos,gst,got->", change, second, change)
                lost /= np.einsum("gos,gst,got->", rows, second, rows)
                assert errors[rank] == pytest.approx(lost, rel=1.0, abs=1e-3)
                compared += 1
    assert compared > 0
