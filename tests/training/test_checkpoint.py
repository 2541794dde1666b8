"""Checkpoints: whole or not there, readable by anybody, restored in full, refused by name."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from end_to_end.runs import flat_tensors
from neuclip.objectives import OBJECTIVES
from small_training import SmallModel, make_args, make_batches, make_training
from training.atomic_files import sidecar_of, verify, write_atomically
from training.checkpoint import (
    Continuation,
    TrainingState,
    check_whole,
    newest_checkpoint,
    read_checkpoint,
    remove_leftovers,
)
from training.errors import UserError
from training.loop import train_one_epoch
from training.random_state import rng_state

FLAGS = ("--npn_num_protos", "8", "--npn_restart_iter", "3", "--epochs", "3")


def _state(objective: str = "neuclip", epochs: int = 0, **model: Any) -> TrainingState:
    """A run's state after some epochs."""
    training = make_training(make_args("--objective", objective, *FLAGS), make_batches(4, 4), **model)
    for epoch in range(epochs):
        train_one_epoch(training, epoch)
    training.state.epoch = epochs
    return training.state


def _content(objective: str = "neuclip", epochs: int = 1, **model: Any) -> dict[str, Any]:
    return copy.deepcopy(_state(objective, epochs, **model).to_checkpoint("run", "small"))


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_round_trip_restores_everything(objective: str, tmp_path: Path) -> None:
    content = _content(objective, epochs=2)
    write_atomically(tmp_path / "epoch_2.pt", content)
    state = _state(objective)
    state.load(read_checkpoint(tmp_path / "epoch_2.pt"), tmp_path / "epoch_2.pt", "small")
    assert (state.epoch, state.step) == (2, 8)
    assert (state.objective.epoch, state.objective.step) == (1, 8)
    expected, found = flat_tensors(content), flat_tensors(state.to_checkpoint("run", "small"))
    # Learning rates are those of the present command line and are set before each step.
    places = [place for place in expected if not place.endswith("/lr")]
    assert len(places) > 20
    assert [place for place in places if not torch.equal(found[place], expected[place])] == []


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_holds_tensors_and_plain_values_only(objective: str, tmp_path: Path) -> None:
    def walk(part: Any, place: str) -> None:
        if isinstance(part, dict):
            for name, inner in part.items():
                assert type(name) in (str, int), f"key {name!r} at {place}"
                walk(inner, f"{place}/{name}")
        elif isinstance(part, list | tuple):
            for number, inner in enumerate(part):
                walk(inner, f"{place}/{number}")
        else:
            plain = type(part) in (torch.Tensor, nn.Parameter, int, float, bool, str, type(None))
            assert plain, f"{type(part)} at {place}"

    content = _content(objective)
    walk(content, "")
    assert {"epoch", "step", "name", "model", "state_dict", "optimizer", "scaler", "objective"} <= content.keys()
    write_atomically(tmp_path / "epoch_1.pt", content)
    walk(torch.load(tmp_path / "epoch_1.pt", weights_only=True), "")


def test_bias_of_the_run_stays_beside_the_architecture() -> None:
    content = _content("siglip")
    assert content["state_dict"].keys() == SmallModel().state_dict().keys()
    assert content["logit_bias"].shape == ()
    state = _state("siglip")
    content["logit_bias"] = torch.tensor(-3.5)
    state.load(content, Path("epoch_1.pt"), "small")
    assert state.towers.logit_bias is not None
    assert state.towers.logit_bias.item() == -3.5


def test_bias_of_the_architecture_stays_inside() -> None:
    content = _content("siglip", logit_bias=-10.0)
    assert "logit_bias" in content["state_dict"]
    assert "logit_bias" not in content
    assert "logit_bias" not in _content("openclip")


def test_failure_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "epoch_1.pt"
    write_atomically(path, {"epoch": 1})

    def full_disk(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, {"epoch": 2})
    monkeypatch.undo()
    assert read_checkpoint(path) == {"epoch": 1}
    assert {file.name for file in tmp_path.iterdir()} == {"epoch_1.pt", "epoch_1.pt.json"}
    assert verify(path) is None


def test_failure_of_the_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        write_atomically(tmp_path / "epoch_1.pt", {"epoch": lambda: 1})
    assert list(tmp_path.iterdir()) == []


