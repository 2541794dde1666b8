"""The run folder: the checkpoint that was asked for or an error, and the model as it was trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evaluation.errors import UserError
from evaluation.run_folder import RunFolder, parse_params


def test_parameters() -> None:
    params = parse_params(
        "lr: 0.0005\nmodel: ViT-B-32\nsize: (3, 4)\nnone: None\nflag: True\nurl: a::b: c\n\nnot a line\n"
    )
    assert params == {"lr": 5e-4, "model": "ViT-B-32", "size": (3, 4), "none": None, "flag": True, "url": "a::b: c"}


@pytest.mark.parametrize("text", ["{[]: 1}", "{{}}", "(" * 5000, "-" * 5000 + "1", "[" * 300 + "]" * 300])
def test_what_only_looks_like_a_literal_stays_text(text: str) -> None:
    assert parse_params(f"x: {text}\n") == {"x": text}


def test_a_broken_model_configuration_is_named(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", epochs=(1,))
    for content in (b"{", b"[]", b"\xff"):
        (folder / "model_configs" / "x.json").write_bytes(content)
        with pytest.raises(UserError, match=r"model_configs/x\.json is no model configuration"):
            RunFolder(folder).load_model()
    (folder / "model_configs" / "x.json").unlink()
    RunFolder(folder).load_model()  # open_clip has not kept the broken one


def test_loads_the_checkpoint_asked_for(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", epochs=(1, 2, 10))
    run = RunFolder(folder)
    assert (run.name, run.objective) == ("run", "openclip")
    assert [checkpoint.epoch for checkpoint in run.checkpoints()] == [1, 2, 10]
    for epoch in (1, 2):
        stored = torch.load(folder / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)["state_dict"]
        model, preprocess, tokenizer = run.load_model(epoch=epoch)
        torch.testing.assert_close(model.state_dict()["text_projection"], stored["text_projection"])
        assert not model.training
    assert preprocess.transforms[0].size == 32
    assert tokenizer(["a disc"]).shape == (1, 12)
    newest = run.checkpoint()
    assert newest.epoch == 10  # by number, not by name
    assert newest.sha256() == hashlib.sha256(newest.path.read_bytes()).hexdigest()


def test_never_another_checkpoint(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", epochs=(1, 3))
    (folder / "checkpoints" / "iter_40.pt").write_bytes((folder / "checkpoints" / "epoch_1.pt").read_bytes())
    (folder / "checkpoints" / "epoch_latest.pt").write_bytes((folder / "checkpoints" / "epoch_1.pt").read_bytes())
    run = RunFolder(folder)
    message = r"has no epoch_2\.pt; there is: epoch_1\.pt, epoch_3\.pt, iter_40\.pt, epoch_latest\.pt\."
    for missing in (run.checkpoint, run.load_model):
        with pytest.raises(ValueError, match=message):
            missing(epoch=2)
    with pytest.raises(ValueError, match=r"no iter_2\.pt"):
        run.checkpoint(iteration=2)
    with pytest.raises(ValueError, match="both"):
        run.checkpoint(epoch=1, iteration=40)
    assert run.checkpoint(iteration=40).path.name == "iter_40.pt"


def test_latest_counts_where_it_is_further_on(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", epochs=(1, 3))
    latest = folder / "checkpoints" / "epoch_latest.pt"
    latest.write_bytes((folder / "checkpoints" / "epoch_1.pt").read_bytes())
    assert RunFolder(folder).checkpoint().path.name == "epoch_3.pt"
    content = torch.load(latest, weights_only=True)
    torch.save({**content, "epoch": 4}, latest)
    newest = RunFolder(folder).checkpoint()
    assert (newest.path.name, newest.epoch, newest.label) == ("epoch_latest.pt", 4, "epoch 4")
    latest.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"epoch_latest\.pt cannot be read"):
        RunFolder(folder).checkpoint()


def test_two_runs_may_use_one_name_for_two_models(make_run: Callable[..., Path]) -> None:
    narrow, wide = make_run("narrow", epochs=(1,), width=16), make_run("wide", epochs=(1,), width=24)
    for _ in range(2):
        for folder, width in ((narrow, 16), (wide, 24)):
            model = RunFolder(folder).load_model().model
            assert model.encode_text(torch.zeros(1, 12, dtype=torch.int64)).shape == (1, width)


def test_parameters_that_change_the_model_are_honoured(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", epochs=(1,))
    with (folder / "params.txt").open("a") as file:
        file.write(
            "force_quick_gelu: True\nforce_image_size: 48\nforce_context_length: 9\nimage_mean: [0.5, 0.5, 0.5]\n"
        )
    model, preprocess, tokenizer = RunFolder(folder).load_model()
    assert type(model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert model.visual.image_size == (48, 48)
    assert list(preprocess.transforms[-1].mean) == [0.5, 0.5, 0.5]
    assert tokenizer(["x"]).shape == (1, 9)


def test_mistakes(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        RunFolder(tmp_path / "nothing")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"params\.txt is missing"):
        RunFolder(tmp_path / "bare")
    folder = make_run("run", epochs=())
    with pytest.raises(ValueError, match="holds no checkpoint"):
        RunFolder(folder).load_model()
    (folder / "checkpoints" / "epoch_1.pt").write_bytes(b"this is not a checkpoint")
    with pytest.raises(ValueError, match=r"epoch_1\.pt does not load into model tiny-for-tests") as caught:
        RunFolder(folder).load_model(epoch=1)
    assert "\n" not in str(caught.value)
    other = make_run("other", epochs=(1,), width=24)
    (folder / "checkpoints" / "epoch_1.pt").write_bytes((other / "checkpoints" / "epoch_1.pt").read_bytes())
    with pytest.raises(ValueError, match="size mismatch") as caught:
        RunFolder(folder).load_model(epoch=1)
    assert "\n" not in str(caught.value)
    (folder / "params.txt").write_text("model: no-such-model\n")
    with pytest.raises(ValueError, match="no-such-model, unknown to open_clip"):
        RunFolder(folder).load_model(epoch=1)
