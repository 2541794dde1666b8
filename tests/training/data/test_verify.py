"""Every kind of damage that --verify finds, its report, and --check."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from training.data.index import main
from training.data.verify import verify_shard
from training.params import parse_args

SRC = Path(__file__).resolve().parents[3] / "src"


def report_of(folder: Path, capsys, *flags: str) -> tuple[int, dict[str, dict], str]:
    """Status, lines of the report by name of the shard, and what was printed."""
    status = main([str(folder), "--verify", "--report", str(folder / "report.jsonl"), *flags])
    lines = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    return status, {Path(line["shard"]).name: line for line in lines}, capsys.readouterr().out


def test_sound_shards(kit, tmp_path: Path, capsys) -> None:
    kit.write_shards(tmp_path, [4, 0, 3], first=5)
    status, report, out = report_of(tmp_path, capsys, "--decode-images")
    assert status == 0
    assert report["00000.tar"] == {
        "shard": str(tmp_path / "00000.tar"),
        "sound": True,
        "samples": 4,
        "pairs": 4,
        "keys": 4,
        "smallest_key": 5,
        "largest_key": 8,
        "problems": {},
        "damage": [],
        "examples": [],
    }
    assert report["00001.tar"]["samples"] == 0
    assert report["00001.tar"]["smallest_key"] is None
    assert out.splitlines() == [
        "3 shards, 7 samples, 7 whole pairs, 7 different keys of 5 to 11: 0 shards are bad",
        "flags of training: --train-num-samples 7 --data_size 12",
    ]
    assert not (tmp_path / "sizes.json").exists()


@pytest.mark.parametrize(
    ("replaced", "problem", "pairs"),
    [
        ({"png": None}, "no image", 2),
        ({"png": b""}, "image is empty", 2),
        ({"txt": None}, "no caption", 2),
        ({"txt": b" \n"}, "caption is empty", 2),
        ({"txt": b"\xff"}, "caption is not utf-8", 2),
        ({"json": b"{"}, "json is no JSON object", 3),
        ({"json": b'{"key": 1.5}'}, "key is no integer of 0 to 2^63 - 1", 3),
        ({"json": b'{"key": 17179869184}'}, "key is more than 17179869183", 3),
        ({"json": b'{"key": "0000"}'}, "key comes twice", 3),
        ({"json": None}, "no integer key", 3),
    ],
)
def test_broken_samples(kit, tmp_path: Path, replaced: dict, problem: str, pairs: int, capsys) -> None:
    samples = [kit.members_of(number) for number in range(3)]
    changed = {name: replaced.get(name.split(".")[1], content) for name, content in samples[1]}
    samples[1] = [(name, content) for name, content in changed.items() if content is not None]
    kit.write_tar(tmp_path / "0.tar", samples)
    status, report, out = report_of(tmp_path, capsys)
    assert status == 1
    assert report["0.tar"]["problems"] == {problem: 1}
    assert report["0.tar"]["pairs"] == pairs
    assert report["0.tar"]["sound"] is False
    assert len(report["0.tar"]["examples"]) == 1
    assert f"0.tar: 1 x {problem}" in out


def test_images_are_decoded_if_asked(kit, tmp_path: Path, capsys) -> None:
    image = kit.image_bytes(1)
    samples = [kit.members_of(0), [("1.png", image[: len(image) // 2]), *kit.members_of(1)[1:]]]
    samples[1] = [("000001" + name[-4:] if name == "1.png" else name, content) for name, content in samples[1]]
    kit.write_tar(tmp_path / "0.tar", samples)
    assert report_of(tmp_path, capsys)[0] == 0
    status, report, _ = report_of(tmp_path, capsys, "--decode-images")
    assert (status, report["0.tar"]["problems"], report["0.tar"]["pairs"]) == (1, {"image cannot be decoded": 1}, 1)


def test_keys_are_compared_over_shards_and_processes(kit, tmp_path: Path, capsys) -> None:
    kit.write_shards(tmp_path, [3, 3])
    kit.write_tar(tmp_path / "00002.tar", map(kit.members_of, (9, 4, 1)))
    for workers in ("1", "2"):
        status, report, _ = report_of(tmp_path, capsys, "--workers", workers)
        assert status == 1
        assert [line["sound"] for line in report.values()] == [True, True, False]
        assert report["00002.tar"]["problems"] == {"key comes twice": 2}


def test_shards_without_any_key_are_sound(kit, tmp_path: Path, capsys) -> None:
    kit.write_tar(tmp_path / "0.tar", [kit.members_of(number)[:2] for number in range(3)])
    status, report, out = report_of(tmp_path, capsys)
    assert (status, report["0.tar"]["examples"]) == (0, [])
    assert "3 whole pairs, no keys: 0 shards are bad" in out
    assert out.endswith("--train-num-samples 3\n")


@pytest.mark.parametrize("harm", ["cut", "flipped", "no tar", "stale sizes.json"])
def test_damaged_files(kit, tmp_path: Path, harm: str, capsys) -> None:
    path = kit.write_shards(tmp_path, [4, 4])[1]
    data = path.read_bytes()
    if harm == "stale sizes.json":
        (tmp_path / "sizes.json").write_text('{"00001.tar": 5}')
    else:
        flipped = data[:3072] + b"\x01" + data[3073:]
        path.write_bytes({"cut": data[:3600], "flipped": flipped, "no tar": b"nothing"}[harm])
    status, report, _ = report_of(tmp_path, capsys)
    assert status == 1
    assert report["00000.tar"]["sound"] is True
    assert len(report["00001.tar"]["damage"]) == 1


def test_a_sizes_file_that_makes_no_sense_is_told_before_shards_are_read(
    kit, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.write_shards(tmp_path, [4])
    kit.write_shards(tmp_path / "more", [4], first=9)
    (tmp_path / "more" / "sizes.json").write_text("[]")
    monkeypatch.setattr("training.data.verify.verify_shard", None)
    assert main([f"{tmp_path}::{tmp_path}/more", "--verify", "--workers", "1"]) == 1
    assert "more/sizes.json is not of the form" in capsys.readouterr().err


def test_names_that_cannot_be_printed(tmp_path: Path, kit) -> None:
    """Bytes that are no utf-8, and those that a terminal takes for orders."""
    with tarfile.open(tmp_path / "0.tar", "w", encoding="utf-8") as tar:
        for name in ("a\udcff.txt", "\x1b[2J.txt", "n" * 9000 + ".txt"):
            tar.addfile(tarfile.TarInfo(name))
    done = subprocess.run(
        [sys.executable, "-m", "training.data.index", str(tmp_path), "--verify", "--workers", "1"],
        env={**os.environ, "PYTHONPATH": str(SRC), "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "(such as a\\udcff: no image)" in done.stdout
    assert max(map(len, verify_shard(str(tmp_path / "0.tar"), False)[0].examples)) < 300
    assert all(line.isprintable() for line in done.stdout.splitlines())


def test_an_interruption_says_what_the_same_command_does(
    tmp_path: Path, kit, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.write_shards(tmp_path, [2])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.data.shard_pool._results", interrupted)
    for how, what in (("--add-keys", "goes on"), ("--verify", "begins anew"), ("--check", "begins anew")):
        assert main([str(tmp_path), how]) == 130
        assert capsys.readouterr().err.startswith(f"interrupted: the same command {what}")


@pytest.mark.parametrize(
    ("flags", "locked", "message"),
    [
        ("--verify --report 00000.tar/x.jsonl", "", "00000.tar is no folder; give another one"),
        ("--verify --report there/x.jsonl", "there", "there cannot be written to; give another folder"),
        ("--add-keys --out there", "there", "there cannot be written to; give another folder"),
        ("--add-keys --out 00000.tar", "", "00000.tar is no folder; give another one"),
        ("--add-keys", ".", "cannot be written to; give --out DIR"),
    ],
)
def test_what_cannot_be_written_is_told_before_shards_are_read(
    kit, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, flags: str, locked: str, message: str
) -> None:
    kit.write_shards(tmp_path, [2])
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    # Whoever runs the tests may be allowed everything.
    monkeypatch.setattr("os.access", lambda path, _mode: os.path.abspath(path) != os.path.abspath(locked or "none"))
    monkeypatch.setattr("training.data.shard_pool._results", None)
    assert main([".", *flags.split()]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_report_s_folder_is_made(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [2])
    assert main([str(tmp_path), "--verify", "--report", str(tmp_path / "a" / "b" / "c.jsonl")]) == 0
    assert json.loads((tmp_path / "a" / "b" / "c.jsonl").read_text())["pairs"] == 2


def test_the_flags_that_are_printed_are_taken_by_training(kit, tmp_path: Path, capsys) -> None:
    """The last line, pasted; where few samples have a key too."""
    kit.write_tar(tmp_path / "0.tar", [kit.members_of(2), *(kit.members_of(number)[:2] for number in range(5, 15))])
    for how in ("", "--verify", "--check", "--add-keys --first-key 20"):
        main([str(tmp_path), *how.split()])
        *_, last = capsys.readouterr().out.splitlines()
        words = shlex.split(last.removeprefix("flags of training: "))
        args = parse_args(["--train-data", str(tmp_path), "--objective", "fastclip", "--data_size", "11", *words])
        assert args.train_num_samples == 11
        assert args.data_size == (31 if "add" in how else 11)


def test_nothing_is_printed_to_be_pasted_where_there_is_no_sample(kit, tmp_path: Path, capsys) -> None:
    kit.write_tar(tmp_path / "0.tar", [])
    for how, status in (("", 0), ("--verify", 0), ("--check", 0), ("--check --data_size 3", 1), ("--add-keys", 0)):
        assert main([str(tmp_path), *how.split()]) == status
        assert "flags" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "status", "lines"),
    [
        ("", 0, []),
        ("--data_size 11 --train-num-samples 8", 0, ["--data_size 11 fits", "--train-num-samples 8 fits"]),
        ("--data-size 10", 1, ["--data_size 10 is too small: the largest key is 10, give 11"]),
        ("--data_size 99 --train_num_samples 9", 1, ["99 fits", "9 is too large: there are 8 samples, give 8"]),
        ("--train-num-samples 6", 0, ["6 fits: an epoch leaves 2 of 8 samples out"]),
    ],
)
def test_check(kit, tmp_path: Path, flags: str, status: int, lines: list[str], capsys) -> None:
    kit.write_shards(tmp_path, [4, 4], first=3)
    assert main([str(tmp_path), "--check", *flags.split()]) == status
    *found, last = capsys.readouterr().out.splitlines()
    assert len(found) == len(lines)
    assert all(part in line for part, line in zip(lines, found))
    assert last == "flags of training: --train-num-samples 8 --data_size 11"


def test_check_of_samples_without_keys_and_of_damage(kit, tmp_path: Path, capsys) -> None:
    kit.write_tar(tmp_path / "0.tar", [kit.members_of(0), kit.members_of(1)[:2]])
    assert main([str(tmp_path), "--check", "--data_size", "5"]) == 1
    assert "--data_size 5: 1 of 2 samples have no key; --add-keys gives one" in capsys.readouterr().out
    assert main([str(tmp_path), "--check"]) == 0
    assert capsys.readouterr().out.startswith("1 of 2 samples have no key")
    (tmp_path / "1.tar").write_bytes(b"nothing")
    assert main([str(tmp_path), "--check"]) == 1
    assert "1.tar is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--verify --add-keys", "not allowed with"),
        ("--first-key 3", "--first-key 3 goes with --add-keys"),
        ("--add-keys --first-key -1", "--first-key -1: give a number"),
        ("--out x --verify", "--out x goes with --add-keys"),
        ("--decode-images", "--decode-images goes with --verify"),
        ("--report x --check", "--report x goes with --verify"),
        ("--data_size 3", "--data_size 3 goes with --check"),
        ("--train-num-samples 0 --verify", "--train-num-samples 0 goes with --check"),
        ("--first-key 0", "--first-key 0 goes with --add-keys"),
        ("--check --workers 0", "--workers 0: give 1 or more"),
        ("--check --data_size many", "invalid int value: 'many'"),
        ("--verfy", "unrecognized arguments: --verfy"),
    ],
)
def test_mistakes_in_the_flags(tmp_path: Path, flags: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), *flags.split()])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