def test_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), fsync(file))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("replace"), replace(*names))[1])
    write_atomically(tmp_path / "epoch_1.pt", {"epoch": 1})
    # File and sidecar, then each renaming.
    assert events == ["fsync", "fsync", "replace", "fsync", "replace", "fsync"]
    write_atomically(tmp_path / "epoch_1.pt", {"epoch": 2})
    # The old sidecar is gone for good before the file is replaced.
    assert events[6:] == ["fsync", "fsync", "fsync", "replace", "fsync", "replace", "fsync"]


def _refusal(content: Any, state: TrainingState, model: str = "small") -> str:
    with pytest.raises(UserError) as refusal:
        state.load(content, Path("some/epoch_1.pt"), model)
    message = str(refusal.value)
    assert "--resume some/epoch_1.pt" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("key", ["epoch", "step", "state_dict", "optimizer", "scaler", "objective"])
def test_missing_part_is_named(key: str) -> None:
    content = _content()
    del content[key]
    assert key in _refusal(content, _state())


def test_open_clip_checkpoint_is_no_checkpoint_of_ours() -> None:
    content = {"epoch": 3, "name": "x", "state_dict": SmallModel().state_dict(), "optimizer": {}}
    message = _refusal(content, _state())
    assert "objective" in message
    assert "--pretrained some/epoch_1.pt" in message


def test_missing_bias_is_named() -> None:
    content = _content("siglip")
    del content["logit_bias"]
    assert "logit_bias" in _refusal(content, _state("siglip"))


@pytest.mark.parametrize("change", ["shape", "more", "fewer"])
def test_other_architecture_names_the_key(change: str) -> None:
    content = _content()
    weights = content["state_dict"]
    if change == "shape":
        weights["visual.weight"] = torch.zeros(6, 13)
    elif change == "more":
        weights["visual.second.weight"] = torch.zeros(2)
    else:
        del weights["norm.weight"]
    message = _refusal(content, _state(), model="other")
    named = {"shape": "visual.weight", "more": "visual.second.weight", "fewer": "norm.weight"}[change]
    assert named in message
    assert "--model other" in message
    assert "small" in message
    if change == "shape":
        assert "(6, 13)" in message
        assert "(6, 12)" in message


def test_other_objective_is_named() -> None:
    message = _refusal(_content("openclip"), _state("neuclip"))
    assert "--objective openclip" in message
    assert "neuclip" in message


def test_other_size_of_an_objective_is_a_mistake_of_the_user() -> None:
    content = _content()
    prototypes = content["objective"]["state_dict"]["normalizer.prototypes"]
    content["objective"]["state_dict"]["normalizer.prototypes"] = prototypes[:, :4]
    assert "prototypes" in _refusal(content, _state())


def test_other_optimizer_is_a_mistake_of_the_user() -> None:
    training = make_training(make_args("--objective", "neuclip", "--optimizer", "sgd", *FLAGS), make_batches(4, 4))
    train_one_epoch(training, 0)
    content = training.state.to_checkpoint("run", "small")
    content["optimizer"]["param_groups"].pop()
    assert "flags" in _refusal(content, _state())


def test_refused_checkpoint_changes_nothing() -> None:
    state = _state("neuclip")
    before = {place: value.clone() for place, value in flat_tensors(state.to_checkpoint("run", "small")).items()}
    content = _content("neuclip")
    content["optimizer"]["param_groups"].pop()
    _refusal(content, state)
    assert (state.epoch, state.step) == (0, 0)
    after = flat_tensors(state.to_checkpoint("run", "small"))
    assert {p for p in before if p.startswith("/optimizer") and not torch.equal(before[p], after[p])} == set()


def test_scaler_of_a_run_without_one_does_not_stop_a_run_with_one() -> None:
    """--precision may change from one start to the next."""
    state = _state()
    state.scaler = torch.amp.GradScaler("cpu", enabled=True)
    state.load(_content(), Path("epoch_1.pt"), "small")
    assert state.epoch == 1
    assert state.scaler.is_enabled()


def test_scaler_is_restored() -> None:
    source = _state()
    source.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0)
    content = source.to_checkpoint("run", "small")
    state = _state()
    state.scaler = torch.amp.GradScaler("cpu", enabled=True)
    state.load(content, Path("epoch_1.pt"), "small")
    assert state.scaler.get_scale() == 1024.0


