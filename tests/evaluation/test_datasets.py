"""The readers: every sample once over ranks × workers, both classification layouts, and clear errors."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from evaluation.datasets import PairDataset, expand_shards, open_classification
from evaluation.errors import UserError

from .conftest import image_bytes, pair, write_shard


def to_size(image: Image.Image) -> torch.Tensor:
    """A transform that a DataLoader can collate: the size and the mean colour, [5] float32."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(-1, 3).float().mean(0)
    return torch.tensor([*image.size, *pixels.tolist()])


def to_length(texts: list[str]) -> torch.Tensor:
    """A tokenizer: [B, 1] int64."""
    return torch.tensor([[len(text)] for text in texts])


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (3, 2), (5, 1)])
def test_each_pair_once_over_ranks_and_workers(pair_shards: str, world_size: int, workers: int) -> None:
    seen = []
    for rank in range(world_size):
        pairs = PairDataset(pair_shards, to_size, to_length, rank=rank, world_size=world_size)
        for batch in DataLoader(pairs, batch_size=2, num_workers=workers):
            seen += batch["index"].tolist()
            assert (batch["index"] % world_size == rank).all()
            assert batch["text"].shape == (len(batch["index"]), 1)
    assert sorted(seen) == list(range(23))


def test_contents_do_not_depend_on_the_share(pair_shards: str) -> None:
    whole = PairDataset(pair_shards, to_size, to_length)
    for rank in range(4):
        share = PairDataset(pair_shards, to_size, to_length, rank=rank, world_size=4)
        assert len(share) == len(range(rank, 23, 4))
        for sample in share:
            torch.testing.assert_close(sample["image"], whole[sample["index"]]["image"])
    sample = whole[20]
    expected = to_size(Image.open(io.BytesIO(image_bytes(20))).convert("RGB"))
    torch.testing.assert_close(sample["image"], expected)
    assert whole.caption(20) == "disc 20 icon"
    assert whole.concept(20) == "disc 20"
    assert whole.image(20).size == (32, 32)


def test_caption_ids_cover_all_ranks(pair_shards: str) -> None:
    ids = PairDataset(pair_shards, rank=1, world_size=4).caption_ids()
    assert ids.shape == (23,)
    assert ids[9] == ids[0]  # the fixture repeats caption 0 at pair 9
    assert len(ids.unique()) == 22


def test_patterns_join_and_odd_members_are_left_out(tmp_path: Path) -> None:
    jpeg = {"JPG": image_bytes(1, format_name="JPEG"), "txt": b" one\n"}
    write_shard(
        tmp_path / "a.tar", [("dir.v2/000", jpeg), ("001", {"txt": b"no image"}), ("__meta__", {"json": b"{}"})]
    )
    write_shard(tmp_path / "b.tar", [("7", {"png": image_bytes(2)}), ("8", {"webp": image_bytes(3), "txt": b"two"})])
    pairs = PairDataset(f"{tmp_path}/a.tar::{tmp_path}/b.tar", to_size, to_length)
    assert pairs.captions() == ["one", "two"]
    assert pairs.skipped == 2
    assert pairs.concept(0) == ""
    assert pickle.loads(pickle.dumps(pairs))[1]["index"] == 1  # spawned loader workers get a copy


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    write_shard(tmp_path / "a.tar", [("0", {**pair(0), "pkl": trap, "pyd": trap, "pth": trap})])
    assert PairDataset(f"{tmp_path}/a.tar", to_size, to_length)[0]["index"] == 0
    assert not (tmp_path / "owned").exists()


def test_broken_pairs(tmp_path: Path, pair_shards: str) -> None:
    with pytest.raises(ValueError, match=r"00003\.tar does not exist; check"):
        PairDataset(pair_shards.replace("00002}", "00003}"))
    shard = Path(pair_shards.replace("{00000..00002}", "00000"))
    (tmp_path / "z.tar").write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        PairDataset(f"{tmp_path}/z.tar")
    (tmp_path / "cut.tar").write_bytes(shard.read_bytes()[:1800])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        PairDataset(f"{tmp_path}/cut.tar")
    write_shard(tmp_path / "t.tar", [("0", {"txt": b"alone"})])
    with pytest.raises(ValueError, match="no sample has both"):
        PairDataset(f"{tmp_path}/t.tar")
    write_shard(tmp_path / "i.tar", [("5", {"png": b"not a picture", "txt": b"x", "json": b"{"})])
    pairs = PairDataset(f"{tmp_path}/i.tar", to_size)
    with pytest.raises(ValueError, match=r"sample 5 of .*i\.tar: the image cannot be decoded"):
        pairs[0]
    with pytest.raises(ValueError, match="its json cannot be read"):
        pairs.concept(0)
    write_shard(tmp_path / "twice.tar", [("5", pair(1)), ("5", {"png": image_bytes(1)})])
    with pytest.raises(ValueError, match=r"5\.png twice"):
        PairDataset(f"{tmp_path}/twice.tar")
    with pytest.raises(ValueError, match="rank 2 of 2"):
        PairDataset(pair_shards, rank=2, world_size=2)


