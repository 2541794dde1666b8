"""csv files and synthetic data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.data import NoUsableSamplesError, build_train_loader, check_train_data
from training.data.tables import PackedStrings
from training.errors import UserError


def write_table(kit, folder: Path, rows: int, separator: str = "\t", header: str = "filepath\ttitle\tother") -> Path:
    lines = [header.replace("\t", separator)]
    for number in range(rows):
        image = folder / f"{number}.png"
        image.write_bytes(kit.image_bytes(number))
        lines.append(separator.join((str(image), f"picture {number}", "x")))
    path = folder / ("table.tsv" if separator == "\t" else "table.csv")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(("world", "workers", "rows"), [(1, 0, 24), (2, 2, 35), (3, 0, 31)])
def test_every_row_once(kit, tmp_path: Path, world: int, workers: int, rows: int) -> None:
    config = kit.config(write_table(kit, tmp_path, rows), workers=workers)
    check_train_data(config, world)
    loaders = kit.open_ranks(config, world)
    epochs = []
    for epoch in (0, 1):
        ranks = [kit.seen_keys(loader, epoch) for loader in loaders]
        keys = [key for rank in ranks for key in rank]
        assert len({len(rank) for rank in ranks}) == 1
        assert len(keys) == len(set(keys)) == rows // (4 * world) * 4 * world
        epochs.append(keys)
    assert epochs[0] != epochs[1]
    assert kit.seen_keys(kit.open_ranks(config, world)[0], 1) == epochs[1][: len(epochs[1]) // world]


def test_names_separator_and_byte_order_mark(kit, tmp_path: Path) -> None:
    path = write_table(kit, tmp_path, 8, separator=",", header="image\ttext\tother")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    config = kit.config(path, csv_separator=",", csv_img_key="image", csv_caption_key="text")
    assert sorted(kit.seen_keys(kit.open_ranks(config, 1)[0], 0)) == list(range(8))


def test_separator_as_a_shell_passes_it(kit, tmp_path: Path) -> None:
    config = kit.config(write_table(kit, tmp_path, 8), csv_separator="\\t")
    assert kit.open_ranks(config, 1)[0].num_samples == 8


def test_broken_rows_are_made_up_for(kit, tmp_path: Path) -> None:
    path = write_table(kit, tmp_path, 12)
    (tmp_path / "3.png").unlink()
    lines = path.read_bytes().split(b"\n")
    lines[6] = lines[6].split(b"\t")[0]
    lines[8] = lines[8].replace(b"picture", b"\xff\xfe")
    path.write_bytes(b"\n".join(lines))
    keys = kit.seen_keys(kit.open_ranks(kit.config(path), 1)[0], 0)
    assert len(keys) == 12
    assert set(keys) == set(range(12)) - {3, 5, 7}


def test_no_image_at_all(kit, tmp_path: Path) -> None:
    config = kit.config(write_table(kit, tmp_path, 12))
    for image in tmp_path.glob("*.png"):
        image.unlink()
    with pytest.raises(UserError, match="the first images do not exist"):
        check_train_data(config)
    with pytest.raises(NoUsableSamplesError, match=r"table\.tsv row"):
        list(kit.open_ranks(config, 1)[0].epoch(0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"csv_img_key": "image"},
            "no column 'image', its columns are 'filepath', 'title', 'other': give --csv-img-key",
        ),
        ({"csv_separator": ","}, "no column 'filepath' and no column 'title'.*give --csv-separator '.t'"),
        ({"csv_separator": "ab"}, "--csv-separator is 'ab'"),
        ({"train_num_samples": 13}, "--train-num-samples 13 is more than the 12"),
        ({"batch_size": 13}, "--batch-size 13"),
    ],
)
def test_mistakes(kit, tmp_path: Path, flags: dict, message: str) -> None:
    config = kit.config(write_table(kit, tmp_path, 12), **flags)
    with pytest.raises(UserError, match=message):
        check_train_data(config)
    with pytest.raises(UserError, match=message):
        kit.open_ranks(config, 1)


def test_missing_and_joined_files(kit, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such csv file; correct"):
        check_train_data(kit.config(tmp_path / "no.csv"))
    with pytest.raises(UserError, match="only shards can be joined"):
        check_train_data(kit.config("a.csv::b.csv"))


def test_packed_strings() -> None:
    packed = PackedStrings(["", "é", "abc", ""])
    assert list(packed) == [b"", "é".encode(), b"abc", b""]
    assert len(PackedStrings([])) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_synthetic(kit, workers: int) -> None:
    config = kit.config(None, dataset_type="synthetic", workers=workers)
    ranks = [build_train_loader(config, kit.plain_preprocess, count_words, rank, 2, False) for rank in range(2)]
    assert [loader.steps_per_epoch for loader in ranks] == [100, 100]
    config.train_num_samples = 50
    ranks = [build_train_loader(config, kit.plain_preprocess, count_words, rank, 2, False) for rank in range(2)]
    batches = [batch for loader in ranks for batch in loader.epoch(0)]
    assert len(batches) == 12
    keys = torch.cat([batch.keys for batch in batches]).tolist()
    assert len(set(keys)) == 48
    assert set(keys) <= set(range(50))
    assert all(torch.equal(image, batches[0].image[0]) for batch in batches for image in batch.image)


def count_words(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption.split())] for caption in captions])
