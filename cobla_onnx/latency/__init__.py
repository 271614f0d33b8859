"""Running times of layers and models in onnxruntime."""
