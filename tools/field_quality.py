"""How well a compressed model still does its task, told from its outputs and the original's.

No part of the package is used, so that its own figures can be judged. Each measure takes the
original's outputs and then the compressed model's, samples first, and returns named figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "MEASURES",
    "boxes",
    "classes",
    "ctc",
    "detections",
    "edit_distance",
    "embedding",
    "f1_of_detections",
    "greatest_difference",
    "losses_by_sample",
    "mean_over_mask",
    "perplexity",
    "probability_map",
    "surprises",
]

Array = NDArray[Any]
Detections = tuple[Array, NDArray[np.int64]]
"""Boxes (n, 4) as left, top, right, bottom, and their classes (n)."""

SCORE = 0.25
SUPPRESSED = 0.45
MATCHED = 0.5
NEIGHBOURS = 10


def embedding(before: Array, after: Array) -> dict[str, float]:
    """Compare unit vectors (samples, features): cosines, and what a search would find.

    The second half of the samples is looked for in the first.
    """
    cosine = (before * after).sum(1)
    half = len(before) // 2
    near, still = (vectors[half:] @ vectors[:half].T for vectors in (before, after))
    first, second = (np.argsort(-scores)[:, :NEIGHBOURS] for scores in (near, still))
    shared = (first[:, :, None] == second[:, None]).any(2).mean()
    return {
        "cosine": float(cosine.mean()),
        "least_cosine": float(cosine.min()),
        "same_nearest": float((first[:, 0] == second[:, 0]).mean()),
        "same_ten": float(shared),
    }


def mean_over_mask(hidden: ArrayLike, mask: ArrayLike) -> Array:
    """Return mean vectors of length one (samples, features) of states (samples, t, features)."""
    states, weights = np.asarray(hidden, np.float64), np.asarray(mask, np.float64)[..., None]
    mean = (states * weights).sum(1) / weights.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def ctc(before: Array, after: Array) -> dict[str, float]:
    """Compare texts read from scores (samples, places, characters), character 0 being blank."""
    texts, others = _read(before), _read(after)
    wrong = sum(edit_distance(a, b) for a, b in zip(texts, others, strict=True))
    return {
        "equal_text": float(np.mean([a == b for a, b in zip(texts, others, strict=True)])),
        "character_error": wrong / max(1, sum(map(len, texts))),
    }


def _read(scores: Array) -> list[list[int]]:
    """Most likely characters, repetitions merged and blanks dropped (Graves et al. 2006)."""
    best = scores.argmax(-1)
    new = np.diff(best, axis=1, prepend=-1) != 0
    return [line[keep].tolist() for line, keep in zip(best, new & (best != 0), strict=True)]


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Fewest insertions, deletions and replacements that make one of the other (Levenshtein)."""
    others, steps = np.asarray(b), np.arange(len(b) + 1)
    costs = steps
    for x in a:
        without = np.concatenate([[costs[0] + 1], costs[:-1] + (others != x)])
        least = np.minimum(without, costs + 1)
        # An insertion costs one more than the place before, however many stand in a row.
        costs = np.minimum.accumulate(least - steps) + steps
    return int(costs[-1])


def probability_map(before: Array, after: Array) -> dict[str, float]:
    """Intersection over union of what is above one half."""
    a, b = before > 0.5, after > 0.5
    return {"iou": float((a & b).sum() / max(1, (a | b).sum()))}


def classes(before: Array, after: Array) -> dict[str, float]:
    """Same most likely class, and KL divergence; classes on the last axis."""
    if np.abs(before.sum(-1) - 1).max() >= 1e-3:
        before, after = _softmax(before), _softmax(after)
    before, after = before.astype(np.float64), after.astype(np.float64)
    divergence = (before * (np.log(before + 1e-12) - np.log(after + 1e-12))).sum(-1)
    same = before.argmax(-1) == after.argmax(-1)
    return {"agreement": float(same.mean()), "kl": float(divergence.mean())}


def _softmax(logits: Array) -> Array:
    scaled = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return scaled / scaled.sum(-1, keepdims=True)


