"""Train the demo model of this repository on scikit-learn's handwritten digits.

Writes ``models/digits.onnx``, ``models/digits_calibration.npz`` (images without labels)
and ``models/digits_test.npz`` (images with labels, never used in training). The network
is generous for its task, so that there is something to compress: 3 x 3 convolutions with
residual connections, whose BatchNormalization is folded at export, and two Gemm.

The ONNX graph is written directly from the folded weights, so that every name is ours.
Needs the extra ``train``. Run from the repository's root::

    python tools/train_demo_model.py
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own convention

SEED = 0
SIZE = 16


class ConvNorm(nn.Module):
    """A 3 x 3 convolution with BatchNormalization."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve and normalise."""
        return self.norm(self.conv(x))

    def folded(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight and bias with the normalisation folded in."""
        scale = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        weight = self.conv.weight * scale[:, None, None, None]
        bias = self.norm.bias - self.norm.running_mean * scale
        return weight.detach().numpy(), bias.detach().numpy()


class Digits(nn.Module):
    """The demo network: three stages at 16 x 16, 8 x 8 and 4 x 4, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 32)
        self.block1 = nn.ModuleList([ConvNorm(32, 32), ConvNorm(32, 32)])
        self.down1 = ConvNorm(32, 64, 2)
        self.block2 = nn.ModuleList([ConvNorm(64, 64), ConvNorm(64, 64)])
        self.down2 = ConvNorm(64, 96, 2)
        self.hidden = nn.Linear(96, 128)
        self.classes = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch of images."""
        x = F.relu(self.stem(x))
        for down, block in ((None, self.block1), (self.down1, self.block2)):
            x = x if down is None else F.relu(down(x))
            x = F.relu(x + block[1](F.relu(block[0](x))))
        x = F.relu(self.down2(x)).mean((2, 3))
        return self.classes(F.relu(self.hidden(x)))


def images_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """Digits as float32 images (1797, 1, 16, 16) in [0, 1], on a grid of 1/255."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return (np.round(images.numpy() * 255) / 255).astype(np.float32), digits.target


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate, scale and shift a little, add noise."""
    count = len(images)
    angle = (torch.rand(count, generator=generator) - 0.5) * 0.4
    scale = 1 + (torch.rand(count, generator=generator) - 0.5) * 0.2
    shift = (torch.rand(count, 2, generator=generator) - 0.5) * 0.25
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.cos(angle) * scale
    theta[:, 0, 1] = -torch.sin(angle) * scale
    theta[:, 1, 0] = torch.sin(angle) * scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved + 0.05 * torch.randn(moved.shape, generator=generator)


def train(images: np.ndarray, labels: np.ndarray, epochs: int) -> Digits:
    """Train with weight decay, which makes the spectra of the weights fall."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    network = Digits()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=3e-3
    )
    x, y = torch.tensor(images), torch.tensor(labels)
    batches = len(x) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * batches)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        total = 0.0
        for number in range(batches):
            chosen = order[number * 64 : number * 64 + 64]
            loss = F.cross_entropy(
                network(augment(x[chosen], generator)), y[chosen], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / batches:.4f}", flush=True)
    return network.eval()


class GraphWriter:
    """Collects the nodes and weights of an ONNX graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, op: str, name: str, inputs: list[str], **attributes: object) -> str:
        """Add a node and return the name of its output."""
        self.nodes.append(helper.make_node(op, inputs, [f"{name}/out"], name, **attributes))
        return f"{name}/out"

    def weighted(
        self,
        op: str,
        name: str,
        data: str,
        arrays: tuple[np.ndarray, np.ndarray],
        **attributes: object,
    ) -> str:
        """Add a node with a weight and a bias."""
        names = [f"{name}/weight", f"{name}/bias"]
        for tensor, array in zip(names, arrays, strict=True):
            self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), tensor))
        return self.add(op, name, [data, *names], **attributes)

    def conv(self, name: str, data: str, layer: ConvNorm) -> str:
        """Add a folded convolution."""
        stride = list(layer.conv.stride)
        return self.weighted(
            "Conv", name, data, layer.folded(),
            kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=stride,
        )  # fmt: skip


def export(network: Digits) -> onnx.ModelProto:
    """Write the network as an ONNX model of opset 17."""
    graph = GraphWriter()
    x = graph.add("Relu", "stem/relu", [graph.conv("stem/conv", "image", network.stem)])
    stages = ((None, network.block1), (network.down1, network.block2))
    for number, (down, block) in enumerate(stages, start=1):
        stage = f"stage{number}"
        if down is not None:
            x = graph.add("Relu", f"{stage}/down/relu", [graph.conv(f"{stage}/down", x, down)])
        y = graph.conv(f"{stage}/conv1", x, block[0])
        y = graph.conv(f"{stage}/conv2", graph.add("Relu", f"{stage}/relu1", [y]), block[1])
        x = graph.add("Relu", f"{stage}/relu2", [graph.add("Add", f"{stage}/add", [x, y])])
    x = graph.add("Relu", "stage3/down/relu", [graph.conv("stage3/down", x, network.down2)])
    x = graph.add("Flatten", "flatten", [graph.add("GlobalAveragePool", "pool", [x])])
    for name, linear in (("hidden", network.hidden), ("classes", network.classes)):
        arrays = (linear.weight.detach().numpy(), linear.bias.detach().numpy())
        x = graph.weighted("Gemm", name, x, arrays, transB=1)
        if name == "hidden":
            x = graph.add("Relu", "hidden/relu", [x])
    graph.nodes[-1].output[0] = "logits"
    shape_in, shape_out = ["N", 1, SIZE, SIZE], ["N", 10]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "digits",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape_in)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape_out)],
            graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="cobla-onnx train_demo_model",
        doc_string="Handwritten digits, 16 x 16 pixels in [0, 1]; trained by cobla-onnx.",
    )
    helper.set_model_props(model, {"classes": "0123456789", "licence": "Apache-2.0"})
    onnx.checker.check_model(model, full_check=True)
    return model


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an npz with a fixed date, so that the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content.getvalue())


def main() -> None:
    """Train, export, check against PyTorch and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models"))
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    images, labels = images_and_labels()
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=400, random_state=SEED, stratify=labels
    )
    network = train(train_x, train_y, options.epochs)
    model = export(network)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    logits = session.run(None, {"image": test_x})[0]
    with torch.no_grad():
        difference = np.abs(network(torch.tensor(test_x)).numpy() - logits).max()
    assert difference < 1e-4, difference
    accuracy = float((logits.argmax(1) == test_y).mean())
    count = sum(int(np.prod(t.dims)) for t in model.graph.initializer)
    print(f"{count} parameters, accuracy {accuracy:.4f} on {len(test_y)} test images")
    (options.out / "digits.onnx").write_bytes(model.SerializeToString(deterministic=True))
    save_arrays(options.out / "digits_calibration.npz", image=train_x[:256])
    save_arrays(options.out / "digits_test.npz", image=test_x, labels=test_y.astype(np.int64))


if __name__ == "__main__":
    main()
