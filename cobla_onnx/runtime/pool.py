"""Map independent units of work over threads, processes or a cluster, with results in order.

Every unit of work runs with one thread of linear algebra, wherever it runs. Its result is
then the same to the last bit whatever the number of threads, processes or machines (of one
kind of processor), and many small matrices do not make threads wait for each other.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from cobla_onnx.errors import UsageError
from cobla_onnx.runtime.machine import return_freed_memory
from cobla_onnx.runtime.processes import interrupts_wait, open_processes
from cobla_onnx.runtime.providers import (
    CPU,
    current_provider,
    execution_provider,
    give_memory_back,
    memory_is_given_back,
)
from cobla_onnx.runtime.temporary import temporary_folder
from cobla_onnx.runtime.transfer import Carried, Shared
from cobla_onnx.wording import option_name

__all__ = [
    "Pool",
    "choose_pool",
    "dask_pool",
    "executor_pool",
    "one_thread",
    "open_pool",
]

Unit = TypeVar("Unit")
Value = TypeVar("Value")

# Units in flight where the caller's executor does not tell how many workers it has.
UNKNOWN_WIDTH = 32
CONNECT_SECONDS = 10


class _OneThread:
    """Limits linear algebra of this process to one thread while anybody is inside.

    To be entered in the thread that asks for the work and not in those that do it:
    threadpoolctl lets one thread alone set limits.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limits: Any = None
        self._controller: ThreadpoolController | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._controller = self._controller or ThreadpoolController()
                self._limits = self._controller.limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limits.restore_original_limits()


one_thread = _OneThread()


def _run_on(
    provider: str, gives_back: bool, function: Callable[[Unit], Value], unit: Unit
) -> Value:
    """Open and run a unit's sessions with the caller's settings."""
    with execution_provider(provider):
        give_memory_back(gives_back)
        return function(unit)


def _run_outside(function: Callable[[Unit], Value], unit: Unit) -> Value:
    with one_thread:
        return function(unit)


