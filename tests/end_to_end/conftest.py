"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from open_clip import factory

from end_to_end.corpus import Corpus, build_corpus
from end_to_end.processes import start_server
from end_to_end.runs import LAUNCHER_VARIABLES, ROOT
from training.main import main


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The data set, written once for all tests."""
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def forked_ranks() -> None:
    """The server from which the ranks of processes.Run are forked: it imports by PYTHONPATH alone."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    start_server()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that no launcher started, on one thread; logging and open_clip's models are put back afterwards."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # open_clip remembers every --model-config for the whole process, broken ones too.
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    root = logging.getLogger()
    handlers, level, threads = root.handlers[:], root.level, torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    for handler in handlers:
        if handler not in root.handlers:
            root.addHandler(handler)
    root.setLevel(level)


Trainer = Callable[..., int]


@pytest.fixture
def train(alone: None, corpus: Corpus, tmp_path: Path) -> Trainer:
    """train(*flags): a run of the tiny model in this process, in tmp_path/logs. Returns the exit status."""

    def run(*flags: str) -> int:
        given = [*corpus.model, "--logs", str(tmp_path / "logs"), "--workers", "0", "--device", "cpu", *flags]
        return main(given)

    return run
