"""Worker processes that fill slots of shared memory; one that dies, hangs or fails is an error, never a wait.

A slot is a dict of arrays. The caller writes a task into it, a worker reads that and writes its result beside it, the
caller takes the result and gives the slot back. There are so many slots and no more: that bounds the memory.
"""

import contextlib
import ctypes
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

Slot = dict[str, np.ndarray]
# Called with a slot and a function to be called before each part of the work; returns what it has to report.
Work = Callable[[Slot, Callable[[int], None]], Any]

_POLL_SECONDS = 0.5
# What asks a program to end: Ctrl-C, a job's end, and a terminal's, which Windows does not have.
ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_LONGEST_TEXT = 1500  # messages stay below PIPE_BUF: written whole or not at all


class WorkerError(RuntimeError):
    """A worker died or hung. The text says which, and what it was working on."""


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_fork() -> bool:
    """Return whether this system has worker processes; Windows has not."""
    return "fork" in multiprocessing.get_all_start_methods()


class WorkerPool:
    """Forked processes and the slots they share with this one; a context manager.

    The workers take tasks in the order they were submitted. They ignore ENDING_SIGNALS, which are the caller's to
    answer, and end with it, whatever ends it.

    Args:
        work: see Work; runs in the workers, on what this process had in memory when the pool was made.
        arrays: name → (shape, dtype) of a slot's arrays.
        num_slots: how many.
        num_workers: 0: the work is done here, when its result is asked for.
        describe: told a slot and the number last passed to the work's callback; says in an error what that was.
        timeout: seconds that one part of the work may take while its result is waited for, and nothing is stopped
            (Ctrl-Z).

    Raises:
        ValueError: num_workers is negative, or num_slots not positive.
        NotImplementedError: workers are asked for on a system that cannot fork.
    """

    def __init__(
        self,
        work: Work,
        arrays: Mapping[str, tuple[tuple[int, ...], Any]],
        *,
        num_slots: int,
        num_workers: int,
        describe: Callable[[Slot, int], str],
        timeout: float = 25.0,
    ):
        if num_workers < 0 or num_slots < 1:
            raise ValueError(
                f"WorkerPool: num_workers must be at least 0 and num_slots at least 1, got {num_workers}, {num_slots}"
            )
        if num_workers and not can_fork():
            raise NotImplementedError("WorkerPool: this system cannot fork workers; use 0 of them")
        self._work, self._describe, self._timeout = work, describe, timeout
        self.slots = [
            {name: _shared(shape, dtype) for name, (shape, dtype) in arrays.items()} for _ in range(num_slots)
        ]
        self._stage = _shared((num_slots,), np.int64)  # what the work's callback was told
        self._beat = _shared((num_slots,), np.float64)  # and when; 0 before a worker has the slot
        self._free = list(range(num_slots))
        self._finished: dict[int, Any] = {}
        self._abandoned: set[int] = set()
        self._waiting: list[int] = []  # submitted where there are no workers
        self._processes: list[Any] = []
        self._results: list[Any] = []
        self._tasks: Any = None
        self._heard = self._watched = 0.0  # the last message; since when we wait without a break
        self._failure: BaseException | None = None
        if num_workers:
            self._start(num_workers)
        # Before multiprocessing's own clean-up, which would wait for workers that ignore SIGTERM.
        self._finalizer = multiprocessing.util.Finalize(self, _kill, (self._processes,), exitpriority=10)

    def _start(self, num_workers: int) -> None:
        context = multiprocessing.get_context("fork")
        self._tasks = context.SimpleQueue()
        for _ in range(num_workers):
            receive, send = context.Pipe(duplex=False)
            arguments = (self._work, self.slots, self._stage, self._beat, self._tasks, send)
            process = context.Process(target=_worker, args=arguments, daemon=True)
            with warnings.catch_warnings(), _signals_held_back():
                warnings.simplefilter(
                    "ignore", DeprecationWarning
                )  # forking beside threads: workers use no lock of theirs
                process.start()
            send.close()
            self._processes.append(process)
            self._results.append(receive)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; results that were not taken are lost."""
        self._finalizer()
        if self._failure is None:
            self._failure = RuntimeError("WorkerPool: it is closed")

    @property
    def has_free_slot(self) -> bool:
        """Whether submit would take a task."""
        return bool(self._free)

    def wait_for_slot(self) -> None:
        """Wait until a released slot is free, where its worker is still at work on it.

        Raises:
            As result.
        """
        self._wait_until(lambda: bool(self._free))

    def submit(self, fill: Callable[[Slot], None]) -> int:
        """Let `fill` write a task into a free slot, and give it to the workers; return its number.

        Raises:
            RuntimeError: no slot is free, or the pool is closed.
        """
        self._raise_failure()
        if not self._free:
            raise RuntimeError("WorkerPool.submit: every slot is in use; release one first")
        number = self._free.pop()
        fill(self.slots[number])
        self._beat[number] = 0.0
        if self._processes:
            self._tasks.put(number)
        else:
            self._waiting.append(number)
        return number

    def result(self, number: int) -> tuple[Slot, Any]:
        """Wait for a submitted task; return its slot, to be released, and what the work reported.

        Raises:
            WorkerError: a worker died, or one is stuck; the pool is closed then.
            Whatever the work raised; likewise.
        """
        self._wait_until(lambda: number in self._finished)
        return self.slots[number], self._finished[number]

    def release(self, number: int) -> None:
        """Give back the slot of a task, finished or not; its result, if it is still to come, is dropped."""
        if number in self._finished:
            del self._finished[number]
            self._free.append(number)
        elif number in self._waiting:
            self._waiting.remove(number)
            self._free.append(number)
        else:
            self._abandoned.add(number)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wait_until(self, done: Callable[[], bool]) -> None:
        self._raise_failure()
        self._heard = self._watched = time.monotonic()
        try:
            while not done():
                self._receive() if self._processes else self._work_here()
        except BaseException as error:
            self._failure = error
            self.close()
            raise

    def _work_here(self) -> None:
        number = self._waiting.pop(0)
        self._finish(number, self._work(self.slots[number], lambda stage: None))

    def _finish(self, number: int, report: Any) -> None:
        self._finished[number] = report
        if number in self._abandoned:
            self._abandoned.discard(number)
            self.release(number)

    def _receive(self) -> None:
        """Take what workers have sent within a moment, and look at those that have not.

        Raises:
            As result.
        """
        sentinels = {process.sentinel: process for process in self._processes}
        senders = dict(zip(self._results, self._processes, strict=True))
        asked = time.monotonic()
        ready: list[Any] = multiprocessing.connection.wait([*senders, *sentinels], timeout=_POLL_SECONDS)
        dead = [sentinels[source] for source in ready if source in sentinels]
        for source in ready:
            if source in sentinels:
                continue
            try:
                number, report, error = source.recv()
            except (EOFError, ConnectionError):  # its end of the pipe is closed before its exit is seen
                dead.append(senders[source])
                continue
            if error is not None:
                raise error
            self._finish(number, report)
        if dead:
            raise self._death_of(dead[0])
        now = time.monotonic()
        if ready:
            self._heard = now
        elif now - asked > 2 * _POLL_SECONDS:  # this process was stopped, and perhaps the workers with it
            self._heard = self._watched = now
        else:
            self._check_beats()

    def _death_of(self, process: Any) -> WorkerError:
        process.join()
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (by the system when memory runs out, for one)" if code == -signal.SIGKILL else ""
        return WorkerError(f"data worker {process.pid} {how}{hint}; {self._in_progress()}")

    def _in_progress(self) -> str:
        started = [number for number in np.flatnonzero(self._beat) if number not in self._finished]
        texts = [self._describe(self.slots[number], int(self._stage[number])) for number in started]
        return f"workers were at {', '.join(texts[:8])}" if texts else "no worker was at work"

    def _check_beats(self) -> None:
        now = time.monotonic()
        for number in np.flatnonzero(self._beat):
            if number not in self._finished and now - max(self._beat[number], self._watched) > self._timeout:
                where = self._describe(self.slots[number], int(self._stage[number]))
                raise WorkerError(f"a data worker has been stuck for {self._timeout:.0f} s at {where}")
        if now - self._heard > self._timeout and not self._beat.any():
            raise WorkerError(f"no data worker has taken up its work for {self._timeout:.0f} s; were they stopped?")


def _shared(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of zeros that forked processes share; not of /dev/shm, which containers keep small."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=dtype, count=int(np.prod(shape))).reshape(shape)


def _kill(processes: Iterable[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


def _worker(work: Work, slots: list[Slot], stages: Any, beats: Any, tasks: Any, results: Any) -> None:
    """What a worker process runs: tasks, until the caller's process is gone."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
    _die_with_parent()
    tasks._writer.close()  # when the caller's end is gone, too, reading ends with an EOFError
    while True:
        try:
            slot = tasks.get()
        except EOFError:
            return

        def at(stage: int, slot: int = slot) -> None:
            stages[slot], beats[slot] = stage, time.monotonic()

        at(0)
        report: Any = None
        failure: BaseException | None = None
        try:
            report = work(slots[slot], at)
        except OSError as error:  # Python finds the subclass again by its errno
            failure = OSError(error.errno, error.strerror, error.filename) if error.errno else error
        except ValueError as error:
            failure = error
        except BaseException:
            failure = RuntimeError(f"a data worker failed: {traceback.format_exc()[-_LONGEST_TEXT:]}")
        beats[slot] = 0.0
        try:
            results.send((slot, report, failure))
        except BrokenPipeError:
            return


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Hold back the signals that workers ignore: one forked in here does not meet them before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with_parent() -> None:
    """Have the system kill this process as soon as its parent is dead, were it in the middle of a read."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
