"""A training set in parts: lengths, drawing, dealing to ranks and workers, broken samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_tensor

from evaluation.errors import UserError
from evaluation.normalizers.pool import Everything, Pool, Spots, batches, draw_spots, open_pool

from ..conftest import image_bytes, pair, write_shard


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text), sum(map(ord, text))] for text in texts])


def pool_of(pattern: str, needs_keys: bool = True, workers: int = 0) -> Pool:
    return open_pool(pattern, to_tensor, tokenize, needs_keys=needs_keys, workers=workers)


def everything(pool: Pool, ranks: int, workers: int, batch_size: int = 4) -> tuple[list[int], list[int], int]:
    """Global indices and keys of what all ranks see, and the number left out."""
    index, keys, left_out = [], [], 0
    for rank in range(ranks):
        for batch in batches(Everything(pool, rank, ranks), batch_size, workers, pin_memory=False):
            left_out += int(batch["left_out"])
            if "index" in batch:
                index += batch["index"].tolist()
                keys += batch["key"].tolist()
                assert batch["image"].shape[0] == batch["text"].shape[0] == len(batch["index"])
    return index, keys, left_out


@pytest.mark.parametrize("workers", [0, 2])
def test_lengths(pair_shards: str, workers: int) -> None:
    pool = pool_of(pair_shards, workers=workers)
    assert (pool.lengths, pool.total) == ([5, 7, 11], 23)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (3, 2), (4, 0)])
def test_every_sample_once(pair_shards: str, ranks: int, workers: int) -> None:
    """Fewer slots than parts and more."""
    index, keys, left_out = everything(pool_of(pair_shards), ranks, workers)
    assert sorted(index) == list(range(23))
    assert sorted(keys) == list(range(23))
    assert left_out == 0


def test_broken_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    samples = [(f"{seed:04d}", pair(seed)) for seed in range(6)]
    samples[1][1]["png"] = image_bytes(1)[:40]
    samples[2][1]["json"] = b'{"key": "x"}'
    del samples[4][1]["json"]
    samples[5][1]["json"] = b'{"key": "000017"}'
    write_shard(tmp_path / "0.tar", samples)
    index, keys, left_out = everything(pool_of(str(tmp_path)), 1, 0)
    assert (index, keys, left_out) == ([0, 3, 5], [0, 3, 17], 3)
    index, _, left_out = everything(pool_of(str(tmp_path), needs_keys=False), 1, 0)
    assert (index, left_out) == ([0, 2, 3, 4, 5], 1)


def test_captions_as_in_training(tmp_path: Path) -> None:
    """In the json where there is no txt; an empty one is left out; a shard without pairs is an empty part."""
    samples = [(f"{seed:04d}", pair(seed)) for seed in range(4)]
    del samples[1][1]["txt"]
    samples[1][1]["json"] = b'{"key": 1, "caption": "in the json"}'
    del samples[2][1]["txt"]  # and no caption in the json
    samples[3][1]["txt"] = b" \n"
    write_shard(tmp_path / "0.tar", samples)
    write_shard(tmp_path / "1.tar", [("0000", {"txt": b"no picture"})])
    pool = pool_of(str(tmp_path))
    assert pool.lengths == [3, 0]
    index, keys, left_out = everything(pool, 1, 0)
    assert (index, keys, left_out) == ([0, 1], [0, 1], 1)
    assert pool.parts[0]().caption(1) == "in the json"


def test_no_pairs_at_all(tmp_path: Path) -> None:
    write_shard(tmp_path / "1.tar", [("0000", {"txt": b"no picture"})])
    with pytest.raises(UserError, match=r"--data .*: no sample has both an image and a caption"):
        pool_of(str(tmp_path))


def test_drawing_is_uniform_and_by_seed(pair_shards: str) -> None:
    pool = pool_of(pair_shards)
    spots = draw_spots(pool, 23, seed=1)
    assert sorted(spots) == [(part, place) for part, length in enumerate((5, 7, 11)) for place in range(length)]
    assert spots != sorted(spots)
    assert draw_spots(pool, 23, seed=1) == spots
    assert draw_spots(pool, 23, seed=2) != spots
    assert draw_spots(pool, 4, seed=1) == spots[:4]
    counts = torch.zeros(23)
    for seed in range(2000):
        for part, place in draw_spots(pool, 3, seed):
            counts[pool.offsets[part] + place] += 1
    assert counts.min() > 180  # 261 expected, standard deviation 15
    assert counts.max() < 345


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_at_spots(pair_shards: str, workers: int) -> None:
    pool = pool_of(pair_shards)
    spots = [(2, 10), (0, 0), (1, 3), (2, 0)]
    found = [number for batch in batches(Spots(pool, spots), 3, workers, False) for number in batch["index"].tolist()]
    assert found == [22, 0, 8, 12]


def test_csv(tmp_path: Path) -> None:
    lines = ["filepath\ttitle"]
    for seed in range(5):
        (tmp_path / f"{seed}.png").write_bytes(image_bytes(seed))
        lines.append(f"{tmp_path}/{seed}.png\tdisc {seed}")
    (tmp_path / "4.png").unlink()
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    index, keys, left_out = everything(pool_of(f"{tmp_path}/table.csv"), 2, 0)
    assert (sorted(index), sorted(keys), left_out) == ([0, 1, 2, 3], [0, 1, 2, 3], 1)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"00009\.tar does not exist"):
        pool_of(f"{tmp_path}/00009.tar")
