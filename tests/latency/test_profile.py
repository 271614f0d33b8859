"""Profiles are kept, checked, and refused where they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cobla_onnx.errors import UsageError
from cobla_onnx.latency.profile import Conditions, Profile
from cobla_onnx.runtime.machine import convolution_block, cpu_name

HERE = Conditions("a CPU", "1.30.0", 2, "CPUExecutionProvider")


def test_what_is_saved_is_read_again(tmp_path):
    path = tmp_path / "p.json"
    profile = Profile.open(path, HERE)
    profile.layers["a layer"] = {"whole": 100, "channel@8": 40}
    profile.model("m")["whole"] = 1000
    profile.save(path)
    again = Profile.open(path, HERE)
    assert again == profile
    assert again.to_json() == path.read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cpu": "another CPU"}, ["cpu was a CPU, here it is another CPU"]),
        ({"onnxruntime": "1.31.0"}, ["onnxruntime was 1.30.0, here it is 1.31.0"]),
        ({"threads": 1}, ["threads was 2, here it is 1"]),
        ({"provider": "CUDA", "threads": 3}, ["provider was CPUEx", "threads was 2"]),
    ],
)
def test_other_conditions_are_named_with_the_way_out(tmp_path, change, words):
    path = tmp_path / "p.json"
    Profile(HERE).save(path)
    with pytest.raises(UsageError) as caught:
        Profile.open(path, replace(HERE, **change))
    message = str(caught.value)
    assert message.startswith(f"profile='{path}': ")
    assert all(word in message for word in words)
    assert "to measure anew" in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 2}',
        "\x00\x01",
        "[" * 100_000,
        json.dumps({"version": 1, "conditions": {}, "layers": {}, "models": {}}),
        json.dumps(
            {"version": 1, "conditions": vars(HERE), "layers": {"a": {"whole": -1}}, "models": {}}
        ),
        json.dumps(
            {"version": 1, "conditions": vars(HERE), "layers": {"a": {"whole": "x"}}, "models": {}}
        ),
        json.dumps(
            {"version": 1, "conditions": vars(HERE), "layers": [], "models": {"m": {"plans": {}}}}
        ),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="is not a profile"):
        Profile.open(path, HERE)


def test_a_name_that_the_system_cannot_have_is_no_profile(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read \(File name too long\)"):
        Profile.open(tmp_path / f"{300 * 'a'}.json", HERE)


def test_this_machine_has_a_name_and_a_block():
    assert cpu_name()
    assert convolution_block() in (8, 16)
