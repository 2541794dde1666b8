"""The scripts that make shards of published lists, with a stand-in for img2dataset and for DataComp's tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "data"

# Runs everything but pip, and says how the index command was called; with REAL set it is run.
PYTHON = """#!/bin/sh
[ "$2" != pip ] || exit 0
[ "$2" != training.data.index ] || [ -n "$REAL" ] || { echo "INDEX $*"; exit 0; }
exec {python} "$@"
"""

# One shard for each 10,000 rows, of which every third link is dead; SHARDS limits how many it makes in this call.
IMG2DATASET = """#!{python}
import io, json, os, sys, tarfile
assert "PYTHONPATH" not in os.environ
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
out = flags["--output_folder"]
names, *rows = [line.rstrip("\\n").split("\\t") for line in open(flags["--url_list"])]
assert sorted(names) == ["caption", "url"], names
for name in os.listdir(out):
    assert not name.endswith(".json") or name.split("_")[0].isdigit(), name  # as img2dataset fails
for shard in range((len(rows) + 9999) // 10000)[: int(os.environ.get("SHARDS", "9"))]:
    with tarfile.open(f"{out}/{shard:05d}.tar", "w") as tar:
        for row in range(shard * 10000, min(shard * 10000 + 10000, len(rows))):
            pair = dict(zip(names, rows[row]))
            if row % 3 == 2:
                continue
            facts = json.dumps({**pair, "key": f"{row:09d}"}).encode()
            for suffix, content in (("jpg", b"image"), ("json", facts), ("txt", pair["caption"].encode())):
                entry = tarfile.TarInfo(f"{row:09d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    open(f"{out}/{shard:05d}_stats.json", "w").write("{}")
"""

# Metadata of a pool of 40 images in two files; images of a subset, in shards of 10,000.
UPSTREAM = """
import json, os, sys
import pyarrow as pa, pyarrow.parquet as pq
flags = {}
words = sys.argv[1:]
for at, word in enumerate(words):
    if word.startswith("--"):
        flags[word] = words[at + 1] if at + 1 < len(words) and not words[at + 1].startswith("--") else True
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(words) + "\\n")
data = flags["--data_dir"]
if "--skip_shards" in flags:
    folder = data + "/metadata"
    assert not os.path.exists(folder) or "--overwrite_metadata" in flags
    os.makedirs(folder, exist_ok=True)
    if os.environ.get("FAIL"):
        sys.exit(9)
    for part in range(2):
        rows = range(part * 20, part * 20 + 20)
        pq.write_table(pa.table({
            "uid": [f"{row:032x}" for row in rows], "url": [f"u{row}" for row in rows], "text": [f"t{row}" for row in rows],
            "clip": [0.5] * 20,
        }), f"{folder}/{part}.parquet")
else:
    table = pq.read_table(flags["--metadata_dir"])
    os.makedirs(data + "/shards", exist_ok=True)
    assert not os.path.exists(data + "/shards/sizes.json")
    json.dump(table["url"].to_pylist(), open(data + "/downloaded", "w"))
    open(data + "/shards/00000000_stats.json", "w").write("{}")
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with lists of 12 urls, an environment and the stand-ins."""
    program(tmp_path / "venv" / "bin" / "python", PYTHON.replace("{python}", sys.executable))
    program(tmp_path / "bin" / "img2dataset", IMG2DATASET.replace("{python}", sys.executable))
    (tmp_path / "cc3m.tsv").write_text("".join(f"a thing {row}\thttp://x/{row}\n" for row in range(12)))
    (tmp_path / "cc12m.tsv").write_text("".join(f"http://x/{row}\ta thing {row}\n" for row in range(12)))
    (tmp_path / "datacomp").mkdir()
    (tmp_path / "datacomp" / "download_upstream.py").write_text(UPSTREAM)
    return tmp_path


def call(place: Path, script: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script, called from the folder of the fixture."""
    names = ("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "DATACOMP", "REAL")
    environment = {
        **{name: value for name, value in os.environ.items() if name not in names},
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(place / "venv"),
        "CALLS": str(place / "calls"),
        **variables,
    }
    command = [str(SCRIPTS / script), *flags]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False)


def calls(place: Path) -> list[list[str]]:
    return [json.loads(line) for line in (place / "calls").read_text().splitlines()]


@pytest.mark.parametrize("name", ["cc3m", "cc12m"])
def test_command_line_of_img2dataset(place: Path, name: str) -> None:
    done = call(place, f"{name}.sh", f"{name}.tsv", "out/", "--retries", "2", THREADS="7")
    assert done.returncode == 0, done.stderr
    published = "--input_format tsv --url_col url --caption_col caption --output_format webdataset --output_folder"
    sizes = "--number_sample_per_shard 10000 --processes_count 16 --thread_count 7 --image_size 256"
    assert [" ".join(words) for words in calls(place)] == [
        f"--url_list {place}/out.tsv {published} {place}/out {sizes} --retries 2"
    ]
    columns = "caption\turl" if name == "cc3m" else "url\tcaption"
    assert (place / "out.tsv").read_text() == f"{columns}\n" + (place / f"{name}.tsv").read_text()
    assert f"INDEX -m training.data.index {place}/out --add-keys" in done.stdout


def test_a_list_that_names_its_columns_is_taken_as_it_is(place: Path) -> None:
    text = "caption\turl\n" + (place / "cc3m.tsv").read_text()
    (place / "cc3m.tsv").write_text(text)
    assert call(place, "cc3m.sh", "cc3m.tsv", "out").returncode == 0
    assert (place / "out.tsv").read_text() == text


def test_what_is_missing_is_told_and_a_second_call_goes_on(place: Path) -> None:
    (place / "cc3m.tsv").write_text("".join(f"a thing {row}\thttp://x/{row}\n" for row in range(10_005)))
    done = call(place, "cc3m.sh", "cc3m.tsv", "out", SHARDS="1")
    assert done.returncode == 1
    assert done.stderr == f"error: {place}/out: 1 of 2 shards are complete; the same command goes on\n"
    assert "INDEX" not in done.stdout
    assert call(place, "cc3m.sh", "cc3m.tsv", "out").returncode == 0


def test_the_whole_way_to_the_flags_of_training(place: Path) -> None:
    """Keys as img2dataset writes them are kept; a sizes.json of an earlier call is no obstacle to it."""
    (place / "out").mkdir()
    (place / "out" / "sizes.json").write_text('{"00000.tar": 99}')
    done = call(place, "cc12m.sh", "cc12m.tsv", "out", REAL="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "0 keys written, 8 were there" in done.stdout
    assert done.stdout.splitlines()[-1] == "flags of training: --train-num-samples 8 --data_size 11"
    assert json.loads((place / "out" / "sizes.json").read_text()) == {"00000.tar": 8}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give the .tsv and the folder"),
        ("cc3m.tsv", "give the .tsv and the folder"),
        ("gone.tsv out", "gone.tsv does not exist"),
        ("empty.tsv out", "empty.tsv is empty"),
        ("text.tsv out", "its first line has no tab"),
        ("cc3m.tsv cc3m.tsv", "give the folder for the shards"),
        ("cc3m.tsv file", "file is not a folder"),
        ("cc3m.tsv cc3m", "cc3m.tsv is where the list with named columns goes"),
        ("cc3m.tsv out --number_sample_per_shard 5", "it stays at 10000"),
    ],
)
def test_mistakes(place: Path, flags: str, message: str) -> None:
    (place / "empty.tsv").write_text("")
    (place / "text.tsv").write_text("hello\n")
    (place / "file").write_text("")
    done = call(place, "cc3m.sh", *flags.split())
    assert done.returncode == 1
    assert message in done.stderr
    assert (done.stderr.count("\n"), done.stderr[:7]) == (1, "error: ")
    assert not (place / "calls").exists()


