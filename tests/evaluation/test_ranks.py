"""The same numbers on 1, 2 and 4 ranks with uneven shares; real spawned gloo processes."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from end_to_end.runs import free_port
from evaluation import ranks as ranks_of_evaluation
from evaluation.collectives import all_reduce_sum, gather_rows
from evaluation.datacomp.errors import MissingData
from evaluation.errors import UserError
from evaluation.features import encode_images, encode_share, gather_pairs
from evaluation.ranks import Place, joined, known_to_all
from evaluation.retrieval import retrieval_metrics
from evaluation.zero_shot import zero_shot_metrics
from ranks import run_on_ranks


class LinearEncoder(torch.nn.Module):
    """Two linear towers with an open_clip model's two methods; images [B, 5], "tokens" [B, 3] int64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.image = torch.nn.Parameter(torch.randn(5, 8, generator=generator))
        self.text = torch.nn.Parameter(torch.randn(3, 8, generator=generator))

    def encode_image(self, image: Tensor) -> Tensor:
        """[B, 5] → [B, 8]."""
        return image @ self.image

    def encode_text(self, text: Tensor) -> Tensor:
        """[B, 3] → [B, 8]."""
        return text.to(self.text.dtype) @ self.text


def place() -> tuple[int, int]:
    """Rank and world size; 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_batches(samples: dict[str, Tensor], rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """The batches of one rank: samples rank, rank + world_size, …, four at a time."""
    mine = torch.arange(rank, len(samples["image"]), world_size)
    return [{"index": rows, **{name: samples[name][rows] for name in samples}} for rows in mine.split(4) if len(rows)]


def all_metrics(payload: dict[str, Any]) -> dict[str, Any]:
    """Every distributed path once: uneven gather, encoding, retrieval both ways, zero-shot."""
    rank, world_size = place()
    encoded = gather_pairs(encode_share(LinearEncoder(), share_batches(payload["pairs"], rank, world_size)), world_size)
    where = {"rank": rank, "world_size": world_size, "block": 8}
    mine = slice(rank, None, world_size)
    return {
        "rows": gather_rows(torch.full((rank * 2, 3), float(rank)) if rank else torch.empty(0, 0), world_size),
        "sum": all_reduce_sum(torch.tensor([rank, 1]), world_size),
        "image_features": encoded.image_features,
        "text_features": encoded.text_features,
        "retrieval": retrieval_metrics(*encoded, **where),
        "same_caption": retrieval_metrics(*encoded, caption_ids=payload["caption_ids"], **where),
        "zero_shot": zero_shot_metrics(
            payload["features"][mine], payload["labels"][mine], payload["head"], world_size=world_size, block=3
        ),
    }


def label_error() -> str:
    """Only the last rank has a bad label; every rank must say so instead of waiting."""
    rank, world_size = place()
    labels = torch.tensor([7 if rank == world_size - 1 else 0])
    try:
        zero_shot_metrics(torch.ones(1, 4), labels, torch.eye(4), world_size=world_size)
    except ValueError as error:
        return str(error)
    return "no error"


def mistakes() -> dict[str, Any]:
    """Work that fails on one rank only, and what rank 0 found out."""
    rank, world_size = place()
    here = Place(rank, world_size, torch.device("cpu"))

    def fail(failing: int) -> None:
        if rank == failing:
            raise UserError(f"a mistake of {failing}")

    def crash() -> None:
        if rank == 1:
            raise KeyError("a crash of 1")

    found: dict[str, Any] = {"from_main": here.from_main(lambda: rank + 7), "everyone": here.everyone(rank)}
    for name, work in (("together", lambda: here.together(lambda: fail(1))), ("main", lambda: here.from_main(crash))):
        try:
            found[name] = work()
        except UserError as error:
            found[name] = type(error).__name__, str(error)
    try:
        here.together(crash)
    except (KeyError, UserError) as error:
        found["crash"] = type(error).__name__, known_to_all(error)
    return found


def test_all_ranks_learn_of_a_mistake_and_of_a_crash() -> None:
    results = run_on_ranks(mistakes, 2)
    for found in results:
        assert found["from_main"] == 7
        assert found["everyone"] == [0, 1]
        assert found["together"] == ("SharedError", "a mistake of 1")
        assert found["main"] is None  # rank 0 alone did the work
    assert [found["crash"] for found in results] == [("SharedError", True), ("KeyError", True)]
    assert not known_to_all(UserError("of this rank alone"))


def make_payload(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pairs": {
            "image": torch.randn(number, 5, generator=generator),
            "text": torch.randint(0, 9, (number, 3), generator=generator),
        },
        "caption_ids": torch.arange(number) % 11,
        "features": F.normalize(torch.randn(number, 6, generator=generator), dim=-1),
        "labels": torch.randint(0, 7, (number,), generator=generator),
        "head": F.normalize(torch.randn(7, 6, generator=generator), dim=-1),
    }


# 37 samples are shared unevenly by 2 and by 4 ranks; of 3 samples the last of 4 ranks has none.
NUMBERS = (37, 3)


def everything(payloads: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """What one start of the ranks does: starting them is what takes the time."""
    return [all_metrics(payload) for payload in payloads], label_error()


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_gives_the_numbers_of_one(world_size: int) -> None:
    payloads = [make_payload(number) for number in NUMBERS]
    alone = [all_metrics(payload) for payload in payloads]
    results = run_on_ranks(everything, world_size, payloads, timeout=120)
    for shared, _ in results:
        for got, wanted in zip(shared, alone):
            assert_same_numbers(got, wanted, world_size)
    # Only the last rank has a bad label, and all stop.
    messages = [message for _, message in results]
    assert "labels 7 … 7 do not fit 4" in messages[-1]
    assert all("another rank" in message for message in messages[:-1])


def assert_same_numbers(got: dict[str, Any], wanted: dict[str, Any], world_size: int) -> None:
    expected = torch.cat([torch.full((2 * rank, 3), float(rank)) for rank in range(world_size)])
    torch.testing.assert_close(got["rows"], expected, rtol=0, atol=0)
    assert got["sum"].tolist() == [sum(range(world_size)), world_size]
    for name in ("image_features", "text_features"):
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-6)
    assert got["retrieval"] == wanted["retrieval"]
    assert got["same_caption"] == wanted["same_caption"]
    assert got["zero_shot"] == pytest.approx(wanted["zero_shot"], abs=1e-12)


def test_a_sample_loaded_twice_is_an_error() -> None:
    batch = {"image": torch.ones(2, 5), "text": torch.ones(2, 3, dtype=torch.int64), "index": torch.tensor([4, 4])}
    with pytest.raises(ValueError, match="loaded twice"):
        gather_pairs(encode_share(LinearEncoder(), [batch]))


def test_encoding_keeps_the_mode_and_normalises_in_float32() -> None:
    model = LinearEncoder().train()
    batches = share_batches(make_payload(9)["pairs"], 0, 1)
    encoded = gather_pairs(
        encode_share(model, batches[::-1], autocast_context=lambda: torch.autocast("cpu", torch.bfloat16))
    )
    assert model.training
    assert encoded.image_features.dtype == torch.float32
    torch.testing.assert_close(encoded.image_features.norm(dim=1), torch.ones(9), rtol=0, atol=1e-6)
    exact = gather_pairs(encode_share(model, batches))
    # Reversed batches come back in global order; bfloat16 towers differ a little, not at random.
    assert bool((encoded.image_features * exact.image_features).sum(1).min() > 0.999)
    half = encode_images(
        model.bfloat16(), [{**batch, "label": batch["index"]} for batch in batches], image_dtype=torch.bfloat16
    )
    assert half.image_features.dtype == torch.float32
    assert half.labels.tolist() == list(range(9))
    with pytest.raises(ValueError, match="no pair"):
        gather_pairs(encode_share(model, []))


def test_ranks_that_do_not_come_are_not_waited_for_as_long_as_ranks_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks_of_evaluation, "MEETING", timedelta(seconds=1))
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"2 ranks cannot meet at 127\.0\.0\.1:{port}"), joined("cpu"):
        pass
    assert time.monotonic() - began < 30


def test_on_one_rank_a_mistake_in_a_loader_process_is_one_line_of_its_kind() -> None:
    def fail() -> None:
        raise MissingData(
            "Caught MissingData in DataLoader worker process 0.\nTraceback …\nevaluation.errors.UserError: x"
        )

    with pytest.raises(MissingData, match=r"\Ax\Z"):
        Place(0, 1, torch.device("cpu")).together(fail)
