"""Mutate small real models, by bytes and by fields, and see that each is refused or right.

    python tools/fuzz.py 10000 --seed 0

Every run has its own number, from which its mutation follows: `--seed N` with one run
repeats it. Runs happen in a child with a memory limit, so that a crash or a hang is a
result too. Exit code 1 if there was a bug, a crash or a hang. A failed verification is
none, since nothing is written then, but it is listed: weights near the largest float.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message

from cobla_onnx import Budget, compress
from cobla_onnx.errors import CoblaError, VerificationError
from cobla_onnx.graph.io.model_file import load_model
from cobla_onnx.graph.protos import is_repeated

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
MEMORY = 6 << 30
SECONDS = 60
INTEGERS = (0, 1, -1, 2, 3, 7, 127, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, -(2**63))
FLOATS = (0.0, -1.0, 1e-45, 1e38, float("inf"), float("nan"))
STRINGS = ("", "x", "../w", "/etc/passwd", "a\x1b[31m", "\u202e", "Conv", "MatMul", "If", "Loop")


def seeds() -> list[bytes]:
    """Models of the onnx wheel to start from: with weights, and some with sequences."""
    paths = sorted(DATA.glob("pytorch-*/*/model.onnx")) + sorted(DATA.glob("simple/*/model.onnx"))
    contents = [path.read_bytes() for path in paths]
    stored = [c for c in contents if len(onnx.ModelProto.FromString(c).graph.initializer)]
    return [content for content in stored if len(content) < 40_000] + contents[-8:]


def mutate_bytes(data: bytes, generator: np.random.Generator) -> bytes:
    """Flip, delete, insert, repeat or overwrite a few bytes, or cut the end off."""
    content = bytearray(data)
    for _ in range(int(generator.integers(1, 6))):
        if not content:
            break
        start = int(generator.integers(len(content)))
        length = int(min(generator.geometric(0.2), len(content) - start))
        kind = int(generator.integers(6))
        if kind == 0:
            content[start] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            del content[start : start + length]
        elif kind == 2:
            content[start:start] = generator.bytes(length)
        elif kind == 3:
            content[start:start] = content[start : start + length]
        elif kind == 4:
            content[start : start + length] = bytes([int(generator.choice([0, 127, 255]))]) * length
        elif generator.random() < 0.2:
            del content[start:]
    return bytes(content)


def messages(root: Message) -> list[Message]:
    """All messages inside a message, itself among them."""
    found, pending = [], [root]
    while pending:
        message = pending.pop()
        found.append(message)
        for field, value in message.ListFields():
            if field.message_type is not None:
                pending.extend(value if is_repeated(field) else [value])
    return found


def mutate_fields(data: bytes, generator: np.random.Generator) -> bytes:
    """Change a few fields of the model: values, names, copies, gaps, order."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(int(generator.integers(1, 4))):
        everything = messages(model)
        message = everything[int(generator.integers(len(everything)))]
        fields = list(message.DESCRIPTOR.fields) if generator.random() < 0.2 else None
        present = [field for field, _ in message.ListFields()]
        candidates = fields or present
        if candidates:
            field = candidates[int(generator.integers(len(candidates)))]
            try:
                change(message, field, everything, generator)
            except (ValueError, TypeError):
                # A value outside the field's range, or text that is no UTF-8: no mutation.
                continue
    return model.SerializeToString()


def change(message: Message, field: Any, all_of: list[Message], generator: Any) -> None:
    """Change one field of a message."""
    if generator.random() < 0.15:
        message.ClearField(field.name)
        return
    if is_repeated(field):
        items = getattr(message, field.name)
        if not len(items) or generator.random() < 0.2:
            if field.message_type is None:
                items.append(value_for(field, all_of, generator))
            else:
                items.add()
            return
        index = int(generator.integers(len(items)))
        kind = int(generator.integers(3))
        if kind == 0:
            del items[index]
        elif field.message_type is not None:
            copy = type(items[index])()
            copy.CopyFrom(items[index])
            items.insert(int(generator.integers(len(items) + 1)), copy)
        elif kind == 1:
            items.append(items[index])
        else:
            items[index] = value_for(field, all_of, generator)
    elif field.message_type is not None:
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, value_for(field, all_of, generator))


