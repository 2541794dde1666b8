"""Adding a method is one class and one line in the registry: a throw-away one trains with its own flag and state."""

from __future__ import annotations

from argparse import Namespace, _ArgumentGroup
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from end_to_end.corpus import Corpus
from end_to_end.runs import read_checkpoint_file, read_lines
from neuclip import OBJECTIVES
from neuclip.objectives import Objective, Output, RunShape


class PushAndPull(Objective):
    """Pairs are drawn together, everything else apart; remembers the keys it has seen."""

    name = "push_and_pull"
    summary = "a loss made up for this test"
    needs_keys = True
    seen_keys: Tensor

    def __init__(self, push: float, shape: RunShape) -> None:
        super().__init__()
        self.push = push
        self.shape = shape
        self.register_buffer("seen_keys", torch.zeros((), dtype=torch.int64))

    @classmethod
    def add_arguments(cls, group: _ArgumentGroup) -> None:
        group.add_argument("--push_strength", type=float, default=1.0, help="weight of the repulsion")

    @classmethod
    def resolve_args(cls, args: Namespace) -> None:
        if args.push_strength < 0:
            raise ValueError(f"--push_strength {args.push_strength} is negative: give a positive number")

    @classmethod
    def from_args(cls, args: Namespace, shape: RunShape) -> PushAndPull:
        return cls(args.push_strength, shape)

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        keys: Tensor | None,
    ) -> Output:
        assert keys is not None
        self.seen_keys += len(keys)
        similarity = image_features @ text_features.T
        loss = self.push * similarity.square().mean() - logit_scale / 100 * similarity.diagonal().mean()
        return Output(loss, {"pull": similarity.diagonal().mean().detach()} if self.report else {})


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, PushAndPull.name, PushAndPull)


def _flags(corpus: Corpus) -> list[str]:
    return [
        *("--objective", "push_and_pull", "--push-strength", "0.5", "--train-data", corpus.train, "--name", "sixth"),
        *("--batch-size", "16", "--warmup", "0", "--lr", "2e-3", "--log-every-n-steps", "1", "--epochs", "2"),
    ]


@pytest.mark.usefixtures("registered")
def test_trains_resumes_and_is_saved(train: Callable[..., int], corpus: Corpus, tmp_path: Path) -> None:
    assert train(*_flags(corpus), "--stop_epochs", "1") == 0
    assert train(*_flags(corpus), "--resume", "latest") == 0
    run = tmp_path / "logs" / "sixth"
    metrics = read_lines(run / "metrics.jsonl")
    assert metrics[-1]["pull"] > metrics[0]["pull"] + 0.1
    saved = read_checkpoint_file(run / "checkpoints" / "epoch_2.pt")["objective"]
    assert saved["name"] == "push_and_pull"
    assert saved["state_dict"]["seen_keys"] == 2 * 192
    assert "push_strength: 0.5" in (run / "params.txt").read_text()
    assert "a loss made up for this test" in (run / "out.log").read_text()


@pytest.mark.usefixtures("registered")
def test_its_own_check_speaks(train: Callable[..., int], corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*_flags(corpus), "--push_strength", "-1") == 2
    assert capsys.readouterr().err == "error: --push_strength -1.0 is negative: give a positive number\n"


@pytest.mark.usefixtures("registered")
def test_its_flags_are_a_group_of_their_own(train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        train("--help")
    assert leaving.value.code == 0
    group = capsys.readouterr().out.split("objective push_and_pull:")[1]
    assert group.split()[:6] == ["a", "loss", "made", "up", "for", "this"]
    assert "--push_strength" in group.split("\n\n")[1]
