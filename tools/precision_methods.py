"""Ways to make a model smaller in bytes: ours, parts of it, and what people use instead.

    python tools/precision_methods.py METHOD MODEL DATA OUT [BUDGET [CACHE]]

The model that METHOD makes is written to OUT. BUDGET, for methods that take one, is the fraction
of the bytes of constants to keep, CACHE the folder where they keep what does not depend on it.
DATA is an ``.npz`` with calibration samples. The exit code is 4 where the budget cannot be met, 5
where a method does not apply to the model, and 6 where a package that it needs is not installed;
why stands on standard error.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

__all__ = ["ABLATION", "ALTERNATIVES", "LEARNED", "METHODS", "OURS", "Method", "NotApplicable"]

UNREACHABLE, NOT_APPLICABLE, NOT_INSTALLED = 4, 5, 6
# Below it, onnxruntime's quantiser has no scales by channel.
OPSET = 13
HISTOGRAM_SAMPLES = 32

Make = Callable[..., None]
"""Takes the model, the calibration data, where to write, and the budget; methods that take a budget
a folder as `cache` too."""


class NotApplicable(Exception):
    """The method finds nothing to do in this model."""


class NotInstalled(Exception):
    """A package that the method needs is not here."""


@dataclass(frozen=True)
class Method:
    """How a model is made.

    Attributes
    ----------
    make
        Writes the smaller model.
    budgeted
        Whether it takes a budget; else it takes the bytes that it takes.
    """

    make: Make
    budgeted: bool = False


def nothing() -> None:
    """Leave all parts on."""


def no_ranks() -> None:
    """Let only whole weights in fewer bits be proposed."""
    from cobla_onnx.graph.inventory import Reason, Refusal
    from cobla_onnx.variants.registry import FAMILIES

    for family in FAMILIES.values():
        if family.level != "bits":
            family.propose = lambda *_: Refusal(Reason.NO_GAIN)  # type: ignore[method-assign]


def no_compensation() -> None:
    """Round every number to the nearest level, whatever the inputs are."""
    import cobla_onnx.variants.registry  # noqa: F401  # so that all who round are loaded
    from cobla_onnx.variants.storage.rounding import round_weight

    def nearest(rows: Any, _: Any, bits: int) -> Any:
        return round_weight(rows, None, bits)

    for name, module in list(sys.modules.items()):
        if name.startswith("cobla_onnx.") and hasattr(module, "round_weight"):
            module.round_weight = nearest  # type: ignore[attr-defined]


def ours(precision: str, switch_off: Callable[[], None] = nothing, **options: Any) -> Method:
    """Make a method of `cobla_onnx.compress`, with a part of it switched off."""

    def make(
        model: Path, data: Path, out: Path, budget: float | None, cache: Path | None = None
    ) -> None:
        from cobla_onnx import Budget, compress

        switch_off()
        compress(
            model,
            Budget(mem=budget),
            data=data,
            precision=precision,  # type: ignore[arg-type]
            threads=2,
            cache=cache,
            **options,
        ).save(out)

    return Method(make, budgeted=True)


def static_qdq_by(ranges: str) -> Make:
    """Make a method that quantises weights (int8, by channel) and activations (uint8).

    As onnxruntime advises, with ranges by one of its calibrators, ``MinMax`` by default there.
    Histograms are of the first samples alone: it holds all tensors of all samples for them.
    """

    def make(model: Path, data: Path, out: Path, _: float | None) -> None:
        from field_data import feeds_for, open_model
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

        from cobla_onnx.arithmetic.saturation import sums_saturate
        from cobla_onnx.graph.opset import lifted

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.feeds = feeds_for(open_model(model), data)
                if ranges != "MinMax":
                    single = (
                        {name: array[at : at + 1] for name, array in feeds.items()}
                        for feeds in self.feeds
                        for at in range(len(next(iter(feeds.values()))))
                    )
                    self.feeds = itertools.islice(single, HISTOGRAM_SAMPLES)

            def get_next(self) -> Any:
                return next(self.feeds, None)

        with tempfile.TemporaryDirectory() as folder:
            raised, prepared = Path(folder) / "raised.onnx", Path(folder) / "prepared.onnx"
            onnx.save(lifted(onnx.load(model), OPSET), raised)
            quant_pre_process(raised, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                out,
                Reader(),
                per_channel=True,
                # As onnxruntime advises for processors without 8-bit dot products.
                reduce_range=sums_saturate(),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=getattr(CalibrationMethod, ranges),
                # A range that is never negative begins at 0.
                extra_options={"CalibTensorRangeSymmetric": False},
            )

    return make


static_qdq = static_qdq_by("MinMax")


def quantiser(name: str) -> Make:
    """Make a method of one of onnxruntime's quantisers, as the package calls it."""

    def make(model: Path, _: Path, out: Path, __: float | None) -> None:
        from cobla_onnx.arithmetic.quantisers import QUANTISERS
        from cobla_onnx.errors import ModelError

        (found,) = [each for each in QUANTISERS if each.name == name]
        try:
            found.make(model, out, list)
        except ImportError as error:
            raise NotInstalled(f"pip install onnx-ir: {error}") from error
        except ModelError as error:
            raise NotApplicable(str(error)) from error

    return make


