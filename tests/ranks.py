"""Runs a function on several gloo ranks, each a process of its own on this machine."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo process group and return the results, one per rank.

    Args:
        function: a function at the top level of a file. The ranks load that file by its path, because the names under which
            pytest imports test files mean nothing to another process; it may import whatever `sys.path` offers here, but
            nothing relative to itself.
        world_size: number of ranks.
        args: what torch.save can write. Every rank gets a copy. (Environment variables of this process may not reach them.)
        timeout: seconds until the ranks are killed.

    Raises:
        RuntimeError: a rank failed; the message holds its traceback. The other ranks are killed.
        TimeoutError: the ranks did not finish in time.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(args, folder / "args")
        # Forked from a server that has done nothing but import: without the threads and process groups of this process,
        # as when spawned, but not every rank spends seconds on importing. The server lives as long as this process.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "open_clip"])
        source = (function.__module__, str(inspect.getsourcefile(function)), function.__name__)
        processes = [
            context.Process(target=_rank_main, args=(source, name, rank, world_size, timeout), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, folder, time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _wait(processes: list[BaseProcess], folder: Path, deadline: float, timeout: float) -> None:
    """Until all processes have ended well; the first that ends badly ends the wait."""
    running = dict(enumerate(processes))
    while running:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"ranks {sorted(running)} of {len(processes)} still ran after {timeout:.0f} s")
        multiprocessing.connection.wait([process.sentinel for process in running.values()], left)
        ended = {rank: process.exitcode for rank, process in running.items() if process.exitcode is not None}
        if any(ended.values()):
            # Whoever waits in a collective fails too once its peer is gone: the first traceback is the cause.
            errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
            texts = [f"{path.name.replace('error-', 'rank ')}:\n{path.read_text()}" for path in errors]
            raise RuntimeError("\n".join(texts) or f"exit codes of the ranks: {ended}")
        for rank in ended:
            del running[rank]


def _rank_main(source: tuple[str, str, str], folder: str, rank: int, world_size: int, timeout: float) -> None:
    try:
        # Several ranks share few cores; gloo needs an interface that exists on every machine.
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        function = _load(*source)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = function(*torch.load(f"{folder}/args", weights_only=False))
        torch.save(result, f"{folder}/result-{rank}")
        # No rank leaves while another still talks to it.
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        sys.exit(1)


def _load(module_name: str, path: str, function_name: str) -> Callable[..., Any]:
    """The function, from a file imported under the name that it has in the parent, so that its classes can be pickled."""
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return getattr(sys.modules[module_name], function_name)
