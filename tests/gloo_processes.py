"""Processes on this machine that talk over gloo: they meet, call one function, and end in bounded time."""
import multiprocessing
import tempfile
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

SECONDS = 400  # for all that processes do together; a loaded machine needs most of it
# What every process would import for seconds: one imports it, and those that meet are its forks.
multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint", "transfusion.train"])

needs_gloo = pytest.mark.skipif(
    not dist.is_gloo_available(),
    reason="torch.distributed.is_gloo_available() is False: this PyTorch has no CPU collectives")


def run_together(count, function, *arguments):
    """Call `function(rank, *arguments)` in `count` new processes of one group.

    The test fails with the error of the first that fails, or when the time is over; no process outlives it.
    """
    end = time.monotonic() + SECONDS
    with tempfile.TemporaryDirectory() as folder:
        started = torch.multiprocessing.start_processes(_run, (count, folder, function, arguments), nprocs=count,
                                                        join=False, start_method="forkserver")
        try:
            while not started.join(timeout=1):  # True once all have ended
                if time.monotonic() > end:
                    pytest.fail(f"{count} processes did not finish in {SECONDS} s")
        finally:
            for process in started.processes:
                process.kill()


def meet(rank, count, folder):
    """Join the group of `count` processes that meet in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count,
                            timeout=timedelta(seconds=SECONDS))


def _run(rank, count, folder, function, arguments):
    meet(rank, count, folder)
    function(rank, *arguments)
    dist.barrier()  # who leaves first breaks connections that another may still be accepting, which gloo aborts on
    dist.destroy_process_group()
