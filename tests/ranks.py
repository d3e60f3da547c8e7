"""Runs a function on several ranks: gloo processes, forked from a server that has imported everything."""

import datetime
import io
import multiprocessing
import os
import tempfile
import traceback

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [  # what a step of training imports when it is first needed, too: it takes a second in each process
        *("torch", "torch.distributed", "torch.distributed.checkpoint", "torch.distributed.tensor", "torch._dynamo"),
        *("latephase_kernels", "latephase_kernels.train.trainer", "ranks"),
    ]
)


def _rank(function, rank, ranks, store, timeout, arguments, results):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, ranks),
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=timeout),
        )
        answer = function(*arguments)
        content = io.BytesIO()
        torch.save(answer, content)
        results.send((None, content.getvalue()))
    except BaseException as error:
        results.send((f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None))
    finally:
        results.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def run_on_ranks(ranks, function, *arguments, timeout=60):
    """Return what function(*arguments) returned on each rank; it is named at the top of a module.

    `timeout` is a collective's, in seconds. A rank that raises answers with the error's text, a killed one with None.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes, answers = [], []
        for rank in range(ranks):
            receiving, sending = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank, args=(function, rank, ranks, store, timeout, arguments, sending), daemon=True
            )
            process.start()
            sending.close()
            processes.append((process, receiving))
        for process, receiving in processes:
            try:
                error, content = receiving.recv()
                answers.append(error or torch.load(io.BytesIO(content), weights_only=False))
            except EOFError:
                answers.append(None)
            process.join()
    return answers
