"""The towers: float32 features, where a bias lives, what is frozen, and what is refused before anything is built."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from end_to_end.corpus import MODEL_CONFIG
from neuclip.objectives import OBJECTIVES, Objective, RunShape
from ranks import run_on_ranks
from small_training import CPU, EMBED_DIM, SmallModel, make_args, make_batches
from training.checkpoint import TrainingState
from training.data.seeds import seeded_augmentation
from training.distributed import World
from training.errors import UserError
from training.model import (
    ModelBundle,
    TwoTowers,
    build_model,
    build_transforms,
    check_model,
    copy_model_configs,
    is_convolutional,
    wrap,
)
from training.optim import build_optimizer, parameter_groups
from training.precision import Precision

ALONE = World(0, 1, CPU)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip remembers models for the whole process."""
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))


def _config(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**MODEL_CONFIG, **changes}))
    return path


def _build(folder: Path, objective: str, *flags: str, **changes: Any) -> tuple[ModelBundle, Namespace]:
    config = _config(folder, **changes)
    args = make_args("--model", "tiny", "--model-config", str(config), "--objective", objective, *flags)
    check_model(args)
    return build_model(args, OBJECTIVES[objective], CPU), args


def _objective(name: str, **attributes: Any) -> Objective:
    objective = Objective()
    objective.__dict__.update(attributes)
    return objective


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16"])
def test_features_are_float32_of_unit_length(precision: str, tmp_path: Path) -> None:
    bundle, _ = _build(tmp_path, "openclip", "--precision", precision)
    formats = Precision(precision, "cpu")
    image = torch.randn(5, 3, 32, 32).to(formats.input_dtype)
    text = bundle.tokenizer(["a", "b", "c", "d", "e"])
    with formats.autocast():
        image_features, text_features, scale, bias = bundle.towers(image, text)
        if precision != "fp32":
            assert bundle.towers.model.encode_text(text).dtype == torch.bfloat16, "the towers compute in bfloat16"
    for features in (image_features, text_features):
        assert features.shape == (5, MODEL_CONFIG["embed_dim"])
        assert features.dtype == torch.float32
        # bfloat16 could not hold lengths this exact.
        torch.testing.assert_close(features.norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    assert (scale.shape, scale.dtype) == ((), torch.float32)
    assert bias is None
    assert bundle.embed_dim == MODEL_CONFIG["embed_dim"]


@pytest.mark.parametrize(
    ("objective", "flags", "temperature"),
    [("openclip", [], 0.07), ("siglip", [], 0.1), ("neuclip", [], 0.07), ("siglip", ["--temperature", "0.05"], 0.05)],
)
def test_starting_temperature(objective: str, flags: list[str], temperature: float, tmp_path: Path) -> None:
    towers = _build(tmp_path, objective, *flags)[0].towers
    assert towers.model.logit_scale.item() == pytest.approx(math.log(1 / temperature))
    assert towers(torch.randn(2, 3, 32, 32), torch.zeros(2, 12).long())[2].item() == pytest.approx(1 / temperature)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_state_dict_of_the_model_is_the_architectures(objective: str, tmp_path: Path) -> None:
    towers = _build(tmp_path, objective)[0].towers
    plain = open_clip.create_model("tiny")
    assert towers.model.state_dict().keys() == plain.state_dict().keys()
    needs_bias = OBJECTIVES[objective].initial_logit_bias is not None
    assert (towers.extra_logit_bias is not None) == needs_bias


def test_bias_beside_an_architecture_without_one(tmp_path: Path) -> None:
    towers = _build(tmp_path, "siglip")[0].towers
    assert "logit_bias" not in towers.model.state_dict()
    assert towers.logit_bias is towers.extra_logit_bias
    assert towers.logit_bias is not None
    assert towers.logit_bias.item() == -10.0
    assert any(parameter is towers.extra_logit_bias for parameter in towers.parameters()), "it is learnt"


def test_bias_inside_an_architecture_with_one(tmp_path: Path) -> None:
    towers = _build(tmp_path, "siglip", init_logit_bias=-3.0)[0].towers
    assert towers.extra_logit_bias is None
    assert "logit_bias" in towers.model.state_dict()
    assert towers.logit_bias is towers.model.logit_bias
    assert towers.logit_bias is not None
    assert towers.logit_bias.item() == -10.0


def test_pretrained_weights_keep_scale_and_bias(tmp_path: Path) -> None:
    towers = _build(tmp_path, "siglip", init_logit_bias=-10.0)[0].towers
    with torch.no_grad():
        towers.model.logit_scale.fill_(3.25)
        towers.model.logit_bias.fill_(-4.5)
    torch.save({"state_dict": towers.model.state_dict()}, tmp_path / "weights.pt")
    flags = ("--pretrained", str(tmp_path / "weights.pt"))
    loaded = _build(tmp_path, "siglip", *flags, init_logit_bias=-10.0)[0].towers
    assert torch.equal(loaded.model.visual.proj, towers.model.visual.proj)
    assert loaded.model.logit_scale.item() == 3.25
    assert loaded.logit_bias is not None
    assert loaded.logit_bias.item() == -4.5


def test_temperature_given_beside_pretrained_weights_counts(tmp_path: Path) -> None:
    towers = _build(tmp_path, "openclip")[0].towers
    torch.save({"state_dict": towers.model.state_dict()}, tmp_path / "weights.pt")
    flags = ("--pretrained", str(tmp_path / "weights.pt"), "--temperature", "0.02")
    assert _build(tmp_path, "openclip", *flags)[0].towers.model.logit_scale.item() == pytest.approx(math.log(50))


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_bias_nobody_looks_at_is_frozen(objective: str, tmp_path: Path) -> None:
    bundle, args = _build(tmp_path, objective, init_logit_bias=-10.0)
    needed = OBJECTIVES[objective].initial_logit_bias
    wrap(args, bundle.towers, _objective(objective, initial_logit_bias=needed), ALONE)
    assert bundle.towers.model.logit_bias.requires_grad == (needed is not None)


def test_weights_are_drawn_by_the_seed(tmp_path: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.rand(seed + 3)
        towers = _build(tmp_path, "openclip", "--seed", str(seed))[0].towers
        return towers.model.visual.proj.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_locked_towers(tmp_path: Path) -> None:
    model = _build(tmp_path, "openclip", "--lock-image")[0].towers.model
    assert not any(parameter.requires_grad for parameter in model.visual.parameters())
    assert model.token_embedding.weight.requires_grad
    model = _build(tmp_path, "openclip", "--lock-text")[0].towers.model
    assert not model.token_embedding.weight.requires_grad
    assert all(parameter.requires_grad for parameter in model.visual.parameters())


def test_grad_checkpointing_reaches_the_towers(tmp_path: Path) -> None:
    model = _build(tmp_path, "openclip", "--grad-checkpointing")[0].towers.model
    assert model.visual.transformer.grad_checkpointing


def test_image_size_and_context_length_are_forced(tmp_path: Path) -> None:
    bundle, _ = _build(tmp_path, "openclip", "--force-image-size", "48", "--force-context-length", "9")
    assert bundle.tokenizer(["a"]).shape == (1, 9)
    image = torch.randn(2, 3, 48, 48)
    assert bundle.towers(image, bundle.tokenizer(["a", "b"]))[0].shape == (2, MODEL_CONFIG["embed_dim"])


def test_clamp_keeps_the_temperature_in_its_range() -> None:
    towers = TwoTowers(SmallModel())
    for value, clamped in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        towers.model.logit_scale.data.fill_(value)
        towers.clamp_logit_scale()
        assert towers.model.logit_scale.item() == pytest.approx(clamped)


def test_unknown_model_names_near_ones() -> None:
    with pytest.raises(UserError, match=r"--model RN51 is unknown.*RN50.*--model-config"):
        check_model(make_args("--model", "RN51"))


def test_unknown_pretrained_tag_names_the_known() -> None:
    with pytest.raises(UserError, match=r"--pretrained laion3b.*openai"):
        check_model(make_args("--model", "RN50", "--pretrained", "laion3b"))


@pytest.mark.parametrize("content", ["{", "[]", "no json", '{"embed_dim": 16}'])
def test_broken_model_config_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(UserError, match="broken"):
        check_model(make_args("--model", "broken", "--model-config", str(path)))


def test_config_that_open_clip_cannot_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model tiny: open_clip cannot build it"):
        _build(tmp_path, "openclip", vision_cfg={"no_such_option": 3})


def test_configs_of_a_folder_are_known_and_copied(tmp_path: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    _config(source, "first")
    _config(source, "second")
    check_model(make_args("--model", "second", "--model-config", str(source)))
    for _ in range(2):  # a resumed run copies them again
        copy_model_configs([str(source), str(run / "first.json")] if run.exists() else [str(source)], run)
    assert sorted(path.name for path in run.iterdir()) == ["first.json", "second.json"]
    assert (run / "first.json").read_bytes() == (source / "first.json").read_bytes()


def gradients_on_ranks(with_bias: bool) -> list[str]:
    """Names of the parameters that a backward pass through the wrapped towers leaves without a gradient."""
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size(), CPU)
    towers = TwoTowers(SmallModel(logit_bias=-10.0 if with_bias else None))
    wrapped = wrap(make_args(), towers, Objective(), world)
    assert isinstance(wrapped, DistributedDataParallel)
    for _ in range(2):  # a parameter without a gradient shows in the second pass at the latest
        (batch,) = make_batches(1, 4, seed=world.rank)
        image, text, scale, _ = wrapped(batch.image, batch.text)
        (image.sum() + text.sum() * scale).backward()
    assert image.shape == (4, EMBED_DIM)
    return [name for name, p in towers.named_parameters() if p.requires_grad and p.grad is None]


def test_ranks_do_not_wait_for_an_unused_bias() -> None:
    assert run_on_ranks(gradients_on_ranks, 2, True) == [[], []]


def test_batch_norm_over_all_ranks_is_left_alone_on_one(tmp_path: Path) -> None:
    towers = TwoTowers(SmallModel())
    assert wrap(make_args("--use-bn-sync"), towers, Objective(), ALONE) is towers
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in towers.modules())


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--force-image-size", "48", "--image-mean", "0.1", "0.2", "0.3", "--force-context-length", "9"],
        ["--aug-cfg", "scale=(0.2, 0.5)", "gray_scale_prob=0.5"],
        ["--aug-cfg", "use_timm=True", "scale=(0.2, 0.5)", "re_prob=0.9"],
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Unused augmentation cfg items")
def test_transforms_without_a_model_are_those_of_the_model(flags: list[str], tmp_path: Path) -> None:
    bundle, args = _build(tmp_path, "openclip", *flags)
    preprocess, tokenizer = build_transforms(args)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8))
    found = []
    for transform in (preprocess, bundle.preprocess_train):
        with seeded_augmentation(3):
            found.append(transform(picture))
    assert torch.equal(*found)
    assert torch.equal(tokenizer(["a cat"]), bundle.tokenizer(["a cat"]))


