"""The command line: parse options, call the API, show the result. No logic.

A file for each command; options that several commands have are declared in `options`.
"""

from cobla_onnx.cli.app import app, main

__all__ = ["app", "main"]
