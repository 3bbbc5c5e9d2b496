"""Where the runs of a sweep are computed: processes of this machine, or any other executor."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import psutil

ATTEMPTS = 3  # at a run whose process dies: one that needs more memory than there is would be tried for ever


def cores() -> int:
    """How many processor cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else psutil.cpu_count() or 1


class Processes(Executor):
    """An executor of processes with one thread each.

    Other than in `ProcessPoolExecutor`, a process that dies takes nothing with it: it is replaced, and the call that it
    had is made again, `ATTEMPTS` times in all. No process outlives the one that started it, however that one ends.

    Args:
        number: of processes; one a core if left out.

    """

    def __init__(self, number: int | None = None) -> None:
        self._threads = ThreadPoolExecutor(number or cores())  # each waits for a process of its own
        self._own = threading.local()
        self._processes: dict[int, ProcessPoolExecutor] = {}
        self._stopped = False

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Call a function in the next process that is free."""
        return self._threads.submit(self._call, fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes: after what was submitted, or, with `cancel_futures`, at once."""
        if cancel_futures:
            self._stopped = True
            for process in list(self._processes):
                with suppress(OSError):  # it has ended
                    os.kill(process, signal.SIGTERM)
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        for pool in self._processes.values():
            pool.shutdown(wait)

    def _call(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        for _ in range(ATTEMPTS):
            if self._stopped:
                raise RuntimeError("stopped")
            with suppress(BrokenProcessPool):
                return self._pool().submit(fn, *args, **kwargs).result()
            self._own.pool = None
        raise RuntimeError(
            f"its process died {ATTEMPTS} times: killed, out of memory, or started by a script that is not guarded by "
            'if __name__ == "__main__"'
        )

    def _pool(self) -> ProcessPoolExecutor:
        """The pool of one process that belongs to this thread."""
        if getattr(self._own, "pool", None) is None:
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
            self._processes[pool.submit(os.getpid).result()] = pool
            self._own.pool = pool
        return self._own.pool


def _begin() -> None:
    """What a process does first: leave Ctrl-C to its parent, end when that ends, compute in one thread."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
