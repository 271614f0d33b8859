"""Find strings that a model has in its vocabulary, to use as text inputs."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from cobla_onnx.graph.tensors import all_tensors, subgraphs

__all__ = ["known_words"]

# Attributes that list texts which a node looks its input up in.
LISTS = {
    "cats_strings",
    "classlabels_strings",
    "keys_strings",
    "pool_strings",
    "string_vocabulary",
}
# Anything can read these, as texts and as numbers.
PLAIN = ("0", "1")
MOST = 64


def known_words(model: onnx.ModelProto) -> tuple[str, ...]:
    """Texts that the nodes of a model look up, and two that any node can read; at most 64."""
    words = dict.fromkeys(_words(model))
    return (*list(words)[: MOST - len(PLAIN)], *PLAIN)


def _words(model: onnx.ModelProto) -> Iterator[str]:
    graphs = [model.graph]
    while graphs:
        for node in graphs.pop().node:
            graphs.extend(subgraphs(node))
            for attribute in node.attribute:
                if attribute.name in LISTS:
                    yield from (text.decode(errors="replace") for text in attribute.strings)
    for held in all_tensors(model):
        if held.tensor.data_type == onnx.TensorProto.STRING:
            yield from (text.decode(errors="replace") for text in held.tensor.string_data)