class Pool:
    """Maps functions over units of work, results in the order of the units.

    Use one of `open_pool`, `executor_pool`, `dask_pool` to make one.

    Parameters
    ----------
    executor : Executor or None
        None: units run one after the other where they are asked for.
    width : int
        Units that run at a time.
    inside : bool
        Whether units run in this process.
    folder : path, optional
        For files that workers on this machine read.
    option : str
        What the user asked for, for messages.
    """

    def __init__(
        self,
        executor: Executor | None = None,
        width: int = 1,
        *,
        inside: bool = True,
        folder: Path | None = None,
        option: str = option_name("threads"),
    ) -> None:
        self._executor, self.width = executor, width
        self.inside, self._folder, self._option = inside, folder, option
        # Runs of the model that memory has room for side by side, where that is known.
        self.runs: int | None = None

    @property
    def shares_memory(self) -> bool:
        """Whether units are known to run on this machine."""
        return self.inside or self._folder is not None

    @property
    def runs_at_most(self) -> int:
        """Units that run the model, or results of them that wait, at a time."""
        return 2 * self.width if self.runs is None else min(2 * self.width, self.runs)

    def carry(self, array: NDArray[Any]) -> Carried:
        """Prepare an array for a unit."""
        return Carried(array, self._folder is not None)

    def share(self, value: Any) -> Shared:
        """Prepare a value that many units need."""
        return Shared(value, self._folder)

    def map(
        self,
        function: Callable[[Unit], Value],
        units: Iterable[Unit],
        at_most: int | None = None,
        *,
        small: bool = False,
        is_step: bool = False,
    ) -> Iterator[Value]:
        """Yield ``function(unit)`` for each unit, in order.

        Units are taken from the iterable as workers get free, so that it may make them, with
        their arrays, one by one.

        Parameters
        ----------
        at_most : int, optional
            Units, or results that wait, at a time; by default twice as many as can run.
        small : bool
            Whether results are, so that those that wait for an earlier one count for nothing.
        is_step : bool
            Whether many calls follow that need the same memory again, which is then kept for them.

        Raises
        ------
        UsageError
            If a worker has died.
        """
        if current_provider() != CPU or memory_is_given_back():
            function = partial(_run_on, current_provider(), memory_is_given_back(), function)
        with one_thread if self.inside else nullcontext():
            if self._executor is None:
                yield from map(function, units)
            else:
                run = function if self.inside else partial(_run_outside, function)
                most = at_most or 2 * self.width
                yield from self._mapped(self._executor, run, units, most, small)
        if self.inside and not is_step:
            # Of what the units have freed, the C library keeps most, and for each thread apart.
            return_freed_memory()

    def _mapped(
        self,
        executor: Executor,
        function: Callable[[Unit], Value],
        units: Iterable[Unit],
        at_most: int,
        small: bool,
    ) -> Iterator[Value]:
        pending: deque[Future[Value]] = deque()
        try:
            for unit in units:
                with interrupts_wait():
                    pending.append(executor.submit(function, unit))
                if not small:
                    if len(pending) >= at_most:
                        yield pending.popleft().result()
                    continue
                running = [future for future in pending if not future.done()]
                if len(running) >= at_most:
                    wait(running, return_when=FIRST_COMPLETED)
                while pending and pending[0].done():
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except Exception as error:
            if not isinstance(error, (BrokenExecutor, *_lost())):
                raise
            raise UsageError(
                f"{self._option}: a worker has ended without an answer, most likely for lack of "
                "memory; use fewer workers, or none"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _lost() -> tuple[type[Exception], ...]:
    """What dask raises when a worker has died, if dask is in use."""
    distributed = sys.modules.get("distributed")
    return () if distributed is None else (distributed.KilledWorker,)


@contextmanager
def open_pool(threads: int, workers: int | None = None) -> Iterator[Pool]:
    """Map over threads of this process, or over processes of our own.

    Parameters
    ----------
    threads : int
        Units that run at a time in this process.
    workers : int, optional
        Processes instead.
    """
    if workers is not None:
        with _process_pool(workers) as pool:
            yield pool
    elif threads == 1:
        yield Pool()
    else:
        with ThreadPoolExecutor(threads, "cobla-onnx") as executor:
            yield Pool(executor, threads)


@contextmanager
def _process_pool(workers: int) -> Iterator[Pool]:
    option = option_name("workers", workers)
    with temporary_folder("work") as folder, open_processes(workers) as executor:
        yield Pool(executor, workers, inside=False, folder=folder, option=option)


@contextmanager
def executor_pool(executor: Executor) -> Iterator[Pool]:
    """Map over an executor that the caller has brought, and leave it open."""
    width = int(getattr(executor, "_max_workers", UNKNOWN_WIDTH))
    inside = isinstance(executor, ThreadPoolExecutor)
    if not isinstance(executor, ProcessPoolExecutor):
        yield Pool(executor, width, inside=inside, option="executor")
        return
    with temporary_folder("work") as folder:
        yield Pool(executor, width, inside=False, folder=folder, option="executor")


async def _try_dask(address: str) -> None:
    """Connect to a scheduler, and leave; an OSError or ValueError if that cannot be done."""
    import distributed

    untyped: Any = distributed
    options = untyped.Security().get_connection_args("client")
    connection = await untyped.comm.connect(address, timeout=CONNECT_SECONDS, **options)
    await connection.close()


@contextmanager
def dask_pool(address: str) -> Iterator[Pool]:
    """Map over the workers of a dask cluster.

    Raises
    ------
    UsageError
        If dask is not installed, or there is no scheduler at the address.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError(
            f"{option_name('dask', address)}: needs dask; install it with: pip install "
            "'cobla-onnx[distributed]'"
        ) from error
    # Untyped, where dask is installed.
    new_client: Any = Client
    try:
        # A client that finds nobody waits once more when it is collected, and leaves a traceback.
        with ThreadPoolExecutor(1) as thread:  # as the caller's may run an event loop already
            thread.submit(asyncio.run, _try_dask(address)).result()
        client = new_client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{option_name('dask', address)}: no scheduler answers there; start one with `dask "
            "scheduler`, and give the address that it prints"
        ) from error
    with client:
        width = sum(client.nthreads().values())
        if not width:
            raise UsageError(
                f"{option_name('dask', address)}: the cluster has no workers; start some"
            )
        yield Pool(
            client.get_executor(pure=False),
            width,
            inside=False,
            option=option_name("dask", address),
        )


def choose_pool(
    threads: int,
    workers: int | None = None,
    executor: Executor | None = None,
    dask: str | None = None,
) -> AbstractContextManager[Pool]:
    """Open the pool that the options ask for.

    Raises
    ------
    UsageError
        If they ask for more than one.
    """
    given = [
        option_name(name)
        for name, value in (("workers", workers), ("executor", executor), ("dask", dask))
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: exclude each other; give one of them")
    if executor is not None:
        return executor_pool(executor)
    return open_pool(threads, workers) if dask is None else dask_pool(dask)
