"""Check a rewrite: the new nodes of a layer must compute what their dense weight does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.batching import TapLimit
from cobla_onnx.calibration.evaluation.deviation import network_errors
from cobla_onnx.calibration.patches import has_products
from cobla_onnx.errors import ModelError, VerificationError
from cobla_onnx.graph.bodies import body_graphs
from cobla_onnx.graph.layers import find_layers, read_bias
from cobla_onnx.graph.randomness import random_nodes
from cobla_onnx.graph.settling import branching, settled
from cobla_onnx.graph.subgraph import Exposed, expose
from cobla_onnx.pipeline.body_proof import append_slice, checked, prove_in_bodies
from cobla_onnx.runtime.session import Feeds, open_session, run_session
from cobla_onnx.runtime.temporary import owned
from cobla_onnx.text import quoted
from cobla_onnx.variants.replacement import ROUNDING, Replacement
from cobla_onnx.variants.rewrite import add_functions

__all__ = ["prove_optimized", "prove_rewrite", "tolerance"]

# Tolerance after a whole network, which amplifies rounding.
AMPLIFICATION = 30.0
# Most bytes of dense weights held at a time.
DENSE_AT_ONCE = 1 << 29


def prove_rewrite(
    original: onnx.ModelProto,
    compressed: onnx.ModelProto,
    replacements: Sequence[Replacement],
    feeds: Sequence[Feeds],
    results: Sequence[dict[str, Any]],
    threads: int,
    varying: frozenset[str],
    taps: TapLimit | None,
) -> tuple[float, float | None, tuple[str, ...]]:
    """Check all layers; if memory is short, in groups and without the network's outputs."""
    if not replacements:
        # The model is the original, whose nodes may compute in 8 bits after the proof.
        return 0.0, 0.0, ()
    groups = _groups(replacements)
    in_bodies = prove_in_bodies(original, compressed, replacements, threads)
    if len(groups) > 1:
        errors = [in_bodies]
        errors += [_check_layers(original, compressed, g, feeds, threads, taps)[0] for g in groups]
        note = "the weights are large: the rewrite was proved layer by layer alone"
        return max(errors), None, (note,)
    worst, dense = _check_layers(original, compressed, replacements, feeds, threads, taps)
    in_branches, notes = _prove_branches(
        original, compressed, replacements, feeds, threads, varying, taps
    )
    worst = max(worst, in_bodies, in_branches)
    outputs = network_errors(dense, results, varying)
    beyond = {
        name: error
        for name, error in outputs.items()
        if not error <= AMPLIFICATION * ROUNDING[dense[0][name].dtype]
    }
    notes += _random_outputs(original, feeds, outputs, beyond, threads)
    if beyond:
        noise = _rounding_noise(original, replacements, feeds, dense, worst, threads)
        notes += tuple(_explained(n, e, noise[n], n in varying) for n, e in beyond.items())
    return worst, max(outputs.values(), default=None), notes


def _random_outputs(
    original: onnx.ModelProto,
    feeds: Sequence[Feeds],
    outputs: dict[str, float],
    beyond: dict[str, float],
    threads: int,
) -> tuple[str, ...]:
    """Take out what the original itself gives otherwise on the same inputs; say so of each."""
    itself = _own_differences(original, feeds, threads) if beyond else {}
    notes: tuple[str, ...] = ()
    for name in [name for name in beyond if itself[name] > 0]:
        error = beyond.pop(name)
        outputs.pop(name)
        drawn = ", ".join(random_nodes(original)[:4])
        notes += (
            f"output {quoted(name)}: the model itself is random{drawn and f', by node {drawn}'}: "
            f"on the same inputs it differs from itself by {itself[name]:.2g}, and from the "
            f"rewritten model by {error:.2g}; the rewrite was proved layer by layer alone",
        )
    return notes


def _explained(name: str, error: float, noise: float, selected: bool) -> str:
    """Say why an output differs by more than rounding of its own type.

    Parameters
    ----------
    selected : bool
        Whether the data selects what is in it.

    Raises
    ------
    VerificationError
        If nothing explains it.
    """
    if selected:
        return (
            f"output {quoted(name)}: the data selects what is in it, and rounding may "
            "select otherwise; the rewrite was proved layer by layer alone"
        )
    if not error <= AMPLIFICATION * noise:
        raise VerificationError(
            f"output {quoted(name)}: the rewritten model differs from the same model "
            f"with dense weights by {error:.2g}, rounding explains {noise:.2g}; "
            "nothing was written, please report this"
        )
    return (
        f"output {quoted(name)}: the network amplifies float rounding; on this data it "
        f"differs from dense weights by {error:.2g}, as it does by rounding alone"
    )


