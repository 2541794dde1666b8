"""How a loader's worker process begins: one thread, and deaf to signals that are meant for the training process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import torch

from training.data.streams import end_commands


def heed_parent_only(_worker: int) -> None:
    """To be called first in a worker process."""
    torch.set_num_threads(1)  # A worker per core: more threads each would only get in each other's way.
    # The training process reads the numbers of its own signals from a pipe that a forked worker has inherited.
    signal.set_wakeup_fd(-1)
    # Batch systems signal every process of a job, and ^C every one of a terminal. What the signal means is for the
    # training process to decide, which still needs batches to finish its step.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # A handler would not see who sent the signal; with the signal blocked a waiting thread does.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent_only, daemon=True).start()


def _obey_parent_only() -> None:
    """Ends the worker at a SIGTERM from the training process, which is how one is shut down, and at no other."""
    parent = multiprocessing.parent_process()  # not os.getppid(), which may be a fork server
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != (parent.pid if parent else os.getppid()):
        pass
    end_commands()
    os._exit(0)
