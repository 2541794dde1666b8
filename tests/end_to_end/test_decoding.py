"""Training on uint8 pictures that are normalised on the device is training on the floats of the whole transform."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from end_to_end.corpus import Corpus
from end_to_end.runs import flat_tensors, read_checkpoint_file
from training.data.pictures import WholePictures

Trainer = Callable[..., int]


@pytest.mark.parametrize("flags", [[], ["--accum-freq", "2", "--workers", "1"], ["--precision", "pure_bf16"]], ids=str)
def test_exact_pixels_give_the_same_weights(
    flags: list[str], train: Trainer, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = ["--batch-size", "8", "--train-num-samples", "48", "--epochs", "1", "--warmup", "0"]

    def weights(name: str, *words: str) -> dict[str, torch.Tensor]:
        common = ["--name", name, "--train-data", corpus.train, *length, "--precision", "fp32"]
        assert train(*common, *flags, *words) == 0
        return flat_tensors(read_checkpoint_file(tmp_path / "logs" / name / "checkpoints" / "epoch_1.pt")["state_dict"])

    exact, fast = weights("exact", "--decode", "exact"), weights("fast")
    monkeypatch.setattr("training.data.loader.make_pictures", lambda preprocess, _: WholePictures(preprocess))
    whole = weights("whole")
    assert all(torch.equal(exact[name], whole[name]) for name in whole)
    # The other decoding is in use where it is asked for, and near.
    assert any(not torch.equal(fast[name], whole[name]) for name in whole)
    # AdamW moves every weight by the learning rate, whichever way; a few turn round.
    apart = max((fast[name].float() - whole[name].float()).abs().max().item() for name in whole)
    assert apart < 2 * 6 * 5e-4