def _prove_branches(
    original: onnx.ModelProto,
    compressed: onnx.ModelProto,
    replacements: Sequence[Replacement],
    feeds: Sequence[Feeds],
    threads: int,
    varying: frozenset[str],
    taps: TapLimit | None,
) -> tuple[float, tuple[str, ...]]:
    """Prove each branch of the Ifs that hold layers as if its condition said so.

    Returns
    -------
    float
        Largest difference.
    tuple of str
        A note if a branch does not run on these inputs.
    """
    inside = {use.output for r in replacements for use in r.layer.uses if use.holder is not None}
    held = {
        output: {name for body in body_graphs([node]) for n in body.node for name in n.output}
        for node in original.graph.node
        for output in node.output[:1]
    }
    chosen = [output for output in branching(original) if held[output] & inside]
    worst, missing = 0.0, 0
    for taken in (True, False) if chosen else ():
        forced = dict.fromkeys(chosen, taken)
        before, after = settled(original, forced), settled(compressed, forced)
        try:
            for model in (before, after):
                session = open_session(model, threads)
                results = [run_session(session, feed) for feed in feeds]
        except ModelError:
            missing += 1
            continue
        its = _found_again(before, replacements)
        found = prove_rewrite(before, after, its, feeds, results, threads, varying, taps)
        worst = max(worst, found[0])
    if not missing:
        return worst, ()
    return worst, (
        f"{missing} of 2 branches do not run on these inputs; their layers were proved one by one "
        "on random data",
    )


def _found_again(model: onnx.ModelProto, replacements: Sequence[Replacement]) -> list[Replacement]:
    """Replacements of the layers, or of those of their uses, that a model has."""
    # A recurrent node holds two layers.
    made = {(use.output, r.layer.weight_input): r for r in replacements for use in r.layer.uses}
    layers = find_layers(model).layers
    pairs = [(made.get((x.uses[0].output, x.weight_input)), x) for x in layers]
    return [replace(r, layer=replace(x, bias=r.layer.bias)) for r, x in pairs if r is not None]


def prove_optimized(
    original: onnx.ModelProto,
    compressed: onnx.ModelProto,
    replacements: Sequence[Replacement],
    feeds: Sequence[Feeds],
    results: Sequence[dict[str, Any]],
    threads: int,
    taps: TapLimit | None,
) -> tuple[str, ...]:
    """Check layers that onnxruntime computes in another way once it has optimised them.

    Each has a tolerance of its own for that (`Replacement.optimized_tolerance`).

    Returns
    -------
    tuple of str
        A note on how much they and the outputs change by it; none if there are no such layers.
    """
    known = [r for r in replacements if r.optimized_tolerance is not None]
    if not known:
        return ()
    nodes = {use.output for r in known for use in r.layer.uses}
    # With the other weight of a recurrent node, which has a tolerance of its own or none.
    beside = [r for r in replacements if any(use.output in nodes for use in r.layer.uses)]
    worst = max(
        _check_layers(original, compressed, group, feeds, threads, taps, optimized=True)[0]
        for group in _groups(beside)
    )
    session = open_session(compressed, threads, optimized=True)
    after = network_errors(results, [run_session(session, feed) for feed in feeds])
    return (
        f"{len(known)} of {len(replacements)} layers read DequantizeLinear; of these onnxruntime "
        f"computes matrix products in 8 bits: they differ by at most {worst:.2g} of their largest "
        f"value, outputs by {max(after.values(), default=0.0):.2g}, from what is measured here",
    )


def _own_differences(
    model: onnx.ModelProto, feeds: Sequence[Feeds], threads: int
) -> dict[str, float]:
    """Difference of a model's outputs between two runs on the same inputs."""
    session = open_session(model, threads)
    runs = [[run_session(session, feed) for feed in feeds] for _ in range(2)]
    return network_errors(runs[0], runs[1])


def _rounding_noise(
    original: onnx.ModelProto,
    replacements: Sequence[Replacement],
    feeds: Sequence[Feeds],
    dense: Sequence[dict[str, Any]],
    size: float,
    threads: int,
) -> dict[str, float]:
    """Change of the outputs if each dense weight changes by at most a fraction `size`."""
    exposed = expose(original, [r.layer for r in replacements], as_inputs=False)
    weights = _dense_weights(original, exposed, replacements)
    generator = np.random.default_rng(0)
    for name, array in weights.items():
        factor = 1 + size * generator.uniform(-1, 1, array.shape)
        weights[name] = (array * factor).astype(array.dtype)
    session = open_session(exposed.model, threads, (), weights)
    return network_errors(dense, [run_session(session, feed) for feed in feeds])


def _groups(replacements: Sequence[Replacement]) -> list[list[Replacement]]:
    """Group layers so that the dense weights of each group fit into memory.

    Layers of one node stay together, whatever their size: all of its weights become dense at once.
    """
    groups: list[list[Replacement]] = [[]]
    size = 0
    for replaced in _of_nodes(replacements):
        bytes_here = sum(replacement.layer.stored_bytes for replacement in replaced)
        if groups[-1] and size + bytes_here > DENSE_AT_ONCE:
            groups.append([])
            size = 0
        groups[-1].extend(replaced)
        size += bytes_here
    return groups


