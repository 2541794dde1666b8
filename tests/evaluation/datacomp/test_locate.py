"""Every published layout is found, and what is missing is named."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest

from evaluation.datacomp.errors import MissingData
from evaluation.datacomp.locate import find_data, is_sharded, is_test_file, table_files
from evaluation.datacomp.tasks import TASKS, Kind
from evaluation.errors import UserError

from .sets import write_set

FLICKR = TASKS["retrieval/flickr_1k_test_image_text_retrieval"]
WINOGAVIL = TASKS["misc/winogavil"]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_the_tasks() -> None:
    assert len(TASKS) == 40
    assert sum(task.main_metric is not None for task in TASKS.values()) == 38
    assert all(key == task.key for key, task in TASKS.items())
    assert len({task.name for task in TASKS.values()}) == len({task.folder for task in TASKS.values()}) == 40
    folders = {
        "vtab/caltech101": "wds_vtab-caltech101_test",
        "imagenet-a": "wds_imagenet-a_test",
        "wilds/fmow": "wds_wilds-fmow_test",
        "fairness/geode": "wds_geode_test",
        "misc/winogavil": "winogavil",
        "retrieval/flickr_1k_test_image_text_retrieval": "flickr_1k_test_image_text_retrieval",
    }
    assert {key: TASKS[key].folder for key in folders} == folders


@pytest.mark.parametrize("kind", list(Kind))
def test_a_written_set_is_found(tmp_path: Path, kind: Kind) -> None:
    task = next(task for task in TASKS.values() if task.kind is kind)
    with pytest.raises(MissingData, match=task.name):
        find_data(task, tmp_path)
    folder = write_set(task, tmp_path, images=2)
    assert find_data(task, tmp_path) == folder
    assert is_sharded(folder) == (kind not in (Kind.RETRIEVAL, Kind.WINOGAVIL))


@pytest.mark.parametrize("layout", ["cache", "parquet", "user-parquet", "hub", "shards"])
def test_layouts_of_retrieval(tmp_path: Path, layout: str) -> None:
    folder = write_set(FLICKR, tmp_path, images=3, layout=layout)
    assert find_data(FLICKR, tmp_path) == folder


@pytest.mark.parametrize(
    "name", ["classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt", "test/1.tar"]
)
def test_a_missing_part_is_named(tmp_path: Path, name: str) -> None:
    folder = write_set("cifar10", tmp_path, images=4)
    (folder / name).unlink()
    with pytest.raises(MissingData, match=f"CIFAR-10: .*{name}"):
        find_data(TASKS["cifar10"], tmp_path)


def test_no_data_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"--data_dir .*nowhere"):
        find_data(FLICKR, tmp_path / "nowhere")


def test_a_number_of_shards_that_is_none(tmp_path: Path) -> None:
    (write_set("cifar10", tmp_path, images=2) / "test" / "nshards.txt").write_text("two")
    with pytest.raises(UserError, match="says 'two'"):
        find_data(TASKS["cifar10"], tmp_path)


def test_shards_of_pairs_say_what_they_are(tmp_path: Path) -> None:
    folder = write_set(FLICKR, tmp_path, images=2, layout="shards")
    (folder / "dataset_type.txt").write_text("multilabel")
    with pytest.raises(UserError, match=r"must say `retrieval`.*'multilabel'"):
        find_data(FLICKR, tmp_path)


def test_only_the_test_split_counts(tmp_path: Path) -> None:
    cache = tmp_path / "hf_cache" / f"nlphuji___{FLICKR.folder}" / "TEST" / "1.1.0" / "0"
    name = FLICKR.folder  # holds the word test itself
    touch(cache / f"{name}-train.arrow", cache / "cache-1234.arrow", cache / f"{name}-test.arrow")
    touch(cache.with_name("1.incomplete") / f"{name}-test.arrow")
    assert table_files(FLICKR, tmp_path) == [cache / f"{name}-test.arrow"]
    parquet = tmp_path / "winogavil"
    touch(parquet / "TEST" / "train" / "0000.parquet", parquet / "TEST" / "test" / "0000.parquet")
    touch(parquet / "TEST" / "test" / "0001.parquet")
    assert [path.name for path in table_files(WINOGAVIL, tmp_path)] == ["0000.parquet", "0001.parquet"]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("data/test-00000-of-00002.parquet", True),
        ("data/test-00000-of-00001-0a1b2c3d.parquet", True),
        ("TEST/test/0000.parquet", True),
        ("TEST/flickr-test.parquet", True),
        ("TEST/train/0000.parquet", False),
        ("TEST/train-00000-of-00001.parquet", False),
        ("TEST/flickr-validation.parquet", False),
        ("test.incomplete/0000.parquet", False),
        ("data/latest.parquet", False),
        ("test/0000.arrow", False),
        ("0000.parquet", False),
    ],
)
def test_which_files_are_of_the_test_split(name: str, counts: bool) -> None:
    assert is_test_file(PurePosixPath(name)) == counts


def test_of_prepared_copies_the_newest_counts(tmp_path: Path) -> None:
    root = tmp_path / "hf_cache" / f"nlphuji___{FLICKR.folder}" / "TEST" / "1.1.0"
    for age, name in enumerate(("b", "c", "a")):
        file = root / name / f"{FLICKR.folder}-test.arrow"
        touch(file)
        os.utime(file.parent, (10**9 - age, 10**9 - age))
    assert table_files(FLICKR, tmp_path)[0].parent.name == "b"


def test_two_parquet_copies_are_one_too_many(tmp_path: Path) -> None:
    for name in ("x", "y"):
        touch(tmp_path / "winogavil" / name / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="several parquet copies"):
        find_data(WINOGAVIL, tmp_path)


def test_the_snapshot_of_a_branch_counts(tmp_path: Path) -> None:
    repository = tmp_path / "hf_cache" / "hub" / "datasets--nlphuji--winogavil"
    for commit in ("old", "converted", "new"):
        touch(repository / "snapshots" / commit / "test-00000-of-00001.parquet")
    (repository / "refs" / "convert").mkdir(parents=True)
    (repository / "refs" / "convert" / "parquet").write_text("converted")
    assert find_data(WINOGAVIL, tmp_path).name == "converted"
    (repository / "refs" / "main").write_text("old")
    assert find_data(WINOGAVIL, tmp_path).name == "old"