def test_shard_layout(classification_shards: Path) -> None:
    labels = {}
    for rank in range(3):
        source = open_classification(classification_shards, to_size, rank=rank, world_size=3)
        assert source.class_names == [f"disc {label}" for label in range(6)]
        assert source.templates == ["{c} icon", "a photo of {c}"]
        for batch in DataLoader(source.dataset, batch_size=2, num_workers=rank):
            labels.update(zip(batch["index"].tolist(), batch["label"].tolist()))
    assert labels == {i: i % 6 for i in range(13)}


def test_shard_layout_mistakes(classification_shards: Path) -> None:
    (classification_shards / "classnames.txt").write_text("only\nfour\nnames\nhere\n")
    with pytest.raises(ValueError, match=r"cls is '4'; it must be a number in 0 … 3"):
        list(open_classification(classification_shards, to_size).dataset)
    (classification_shards / "test" / "nshards.txt").write_text("two")
    with pytest.raises(ValueError, match=r"nshards\.txt says 'two'"):
        open_classification(classification_shards)
    (classification_shards / "test" / "nshards.txt").write_text("3")
    with pytest.raises(ValueError, match=r"2\.tar does not exist"):
        open_classification(classification_shards)
    (classification_shards / "classnames.txt").unlink()
    with pytest.raises(ValueError, match=r"classnames\.txt is missing"):
        open_classification(classification_shards)


def make_folders(root: Path, names: list[str], images: int = 1) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for image in range(images):
            (root / name / f"{image}.JPEG").write_bytes(image_bytes(number + image, format_name="JPEG"))
        (root / name / "notes.txt").write_text("not an image")
    return root


def test_folder_layout_with_names(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "set", ["b", "a", "c"], images=3)
    (root / "classnames.txt").write_text("alpha\nbeta\ngamma\n")
    source = open_classification(root, to_size)
    assert source.class_names == ["alpha", "beta", "gamma"]
    assert source.templates == ["a photo of a {c}."]
    assert [sample["label"] for sample in source.dataset] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for sample, folder in ((source.dataset[0], "a"), (source.dataset[3], "b"), (source.dataset[6], "c")):
        with Image.open(root / folder / "0.JPEG") as image:  # labels follow the sorted names of the folders
            torch.testing.assert_close(sample["image"], to_size(image.convert("RGB")))
    shares = [open_classification(root, to_size, rank=rank, world_size=2).dataset for rank in range(2)]
    assert sorted(sample["index"] for share in shares for sample in share) == list(range(9))
    (root / "classnames.txt").write_text("alpha\nbeta\n")
    with pytest.raises(ValueError, match="2 names for 3 class folders"):
        open_classification(root)


def test_imagenet_is_recognised(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "val", [f"n{number:08d}" for number in range(1000)])
    source = open_classification(root)
    assert source.class_names == list(open_clip.IMAGENET_CLASSNAMES)
    assert source.templates == list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert source.dataset.total == 1000
    for leftover in (root / "n00000000").iterdir():
        leftover.unlink()
    (root / "n00000000").rmdir()
    with pytest.raises(ValueError, match=r"999 class folders that are not ImageNet's 1,000: add .*classnames\.txt"):
        open_classification(root)


def test_neither_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        open_classification(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither"):
        open_classification(tmp_path / "empty")


def test_json_without_a_concept(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("0", {**pair(0), "json": json.dumps([1]).encode()})])
    assert PairDataset(f"{tmp_path}/a.tar").concept(0) == ""
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert len(tar.getnames()) == 3


@pytest.mark.parametrize("nested", [False, True])
def test_folders_of_imagenet_v2_are_classes_by_number(nested: bool, tmp_path: Path) -> None:
    """As text the folders sort 0, 1, 10, 100; a label must be the folder's number."""
    root = tmp_path / "ImageNetV2-matched-frequency-format-val" if nested else tmp_path
    for number in range(1000):
        (root / str(number)).mkdir(parents=True)
    for number in (2, 10):
        Image.new("RGB", (4, 4)).save(root / str(number) / "a.png")
    source = open_classification(tmp_path)
    assert len(source.class_names) == 1000
    assert [source.dataset[i]["label"] for i in range(2)] == [2, 10]


def test_shards_by_wildcard(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).touch()
    assert expand_shards(f"{tmp_path}/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    with pytest.raises(UserError, match="matches no shard"):
        expand_shards(f"{tmp_path}/*.tgz")
