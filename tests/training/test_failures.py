"""One rank fails: all end soon, with its status, and rank 0 tells its traceback first."""

from __future__ import annotations

import subprocess
import sys
import time

from end_to_end.runs import clean_environment, free_port
from training.failures import END_SECONDS

# Every rank waits in a collective that the failing one never enters, as in training. The message of rank 1 has two lines.
PROGRAM = """
import logging, os, sys, time
import torch, torch.distributed as dist
from training import distributed
from training.failures import FailureWatch
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
world = distributed.connect("cpu", None, "env://", 600, 600)
watch = FailureWatch(world)
print("connected", flush=True)
kind = sys.argv[1]
if kind == "none":
    watch.close()
    distributed.disconnect()
    sys.exit(0)
if world.rank == int(sys.argv[2]):
    if kind == "killed":
        os.kill(os.getpid(), 9)
    watch.end_all("Traceback of the cause\\nValueError: it broke", int(sys.argv[3]))
try:
    if kind == "hangs":
        time.sleep(600)  # such as a collective of NCCL's
    dist.all_reduce(torch.zeros(1))
except RuntimeError as error:
    watch.end_all(f"a consequence: {error}", 1)
"""


def ends(kind: str, failing: int = 0, status: int = 1, ranks: int = 2) -> tuple[list[int], list[str], float]:
    """Exit statuses, what each rank printed, and seconds from connecting to the end of all."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    children = [
        subprocess.Popen(
            [sys.executable, "-u", "-c", PROGRAM, kind, str(failing), str(status)],
            env={**clean_environment(), **meeting, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            while "connected" not in child.stdout.readline():
                assert child.poll() is None
        began = time.monotonic()
        texts = [child.stdout.read() for child in children if child.stdout is not None]
        statuses = [child.wait(60) for child in children]
        return statuses, texts, time.monotonic() - began
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_all_end_with_the_cause_first() -> None:
    statuses, texts, seconds = ends("hangs", failing=1, status=7, ranks=3)
    assert statuses == [7, 7, 7]
    assert seconds < END_SECONDS
    assert texts[0] == "rank 1 failed:\nTraceback of the cause\nValueError: it broke\n"
    assert texts[1] == "[rank 1] Traceback of the cause\nValueError: it broke\n"
    assert texts[2] == "[rank 2] ended, since rank 1 failed\n"


def test_rank_0_fails_while_others_are_in_a_collective() -> None:
    statuses, texts, seconds = ends("collective", failing=0)
    assert statuses == [1, 1]
    assert seconds < END_SECONDS
    assert texts[0] == "Traceback of the cause\nValueError: it broke\n"
    assert texts[1] == "[rank 1] ended, since rank 0 failed\n"


def test_killed_rank_ends_the_others() -> None:
    """It leaves no note; with gloo the others meet a closed connection, and the first of them is heard."""
    statuses, texts, seconds = ends("killed", failing=1)
    assert statuses == [1, -9]
    assert seconds < END_SECONDS
    assert "a consequence" in texts[0]


def test_good_end_leaves_no_trace() -> None:
    statuses, texts, seconds = ends("none")
    assert statuses == [0, 0]
    assert texts == ["", ""]
    assert seconds < END_SECONDS
