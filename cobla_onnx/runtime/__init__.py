"""Running things: onnxruntime sessions, worker pools, the cache, temporary files."""
