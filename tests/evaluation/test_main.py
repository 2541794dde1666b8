"""The command line tool from end to end, on a tiny model with random weights: every file it writes, and its errors."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation import held_out
from evaluation.curves import DOTS_PER_INCH, FIGURE_INCHES
from evaluation.datasets import PairDataset, open_classification
from evaluation.gallery_picture import gallery_size
from evaluation.held_out import read_queries
from evaluation.held_out_digest import classification_digest, pairs_digest
from evaluation.main import main, parse_args

from .conftest import pair, write_shard

SOURCE = Path(__file__).resolve().parents[2] / "src"


def write_history(folder: Path, keys: tuple[str, ...] = ("contrastive_loss", "lr", "temperature")) -> None:
    """metrics.jsonl with a half-written last line, and results.jsonl."""
    lines = [json.dumps({"step": step, "samples": 8 * step, **dict.fromkeys(keys, 1 / step)}) for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "los')
    (folder / "results.jsonl").write_text(
        '{"epoch": 1, "image_to_text_R@1": 0.1}\n{"epoch": 2, "image_to_text_R@1": null}\n'
    )


def test_all_files(
    make_run: Callable[..., Path],
    pair_shards: str,
    classification_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, other = make_run("mine", epochs=(1, 2)), make_run("theirs", epochs=(1, 2))
    write_history(run)
    queries = tmp_path / "queries.json"
    queries.write_text(json.dumps(["disc 3 icon", {"text": "a disc", "concept": "disc 4"}, {"query": "disc 5 icon"}]))
    command = f"--train-output-dir {run} --epoch=1 --pairs {pair_shards} --zeroshot {classification_shards}"
    command += f" --queries {queries} --compare {other} {run} --device cpu --batch-size 8 --workers 1"
    assert main(command.split()) == 0

    result = json.loads((run / "evaluation.json").read_text())
    checkpoint = run / "checkpoints" / "epoch_1.pt"
    assert result["checkpoint"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert result["checkpoint"] | {"sha256": ""} == {
        "file": "checkpoints/epoch_1.pt",
        "sha256": "",
        "epoch": 1,
        "iteration": None,
    }
    assert (result["run"], result["objective"], result["model"]) == ("mine", "openclip", "tiny-for-tests")
    counts = {"pairs": 23, "distinct_captions": 22, "zeroshot_images": 13, "zeroshot_classes": 6}
    assert result["counts"] == counts
    assert result["metrics"].keys() == result["chance"].keys()
    assert result["chance"]["retrieval/image_to_text_R@5"] == pytest.approx(5 / 23)
    assert result["chance"]["zeroshot/top5"] == pytest.approx(5 / 6)
    assert 0 <= result["metrics"]["retrieval/text_to_image_R@10"] <= 1
    assert result["metrics"]["retrieval/text_to_image_mean_rank"] > 1

    page = (run / "evaluation.md").read_text()
    assert "| metric | mine | theirs | chance | ×chance (mine) |" in page
    assert "| image → text R@5 |" in page
    assert " 21.74 % |" in page
    table = capsys.readouterr().out
    assert "zero-shot mean per-class recall" in table
    assert "wrote " in table
    with Image.open(run / "gallery.png") as gallery:
        gallery.load()
        assert gallery.size == gallery_size(3)
    with Image.open(run / "curves.png") as curves:
        curves.load()
        assert curves.size == tuple(round(inches * DOTS_PER_INCH) for inches in FIGURE_INCHES)
    assert not (other / "evaluation.json").exists()


def test_the_same_weights_give_the_same_numbers(make_run: Callable[..., Path], pair_shards: str) -> None:
    run = make_run("run", epochs=(1, 2))
    found = []
    for epoch, batch_size in ((1, 5), (1, 64), (2, 64)):
        assert (
            main(f"--train_output_dir {run} --epoch {epoch} --pairs {pair_shards} --batch_size {batch_size}".split())
            == 0
        )
        found.append(json.loads((run / "evaluation.json").read_text()))
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"])
    assert found[1]["metrics"] != found[2]["metrics"]
    assert found[1]["checkpoint"]["sha256"] != found[2]["checkpoint"]["sha256"]
    # Without queries, captions of the set are searched for.
    with Image.open(run / "gallery.png") as gallery:
        assert gallery.size == gallery_size(8)


def test_zero_shot_alone(make_run: Callable[..., Path], classification_shards: Path) -> None:
    run = make_run("run", epochs=(3,))
    assert main(["--train_output_dir", str(run), "--zeroshot", str(classification_shards), "--workers=0"]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert set(result["metrics"]) == {"zeroshot/top1", "zeroshot/top5", "zeroshot/mean_per_class_recall"}
    assert (run / "curves.png").exists()
    assert not (run / "gallery.png").exists()


@pytest.mark.parametrize("how", ["script", "module"])
def test_starts_as_a_script_and_as_a_module(how: str, tmp_path: Path) -> None:
    command = [str(SOURCE / "evaluation" / "main.py")] if how == "script" else ["-m", "evaluation.main"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if how == "module":
        environment["PYTHONPATH"] = str(SOURCE)
    arguments = ["--train-output-dir", str(tmp_path / "no-run"), "--pairs", "x.tar"]
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: run folder {tmp_path}/no-run does not exist")
    assert "Traceback" not in done.stderr


def test_mistakes_are_one_line(
    make_run: Callable[..., Path], pair_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("run", epochs=(1,))
    broken = tmp_path / "broken.json"
    broken.write_text('{"text": "not a list"}')
    shard = tmp_path / "bad.tar"
    write_shard(shard, [("5", {"png": b"not a picture", "txt": b"x"})])
    for arguments, message in (
        (f"--pairs {pair_shards} --epoch 7", "has no epoch_7.pt; there is: epoch_1.pt."),
        (f"--pairs {pair_shards} --compare {tmp_path}/gone", "gone does not exist"),
        ("", "nothing to evaluate on"),
        ("--zeroshot x --query cat", "--pairs SHARDS too"),
        (f"--pairs {pair_shards} --queries {broken}", "must be a JSON list"),
        (f"--pairs {pair_shards} --queries {tmp_path}/none.json", "cannot be read"),
        (f"--pairs {pair_shards} --device quantum", "--device quantum cannot be used here"),
        (f"--pairs {pair_shards} --batch-size 0", "at least 1"),
        (f"--pairs {shard} --workers 1", "error: sample 5 of"),  # raised in a loader process
    ):
        assert main(["--train_output_dir", str(run), *arguments.split()]) == 2
        errors = capsys.readouterr().err.strip()
        assert "\n" not in errors
        assert errors.startswith("error: ")
        assert message in errors
    assert not (run / "evaluation.json").exists()


def test_a_template_without_a_place_for_the_name_is_found_before_the_model_is_loaded(
    make_run: Callable[..., Path],
    classification_shards: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run("run", epochs=(1,))
    monkeypatch.setattr("evaluation.run_folder.RunFolder.load_checkpoint", lambda *_: pytest.fail("loaded"))
    (classification_shards / "zeroshot_classification_templates.txt").write_text("{c} icon\na photo\n")
    assert main(["--train_output_dir", str(run), "--zeroshot", str(classification_shards)]) == 2
    assert "template 'a photo' has no {c}" in capsys.readouterr().err


def test_digests_are_of_the_content_and_not_of_the_place(pair_shards: str, classification_shards: Path) -> None:
    folder = Path(pair_shards).parent
    digests = [
        pairs_digest(PairDataset(pair_shards)),
        classification_digest(open_classification(classification_shards)),
    ]
    moved = folder.rename(folder.with_name("moved"))
    assert pairs_digest(PairDataset(str(moved))) == digests[0]
    write_shard(moved / "00000.tar", [(f"{3 * seed:09d}", pair(seed, "disc x icon")) for seed in range(5)])
    assert pairs_digest(PairDataset(str(moved))) != digests[0]
    (classification_shards / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    assert classification_digest(open_classification(classification_shards)) != digests[1]


def test_without_matplotlib_the_numbers_are_written(
    make_run: Callable[..., Path], pair_shards: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("run", epochs=(1,))
    for name in [name for name in sys.modules if name.startswith(("evaluation.curves", "evaluation.gallery_picture"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--train_output_dir", str(run), "--pairs", pair_shards, "--workers", "0"]) == 0
    assert "no pictures, as matplotlib is not installed: pip install matplotlib" in capsys.readouterr().out
    result = json.loads((run / "evaluation.json").read_text())
    assert result["data"]["pairs_sha256"] == pairs_digest(PairDataset(pair_shards))
    assert not (run / "curves.png").exists()


def test_what_cannot_be_written_is_one_line_after_the_table(
    make_run: Callable[..., Path], pair_shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("run", epochs=(1,))
    (run / "evaluation.json").mkdir()
    assert main(["--train_output_dir", str(run), "--pairs", pair_shards, "--workers", "0"]) == 2
    out, err = capsys.readouterr()
    assert "image → text R@1" in out
    assert err.startswith("error: ")
    assert "evaluation.json" in err
    assert err.count("\n") == 1


def test_queries_are_encoded_in_the_precision_of_the_run(
    make_run: Callable[..., Path], pair_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    encode = held_out.encode_queries
    monkeypatch.setattr(held_out, "encode_queries", lambda *args: seen.append(args[-1]) or encode(*args))
    flags = ["--pairs", pair_shards, "--workers", "0", "--precision", "bf16"]
    assert main(["--train_output_dir", str(make_run("run", epochs=(1,))), *flags]) == 0
    with seen[0].autocast_context():
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_mistakes_of_all_ranks_are_told_by_the_first(
    rank: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.main.LET_RANK_0_SPEAK", 0)
    for name, value in (("RANK", rank), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main(["--train_output_dir", "x"]) == 2
    assert ("nothing to evaluate on" in capsys.readouterr().err) == (rank == "0")


def test_flags_take_both_spellings() -> None:
    same = [
        parse_args(["--train-output-dir", "a", "--pairs", "x-y_z.tar", "--batch-size=3", "--query", "a-b c_d"]),
        parse_args(["--train_output_dir", "a", "--pairs", "x-y_z.tar", "--batch_size=3", "--query", "a-b c_d"]),
    ]
    assert same[0] == same[1]
    assert (same[0].pairs, same[0].batch_size, same[0].query) == ("x-y_z.tar", 3, ["a-b c_d"])


def test_queries_from_the_command_line_win(tmp_path: Path) -> None:
    queries = read_queries(str(tmp_path / "unused.json"), [f"q{number}" for number in range(12)], None)  # type: ignore[arg-type]
    assert [query.text for query in queries] == [f"q{number}" for number in range(8)]
