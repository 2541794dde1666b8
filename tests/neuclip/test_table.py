"""The table of per-sample numbers on one rank; tests/distributed has it on several."""

from __future__ import annotations

import pytest
import torch

from neuclip.normalizers import Placement, ShardedTable, table


def test_rows_start_with_the_initial_values_and_are_replaced_by_key() -> None:
    numbers = ShardedTable(5, (1.0, -2.0))
    assert numbers.whole().tolist() == [[1.0, -2.0]] * 5
    numbers.write(torch.tensor([4, 0]), torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    assert numbers.read(torch.tensor([0, 1, 4, 0])).tolist() == [[7.0, 8.0], [1.0, -2.0], [5.0, 6.0], [7.0, 8.0]]
    assert numbers.local_rows().shape == (5, 2)


def test_what_was_read_is_a_copy() -> None:
    numbers = ShardedTable(3, (0.0,))
    numbers.read(torch.tensor([1])).add_(1.0)
    assert not numbers.whole().any()


def test_fill_takes_what_overlaps() -> None:
    numbers = ShardedTable(4, (0.0,))
    numbers.fill(2, torch.tensor([[1.0], [2.0], [3.0]]))
    numbers.fill(-1, torch.tensor([[9.0], [8.0]]))
    numbers.fill(10, torch.tensor([[9.0]]))
    assert numbers.whole().flatten().tolist() == [8.0, 0.0, 1.0, 2.0]


def test_the_whole_is_put_together_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "GATHERED_BYTES", 24)
    numbers = ShardedTable(7, (0.0, 0.0))
    content = torch.arange(14.0).view(7, 2)
    numbers.write(torch.arange(7), content)
    assert torch.equal(numbers.whole(), content)


def test_state_dict_holds_a_copy_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = ShardedTable(4, (0.0,))
    state = numbers.state_dict()
    numbers.write(torch.tensor([1]), torch.tensor([[3.0]]))
    assert state["table"].tolist() == [[0.0]] * 4
    monkeypatch.setattr(table, "STATE_DICT_LIMIT", 15)
    large = ShardedTable(4, (0.0,))
    assert not large.in_state_dict
    assert "table" not in large.state_dict()
    large.load_state_dict(large.state_dict())
    large.load_state_dict(numbers.state_dict())
    assert large.whole().flatten().tolist() == [0.0, 3.0, 0.0, 0.0]


def test_another_size_is_refused_with_the_flag() -> None:
    with pytest.raises(RuntimeError, match=r"table of 4 keys.*--data_size.*one of 5"):
        ShardedTable(5, (0.0,)).load_state_dict(ShardedTable(4, (0.0,)).state_dict())
    with pytest.raises(RuntimeError, match=r"4 keys with 1 numbers.*4 with 2"):
        ShardedTable(4, (0.0, 0.0)).load_state_dict(ShardedTable(4, (0.0,)).state_dict())
    state = ShardedTable(4, (0.0,)).state_dict()
    del state["table"]
    with pytest.raises(RuntimeError, match=r"Missing key.*table"):
        ShardedTable(4, (0.0,)).load_state_dict(state)


@pytest.mark.parametrize(
    ("place", "budget", "num_bytes", "on_gpu"),
    [("auto", 100, 100, True), ("auto", 100, 101, False), ("gpu", 0, 10**12, True), ("host", 10**12, 1, False)],
)
def test_placement(place: str, budget: int, num_bytes: int, on_gpu: bool) -> None:
    assert Placement(place, budget).on_gpu(num_bytes) is on_gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("place", ["gpu", "host"])
def test_on_a_gpu(place: str) -> None:
    numbers = ShardedTable(1000, (1.0, 2.0), Placement(place)).cuda()
    keys = torch.tensor([7, 999], device="cuda")
    numbers.write(keys, torch.tensor([[3.0, 4.0], [5.0, 6.0]], device="cuda"))
    values = numbers.read(torch.tensor([999, 0, 7], device="cuda"))
    assert values.is_cuda
    assert values.tolist() == [[5.0, 6.0], [1.0, 2.0], [3.0, 4.0]]
    copy = ShardedTable(1000, (0.0, 0.0), Placement("gpu")).cuda()
    copy.load_state_dict(numbers.state_dict())
    assert torch.equal(copy.whole(), numbers.whole())
    taken = torch.cuda.memory_allocated()
    large = ShardedTable(10**6, (0.0, 0.0), Placement(place)).cuda()
    assert (torch.cuda.memory_allocated() - taken > 10**6) == (place == "gpu")
    assert large.shard.is_cuda