def surprises(logits: Array, ids: NDArray[np.integer[Any]]) -> Array:
    """Return what each token but the first cost, -log p in nats (rows, length - 1)."""
    shares = _softmax(logits[:, :-1])
    return -np.log(np.take_along_axis(shares, ids[:, 1:, None], 2)[..., 0] + 1e-30)


def perplexity(before: Array, after: Array) -> dict[str, float]:
    """Compare what tokens cost in nats: the exponential of the mean, and how much it rose."""
    first, second = (float(np.exp(costs.mean())) for costs in (before, after))
    return {"perplexity": second, "rise": second / first - 1}


def greatest_difference(before: Array, after: Array) -> dict[str, float]:
    """Compare probabilities of single events: the greatest difference, and the same side of 0.5."""
    return {
        "greatest_difference": float(np.abs(before - after).max()),
        "same_decision": float(((before > 0.5) == (after > 0.5)).mean()),
    }


def boxes(before: Array, after: Array) -> dict[str, float]:
    """F1 of boxes (samples, 4 + classes, anchors) against the original's, as YOLOv8 reads them."""
    first, second = ([detections(x) for x in outputs] for outputs in (before, after))
    return {"f1": f1_of_detections(first, second), "boxes": sum(len(x[1]) for x in first)}


def detections(output: ArrayLike) -> Detections:
    """Read one picture's boxes from (4 + classes, anchors): the best of each heap."""
    raw = np.asarray(output, np.float64)
    scores, labels = raw[4:].max(0), raw[4:].argmax(0)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > SCORE]
    centre, size = raw[:2, order].T, raw[2:4, order].T
    found, labels = np.concatenate([centre - size / 2, centre + size / 2], 1), labels[order]
    heaped = (overlaps(found, found) >= SUPPRESSED) & (labels[:, None] == labels)
    chosen: list[int] = []
    for place in range(len(found)):
        if not heaped[place, chosen].any():
            chosen.append(place)
    return found[chosen], labels[chosen]


def overlaps(a: Array, b: Array) -> Array:
    """Intersection over union of each box of `a` (n, 4) with each of `b` (m, 4)."""
    low, high = (pick(a[:, None], b) for pick in (np.maximum, np.minimum))
    inner = np.maximum(high[..., 2:] - low[..., :2], 0).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    return inner / (areas[0][:, None] + areas[1] - inner + 1e-9)


def f1_of_detections(first: Sequence[Detections], second: Sequence[Detections]) -> float:
    """Twice the matched boxes over all boxes; a box matches one of its class that overlaps."""
    matched = total = 0
    for (a, labels), (b, others) in zip(first, second, strict=True):
        total += len(a) + len(b)
        free = (overlaps(a, b) > MATCHED) & (labels[:, None] == others)
        for candidates in free:
            if candidates.any():
                free[:, candidates.argmax()] = False
                matched += 1
    return 2 * matched / max(1, total)


def losses_by_sample(kind: str, before: Array, after: Array) -> list[float]:
    """What each sample loses, by the measure of that name; 0 is the original's, more is worse.

    Samples are those of the test data: sentences, lines of text, pictures, texts.
    """
    if kind == "perplexity":
        return [float(rise) for rise in (after - before).mean(axis=1)]
    if kind == "embedding":
        return [1 - float(cosine) for cosine in (before * after).sum(1)]
    of_one: Callable[[Array, Array], float] = {
        "ctc": lambda a, b: ctc(a, b)["character_error"],
        "map": lambda a, b: 1 - probability_map(a, b)["iou"],
        "boxes": lambda a, b: 1 - boxes(a, b)["f1"],
        "classes": lambda a, b: classes(a, b)["kl"],
        "event": lambda a, b: greatest_difference(a, b)["greatest_difference"],
    }[kind]
    return [of_one(before[i : i + 1], after[i : i + 1]) for i in range(len(before))]


MEASURES: Mapping[str, Callable[[Array, Array], dict[str, float]]] = {
    "embedding": embedding,
    "ctc": ctc,
    "map": probability_map,
    "boxes": boxes,
    "classes": classes,
    "event": greatest_difference,
    "perplexity": perplexity,
}
