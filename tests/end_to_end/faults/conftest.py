"""What the fault suite shares: data, some of it broken, and a run that nothing disturbed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from end_to_end.corpus import Corpus, build_corpus
from end_to_end.faults.processes import start_server


@pytest.fixture(scope="session", autouse=True)
def _server_can_import() -> None:
    """The server from which ranks are forked imports by PYTHONPATH alone."""
    root = Path(__file__).resolve().parents[3]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root / "tests")])
    start_server()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The data set, written once for all tests."""
    return build_corpus(tmp_path_factory.mktemp("corpus"))
