"""``python -m cobla_onnx``: the same as the command ``cobla-onnx``."""

from cobla_onnx.cli import main

if __name__ == "__main__":
    main()
