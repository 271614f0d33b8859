"""Parts of a model that can learn one after another: where one tensor carries all that changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import onnx

from cobla_onnx.graph.layers import all_inputs
from cobla_onnx.graph.subgraph import reached_from

__all__ = ["Block", "cut_tensors", "find_blocks"]

# They make probabilities.
SQUASHING = ("Softmax", "LogSoftmax", "Sigmoid")


class Block(NamedTuple):
    """What lies between two cuts of a model.

    Attributes
    ----------
    begin, end : str
        The tensors at the cuts. Empty at the inputs, and at the outputs, of the model.
    names : tuple of str
        Tensors in it that learn.
    """

    begin: str
    end: str
    names: tuple[str, ...]


def find_blocks(
    model: onnx.ModelProto, names: Collection[str], known: Collection[str]
) -> list[Block]:
    """Cut a model where a single tensor depends on what learns: a residual unit, a Fire module.

    What does not depend on that, such as a mask of a transformer, may cross a cut: it is the same
    in the original. A part in which nothing learns belongs to the block before it; the last block
    ends before what makes probabilities, which tell less than what they are made of.

    Parameters
    ----------
    model : ModelProto
        Its nodes are in topological order.
    names : collection of str
        Stored tensors that learn. What several blocks read is in none of them.
    known : collection of str
        Tensors at which there may be a cut.
    """
    found: list[Block] = []
    learned, begin, read = set(names), "", dict[str, None]()
    cuts, squashed = dict(_cuts(model, learned)), False
    for index, node in enumerate([*model.graph.node, None]):
        end = cuts.get(index, "")
        if end in known and read:
            if found:
                # Up to here nothing more was learned: that belongs to the block before.
                found[-1] = found[-1]._replace(end=begin)
            found.append(Block(begin, end, tuple(read)))
            begin, read, squashed = end, {}, False
        elif end in known:
            begin = end
            if found and not squashed:
                found[-1] = found[-1]._replace(end=end)
        if node is not None:
            # Any of them, be it a gate: the block then only ends a little earlier.
            squashed |= node.op_type in SQUASHING
            read |= dict.fromkeys(name for name in all_inputs(node) if name in learned)
    if read:
        if found:
            found[-1] = found[-1]._replace(end=begin)
        found.append(Block(begin, "", tuple(read)))
    return _of_one(found)


def cut_tensors(model: onnx.ModelProto, names: Collection[str]) -> list[str]:
    """Return the tensors at which `find_blocks` may cut."""
    return list(dict.fromkeys(name for _, name in _cuts(model, names)))


def _cuts(model: onnx.ModelProto, names: Collection[str]) -> Iterator[tuple[int, str]]:
    """Yield before which nodes a single tensor that depends on `names` is needed, and which."""
    nodes = model.graph.node
    producer = {name: index for index, node in enumerate(nodes) for name in node.output}
    last = {name: index for index, node in enumerate(nodes) for name in all_inputs(node)}
    last |= {value.name: len(nodes) for value in model.graph.output}
    reached = reached_from(model, names)
    ending = dict[int, list[str]]()
    for name in reached:
        if name in producer and name in last:
            ending.setdefault(last[name], []).append(name)
    live = set[str]()
    for index, node in enumerate(nodes):
        if len(live) == 1:
            yield index, next(iter(live))
        live |= {name for name in node.output if name in reached and name in last}
        live.difference_update(ending.get(index, ()))
    if len(live) == 1:
        yield len(nodes), next(iter(live))


def _of_one(blocks: Sequence[Block]) -> list[Block]:
    """Leave out what several blocks read, and join blocks in which nothing is left to others."""
    counts = Counter(name for block in blocks for name in block.names)
    found: list[Block] = []
    for block in blocks:
        own = tuple(name for name in block.names if counts[name] == 1)
        if own or not found:
            found.append(block._replace(names=own))
        else:
            found[-1] = found[-1]._replace(end=block.end)
    if len(found) > 1 and not found[0].names:
        found[1] = found[1]._replace(begin=found[0].begin)
        del found[0]
    return found
