"""The download helper against a stand-in for the hub on this machine: whole, damaged, cut off, missing, closed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from evaluation.datacomp import hub
from evaluation.datacomp.locate import find_data
from evaluation.datacomp.tasks import TASKS
from evaluation.download import main

from .hub_server import Content, serving

DTD, FLICKR = TASKS["vtab/dtd"], TASKS["retrieval/flickr_1k_test_image_text_retrieval"]
SOURCE = Path(__file__).resolve().parents[3] / "src"
WINO = TASKS["misc/winogavil"]


def shard_set(seed: int, shards: int = 2) -> dict[str, bytes]:
    generator = random.Random(seed)
    files = {f"test/{number}.tar": generator.randbytes(40_000 + number) for number in range(shards)}
    return {
        **files,
        "test/nshards.txt": f"{shards}\n".encode(),
        "classnames.txt": b"a\nb\n",
        "zeroshot_classification_templates.txt": b"a {c}\n",
        "README.md": b"not needed",
        "test/../../evil.tar": b"leads out of the folder",
    }


@pytest.fixture
def content() -> Content:
    """DTD and MNIST in shards; Flickr in parquet on main; WinoGAViL as a script, converted by the hub."""
    generator = random.Random(5)
    return Content(
        repos={
            "djghosh/wds_vtab-dtd_test": {"main": shard_set(1)},
            "djghosh/wds_mnist_test": {"main": shard_set(2)},
            "nlphuji/flickr_1k_test_image_text_retrieval": {
                "main": {
                    "data/test-00000-of-00001.parquet": generator.randbytes(30_000),
                    "data/train-00000-of-00001.parquet": b"not needed",
                }
            },
            "nlphuji/winogavil": {
                "main": {"winogavil.py": b"a script"},
                "refs/convert/parquet": {
                    "TEST/test/0000.parquet": generator.randbytes(20_000),
                    "TEST/train/0000.parquet": b"not needed",
                },
            },
        }
    )


@pytest.fixture
def endpoint(content: Content, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(hub, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(content) as address:
        yield address


def fetch(data: Path, endpoint: str, tasks: str = "dtd,mnist,flickr,winogavil") -> int:
    return main([str(data), "--tasks", tasks, "--endpoint", endpoint, "--workers", "2"])


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_all_sets_into_the_layout_that_the_suite_reads(content: Content, endpoint: str, tmp_path: Path) -> None:
    data = tmp_path / "new" / "data"
    assert fetch(data, endpoint) == 0
    needed = {"test/0.tar", "test/1.tar", "test/nshards.txt", "classnames.txt", "zeroshot_classification_templates.txt"}
    assert names(data) == {
        *(f"wds_vtab-dtd_test/{name}" for name in needed),
        *(f"wds_mnist_test/{name}" for name in needed),
        "flickr_1k_test_image_text_retrieval/data/test-00000-of-00001.parquet",
        "winogavil/TEST/test/0000.parquet",
    }
    files = content.repos["djghosh/wds_vtab-dtd_test"]["main"]
    assert all((data / "wds_vtab-dtd_test" / name).read_bytes() == files[name] for name in needed)
    for task in (DTD, FLICKR, WINO):
        find_data(task, data)
    # A second time nothing is fetched.
    before = sum(content.fetched.values())
    assert fetch(data, endpoint) == 0
    assert sum(content.fetched.values()) == before


def test_damaged_and_missing_files_are_fetched_again(
    content: Content, endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(tmp_path, endpoint, "dtd") == 0
    folder = tmp_path / DTD.folder
    whole = {name: (folder / name).read_bytes() for name in names(folder)}
    shard = bytearray(whole["test/0.tar"])
    shard[1000] ^= 1
    (folder / "test" / "0.tar").write_bytes(shard)
    (folder / "classnames.txt").write_bytes(b"a\nc\n")  # of the same length
    (folder / "test" / "nshards.txt").unlink()
    content.fetched.clear()
    capsys.readouterr()
    assert fetch(tmp_path, endpoint, "dtd") == 0
    assert {name: (folder / name).read_bytes() for name in names(folder)} == whole
    assert set(content.fetched) == {"test/0.tar", "classnames.txt", "test/nshards.txt"}
    assert "2 files are whole, 3 to fetch" in capsys.readouterr().out


def test_a_transfer_that_breaks_goes_on_where_it_was(
    content: Content, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)  # what is kept of a broken transfer
    content.cut = {"test/1.tar"}
    content.busy = 2
    assert fetch(tmp_path, endpoint, "dtd") == 0
    assert content.ranges
    assert all(int(asked[6:].split("-")[0]) > 0 for asked in content.ranges)
    wanted = content.repos["djghosh/wds_vtab-dtd_test"]["main"]["test/1.tar"]
    assert (tmp_path / DTD.folder / "test" / "1.tar").read_bytes() == wanted


def test_a_wrong_checksum_once_and_for_ever(
    content: Content, endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content.corrupt.update({"test/0.tar": 1})
    assert fetch(tmp_path, endpoint, "dtd") == 0
    shutil.rmtree(tmp_path / DTD.folder)
    content.corrupt.update({"test/0.tar": 1000})
    assert fetch(tmp_path, endpoint, "dtd") == 1
    assert not (tmp_path / DTD.folder / "test" / "0.tar").exists()
    assert (tmp_path / DTD.folder / "test" / "1.tar").exists()
    assert not (tmp_path / ".download").exists()
    assert "test/0.tar: its checksum is not the hub's, fetched twice" in capsys.readouterr().out


def test_sets_that_fail_do_not_stop_the_others(
    content: Content, endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del content.repos["djghosh/wds_vtab-dtd_test"]
    content.gated = {"djghosh/wds_mnist_test"}
    content.repos["djghosh/wds_cars_test"] = {"main": {"README.md": b"empty"}}
    assert fetch(tmp_path, endpoint, "dtd,mnist,cars,winogavil") == 1
    find_data(WINO, tmp_path)
    out = capsys.readouterr().out
    assert "1 of 4 sets are there" in out
    last = [line for line in out.splitlines() if line.startswith("still missing: ")]
    assert [line.split()[2] for line in last] == ["vtab/dtd:", "mnist:", "cars:"]
    for line, reason in zip(last, ("not there, or not open to you", "gated", "has no classnames.txt")):
        assert reason in line
        assert f"{endpoint}/datasets/djghosh/wds_" in line
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert fetch(tmp_path, endpoint, "mnist") == 0


def test_what_lies_in_another_layout_is_left_alone(content: Content, endpoint: str, tmp_path: Path) -> None:
    table = tmp_path / "nlphuji" / "winogavil" / "test-00000-of-00001.parquet"
    table.parent.mkdir(parents=True)
    table.write_bytes(b"x")
    assert fetch(tmp_path, endpoint, "winogavil") == 0
    assert not content.fetched


def test_a_split_in_other_files_than_the_hubs_gets_no_second_copy(
    content: Content, endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "winogavil"
    for name in ("test-00000-of-00001.parquet", "data/test.parquet", "TEST/test/test-00000-of-00001-abc123.parquet"):
        table = folder / name
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_bytes(b"x")
        assert fetch(tmp_path, endpoint, "winogavil") == 0
        assert names(folder) == {name}
        assert find_data(WINO, tmp_path) == table.parent
        table.unlink()
        assert "left as it is" in capsys.readouterr().out
    # Half of a copy is no copy, and what comes beside it would be read with it.
    table = folder / "TEST" / "test" / "test-00000-of-00002.parquet"
    table.write_bytes(b"x")
    assert fetch(tmp_path, endpoint, "winogavil") == 1
    assert "a part of another copy of the test split: remove it" in capsys.readouterr().out
    assert not content.fetched


def test_control_c_ends_it_at_once_and_removes_what_is_unfinished(
    content: Content, endpoint: str, tmp_path: Path
) -> None:
    content.stalled.set()
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from evaluation.download import main; sys.exit(main())"
    )
    flags = [str(tmp_path), "--tasks", "dtd,mnist", "--endpoint", endpoint, "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *flags],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not content.fetched:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    finally:
        content.stalled.clear()
        process.kill()
    assert process.returncode == 130
    assert "stopped; start it again" in errors
    assert "Traceback" not in errors
    assert set(content.fetched) == {"test/0.tar"}
    assert not list((tmp_path / ".download").glob("*"))


def test_room_and_flags_are_checked_first(
    content: Content,
    endpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("evaluation.download.shutil.disk_usage", lambda _: usage(10**6, 0, 1000))
    assert fetch(tmp_path, endpoint, "dtd") == 2
    assert "free and 0.1 MB are needed" in capsys.readouterr().err
    assert not content.fetched
    (tmp_path / "file").touch()
    for arguments, message in (
        ([str(tmp_path), "--tasks", "nothing"], "--tasks nothing"),
        ([str(tmp_path), "--workers", "0"], "--workers 0"),
        ([str(tmp_path / "file" / "data")], "cannot be made"),
        ([str(tmp_path), "--endpoint", "localhost:80"], "localhost:80 is no address: give https://HOST"),
        ([str(tmp_path), "--endpoint", "http://"], "is no address"),
        ([str(tmp_path), "--endpoint", "http://x:port"], "is no address"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_asked_for_one_set_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(hub, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    with serving(Content()) as address:
        pass
    assert fetch(tmp_path, address, "dtd,mnist,cars") == 1
    out = capsys.readouterr().out
    assert all(f"still missing: {key}: " in out for key in ("vtab/dtd", "mnist", "cars"))
    assert len(pauses) == hub.TRIES - 1


def test_a_hub_that_may_not_be_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(hub.HfApi, "dataset_info", offline)
    monkeypatch.setattr(hub.time, "sleep", lambda _: pytest.fail("tried again"))
    assert fetch(tmp_path, "http://127.0.0.1:9", "dtd") == 1
    assert "HF_HUB_OFFLINE is set: unset it to fetch" in capsys.readouterr().out
