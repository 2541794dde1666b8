"""The one combination of OpenCLIP's flags that is not the gradient of its loss says so."""

from __future__ import annotations

import logging

import pytest

from neuclip import RunShape, distributed, make_objective

SHAPE = RunShape(6, 4, 2, 10, 1)
DROPS_GRADIENT = "--objective openclip --local-loss"


@pytest.mark.parametrize(
    ("flags", "world_size", "warned"),
    [
        (DROPS_GRADIENT, 2, True),
        (DROPS_GRADIENT, 1, False),
        (f"{DROPS_GRADIENT} --loss-chunk-size 3", 2, False),
        ("--objective openclip --local-loss --gather-with-grad", 2, False),
        ("--objective openclip --gather-with-grad", 2, False),
        ("--objective openclip", 2, False),
    ],
)
def test_local_loss_without_gather_with_grad_warns(
    flags: str, world_size: int, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    make_objective(flags, SHAPE)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == warned
    for message in warnings:
        assert "--gather-with-grad" in message
        assert "gradient" in message
