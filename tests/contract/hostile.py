"""Damaged and hostile models, built by code, with the message that each must get.

Messages leave out the file name that stands before them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx.wording import option_name
from tests.builders import FLOAT, random_array, small_network

AGAIN = "the file is damaged, export or download it again"
DAMAGED = "the model is damaged, export it again"


@dataclass(frozen=True)
class Hostile:
    """A way to damage a model, what happens to it, and the exact message."""

    name: str
    damage: Callable[[onnx.ModelProto], object]
    message: str


CASES: list[Hostile] = []


def hostile(name: str, message: str) -> Callable[..., None]:
    def register(damage: Callable[[onnx.ModelProto], object]) -> None:
        CASES.append(Hostile(name, damage, message))

    return register


def set_dims(model: onnx.ModelProto, *sizes: int, index: int = 0) -> None:
    tensor = model.graph.initializer[index]
    del tensor.dims[:]
    tensor.dims.extend(sizes)


def replace_weight(model: onnx.ModelProto, index: int, array: np.ndarray) -> None:
    name = model.graph.initializer[index].name
    model.graph.initializer[index].CopyFrom(numpy_helper.from_array(array, name))


def conv_with(**values: object) -> Callable[[onnx.ModelProto], None]:
    def damage(model: onnx.ModelProto) -> None:
        node = model.graph.node[0]
        kept = [a for a in node.attribute if a.name not in values]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in values.items())

    return damage


def needs(label: str, shape: list[int], needed: int, held: int, unit: str = "bytes") -> str:
    return f"{label}: shape {shape} needs {needed} {unit}, the file holds {held}; {AGAIN}"


# Sizes and data
hostile("giant dims, little data", needs("initializer 'w1'", [2**40, 2**40], 2**82, 1728))(
    lambda m: set_dims(m, 2**40, 2**40)
)
hostile("dims that wrap to 0", needs("initializer 'w1'", [2**32, 2**32], 2**66, 1728))(
    lambda m: set_dims(m, 2**32, 2**32)
)
hostile("negative dims", f"initializer 'w1': has a negative size in its shape [-16, -27]; {AGAIN}")(
    lambda m: set_dims(m, -16, -27)
)
hostile("too little data", needs("initializer 'w1'", [16, 3, 3, 3], 1728, 1000))(
    lambda m: setattr(m.graph.initializer[0], "raw_data", bytes(1000))
)
hostile("too much data", needs("initializer 'w1'", [16, 3, 3, 3], 1728, 2000))(
    lambda m: setattr(m.graph.initializer[0], "raw_data", bytes(2000))
)
hostile("unknown type", f"initializer 'w1': has unknown data type 999; {AGAIN}")(
    lambda m: setattr(m.graph.initializer[0], "data_type", 999)
)
hostile("no type", f"initializer 'w1': has unknown data type 0; {AGAIN}")(
    lambda m: m.graph.initializer[0].ClearField("data_type")
)


@hostile("too few numbers in a typed field", needs("initializer 'w1'", [2, 2], 4, 3, "numbers"))
def _(model: onnx.ModelProto) -> None:
    tensor = TensorProto(name="w1", data_type=FLOAT, dims=[2, 2], float_data=[1, 2, 3])
    model.graph.initializer[0].CopyFrom(tensor)


@hostile("a damaged attribute", needs("node 'constant': 'value'", [3], 12, 4))
def _(model: onnx.ModelProto) -> None:
    value = TensorProto(data_type=FLOAT, dims=[3], raw_data=bytes(4))
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], "constant", value=value))


# Ranks
for shape in ((), (3,), (3, 3)):
    hostile(
        f"weight of rank {len(shape)}",
        f"node 'conv1': its weight has shape {list(shape)}, a Conv's has 3 axes or more; {DAMAGED}",
    )(lambda m, shape=shape: replace_weight(m, 0, np.ones(shape, np.float32)))
hostile(
    "Gemm weight of rank 1",
    f"node 'fc': its weight has shape [240], a Gemm's has 2 axes; {DAMAGED}",
)(lambda m: replace_weight(m, 3, random_array(240)))

# Values
for value in (np.nan, np.inf, -np.inf):
    hostile(
        f"{value} in a weight",
        "weight 'w1' of node 'conv1' holds NaN or infinity; "
        "export the model again from a healthy checkpoint",
    )(lambda m, v=value: replace_weight(m, 0, np.full((16, 3, 3, 3), v, np.float32)))

# Attributes
hostile(
    "group 0", f"node 'conv1': group 0 does not divide the 16 channels of its weight; {DAMAGED}"
)(conv_with(group=0))
hostile(
    "group 3 of 16",
    f"node 'conv1': group 3 does not divide the 16 channels of its weight; {DAMAGED}",
)(conv_with(group=3))
hostile("strides 0", f"node 'conv1': strides [0, 0] do not fit a kernel of 2 axes; {DAMAGED}")(
    conv_with(strides=[0, 0])
)
hostile("strides -1", f"node 'conv1': strides [-1, 1] do not fit a kernel of 2 axes; {DAMAGED}")(
    conv_with(strides=[-1, 1])
)
hostile(
    "dilations 2^40",
    f"node 'conv1': dilations [{2**40}, 1] do not fit a kernel of 2 axes; {DAMAGED}",
)(conv_with(dilations=[2**40, 1]))
hostile(
    "three strides", f"node 'conv1': strides [1, 1, 1] do not fit a kernel of 2 axes; {DAMAGED}"
)(conv_with(strides=[1, 1, 1]))
hostile("one pad", f"node 'conv1': pads [1] do not fit a kernel of 2 axes; {DAMAGED}")(
    conv_with(pads=[1])
)
hostile(
    "kernel_shape lies",
    f"node 'conv1': kernel_shape says [5, 5], its weight has [3, 3]; {DAMAGED}",
)(conv_with(kernel_shape=[5, 5]))
hostile(
    "attribute of another type",
    "node 'conv1': its attribute 'group' is not of the type that Conv defines; "
    "the file is damaged, export it again",
)(conv_with(group="one"))
hostile(
    "attribute of a function",
    "node 'conv1': an attribute refers to a function's, but it is in none; "
    "the file is damaged, export it again",
)(lambda m: setattr(m.graph.node[0].attribute[0], "ref_attr_name", "pads"))
hostile(
    "attribute without type",
    "node 'conv1': its attribute 'pads' has no type; the file is damaged, export it again",
)(lambda m: m.graph.node[0].attribute[0].ClearField("type"))
hostile("attribute twice", "node 'conv1': has an attribute twice; the file is damaged")(
    lambda m: m.graph.node[0].attribute.append(m.graph.node[0].attribute[0])
)

# Names and order
hostile("initializer twice", f"initializer 'w1': occurs twice; {AGAIN}")(
    lambda m: m.graph.initializer.append(m.graph.initializer[0])
)
hostile("missing initializer", f"node 'fc': reads 'w3', which nothing produces; {AGAIN}")(
    lambda m: m.graph.initializer.remove(m.graph.initializer[3])
)
hostile("node name twice", f"node 'conv1': another node has the same name; {AGAIN}")(
    lambda m: setattr(m.graph.node[1], "name", "conv1")
)
hostile("two producers", f"node 'relu2': makes 'y1', which exists already; {AGAIN}")(
    lambda m: m.graph.node[3].output.__setitem__(0, "y1")
)
hostile("output without producer", f"output 'nowhere': no node makes it; {AGAIN}")(
    lambda m: setattr(m.graph.output[0], "name", "nowhere")
)
hostile("output twice", f"graph output 'logits': occurs twice; {AGAIN}")(
    lambda m: m.graph.output.append(m.graph.output[0])
)
hostile("cycle", f"node 'relu1': depends on its own output 'r2'; {AGAIN}")(
    lambda m: m.graph.node[1].input.__setitem__(0, "r2")
)
hostile("reads itself", f"node 'relu1': depends on its own output 'r1'; {AGAIN}")(
    lambda m: m.graph.node[1].input.__setitem__(0, "r1")
)


@hostile(
    "a node waits for a cycle",
    f"node 'relu1': waits for node 'relu2', which depends on its own output; {AGAIN}",
)
def _(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "y2"
    model.graph.node[3].input[0] = "r2"
    model.graph.node[2].input[0] = "r2"


hostile(
    "Conv without weight",
    "node 'conv1': has 1 inputs, Conv has 2 to 3; the file is damaged, export it again",
)(lambda m: m.graph.node[0].input.__delitem__(slice(1, None)))
hostile(
    "Conv with an empty weight name",
    "node 'conv1': its input 'W' is missing, which Conv needs; "
    "the file is damaged, export it again",
)(lambda m: m.graph.node[0].input.__setitem__(1, ""))
hostile("no operator", "node 'relu1': has no operator; the file is damaged, export it again")(
    lambda m: m.graph.node[1].ClearField("op_type")
)

# Versions
hostile("no graph", f"holds no graph with nodes; {AGAIN}")(lambda m: m.ClearField("graph"))
hostile("no opset", f"the model imports no operator set; {AGAIN}")(
    lambda m: m.ClearField("opset_import")
)
hostile(
    "opset 999",
    f"the model uses opset 999, onnx {onnx.__version__} knows 1 to "
    f"{onnx.defs.onnx_opset_version()}; update onnx, or export again for an older opset",
)(lambda m: setattr(m.opset_import[0], "version", 999))
hostile(
    "IR 999",
    f"has IR version 999, onnx {onnx.__version__} knows 1 to {onnx.IR_VERSION}; "
    "update onnx, or export again",
)(lambda m: setattr(m, "ir_version", 999))
hostile("opset twice", f"the model imports operator set '' twice; {AGAIN}")(
    lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 9))
)


# Functions
def function(name: str, *called: str) -> onnx.FunctionProto:
    nodes = [helper.make_node(c, ["x"], [f"y_{c}"], domain="my") for c in called]
    nodes.append(helper.make_node("Relu", ["x"], ["y"]))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    return helper.make_function("my", name, ["x"], ["y"], nodes, imports)


hostile("function that calls itself", f"function 'f': calls itself in a cycle; {AGAIN}")(
    lambda m: m.functions.append(function("f", "f"))
)
hostile("functions in a circle", f"function 'f': calls itself in a cycle; {AGAIN}")(
    lambda m: m.functions.extend([function("f", "g"), function("g", "h"), function("h", "f")])
)
hostile("function twice", f"function 'f': is defined twice; {AGAIN}")(
    lambda m: m.functions.extend([function("f"), function("f")])
)


@hostile(
    "unknown name in a function",
    f"function 'f', node 'Relu_0': reads 'z', which nothing produces; {AGAIN}",
)
def _(model: onnx.ModelProto) -> None:
    model.functions.append(function("f"))
    model.functions[0].node[0].input[0] = "z"


# Resources
def giant(op: str, inputs: list[str], **values: object) -> Callable[[onnx.ModelProto], None]:
    def damage(model: onnx.ModelProto) -> None:
        array = np.array([2**20, 2**20], np.int64)
        model.graph.initializer.append(numpy_helper.from_array(array, "sizes"))
        model.graph.initializer.append(numpy_helper.from_array(random_array(1, 1), "one"))
        model.graph.node.append(helper.make_node(op, inputs, ["much"], "giant", **values))
        model.graph.output.append(helper.make_tensor_value_info("much", FLOAT, None))

    return damage


MUCH = (
    f"node 'giant': makes a tensor of shape [{2**20}, {2**20}], more than 2147483647 numbers; "
    f"give smaller inputs by {option_name('input_shapes')}, or export the model again"
)
hostile("ConstantOfShape of 2^40", MUCH)(giant("ConstantOfShape", ["sizes"]))
hostile("Expand to 2^40", MUCH)(giant("Expand", ["one", "sizes"]))


@hostile(
    "a giant input",
    MUCH.replace("giant", "conv1").replace(f"{2**20}, {2**20}", f"1, 16, {2**31}, {2**31}"),
)
def _(model: onnx.ModelProto) -> None:
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 2**31
    del model.graph.value_info[:]


# Names
def named(name: str) -> Callable[[onnx.ModelProto], None]:
    """Give a name to a node that reads what is not there."""

    def damage(model: onnx.ModelProto) -> None:
        model.graph.node[1].name = name
        model.graph.node[1].input[0] = "lost"

    return damage


LOST = f"reads 'lost', which nothing produces; {AGAIN}"
hostile("hostile name", f"node 'a\\x1b[31mb\\x0a\\x202e/../c': {LOST}")(
    named("a\x1b[31mb\n\u202e/../c")
)
hostile("long name", f"node '{'x' * 39}…{'x' * 40}': {LOST}")(named("x" * 10_000))


# External data: the model reads "w.bin" beside it, if nothing is done to it.
@dataclass(frozen=True)
class HostileData:
    """Damage to external data: a change of its entries, or of the folder."""

    name: str
    entries: dict[str, str]
    message: str
    prepare: Callable[[Path], object] = lambda folder: None


def _as_link(folder: Path) -> None:
    (folder / "w.bin").rename(folder.parent / "elsewhere.bin")
    (folder / "w.bin").symlink_to(folder.parent / "elsewhere.bin")


def _below_a_link(folder: Path) -> None:
    (folder.parent / "outside").mkdir()
    (folder / "w.bin").rename(folder.parent / "outside" / "w.bin")
    (folder / "sub").symlink_to(folder.parent / "outside")


BESIDE = "put the data file that belongs to the model beside it"
MOVE = "only files beside the model are read, move the data there"


def outside(location: str) -> str:
    return f"its external data '{location}' is outside the model's folder; {MOVE}"


DATA_CASES = [
    HostileData("parent folder", {"location": "../w.bin"}, outside("../w.bin")),
    HostileData("hidden parent", {"location": "a/../../w.bin"}, outside("a/../../w.bin")),
    HostileData("windows parent", {"location": "..\\w.bin"}, outside("..\\w.bin")),
    HostileData("absolute", {"location": "/etc/passwd"}, outside("/etc/passwd")),
    HostileData("drive", {"location": "C:\\w.bin"}, outside("C:\\w.bin")),
    HostileData("no location", {"location": ""}, outside("")),
    HostileData(
        "symlink", {}, f"its external data 'w.bin' is reached through a symlink; {BESIDE}", _as_link
    ),
    HostileData(
        "folder that is a symlink",
        {"location": "sub/w.bin"},
        f"its external data 'sub/w.bin' is reached through a symlink; {BESIDE}",
        _below_a_link,
    ),
    HostileData(
        "hard link",
        {},
        f"its external data 'w.bin' is a hard link; {BESIDE}",
        lambda folder: os.link(folder / "w.bin", folder / "other"),
    ),
    HostileData(
        "missing",
        {},
        f"its external data 'w.bin' cannot be read (No such file or directory); {BESIDE}",
        lambda folder: (folder / "w.bin").unlink(),
    ),
    HostileData(
        "pipe",
        {},
        f"its external data 'w.bin' is not a regular file; {BESIDE}",
        lambda folder: ((folder / "w.bin").unlink(), os.mkfifo(folder / "w.bin")),
    ),
    HostileData(
        "folder",
        {},
        f"its external data 'w.bin' is not a regular file; {BESIDE}",
        lambda folder: ((folder / "w.bin").unlink(), (folder / "w.bin").mkdir()),
    ),
    HostileData(
        "offset beyond the end",
        {"offset": str(2**60)},
        f"its external data 'w.bin' has 16616 bytes, the tensor needs 1728 from byte {2**60} on; "
        + BESIDE,
    ),
    HostileData(
        "short file",
        {},
        f"its external data 'w.bin' has 100 bytes, the tensor needs 1728 from byte 0 on; {BESIDE}",
        lambda folder: os.truncate(folder / "w.bin", 100),
    ),
    HostileData(
        "length 2^50",
        {"length": str(2**50)},
        f"its external data has length '{2**50}', its shape [16, 3, 3, 3] needs 1728; "
        "the file is damaged, export it again",
    ),
    HostileData(
        "offset -1",
        {"offset": "-1"},
        "its external data has offset '-1', which is not a size in bytes; "
        "the file is damaged, export it again",
    ),
    HostileData(
        "key that is an attribute",
        {"__class__": "x"},
        "its external data has a doubled or unknown entry '__class__'; "
        "the file is damaged, export it again",
    ),
]


def with_external_data(folder: Path, entries: dict[str, str]) -> Path:
    """Write the small network with its weights in w.bin; change the entries of the first."""
    path = folder / "model.onnx"
    onnx.save(small_network(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    present = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in present.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path
