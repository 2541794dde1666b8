"""Where the data of a task lies: the published layouts in a local folder. Nothing is fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from evaluation.datacomp.errors import MissingData
from evaluation.datacomp.tasks import Kind, Task
from evaluation.datasets import numbered_shards
from evaluation.errors import UserError

HUB_USER = "nlphuji"
TEXT_FILES = ("classnames.txt", "zeroshot_classification_templates.txt")

# Names of the files of a test split: test-00000-of-00002.parquet (or -of-00002-<digest>), NAME-test.arrow. In a folder `test`
# any parquet file will do, 0000.parquet, but for one that names another split.
_TEST_FILE = re.compile(r"(.*-)?test(-\d+-of-(?P<files>\d+)(-[0-9a-f]+)?)?\.(parquet|arrow)")
_OTHER_SPLIT = re.compile(r"(.*-)?(train|training|validation|valid|val|dev|unlabeled|unsupervised)[-.].*")


def find_data(task: Task, data_dir: str | Path) -> Path:
    """The folder that holds the data of a task, complete as far as names of files tell.

    Args:
        task: which one.
        data_dir: the folder of all sets. Sets in shards are `data_dir/task.folder`. Tables of the Hugging Face hub are
            looked for in `data_dir/NAME`, `data_dir/nlphuji/NAME`, in a cache of its client (`datasets--nlphuji--NAME`)
            or one of the datasets library (`nlphuji___NAME`), each in data_dir, `hf_cache` or `hf_cache/hub`; retrieval
            also in shards (image + txt with a caption a line) in `data_dir/NAME` or `data_dir/wds_NAME_test`.

    Raises:
        MissingData: if it is not there; the message says what was looked for.
        UserError: if it is there twice.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise MissingData(f"--data_dir {root} is not a folder; give the folder that holds the evaluation sets.")
    if task.kind not in (Kind.RETRIEVAL, Kind.WINOGAVIL):
        _check_shards(task, root / task.folder, TEXT_FILES)
        return root / task.folder
    if task.kind is Kind.RETRIEVAL:
        for folder in (
            root / task.folder,
            root / f"wds_{task.folder}_test",
            root / f"wds_retrieval-{task.folder}_test",
        ):
            if (folder / "test" / "nshards.txt").is_file():
                _check_shards(task, folder, ())
                _check_type(folder)
                return folder
    return table_files(task, root)[0].parent


def is_sharded(folder: Path) -> bool:
    """Whether a folder that `find_data` returned holds shards, and not a table."""
    return (folder / "test" / "nshards.txt").is_file()


def table_files(task: Task, data_dir: str | Path) -> list[Path]:
    """The parquet or Arrow files of the test split of a table, in order; errors as in `find_data`."""
    root = Path(data_dir)
    for folder in _table_folders(task.folder, root):
        if folder.is_dir():
            files = _test_split(folder)
            if files:
                return files
    raise MissingData(
        f"{task.name}: no parquet or Arrow file of {HUB_USER}/{task.folder} (test split) under {root}; looked in "
        f"{task.folder}, {HUB_USER}/{task.folder}, hf_cache/{HUB_USER}___{task.folder} and "
        f"hf_cache/hub/datasets--{HUB_USER}--{task.folder}."
    )


def _table_folders(name: str, root: Path) -> Iterator[Path]:
    yield root / name
    yield root / HUB_USER / name
    for cache in (root / "hf_cache", root / "hf_cache" / "hub", root):
        yield cache / f"{HUB_USER}___{name}"
        yield from _snapshots(cache / f"datasets--{HUB_USER}--{name}")


def _snapshots(repository: Path) -> list[Path]:
    """The snapshots of a repository in a hub cache: main's first, then other branches', then the newest."""
    folder = repository / "snapshots"
    if not folder.is_dir():
        return []
    references = [path for path in (repository / "refs").rglob("*") if path.is_file()]
    named = [path.read_text().strip() for path in sorted(references, key=lambda path: (path.name != "main", path))]
    others = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    return list(dict.fromkeys([folder / commit for commit in named] + others))


def _test_split(folder: Path) -> list[Path]:
    """The files of the test split under a folder; of several prepared copies in a cache, the newest.

    Raises:
        UserError: for parquet files of the split in more than one folder: which of them counts, nobody can tell.
    """
    found = [path for path in folder.rglob("*") if is_test_file(path.relative_to(folder)) and path.is_file()]
    groups: dict[Path, list[Path]] = {}
    for path in found:
        groups.setdefault(path.parent, []).append(path)
    if not groups:
        return []
    if len(groups) > 1 and any(path.suffix == ".parquet" for path in found):
        places = " and ".join(map(str, sorted(groups)[:2]))
        raise UserError(f"{folder} holds several parquet copies of the test split, {places}; keep one.")
    # As the datasets library chooses.
    newest = max(groups, key=lambda place: place.stat().st_mtime)
    return sorted(groups[newest])


def is_test_file(path: PurePath) -> bool:
    """Whether a file of a table belongs to the test split, by its name or its folder's; unfinished copies do not.

    Args:
        path: relative to the folder of the set.
    """
    name, kind = path.name.lower(), path.suffix.lower()
    if kind not in (".parquet", ".arrow") or any(part.endswith(".incomplete") for part in path.parts):
        return False
    if _TEST_FILE.fullmatch(name):
        return True
    # The configuration, whose folder holds those of the splits or their files, may be called TEST as well.
    return kind == ".parquet" and path.parent.name.lower() == "test" and not _OTHER_SPLIT.fullmatch(name)


def whole_split(files: Sequence[Path]) -> bool:
    """Whether the files of a split are as many as their names say, test-00000-of-00002.parquet; other names say nothing."""
    matches = [_TEST_FILE.fullmatch(file.name.lower()) for file in files]
    numbers = {int(match["files"]) for match in matches if match is not None and match["files"]}
    return not numbers or numbers == {len(files)}


def _check_shards(task: Task, folder: Path, text_files: tuple[str, ...]) -> None:
    if not folder.is_dir():
        raise MissingData(f"{task.name}: folder {folder} is missing.")
    for name in (*text_files, "test/nshards.txt"):
        if not (folder / name).is_file():
            raise MissingData(f"{task.name}: {folder / name} is missing.")
    missing = [path for path in numbered_shards(folder) if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingData(f"{task.name}: shard {missing[0]}{more} of test/nshards.txt is missing.")


def _check_type(folder: Path) -> None:
    file = folder / "dataset_type.txt"
    kind = file.read_text(encoding="utf-8", errors="replace").strip().lower() if file.is_file() else ""
    if kind != "retrieval":
        raise UserError(f"{file} must say `retrieval`, as clip_benchmark writes it; it says {kind[:40]!r}.")
