"""Worker processes: results in order, in bounded memory; every way to fail is an error that says what happened."""

import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from latephase_kernels.data.worker_pool import WorkerError, WorkerPool

ARRAYS = {"task": ((1,), np.int64), "result": ((3,), np.int64)}


def square(slot, at):
    """Three squares; certain tasks go wrong at their second part."""
    task = int(slot["task"][0])
    for part in range(3):
        at(part)
        if part == 1:
            if task == -1:
                os._exit(7)
            if task == -2:
                os.kill(os.getpid(), signal.SIGKILL)
            if task == -7:
                for _ in range(8):
                    time.sleep(0.1)
            if task == -3:
                time.sleep(60)
            if task == -4:
                raise PermissionError(13, "Permission denied", "some.jpg")
            if task == -5:
                raise ValueError("a bad value")
            if task == -6:
                raise KeyError("an error of our own")
        slot["result"][part] = task * task + part
    return f"did {task}"


def make(num_workers=2, num_slots=4, **options):
    describe = lambda slot, part: f"task {slot['task'][0]}, part {part}"  # noqa: E731
    return WorkerPool(square, ARRAYS, num_slots=num_slots, num_workers=num_workers, describe=describe, **options)


def task(number):
    def fill(slot):
        slot["task"][0] = number
        slot["result"][:] = -99

    return fill


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_are_those_of_their_tasks(num_workers):
    with make(num_workers) as pool:
        for first in range(0, 20, 4):
            tickets = [pool.submit(task(first + number)) for number in range(4)]
            assert not pool.has_free_slot
            with pytest.raises(RuntimeError, match="every slot is in use"):
                pool.submit(task(0))
            for number in reversed(range(4)):  # asked for in another order
                slot, report = pool.result(tickets[number])
                expected = (first + number) ** 2
                assert slot["result"].tolist() == [expected, expected + 1, expected + 2]
                assert report == f"did {first + number}"
                pool.release(tickets[number])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_slot_released_early_comes_back(num_workers):
    with make(num_workers, num_slots=2) as pool:
        for _ in range(10):
            for _ in range(2):
                pool.release(pool.submit(task(5)))
                pool.wait_for_slot()
            ticket = pool.submit(task(3))
            assert pool.result(ticket)[0]["result"].tolist() == [9, 10, 11]
            pool.release(ticket)


@pytest.mark.parametrize(
    "number, error, message",
    [
        (-1, WorkerError, "data worker [0-9]+ ended with exit code 7; workers were at task -1, part 1"),
        (-2, WorkerError, "was killed by SIGKILL .*memory.*; workers were at task -2, part 1"),
        (-3, WorkerError, "a data worker has been stuck for 1 s at task -3, part 1"),
        (-4, PermissionError, "some.jpg"),
        (-5, ValueError, "^a bad value$"),
        (-6, RuntimeError, "KeyError: 'an error of our own'"),
    ],
)
def test_a_worker_that_fails_is_an_error(number, error, message):
    pool = make(1, timeout=1.0)  # one worker: nothing else is in progress
    tickets = [pool.submit(task(7)), pool.submit(task(number)), pool.submit(task(8))]
    started = time.monotonic()
    with pytest.raises(error, match=message):
        for ticket in tickets:
            pool.result(ticket)
    assert time.monotonic() - started < 5
    processes = pool._processes
    assert not any(process.is_alive() for process in processes)
    with pytest.raises(error, match=message):  # and it stays one
        pool.submit(task(1))
    pool.close()


def test_stopped_workers_are_an_error():
    pool = make(timeout=1.0)
    for process in pool._processes:
        os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match="no data worker has taken up its work for 1 s"):
        pool.result(pool.submit(task(1)))
    assert not any(process.is_alive() for process in pool._processes)


def test_failures_without_workers():
    with make(0) as pool, pytest.raises(KeyError):
        pool.result(pool.submit(task(-6)))


def test_signals_to_the_whole_group_leave_the_workers():
    with make() as pool:
        pool.result(pool.submit(task(1)))  # they have started
        for process in pool._processes:
            os.kill(process.pid, signal.SIGINT), os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)
        assert pool.result(pool.submit(task(6)))[0]["result"][0] == 36
    assert not any(process.is_alive() for process in pool._processes)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "raise SystemExit(3)", "pool = None"])
def test_workers_end_with_their_parent(end, tmp_path):
    script = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from test_worker_pool import make, task\n"
        "pool = make()\n"
        "pool.submit(task(-3)), pool.result(pool.submit(task(1)))\n"
        f"print(*[process.pid for process in pool._processes], flush=True)\n{end}\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__)], capture_output=True, text=True, timeout=60
    )
    pids = [int(pid) for pid in found.stdout.split()]
    assert len(pids) == 2, found.stderr
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_arguments():
    with pytest.raises(ValueError, match="num_workers must be at least 0"):
        make(-1)
    with pytest.raises(ValueError, match="num_slots at least 1"):
        make(num_slots=0)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_program_that_was_stopped_goes_on(waiting, monkeypatch):
    """Ctrl-Z stops the workers, too, in the middle of their work, for longer than that may take."""
    wait = multiprocessing.connection.wait

    def stopped(*_, **__):
        while not pool._beat.any():
            time.sleep(0.01)
        os.kill(pool._processes[0].pid, signal.SIGSTOP)
        time.sleep(1.2)
        os.kill(pool._processes[0].pid, signal.SIGCONT)
        monkeypatch.setattr(multiprocessing.connection, "wait", wait)
        return []

    with make(1, timeout=1.0) as pool:
        number = pool.submit(task(-7))
        if waiting:
            monkeypatch.setattr(multiprocessing.connection, "wait", stopped)
        else:
            stopped()
        assert pool.result(number)[1] == "did -7"