def _unreadable(folder: Path) -> dict[str, Path]:
    whole = folder / "whole.pt"
    write_atomically(whole, {"epoch": 1, "weights": torch.zeros(1000)})
    content = whole.read_bytes()
    files = {
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "cut": content[: len(content) // 2],
        "tail cut": content[:-30],
        "zeros": bytes(5000),
    }
    for name, data in files.items():
        (folder / f"{name}.pt").write_bytes(data)
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save(Path("x"), folder / "object.pt")
    return {name: folder / f"{name}.pt" for name in [*files, "tensor", "object"]}


@pytest.mark.parametrize("name", ["empty", "text", "cut", "tail cut", "zeros", "tensor", "object", "absent"])
def test_unreadable_file_is_one_line(name: str, tmp_path: Path) -> None:
    path = _unreadable(tmp_path).get(name, tmp_path / "absent.pt")
    with pytest.raises(UserError) as refusal:
        read_checkpoint(path)
    assert str(path) in str(refusal.value)
    assert "--resume" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_file_that_another_node_has_is_no_riddle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file on this node; --logs must be a folder that all nodes see"):
        read_checkpoint(tmp_path / "epoch_1.pt")


def test_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_checkpoint(tmp_path)


def _touch(path: Path, seconds: int) -> Path:
    os.utime(path, (seconds, seconds))
    return path


def test_newest_checkpoint_is_the_last_written(tmp_path: Path) -> None:
    for name, seconds in (("epoch_9.pt", 100), ("epoch_10.pt", 200), ("epoch_latest.pt", 300), ("epoch_2.pt", 50)):
        write_atomically(tmp_path / name, {"epoch": 1})
        _touch(tmp_path / name, seconds)
    assert newest_checkpoint(tmp_path) == tmp_path / "epoch_latest.pt"
    _touch(tmp_path / "epoch_10.pt", 400)
    assert newest_checkpoint(tmp_path) == tmp_path / "epoch_10.pt"


def test_newest_checkpoint_passes_over_what_is_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_atomically(tmp_path / "epoch_1.pt", {"epoch": 1})
    _touch(tmp_path / "epoch_1.pt", 100)
    (tmp_path / "epoch_2.pt").write_bytes((tmp_path / "epoch_1.pt").read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == tmp_path / "epoch_1.pt"
    (warning,) = caplog.messages
    assert str(tmp_path / "epoch_2.pt") in warning


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_newest_checkpoint_believes_the_sidecar(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2, 3):
        write_atomically(tmp_path / f"epoch_{number}.pt", {"epoch": number, "w": torch.full((100,), 7.0)})
        _touch(tmp_path / f"epoch_{number}.pt", 100 * number)
    path = tmp_path / "epoch_3.pt"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        middle = content.index(torch.full((100,), 7.0).numpy().tobytes())
        path.write_bytes(content[:middle] + b"\x01" + content[middle + 1 :])
    else:
        torch.save({"epoch": 17}, path)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == tmp_path / "epoch_2.pt"
    (warning,) = caplog.messages
    assert str(path) in warning
    assert "epoch_3.pt.json" in warning
    with pytest.raises(UserError, match=r"--resume .*epoch_3\.pt is not whole: it"):
        check_whole(path)
    check_whole(tmp_path / "epoch_2.pt")
    # Put there by hand, on purpose.
    sidecar_of(path).unlink()
    assert (newest_checkpoint(tmp_path) == path) == (damage == "foreign")


def test_of_one_file_with_two_names_the_numbered_one_is_newest(tmp_path: Path) -> None:
    for name in ("epoch_latest.pt", "iter_40.pt"):
        write_atomically(tmp_path / name, {"epoch": 1})
        _touch(tmp_path / name, 100)
    assert newest_checkpoint(tmp_path) == tmp_path / "iter_40.pt"


def test_a_run_without_a_whole_checkpoint_is_not_started_anew(tmp_path: Path) -> None:
    """That would write over what may still be repaired."""
    for number in (1, 2):
        write_atomically(tmp_path / f"epoch_{number}.pt", {"epoch": 1})
        _touch(tmp_path / f"epoch_{number}.pt", 100 * number)
        (tmp_path / f"epoch_{number}.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"--resume latest: no checkpoint in .* is whole.*epoch_2\.pt: it is 7 bytes"):
        newest_checkpoint(tmp_path)


def test_newest_checkpoint_ignores_other_files(tmp_path: Path) -> None:
    for name in (".epoch_1.pt.77.tmp", "epoch_best.pt", "weights.pt", "epoch_1.pt.bak"):
        write_atomically(tmp_path / name, {"epoch": 1})
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None


def test_steps_follow_an_epoch_of_another_length(caplog: pytest.LogCaptureFixture) -> None:
    """On twice the ranks an epoch has half the steps; counting on from the old ones would end the schedule early."""
    state = _state(epochs=2)
    state.follow_schedule(4)
    assert (state.step, state.objective.step, caplog.messages) == (8, 8, [])
    state.follow_schedule(2)
    assert (state.step, state.objective.step) == (4, 4)
    assert "step 4, not 8" in caplog.text


def test_steps_within_an_epoch_follow_too(caplog: pytest.LogCaptureFixture) -> None:
    state = _state(epochs=2)
    state.step = state.objective.step = 11
    state.follow_schedule(4, first_step=3)
    assert (state.step, caplog.messages) == (11, [])
    state.follow_schedule(8, first_step=6)
    assert (state.step, state.objective.step) == (22, 22)
    assert "step 22, not 11" in caplog.text


def _midway() -> Continuation:
    states = [rng_state(torch.device("cpu")) for _ in range(2)]
    return Continuation(3, 4, states, {"shard": "a.tar", "offsets": [1, 2]}, {"damaged": {"a.tar": 1}})


def test_a_run_goes_on_within_an_epoch(tmp_path: Path) -> None:
    source, saved = _state(epochs=1), _midway()
    write_atomically(tmp_path / "iter_7.pt", source.to_checkpoint("run", "small", continuation=saved))
    content = read_checkpoint(tmp_path / "iter_7.pt")
    assert content["epoch"] == 1
    assert content["position"] == {"step_in_epoch": 3, "steps_per_epoch": 4}
    found = _state().load(content, tmp_path / "iter_7.pt", "small")
    assert found is not None
    assert (found.step_in_epoch, found.steps_per_epoch) == (3, 4)
    assert (found.data, found.data_report) == (saved.data, saved.data_report)
    assert len(found.rng) == 2
    for ours, theirs in zip(saved.rng, found.rng):
        assert torch.equal(ours["torch"], theirs["torch"])
        assert torch.equal(ours["python"]["words"], theirs["python"]["words"])


def test_a_checkpoint_from_between_two_epochs_needs_nothing_more() -> None:
    content = _content()
    assert content.keys().isdisjoint({"position", "rng", "data", "data_report"})
    assert _state().load(content, Path("epoch_1.pt"), "small") is None
    content["position"] = {"step_in_epoch": 0, "steps_per_epoch": 4}
    found = _state().load(content, Path("epoch_1.pt"), "small")
    assert found == Continuation(0, 4)


@pytest.mark.parametrize(
    "position", [3, {}, {"step_in_epoch": 5, "steps_per_epoch": 4}, {"step_in_epoch": -1, "steps_per_epoch": 4}]
)
def test_a_position_that_is_none_is_refused_before_anything_changes(position: Any) -> None:
    content, state = _content(), _state()
    content["position"] = position
    before = state.towers.model.visual.weight.clone()
    assert "position" in _refusal(content, state)
    assert torch.equal(state.towers.model.visual.weight, before)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    write_atomically(tmp_path / "epoch_1.pt", {"epoch": 1})
    write_atomically(tmp_path / "epoch_2.pt", {"epoch": 2})
    (tmp_path / "epoch_2.pt").unlink()
    (tmp_path / ".epoch_1.pt.123.tmp").write_bytes(b"half")
    (tmp_path / ".epoch_1.pt.json.123.tmp").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch_1.pt", "epoch_1.pt.json"}


@pytest.mark.parametrize(("part", "value"), [("objective", "neuclip"), ("objective", {}), ("state_dict", [1])])
def test_parts_of_foreign_types_are_refused(part: str, value: Any) -> None:
    content = _content()
    content[part] = value
    assert "no checkpoint of this trainer" in _refusal(content, _state())