def _of_nodes(replacements: Sequence[Replacement]) -> list[list[Replacement]]:
    """Join layers that share a node, as those of a recurrent one do, in the order of the first."""
    joined: list[list[Replacement]] = []
    holding: dict[str, list[Replacement]] = {}
    for replacement in replacements:
        outputs = [use.output for use in replacement.layer.uses]
        met = {id(holding[name]): holding[name] for name in outputs if name in holding}
        first = next(iter(met.values()), None)
        if first is None:
            first = []
            joined.append(first)
        for other in list(met.values())[1:]:
            first.extend(other)
            other.clear()
        first.append(replacement)
        holding.update((use.output, first) for each in first for use in each.layer.uses)
    return [group for group in joined if group]


def _check_layers(
    original: onnx.ModelProto,
    compressed: onnx.ModelProto,
    replacements: Sequence[Replacement],
    feeds: Sequence[Feeds],
    threads: int,
    taps: TapLimit | None,
    optimized: bool = False,
) -> tuple[float, list[dict[str, Any]]]:
    """Compare the new nodes of each layer with its node under the same dense weight.

    One graph holds both: the original with dense approximated weights and, on the same input
    as each such node, the new nodes of the compressed model. It is run once for each group
    of layers that `taps` makes.
    """
    allowed: dict[str, float] = {}
    for r in replacements:
        most = (r.optimized_tolerance if optimized else None) or tolerance(original, r)
        # A recurrent node holds two layers.
        allowed.update((name, max(most, allowed.get(name, 0.0))) for name in _readable(original, r))
    outputs = list(allowed)
    exposed = expose(original, [r.layer for r in replacements], as_inputs=False)
    reference = exposed.model
    renamed = _add_new_nodes(reference, compressed, outputs)
    dense = _dense_weights(original, exposed, replacements)
    kept = {value.name for value in original.graph.output}
    worst = 0.0
    results: list[dict[str, Any]] = []
    # Without layers in the main graph, the outputs of the network are still wanted.
    for part in [outputs] if taps is None or not outputs else taps.cut(outputs, str, 2):
        shown = [*part, *(renamed[n] for n in part)]
        session = open_session(reference, threads, shown, dense, optimized=optimized)
        results = []
        for feed in feeds:
            values = run_session(session, feed)
            errors = [checked(values, name, renamed[name], allowed[name]) for name in part]
            worst = max([worst, *errors])
            # Without the outputs of the layers, which are many.
            results.append(owned({name: v for name, v in values.items() if name in kept}))
    return worst, results


def _readable(original: onnx.ModelProto, replacement: Replacement) -> list[str]:
    """All outputs of a layer's nodes in the main graph, which can be read from a run."""
    uses = (use for use in replacement.layer.uses if use.holder is None)
    return [name for use in uses for name in original.graph.node[use.node].output if name]


def tolerance(original: onnx.ModelProto, replacement: Replacement) -> float:
    """Most by which new nodes may differ from the dense weight, of the largest output.

    A recurrent layer hands rounding on from step to step, as a network does from layer to layer.
    """
    alone = has_products(original, replacement.layer)
    return replacement.tolerance * (1.0 if alone else AMPLIFICATION)


def _dense_weights(
    original: onnx.ModelProto, exposed: Exposed, replacements: Sequence[Replacement]
) -> dict[str, NDArray[Any]]:
    """Dense weights, and biases, by their input names in the exposed model."""
    result = {name: r.dense() for name, r in zip(exposed.weights, replacements, strict=True)}
    for name, r in zip(exposed.biases, replacements, strict=True):
        if name is not None:
            bias = read_bias(original, r.layer) if r.bias is None else r.bias
            assert bias is not None
            result[name] = bias
    return result


def _add_new_nodes(
    reference: onnx.ModelProto,
    compressed: onnx.ModelProto,
    outputs: Iterable[str],
) -> dict[str, str]:
    """Add the new nodes to the dense ones; return a map of output names, old to new."""
    graph = reference.graph
    present = {t.name for t in graph.initializer} | {v.name for v in graph.input}
    present.update(name for node in graph.node for name in node.output)
    stored = {t.name: t for t in compressed.graph.initializer}
    before = len(graph.node)
    producer = {name: node for node in compressed.graph.node for name in node.output}
    renamed = {name: f"{name} by new nodes" for name in outputs}
    copied: set[str] = set()
    for name in renamed:
        append_slice(graph, producer, name, renamed, present, copied)
    read = {name for node in graph.node[before:] for name in node.input}
    graph.initializer.extend(stored[name] for name in sorted(read - present) if name in stored)
    add_functions(reference, compressed.functions)
    return renamed
