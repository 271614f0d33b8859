"""Latency profile: measured times in a file, keyed by what they depend on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime

from cobla_onnx.errors import UsageError
from cobla_onnx.graph.io.model_file import write_atomically
from cobla_onnx.latency.timing import Comparison
from cobla_onnx.runtime.machine import cpu_name
from cobla_onnx.text import safe_text
from cobla_onnx.wording import option_name

__all__ = ["Conditions", "Profile"]

VERSION = 1
WHOLE = "whole"
# A profile of a thousand layers has a megabyte.
LARGEST_FILE = 256 * 1024**2


@dataclass(frozen=True)
class Conditions:
    """What all times of a profile were measured with."""

    cpu: str
    onnxruntime: str
    threads: int
    provider: str

    @classmethod
    def here(cls, threads: int, provider: str) -> Conditions:
        """Return the conditions of this process."""
        return cls(cpu_name(), onnxruntime.__version__, threads, provider)


@dataclass
class Profile:
    """Times of layers and of whole models, in nanoseconds.

    Attributes
    ----------
    conditions : Conditions
    layers : dict of str to dict of str to int
        By `layer_key`: the time of the ``whole`` layer, and of its factors as
        ``scheme@rank``.
    models : dict of str to dict
        By a hash of the graph: ``whole`` is the model's time, ``plans`` holds a
        `Comparison` for each plan that was tried, by a hash of the plan and of how it is written.
    path : Path, optional
        The file that `keep` writes.
    """

    conditions: Conditions
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    path: Path | None = field(default=None, compare=False)

    def keep(self) -> None:
        """Write the profile to its file, if it has one."""
        if self.path is not None:
            self.save(self.path)

    def model(self, key: str) -> dict[str, Any]:
        """Return the entry of a model, made if it is new."""
        return self.models.setdefault(key, {WHOLE: None, "plans": {}})

    def to_json(self) -> str:
        """Return the profile as JSON."""
        content = {
            "version": VERSION,
            "conditions": asdict(self.conditions),
            "layers": self.layers,
            "models": self.models,
        }
        return json.dumps(content, indent=1, sort_keys=True, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile, atomically.

        Raises
        ------
        WriteError
            If the file cannot be written.
        """
        write_atomically(path, self.to_json().encode())

    @classmethod
    def open(cls, path: str | os.PathLike[str], conditions: Conditions) -> Profile:
        """Read a profile, or begin one where there is no file.

        Raises
        ------
        UsageError
            If the file is not a profile, or was measured under other conditions.
        """
        file = Path(path)
        shown = option_name("profile", safe_text(str(file), 300))
        try:
            if not file.exists():
                return cls(conditions, path=file)
            if file.stat().st_size > LARGEST_FILE:
                raise ValueError("it is too large")
            content = json.loads(file.read_text(encoding="utf-8"))
            _check(content)
            found = Conditions(**content["conditions"])
            profile = cls(found, content["layers"], content["models"], file)
        except OSError as error:
            raise UsageError(f"{shown}: cannot be read ({error.strerror}); check it") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{shown}: is not a profile of this version ({safe_text(str(error), 100)}); "
                "give another name, or delete it to measure anew"
            ) from error
        differences = [
            f"{name} was {safe_text(str(value), 80)}, here it is {safe_text(str(now), 80)}"
            for (name, value), now in zip(
                asdict(found).items(), asdict(conditions).values(), strict=True
            )
            if value != now
        ]
        if differences:
            raise UsageError(
                f"{shown}: was measured under other conditions: {'; '.join(differences)}. "
                "Give another name, or delete it, to measure anew"
            )
        return profile


def _check(content: Any) -> None:
    """Refuse what does not have the form of a profile."""
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f'it has no "version": {VERSION}')
    for times in content["layers"].values():
        if not all(type(value) is int and value > 0 for value in times.values()):
            raise ValueError("a time of a layer is not a number of nanoseconds")
    for entry in content["models"].values():
        whole = entry[WHOLE]
        if whole is not None and not (type(whole) is int and whole > 0):
            raise ValueError("a time of a model is not a number of nanoseconds")
        for plan in entry["plans"].values():
            Comparison(**plan)
            if not all(isinstance(plan[name], (int, float)) for name in ("ratio", "low", "high")):
                raise ValueError("a ratio is not a number")
