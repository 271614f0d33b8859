"""Calibration and test data for models in the field, made where none comes with them.

Samples are written as files that the command takes with ``--data``: an ``.npz`` with samples
on the first axis, or a folder of ``test_data_set_*`` where an input has none (a recurrent
state, a sampling rate). Everything is drawn with fixed seeds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from field_shapes import CALIBRATION, TEST, draw_scenes
from numpy.typing import NDArray
from onnx import numpy_helper

__all__ = [
    "NoData",
    "draw_shapes",
    "draw_texts",
    "feeds_for",
    "first_step",
    "make_sounds",
    "open_model",
    "read_feeds",
]

BATCH = 8

FONTS = Path("/usr/share/fonts/truetype")
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
"""Of ImageNet, which Paddle's models for text take off."""
RATE, CHUNK, CONTEXT = 16_000, 512, 64
"""Of silero-vad at 16 kHz, in samples a second and samples."""


class NoData(Exception):
    """What is needed to make the data is not on this machine."""


def open_model(path: Path, threads: int = 2) -> onnxruntime.InferenceSession:
    """Open a model in onnxruntime without its warnings."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def read_feeds(data: Path, batch: int, fixed: bool) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield a file's samples by batches, only whole ones if the model has a fixed batch."""
    if data.is_dir():
        for folder in sorted(data.iterdir(), key=lambda f: int(f.name.rpartition("_")[2])):
            tensors = [numpy_helper.onnx.load_tensor(f) for f in sorted(folder.glob("input_*.pb"))]
            yield {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
        return
    with np.load(data) as content:
        arrays = dict(content)
    count = len(next(iter(arrays.values())))
    for start in range(0, count - count % batch if fixed else count, batch):
        yield {name: array[start : start + batch] for name, array in arrays.items()}


def feeds_for(
    session: onnxruntime.InferenceSession, data: Path
) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield a file's samples by batches that a model takes; of a decoder, token ids will do."""
    first = session.get_inputs()[0].shape[:1]
    fixed = bool(first) and isinstance(first[0], int)
    for feeds in read_feeds(data, first[0] if fixed else BATCH, fixed):
        yield feeds if "input_ids" not in feeds else {**first_step(session, **feeds), **feeds}


def first_step(
    session: onnxruntime.InferenceSession, input_ids: NDArray[Any], **_: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """Return all inputs of a decoder for whole texts of tokens (rows, length), without a past."""
    rows, length = input_ids.shape
    made = {
        "input_ids": input_ids,
        "attention_mask": np.ones((rows, length), np.int64),
        "position_ids": np.tile(np.arange(length), (rows, 1)),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            _, heads, _, features = value.shape
            made[value.name] = np.zeros((rows, heads, 0, features), np.float32)
    return {value.name: made[value.name] for value in session.get_inputs() if value.name in made}


def draw_shapes(_: Path, calibration: Path, test: Path) -> None:
    """Pictures for the detector that this repository trained."""
    for path, count, seed in ((calibration, 256, CALIBRATION), (test, 500, TEST)):
        np.savez(path, image=draw_scenes(count, seed).images)


def draw_texts(_: Path, calibration: Path, test: Path) -> None:
    """Pages with lines of text, as PP-OCR's detector wants them: BGR, 320 x 320."""
    try:
        from PIL import ImageFont
    except ImportError as error:
        raise NoData("Pillow is not installed") from error
    fonts = [
        ImageFont.truetype(str(path), size)
        for path in sorted(FONTS.rglob("*-Regular.ttf")) + sorted(FONTS.rglob("DejaVuSans.ttf"))
        for size in (12, 16, 22, 30)
    ]
    if not fonts:
        raise NoData(f"no fonts in {FONTS}; on Debian: apt-get install fonts-liberation")
    for path, count, first in ((calibration, 64, 0), (test, 100, 10_000)):
        np.savez(path, x=np.stack([_page(fonts, first + number) for number in range(count)]))


def _page(fonts: Sequence[Any], seed: int, size: int = 320) -> NDArray[np.float32]:
    """Lines of text from Python's own help, a little turned, with noise."""
    from pydoc_data.topics import topics

    from PIL import Image, ImageDraw

    generator = random.Random(seed)
    words = " ".join(topics[name] for name in sorted(topics)).split()
    light, dark = (tuple(generator.randint(*ends) for _ in "rgb") for ends in ((170, 255), (0, 90)))
    page = Image.new("RGB", (size, size), light)
    draw, height = ImageDraw.Draw(page), generator.randint(4, 60)
    while height < size - 20:
        font, start = generator.choice(fonts), generator.randrange(len(words) - 9)
        text = " ".join(words[start : start + generator.randint(1, 7)])
        draw.text((generator.randint(4, 120), height), text, font=font, fill=dark)
        height += round(font.size * generator.uniform(1.4, 4))
    page = page.rotate(generator.uniform(-4, 4), Image.Resampling.BICUBIC, fillcolor=light)
    pixels = np.asarray(page, np.float32)[..., ::-1] / 255
    pixels = pixels + np.random.default_rng(seed).normal(0, 0.02, pixels.shape)
    return ((pixels - MEAN) / DEVIATION).transpose(2, 0, 1).astype(np.float32)


def make_sounds(model: Path, calibration: Path, test: Path) -> None:
    """Chunks of sound with the states that the model itself has come to before each."""
    session = open_model(model)
    for folder, recordings, chunks, seed in ((calibration, 8, 240, 1), (test, 8, 400, 2)):
        generator = np.random.default_rng(seed)
        feeds = [f for _ in range(recordings) for f in _listen(session, _recording(generator))]
        chosen = np.sort(generator.choice(len(feeds), chunks, replace=False))
        for number, place in enumerate(chosen):
            _write_set(folder / f"test_data_set_{number}", feeds[place])


def _listen(
    session: onnxruntime.InferenceSession, sound: NDArray[np.float32]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Feed a recording, chunk after chunk, each with the end of the one before."""
    state, rate = np.zeros((2, 1, 128), np.float32), np.array(RATE, np.int64)
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), sound])
    for start in range(0, len(sound) - CHUNK + 1, CHUNK):
        chunk = padded[None, start : start + CONTEXT + CHUNK]
        feeds = {"input": chunk, "state": state, "sr": rate}
        yield feeds
        _, state = session.run(None, feeds)


def _recording(generator: np.random.Generator, seconds: float = 5.0) -> NDArray[np.float32]:
    """Sound in turns, each 0.3 to 0.9 s: like speech, a chirp, noise, hardly anything."""
    parts: list[NDArray[np.float64]] = []
    while sum(map(len, parts)) < seconds * RATE:
        time = np.arange(int(generator.uniform(0.3, 0.9) * RATE)) / RATE
        kind = generator.choice(["speech", "chirp", "noise", "silence"], p=[0.5, 0.15, 0.2, 0.15])
        if kind == "speech":
            part = _speech(generator, time)
        elif kind == "chirp":
            first, last = generator.uniform(100, 4000, 2)
            part = np.sin(2 * np.pi * (first + (last - first) * time / time[-1] / 2) * time)
        else:
            part = generator.normal(0, 0.3 if kind == "noise" else 0.003, len(time))
        parts.append(part * generator.uniform(0.1, 0.6))
    sound = np.concatenate(parts)
    return (sound + generator.normal(0, 0.002, len(sound))).astype(np.float32)


def _speech(generator: np.random.Generator, time: NDArray[np.float64]) -> NDArray[np.float64]:
    """Harmonics of a gliding pitch under the formants of two vowels, swelling in syllables."""
    pitch = generator.uniform(90, 220) * (1 + generator.uniform(-0.2, 0.2) * time / time[-1])
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    vowels = np.array([[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480]])
    first, second = vowels[generator.choice(len(vowels), 2, replace=False)]
    formants = first + (second - first) * (time / time[-1])[:, None]
    harmonics = np.arange(1, 30)
    distance = pitch[:, None, None] * harmonics[:, None] - formants[:, None]
    loudness = (1 / (1 + (distance / 90) ** 2)).sum(2) / np.sqrt(harmonics)
    sound = (loudness * np.sin(phase[:, None] * harmonics)).sum(1)
    syllables = np.sin(np.pi * time * generator.uniform(3, 6)) ** 2
    return np.asarray(sound / np.abs(sound).max() * syllables)


def _write_set(folder: Path, feeds: Mapping[str, NDArray[Any]]) -> None:
    """Write one sample as ONNX's own tests are laid out."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, array) in enumerate(feeds.items()):
        tensor = numpy_helper.from_array(np.array(array, order="C"), name)
        (folder / f"input_{number}.pb").write_bytes(tensor.SerializeToString())
