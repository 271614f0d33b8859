"""Options that one command suggests for another mean there what they meant to it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest

from cobla_onnx.calibration.data.images import ImageOptions
from cobla_onnx.cli import app
from cobla_onnx.options import Settings
from cobla_onnx.options.flags import LEFT_OUT, typed_options
from cobla_onnx.options.settings import options_of

# A value for each option of layers and data that both commands have.
GIVEN = {
    "input_shapes": {"an input:0": (1, 3, 8, 8), "mask": (1, 8)},
    "include": ("conv*", "it's [a] name"),
    "exclude": ("stem/*",),
    "min_size": 7,
    "deduplicate": False,
    "scheme": "spatial",
    "images": ImageOptions((103.5, 116.3, 123.7), (58.4,), 1 / 255, "bgr", "nhwc"),
    "labels": Path("some labels.csv"),
    "loss": "ce",
    "outputs": ("scores=classes:1", "boxes"),
}


def test_no_option_is_forgotten():
    both = [f for f in options_of("advise") if "compress" in f.metadata["option"].commands]
    shared = {f.name for f in both if f.metadata["option"].group in ("data", "layers")}
    assert set(GIVEN) == shared - set(LEFT_OUT)


def test_the_command_reads_what_was_given(monkeypatch):
    seen = {}

    def run(model, budget=None, **options):
        seen.update(options)
        raise SystemExit

    monkeypatch.setattr("cobla_onnx.pipeline.compress.compress", run)
    settings = Settings(**GIVEN, data="samples.npz", samples=64, threads=3)
    text = typed_options(settings, "advise", "compress")
    arguments = ["compress", "a.onnx", "b.onnx", *shlex.split(text), "--data", "samples.npz"]
    with pytest.raises(SystemExit):
        app(arguments, standalone_mode=False)
    assert {name: seen[name] for name in GIVEN} == GIVEN
    assert seen["samples"] is seen["threads"] is None


def test_defaults_and_what_only_python_can_give_are_left_out():
    assert typed_options(Settings(), "advise", "compress") == ""
    settings = Settings(data="a.npz", labels=np.zeros(3), images=ImageOptions())
    assert typed_options(settings, "advise", "compress") == ""
    classes = dataclasses.replace(settings, labels={"a.png": 3})
    assert typed_options(classes, "advise", "compress") == ""
    named = dataclasses.replace(settings, outputs={"y": "values"})
    assert typed_options(named, "advise", "compress") == " --output y=values"
