"""What the study measures of a finished run is what the run has said of its last epoch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from end_to_end.corpus import Corpus
from end_to_end.runs import read_lines
from study import measure, report


def test_numbers_are_those_of_their_sets(train: Callable[..., int], corpus: Corpus, tmp_path: Path) -> None:
    sets = ["--val-data", corpus.validation, "--zeroshot-data", corpus.zeroshot, "--zeroshot-frequency", "1"]
    plan = ["--epochs", "1", "--batch-size", "20", "--lr", "4e-3", "--warmup", "2", "--seed", "3", "--name", "run"]
    assert train("--train-data", corpus.train, *plan, *sets, "--precision", "fp32") == 0
    folder, data = tmp_path / "logs" / "run", tmp_path / "data"
    (said,) = read_lines(folder / "results.jsonl")
    # The run was evaluated on what stands in for styles; what stands in for names is a larger set.
    for name, shard in (("retrieval_set", Path(corpus.validation)), ("retrieval_concept", corpus.folder / "00000.tar")):
        (data / name).mkdir(parents=True)
        (data / name / shard.name).symlink_to(shard)
    for name in measure.ZEROSHOT:
        (data / name).symlink_to(corpus.zeroshot)
    assert not measure.is_measured(folder)
    assert measure.main([str(folder), "--data", str(data)]) == 0
    assert measure.is_measured(folder)
    found = json.loads((folder / measure.FILE).read_text())
    for way in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            name = f"retrieval/{way}_R@{k}"
            assert found["metrics"][f"retrieval_set/{name}"] == pytest.approx(said[f"{way}_R@{k}"], abs=1e-6)
            assert found["chance"][f"retrieval_set/{name}"] > found["chance"][f"retrieval_concept/{name}"]
    for name in measure.ZEROSHOT:
        assert found["metrics"][f"{name}/top1"] == pytest.approx(said["zeroshot-val-top1"], abs=1e-6)
    assert {name for names in report.HEADLINES.values() for name in names} <= found["metrics"].keys()
    # Of another checkpoint nothing is known.
    (folder / measure.FILE).write_text(json.dumps({**found, "sha256": "of another"}))
    assert not measure.is_measured(folder)
