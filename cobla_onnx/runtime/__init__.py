"""How work is run: onnxruntime sessions, pools of workers, a cache, temporary files."""
