"""Train the detector of this repository on drawn shapes, and export it with PyTorch.

Writes ``models/shapes_detector.onnx``. Its output is laid out like YOLOv8's: one tensor
(pictures, 4 + classes, anchors) with the centre, width and height of boxes in pixels and
scores between 0 and 1, so that one tensor holds values of very different size. The pictures
are drawn by ``tools/field_shapes.py``; nobody needs to keep them.

Needs the extra ``train``. Run from the repository's root::

    python tools/train_detector.py
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from field_quality import detections, f1_of_detections
from field_shapes import CLASSES, SIZE, TEST, TRAINING, Scenes, draw_scenes
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own convention
from torch.nn.utils.fusion import fuse_conv_bn_eval

SEED = 0
STRIDES = (8, 16)
SMALL = 24.0
"""Longest side in pixels of a shape that the finer grid looks for."""


class ConvNorm(nn.Module):
    """A convolution with BatchNormalization and ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve, normalise, rectify."""
        return F.relu(self.norm(self.conv(x)))

    def fold(self) -> None:
        """Put the normalisation into the convolution."""
        self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()


class Residual(nn.Module):
    """Two 3 x 3 convolutions with fewer channels between, and what went in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow = ConvNorm(channels, channels // 2)
        self.widen = ConvNorm(channels // 2, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add to the input."""
        return x + self.widen(self.narrow(x))


class Detector(nn.Module):
    """Two grids of anchors; boxes and scores have branches of their own, as in YOLOv8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 16, stride=2), ConvNorm(16, 32, stride=2))
        self.fine = nn.Sequential(Residual(32), ConvNorm(32, 64, stride=2), Residual(64))
        self.coarse = nn.Sequential(ConvNorm(64, 64, stride=2), Residual(64))
        self.merge = ConvNorm(128, 64, 1)
        self.boxes, self.scores = (
            nn.ModuleList(
                nn.Sequential(ConvNorm(64, 32), nn.Conv2d(32, outputs, 1)) for _ in STRIDES
            )
            for outputs in (4, len(CLASSES))
        )
        for branch in self.scores:
            nn.init.constant_(branch[-1].bias, -4.0)
        places = [torch.arange(stride // 2, SIZE, stride).float() for stride in STRIDES]
        centres = [torch.cartesian_prod(place, place).flip(1).T for place in places]
        spans = [torch.full((1, len(p) ** 2), s) for p, s in zip(places, STRIDES, strict=True)]
        self.register_buffer("anchors", torch.cat(centres, 1))
        self.register_buffer("strides", torch.cat(spans, 1).float())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return boxes in pixels and scores, (pictures, 4 + classes, anchors)."""
        boxes, logits = self.raw(image)
        return torch.cat([boxes, logits.sigmoid()], 1)

    def raw(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return boxes and the logits of the scores."""
        fine = self.fine(self.stem(image))
        coarse = self.coarse(fine)
        fine = self.merge(torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], 1))
        levels = (fine, coarse)
        reach, logits = (
            torch.cat([f(x).flatten(2) for f, x in zip(branches, levels, strict=True)], 2)
            for branches in (self.boxes, self.scores)
        )
        near, far = (F.softplus(reach) * self.strides).chunk(2, 1)
        return torch.cat([self.anchors + (far - near) / 2, near + far], 1), logits

    def folded(self) -> Detector:
        """Return a copy for use, normalisations folded."""
        network = copy.deepcopy(self).eval()
        for module in list(network.modules()):
            if isinstance(module, ConvNorm):
                module.fold()
        return network


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """Turn centres and sizes (pictures, 4, anchors) to sides (pictures, anchors, 4)."""
    centre, size = boxes.transpose(1, 2).chunk(2, 2)
    return torch.cat([centre - size / 2, centre + size / 2], 2)


def overlaps(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Intersection over union of pairs, and its generalised form (Rezatofighi et al. 2019)."""
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).relu()
    outer = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    both = inner.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both
    ratio, hull = both / (union + 1e-6), outer.prod(-1) + 1e-6
    return ratio, ratio - (hull - union) / hull


def assign(
    network: Detector, boxes: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which shape each anchor looks for, and whether any: (pictures, anchors) each.

    Those on the grid for the shape's size whose centre is within the box and near its centre.
    """
    x, y = network.anchors[:, None, :, None]
    left, top, right, bottom = (boxes[:, None, :, side] for side in range(4))
    inside = (x > left) & (x < right) & (y > top) & (y < bottom)
    reach = network.strides[0][None, :, None]
    near = ((x - (left + right) / 2).abs() < reach) & ((y - (top + bottom) / 2).abs() < reach)
    small = torch.maximum(right - left, bottom - top) <= SMALL
    level = small == (reach == STRIDES[0])
    looks = (inside & near & level & (labels >= 0)[:, None]).float()
    found, shape = looks.max(2)
    return shape, found > 0


def loss_of(network: Detector, images: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor):
    """Generalised IoU of boxes; cross-entropy of scores, which are to say the IoU."""
    predicted, logits = network.raw(images)
    shape, found = assign(network, boxes, labels)
    rows = torch.arange(len(images))[:, None]
    ratio, generalised = overlaps(corners(predicted)[found], boxes[rows, shape][found])
    wanted = torch.zeros_like(logits.transpose(1, 2))
    classes = labels[rows, shape][found]
    wanted[found] = F.one_hot(classes, len(CLASSES)) * ratio.detach().clamp(0, 1)[:, None]
    scores = F.binary_cross_entropy_with_logits(logits.transpose(1, 2), wanted, reduction="sum")
    return ((1 - generalised).sum() * 2 + scores) / max(len(classes), 1)


def train(scenes: Scenes, epochs: int) -> Detector:
    """Train with weight decay; half of the pictures are mirrored, colours change places."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    network, batch = Detector(), 32
    images, boxes, labels = (torch.tensor(a) for a in (scenes.images, scenes.boxes, scenes.labels))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=epochs * (len(images) // batch)
    )
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(images))
        for chosen in order[: len(order) // batch * batch].split(batch):
            x, truth = images[chosen][:, torch.randperm(3)], boxes[chosen]
            if torch.rand(()) < 0.5:
                x, truth = x.flip(3), truth[..., [2, 1, 0, 3]]
                truth[..., [0, 2]] = SIZE - truth[..., [0, 2]]
            loss = loss_of(network, x, truth, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: {total / (len(images) // batch):.4f}", flush=True)
    return network


def export(network: Detector) -> onnx.ModelProto:
    """Export with PyTorch's exporter, the number of pictures left open."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            network.folded(),
            (torch.zeros(2, 3, SIZE, SIZE),),
            path,
            input_names=["image"],
            output_names=["detections"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            opset_version=18,
            dynamo=True,
            external_data=False,
        )
        model = onnx.load(path)
    # Which file of whose folder a node comes from is of no use to anybody else.
    for node in model.graph.node:
        del node.metadata_props[:]
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    """Train, export, and say how many shapes of new pictures are found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("models/shapes_detector.onnx"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--pictures", type=int, default=6000)
    options = parser.parse_args()
    network = train(draw_scenes(options.pictures, TRAINING), options.epochs)
    onnx.save(export(network), options.output)
    test = draw_scenes(500, TEST)
    with torch.no_grad():
        outputs = network.folded()(torch.tensor(test.images)).numpy()
    truth = [
        (sides[known >= 0].astype(np.float64), known[known >= 0])
        for sides, known in zip(test.boxes, test.labels, strict=True)
    ]
    found = f1_of_detections([detections(output) for output in outputs], truth)
    print(f"F1 {found:.4f} on {len(outputs)} pictures, {options.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