dynamic = quantiser("quantize_dynamic")


def shrink_ray(model: Path, _: Path, out: Path, __: float | None) -> None:
    """Store weights as int8, with Cast, Mul and Add before their use."""
    try:
        from onnx_shrink_ray.shrink import quantize_weights
    except ImportError as error:
        raise NotInstalled(f"pip install onnx-shrink-ray: {error}") from error
    before = onnx.load(model)
    made = quantize_weights(before)
    if len(made.graph.node) == len(before.graph.node):
        raise NotApplicable("the model has no weight of 16384 numbers or more")
    onnx.save(made, out)


OURS: Mapping[str, Method] = {
    "ranks alone": ours("keep"),
    "bits alone": ours("auto", no_ranks),
    "auto": ours("auto"),
}
ABLATION: Mapping[str, Method] = {
    "auto, no compensation": ours("auto", no_compensation),
    "auto, no refit": ours("auto", refit=False),
    "bits alone, no compensation": ours("auto", lambda: (no_ranks(), no_compensation())[1]),
}
LEARNED: Mapping[str, Method] = {
    "auto, distilled": ours("auto", distil="auto"),
    "auto, distilled with variants": ours("auto", distil="auto", augment="flip,crop:4"),
    **{
        f"auto, distilled with variants, seed {seed}": ours(
            "auto", distil="auto", augment="flip,crop:4", seed=seed
        )
        for seed in (1, 2)
    },
    "auto, distilled with variants in 10 minutes": ours(
        "auto", distil="auto", augment="flip,crop:4", time_limit=600
    ),
    "ranks alone, distilled with variants in 10 minutes": ours(
        "keep", distil="auto", augment="flip,crop:4", time_limit=600
    ),
    "auto, distilled in 10 minutes": ours("auto", distil="auto", time_limit=600),
    "ranks alone, distilled in 10 minutes": ours("keep", distil="auto", time_limit=600),
    "auto, distilled in 4 passes": ours("auto", distil=4),
}
ALTERNATIVES: Mapping[str, Method] = {
    "float16": Method(quantiser("float16")),
    "quantize_dynamic": Method(dynamic),
    "static QDQ, U8S8": Method(static_qdq),
    "MatMulNBits, 8 bits": Method(quantiser("MatMulNBits, 8 bits")),
    "MatMulNBits, 4 bits": Method(quantiser("MatMulNBits, 4 bits")),
    "onnx-shrink-ray": Method(shrink_ray),
}
METHODS: Mapping[str, Method] = {**OURS, **ABLATION, **LEARNED, **ALTERNATIVES}


def main(method: str, model: str, data: str, out: str, budget: str = "", cache: str = "") -> int:
    """Run a method; return the exit code."""
    from cobla_onnx.errors import BudgetError

    try:
        METHODS[method].make(
            Path(model),
            Path(data),
            Path(out),
            float(budget) if budget else None,
            **({"cache": Path(cache)} if cache else {}),
        )
    except BudgetError as error:
        print(error, file=sys.stderr)
        return UNREACHABLE
    except NotApplicable as error:
        print(error, file=sys.stderr)
        return NOT_APPLICABLE
    except NotInstalled as error:
        print(error, file=sys.stderr)
        return NOT_INSTALLED
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
