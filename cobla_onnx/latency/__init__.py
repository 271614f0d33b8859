"""How long layers and models take in onnxruntime, and plans that meet a limit on it."""
