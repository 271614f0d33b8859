"""Train the decoder of this repository on docstrings, with the package's own gradients.

Writes ``models/docstring_gpt.onnx``, its tokens and token ids beside it. It has what decoders
have that exporters write: one table that is both embedding and output layer, learned positions,
attention with a cache of keys and values, and inputs and outputs named as for a generation loop.
Gradients are by `cobla_onnx.autodiff` in onnxruntime; PyTorch is not needed. Run from the
repository's root::

    python tools/train_decoder.py
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from decoder_graph import Sizes, decoder_graph, first_weights
from docstrings import docstrings, learn_tokens, windows
from field_data import feeds_for, open_model
from field_quality import surprises
from numpy.typing import NDArray

from cobla_onnx.autodiff import gradient_graph
from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.distillation.adam import Adam
from cobla_onnx.distillation.training import one_cycle

SEED = 0
BATCH = 16
RATE, DECAY, GREATEST = 4e-3, 0.1, 1.0
"""Greatest rate of a cycle, share of a weight that a rate of 1 takes off, norm of a gradient."""
CALIBRATION, TEST = 128, 256
"""Rows of token ids that are kept."""


class Teacher:
    """Loss and gradients of a decoder on rows of tokens, each predicted from those before.

    Parameters
    ----------
    sizes : Sizes
    weights : dict of str to array
        To begin with; only names and shapes count.
    length : int
        Tokens that are predicted in each row.
    threads : int
    """

    def __init__(
        self, sizes: Sizes, weights: dict[str, NDArray[np.float32]], length: int, threads: int
    ) -> None:
        model = decoder_graph(sizes, weights)
        rows = [BATCH, length]
        self._feeds: dict[str, NDArray[Any]] = {
            "attention_mask": np.ones(rows, np.int64),
            "position_ids": np.tile(np.arange(length), (BATCH, 1)),
        }
        for value in model.graph.input[3:]:
            shape = [BATCH, sizes.heads, 0, sizes.width // sizes.heads]
            self._feeds[value.name] = np.zeros(shape, np.float32)
        shapes = {name: list(array.shape) for name, array in self._feeds.items()}
        graph = gradient_graph(
            model,
            {"logits": Measure("ce-logits", axis=2)},
            list(weights),
            input_shapes={"input_ids": rows, **shapes},
            threads=threads,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
        taken = {value.name for value in self._session.get_inputs()}
        self._feeds = {name: array for name, array in self._feeds.items() if name in taken}
        self._wanted = ["loss", *(f"gradient/{name}" for name in weights)]
        self._classes = np.eye(sizes.tokens, dtype=np.float32)

    def lesson(
        self, weights: dict[str, NDArray[np.float32]], rows: NDArray[np.int64]
    ) -> tuple[float, dict[str, NDArray[np.float32]]]:
        """Return the mean loss of a batch (rows, length + 1), and its gradients."""
        feeds = self._feeds | weights
        feeds |= {"input_ids": rows[:, :-1], "target/logits": self._classes[rows[:, 1:]]}
        loss, *gradients = self._session.run(self._wanted, feeds)
        return float(loss.mean()), {
            name: gradient / BATCH for name, gradient in zip(weights, gradients, strict=True)
        }


def train(
    sizes: Sizes, stream: NDArray[np.int64], passes: int, threads: int
) -> dict[str, NDArray[np.float32]]:
    """Train by Adam in one cycle, with weight decay of matrices (Loshchilov and Hutter 2019)."""
    weights = first_weights(sizes, SEED)
    length = sizes.positions
    teacher = Teacher(sizes, weights, length, threads)
    generator, steps = np.random.default_rng(SEED), passes * (len(stream) // (BATCH * length))
    optimisers = {name: Adam(np.ones(array.size, np.float32)) for name, array in weights.items()}
    started, losses = time.monotonic(), []
    for step in range(steps):
        starts = generator.integers(0, len(stream) - length, BATCH)
        loss, gradients = teacher.lesson(weights, stream[starts[:, None] + np.arange(length + 1)])
        norm = float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients.values())))
        rate = RATE * one_cycle(step / steps)
        for name, gradient in gradients.items():
            kept = 1 - rate * DECAY if gradient.ndim == 2 else 1.0
            change = optimisers[name].step(gradient.ravel() * min(1, GREATEST / norm), rate)
            weights[name] = np.float32(kept) * weights[name] + change.reshape(gradient.shape)
        losses.append(loss)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mean, passed = np.mean(losses[-100:]), time.monotonic() - started
            print(f"step {step + 1}/{steps}: loss {mean:.3f}, {passed:.0f} s", flush=True)
    return weights


def perplexity(path: Path, data: Path) -> float:
    """Exponential of the mean cost of a token."""
    session = open_model(path)
    costs = [
        surprises(session.run(["logits"], feeds)[0], feeds["input_ids"])
        for feeds in feeds_for(session, data)
    ]
    return float(np.exp(np.concatenate(costs).mean()))


def main() -> None:
    """Learn tokens, train, export, and say how well other docstrings are predicted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("models/docstring_gpt.onnx"))
    parser.add_argument("--passes", type=int, default=10, help="over all docstrings")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    known, held = docstrings()
    for texts in (known, held):
        np.random.default_rng(SEED).shuffle(texts)
    sizes = Sizes()
    tokens = learn_tokens(known, sizes.tokens)
    stream = windows(tokens, known, 1).ravel()
    print(f"{len(known)} docstrings, {len(stream)} tokens; {len(held)} held back", flush=True)
    output: Path = options.output
    output.with_suffix(".tokens.json").write_text(
        json.dumps({"characters": tokens.characters, "merges": tokens.merges}) + "\n"
    )
    paths = [output.with_name(f"{output.stem}_{part}.npz") for part in ("calibration", "test")]
    for path, texts, rows in zip(paths, (known, held), (CALIBRATION, TEST), strict=True):
        np.savez_compressed(path, input_ids=windows(tokens, texts, sizes.positions)[:rows])
    weights = train(sizes, stream, options.passes, options.threads)
    onnx.save(decoder_graph(sizes, weights), output)
    found = perplexity(output, paths[1])
    print(f"perplexity {found:.2f} on other docstrings, {output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
