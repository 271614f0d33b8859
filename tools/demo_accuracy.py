"""Measure the demo model after compression and write the table of models/README.md.

Run from the repository's root::

    python tools/demo_accuracy.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from cobla_onnx import Budget, compress

BUDGETS = (
    {"mem": 0.7},
    {"mem": 0.5},
    {"mem": 0.4},
    {"mem": 0.3},
    {"mem": 0.2},
    {"mem": 0.15},
    {"mem": 0.1},
    {"mac": 0.7},
    {"mac": 0.5},
    {"mac": 0.3},
    {"mem": 0.5, "mac": 0.5},
)
MARK = "<!-- measured by tools/demo_accuracy.py -->"


def predictions(model: bytes, images: np.ndarray) -> np.ndarray:
    """Classes that a model gives to images."""
    session = onnxruntime.InferenceSession(model)
    return session.run(None, {"image": images})[0].argmax(1)


def main() -> None:
    """Compress at each budget and print the rows."""
    folder = Path("models")
    test = np.load(folder / "digits_test.npz")
    original = predictions((folder / "digits.onnx").read_bytes(), test["image"])
    known = test["labels"]
    rows = [
        "| budget | without data: accuracy | agreement | with data: accuracy | agreement |",
        "| --- | --- | --- | --- | --- |",
        f"| none | {(original == known).mean():.2%} | 100 % | | |",
    ]
    for budget in BUDGETS:
        name = ", ".join(f"--{key} {value}" for key, value in budget.items())
        cells = []
        for data in (None, folder / "digits_calibration.npz"):
            result = compress(folder / "digits.onnx", Budget(**budget), data=data)
            classes = predictions(result.model.SerializeToString(), test["image"])
            cells += [f"{(classes == known).mean():.2%}", f"{(classes == original).mean():.2%}"]
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    readme = folder / "README.md"
    head = readme.read_text().split(MARK)[0]
    readme.write_text(f"{head}{MARK}\n\n" + "\n".join(rows) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
