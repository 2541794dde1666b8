"""What the fault suite shares."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _server(forked_ranks: None) -> None:
    """Its ranks are forked."""