def test_transforms_of_a_model_that_cannot_be_built(tmp_path: Path) -> None:
    _, args = _build(tmp_path, "openclip")
    args.force_image_size = "many"
    with pytest.raises(UserError, match="--model tiny: open_clip cannot build it"):
        build_transforms(args)


RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}


def test_convolution_towers_compute_channels_last_and_files_are_plain(tmp_path: Path) -> None:
    """Every weight that could lie in either order; the file opens in plain open_clip, with the same features."""
    bundle, args = _build(tmp_path, "openclip", vision_cfg=RESNET)
    model = bundle.towers.model
    kernels = [p for p in model.visual.parameters() if p.ndim == 4 and 1 not in p.shape[1:2] and p.shape[2] > 1]
    assert len(kernels) > 4
    for kernel in kernels:
        assert kernel.is_contiguous(memory_format=torch.channels_last)
        assert not kernel.is_contiguous()

    images = torch.randn(4, 3, 32, 32)
    features = model.encode_image(images)
    features.sum().backward()
    # What a fused optimizer relies on.
    assert all(p.grad.stride() == p.stride() for p in model.visual.parameters())

    objective = OBJECTIVES["openclip"].from_args(args, RunShape(16, 4, 1, 1, 1))
    optimizer = build_optimizer(args, parameter_groups(bundle.towers, model.logit_scale, 0.1))
    state = TrainingState(bundle.towers, objective, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    torch.save(state.to_checkpoint("run", "tiny"), tmp_path / "epoch_1.pt")
    saved = torch.load(tmp_path / "epoch_1.pt", weights_only=True)["state_dict"]
    assert all(value.is_contiguous() for value in saved.values())
    plain = open_clip.create_model("tiny", pretrained=str(tmp_path / "epoch_1.pt"))
    assert all(p.is_contiguous() for p in plain.parameters())
    torch.testing.assert_close(plain.eval().encode_image(images), model.eval().encode_image(images))


def test_a_patch_embedding_is_no_convolution_tower(tmp_path: Path) -> None:
    visual = _build(tmp_path, "openclip")[0].towers.model.visual
    assert not is_convolutional(visual)
    assert visual.conv1.weight.is_contiguous()