def test_the_list_with_named_columns_can_be_given_again(place: Path) -> None:
    assert call(place, "cc3m.sh", "cc3m.tsv", "out").returncode == 0
    text = (place / "out.tsv").read_text()
    assert call(place, "cc3m.sh", "out.tsv", "out").returncode == 0
    assert (place / "out.tsv").read_text() == text


def test_without_img2dataset(place: Path) -> None:
    done = call(place, "cc3m.sh", "cc3m.tsv", "out", IMG2DATASET="bin/none")
    assert (done.returncode, "bin/none is not on PATH: python3 -m venv" in done.stderr) == (1, True)


@pytest.mark.parametrize("script", ["cc3m.sh", "cc12m.sh", "dfn.sh"])
def test_help(place: Path, script: str) -> None:
    done = call(place, script, "--help")
    assert done.returncode == 0
    assert f"./scripts/data/{script} " in done.stdout
    assert "#" not in done.stdout
    assert "pipefail" not in done.stdout


def write_uids(path: Path, rows: list[int]) -> None:
    np.save(path, np.array([(row >> 64, row & (2**64 - 1)) for row in rows], np.dtype("u8,u8")))


def test_dfn_fetches_the_images_of_the_list_alone(place: Path) -> None:
    pytest.importorskip("pyarrow")
    (place / "out").mkdir()
    write_uids(place / "out" / "uids.npy", [3, 4, 25, 39, 2**64 + 1])
    variables = {"DATACOMP": "datacomp", "DATACOMP_PYTHON": sys.executable}
    # An interrupted fetch of the metadata is not taken for the whole.
    assert call(place, "dfn.sh", "medium", "out", **variables, FAIL="1").returncode == 9
    done = call(place, "dfn.sh", "medium", "out", "--skip_bbox_blurring", **variables)
    assert done.returncode == 0, done.stderr
    out = place / "out"
    pool = ["--scale", "medium", "--data_dir", f"{out}/pool", "--skip_shards"]
    images = ["--scale", "medium", "--metadata_dir", f"{out}/subset", "--data_dir", str(out), "--skip_bbox_blurring"]
    assert calls(place) == [pool, [*pool, "--overwrite_metadata"], images]
    assert json.loads((out / "downloaded").read_text()) == ["u3", "u4", "u25", "u39"]
    assert f"INDEX -m training.data.index {out}/shards --add-keys" in done.stdout
    assert "4 of 5 uids are in the metadata" in done.stdout
    # What is there is not fetched again.
    (out / "shards" / "sizes.json").write_text("{}")
    assert call(place, "dfn.sh", "medium", "out", **variables).returncode == 0
    assert calls(place)[3:] == [images[:-1]]
    # Another list does not go on with this one's.
    done = call(place, "dfn.sh", "large", "out", **variables)
    assert (done.returncode, "out was begun with the scale medium" in done.stderr) == (1, True)
    assert len(calls(place)) == 4


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        ("medium", {}, "give a scale and a folder"),
        ("small out", {}, "small is no scale with a published list"),
        ("medium out", {}, "DATACOMP is not set"),
        ("medium out", {"DATACOMP": "bin"}, "has no download_upstream.py"),
        ("medium out", {"DATACOMP": "datacomp", "DATACOMP_PYTHON": "none/python"}, "cannot be run"),
        ("medium cc3m.tsv", {"DATACOMP": "datacomp"}, "is not a folder"),
    ],
)
def test_mistakes_with_dfn(place: Path, flags: str, variables: dict[str, str], message: str) -> None:
    done = call(place, "dfn.sh", *flags.split(), **variables)
    assert done.returncode == 1
    assert message in done.stderr
    assert (done.stderr.count("\n"), done.stderr[:7]) == (1, "error: ")
    assert not (place / "out").exists()