def value_for(field: Any, all_of: list[Message], generator: Any) -> Any:
    """Draw a value of a field's type; names are often those of something else."""
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return float(generator.choice(FLOATS))
    if field.cpp_type != field.CPPTYPE_STRING:
        value = int(INTEGERS[int(generator.integers(len(INTEGERS)))])
        return value % 12 if generator.random() < 0.5 else value
    if field.type == field.TYPE_BYTES:
        return generator.bytes(int(generator.integers(20)))
    names = [m.name for m in all_of if "name" in m.DESCRIPTOR.fields_by_name]
    pool = [*STRINGS, *(name for name in names if isinstance(name, str))]
    return pool[int(generator.integers(len(pool)))]


def mutant(number: int, originals: list[bytes]) -> bytes:
    """Return the mutated model of a run."""
    generator = np.random.default_rng(number)
    data = originals[int(generator.integers(len(originals)))]
    mutate: Callable[[bytes, Any], bytes] = mutate_fields if number % 2 else mutate_bytes
    return mutate(data, generator)


def run(number: int, originals: list[bytes], folder: Path) -> str:
    """Compress one mutant; return the kind of result, or the traceback of a bug."""
    source, out = folder / "mutant.onnx", folder / "out.onnx"
    source.write_bytes(mutant(number, originals))
    out.unlink(missing_ok=True)
    before = sorted(os.listdir(folder))
    try:
        result = compress(source, Budget(mem=0.9), threads=1)
        result.save(out)
        if result.report.unchanged:
            assert out.read_bytes() == source.read_bytes(), "an unchanged model has other bytes"
            return "unchanged"
        load_model(out)
    except VerificationError as error:
        return f"VerificationError: {error}"
    except CoblaError as error:
        assert sorted(os.listdir(folder)) == before, "something was written"
        return type(error).__name__
    except Exception:  # noqa: BLE001
        return f"BUG {traceback.format_exc()}"
    return "compressed"


def work(first: int, last: int) -> None:
    """Run in the child: print the number before each run and its result after it."""
    import resource

    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    originals = seeds()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            print(f"start {number}", flush=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = run(number, originals, Path(folder))
            print("done " + found.strip().replace("\n", "\\n"), flush=True)


def supervise(first: int, last: int) -> tuple[Counter[str], list[str]]:
    """Start children until all runs are done; note crashes and hangs."""
    counts: Counter[str] = Counter()
    findings: list[str] = []
    while first < last:
        batch = min(last, first + 500)
        command = [sys.executable, __file__, "--child", str(first), str(batch)]
        with tempfile.TemporaryFile("w+") as log:
            child = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ, cwd=ROOT
            )
            size, since = 0, time.monotonic()
            while child.poll() is None:
                time.sleep(0.2)
                if log.seek(0, 2) != size:
                    size, since = log.seek(0, 2), time.monotonic()
                elif time.monotonic() - since > SECONDS:
                    child.kill()
            log.seek(0)
            lines = log.read().splitlines()
        started = [int(line.split()[1]) for line in lines if line.startswith("start ")]
        results = [line[5:] for line in lines if line.startswith("done ")]
        for number, found in zip(started, results, strict=False):
            kind = found.split(":")[0].split()[0]
            counts[kind] += 1
            if kind in ("BUG", "VerificationError"):
                findings.append(f"{found}\\nrun {number}")
        if len(started) > len(results):
            kind = "HANG" if child.returncode == -9 else "CRASH"
            counts[kind] += 1
            where = [line.strip() for line in lines if line.strip().startswith("File ")][:3]
            findings.append(f"run {started[-1]}: {kind} ({child.returncode}) {where}")
        elif len(started) < batch - first:
            findings.append(f"child stopped at {first + len(started)}: {lines[-3:]}")
            batch = first + max(1, len(started))
        first = started[-1] + 1 if started else batch
    return counts, findings


def main() -> int:
    """Run the mutants and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int, nargs=2)
    options = parser.parse_args()
    if options.child:
        work(*options.child)
        return 0
    started = time.perf_counter()
    counts, findings = supervise(options.seed, options.seed + options.runs)
    shown = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    print(f"{sum(counts.values())} runs in {time.perf_counter() - started:.0f} s: {shown}")
    for finding in findings:
        print(" | ".join(line.strip() for line in finding.split("\\n")[-4:])[-600:])
    return int(any(counts[kind] for kind in ("BUG", "CRASH", "HANG")))


if __name__ == "__main__":
    sys.exit(main())
