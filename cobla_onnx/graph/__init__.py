"""The ONNX graph: reading and writing models, finding layers, counting their costs."""
