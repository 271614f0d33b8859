"""Context settings of sessions: the execution provider, and whether memory is kept between runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import onnxruntime

from cobla_onnx.errors import UsageError
from cobla_onnx.wording import option_name

__all__ = [
    "CPU",
    "current_provider",
    "execution_provider",
    "find_provider",
    "give_memory_back",
    "memory_is_given_back",
]

CPU = "CPUExecutionProvider"
_provider: ContextVar[str] = ContextVar("execution provider", default=CPU)
_gives_back: ContextVar[bool] = ContextVar("memory is given back after each run", default=False)


def find_provider(name: str | None) -> str:
    """Return the full name of an available execution provider; the CPU's for None.

    ``cuda`` stands for ``CUDAExecutionProvider``.

    Raises
    ------
    UsageError
        If onnxruntime does not have it here; names those that it has.
    """
    if name is None:
        return CPU
    available = list(onnxruntime.get_available_providers())
    for known in available:
        if name.lower() in (known.lower(), known.lower().removesuffix("executionprovider")):
            return str(known)
    raise UsageError(
        f"{option_name('provider', name)}: onnxruntime {onnxruntime.__version__} does not have it "
        f"here; it has {', '.join(available)}"
    )


@contextmanager
def execution_provider(name: str | None) -> Iterator[str]:
    """Open all sessions of this context on an execution provider, see `find_provider`.

    What a provider cannot compute goes to the CPU. What `give_memory_back` sets ends with the
    context.
    """
    tokens = _provider.set(find_provider(name)), _gives_back.set(_gives_back.get())
    try:
        yield _provider.get()
    finally:
        _provider.reset(tokens[0])
        _gives_back.reset(tokens[1])


def current_provider() -> str:
    """Name of the execution provider on which sessions are opened."""
    return _provider.get()


def give_memory_back(wanted: bool) -> None:
    """Choose whether sessions free a run's memory after it, or keep it, which is faster.

    What was freed goes back to the system then, too, whenever a session is opened. Results do
    not depend on it. It holds until the end of the context of `execution_provider`.
    """
    _gives_back.set(wanted)


def memory_is_given_back() -> bool:
    """Whether sessions free a run's memory after it."""
    return _gives_back.get()
