"""Parameter groups, the choice of optimizer, and loading its state under other flags."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from small_training import SmallModel, make_args
from training.model import TwoTowers
from training.optim import build_optimizer, load_optimizer_state, parameter_groups


def _names(module: nn.Module, groups: list[dict[str, object]]) -> dict[str, set[str]]:
    of = {id(parameter): name for name, parameter in module.named_parameters()}
    return {str(group["role"]): {of[id(p)] for p in group["params"]} for group in groups}  # type: ignore[attr-defined]


def test_gains_biases_and_scalars_are_not_decayed() -> None:
    towers = TwoTowers(SmallModel(), logit_bias=-10.0)
    groups = parameter_groups(towers, towers.model.logit_scale, 0.2)
    assert _names(towers, groups) == {
        "decay": {"model.visual.weight", "model.token_embedding.weight"},
        "no_decay": {"model.visual.bias", "model.norm.weight", "model.norm.bias", "extra_logit_bias"},
        "temperature": {"model.logit_scale"},
    }
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0, 0.0]


def test_a_bias_of_the_model_is_not_decayed_either() -> None:
    towers = TwoTowers(SmallModel(logit_bias=-10.0), logit_bias=-10.0)
    groups = parameter_groups(towers, towers.model.logit_scale, 0.2)
    assert "model.logit_bias" in _names(towers, groups)["no_decay"]


def test_frozen_parameters_are_left_out() -> None:
    towers = TwoTowers(SmallModel())
    towers.model.visual.requires_grad_(False)
    towers.model.logit_scale.requires_grad_(False)
    groups = parameter_groups(towers, towers.model.logit_scale, 0.2)
    assert _names(towers, groups) == {
        "decay": {"model.token_embedding.weight"},
        "no_decay": {"model.norm.weight", "model.norm.bias"},
    }


def test_empty_groups_are_left_out() -> None:
    module = nn.Linear(2, 2, bias=False)
    assert [group["role"] for group in parameter_groups(module, nn.Parameter(torch.ones(())), 0.1)] == ["decay"]


@pytest.mark.parametrize(
    ("name", "class_name"), [("adamw", "AdamW"), ("lamb", "Lamb"), ("lion", "Lion"), ("sgd", "SGD")]
)
def test_optimizers_take_their_flags(name: str, class_name: str) -> None:
    towers = TwoTowers(SmallModel())
    args = make_args("--optimizer", name, "--lr", "0.25", "--beta1", "0.8", "--beta2", "0.9", "--eps", "1e-3")
    args.momentum = 0.7
    optimizer = build_optimizer(args, parameter_groups(towers, towers.model.logit_scale, 0.2))
    assert type(optimizer).__name__ == class_name
    for group in optimizer.param_groups:
        assert group["lr"] == 0.25
        if name == "sgd":
            assert (group["momentum"], group["nesterov"]) == (0.7, True)
        else:
            assert tuple(group["betas"]) == (0.8, 0.9)
        if name in ("adamw", "lamb"):
            assert group["eps"] == 1e-3


@pytest.mark.parametrize("name", ["adamw", "lamb", "lion", "sgd"])
def test_decay_moves_matrices_only(name: str) -> None:
    """With gradients of zero nothing but the weight decay can change a parameter."""
    towers = TwoTowers(SmallModel(), logit_bias=-10.0)
    args = make_args("--optimizer", name, "--lr", "0.1")
    optimizer = build_optimizer(args, parameter_groups(towers, towers.model.logit_scale, 0.5))
    before = {key: value.clone() for key, value in towers.state_dict().items()}
    for parameter in towers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {key for key, value in towers.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"model.visual.weight", "model.token_embedding.weight"}


def _stepped(*flags: str, decay: float = 0.2) -> tuple[TwoTowers, torch.optim.Optimizer]:
    towers = TwoTowers(SmallModel())
    optimizer = build_optimizer(make_args(*flags), parameter_groups(towers, towers.model.logit_scale, decay))
    for parameter in towers.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return towers, optimizer


@pytest.mark.parametrize("name", ["adamw", "lamb", "lion", "sgd"])
def test_loading_keeps_the_present_hyper_parameters(name: str) -> None:
    _, saved = _stepped("--optimizer", name, "--lr", "0.1", decay=0.2)
    state = copy.deepcopy(saved.state_dict())
    _, present = _stepped("--optimizer", name, "--lr", "0.3", "--beta1", "0.5", decay=0.7)
    options = [{k: v for k, v in group.items() if k != "params"} for group in present.param_groups]
    load_optimizer_state(present, state)
    assert [{k: v for k, v in group.items() if k != "params"} for group in present.param_groups] == options
    assert [group["weight_decay"] for group in present.param_groups] == [0.7, 0.0, 0.0]
    for key, moments in state["state"].items():
        for field, value in moments.items():
            found = present.state_dict()["state"][key][field]
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(value)), field


def test_loading_is_refused_when_groups_differ() -> None:
    _, saved = _stepped()
    towers = TwoTowers(SmallModel())
    towers.model.visual.requires_grad_(False)
    present = build_optimizer(make_args(), parameter_groups(towers, towers.model.logit_scale, 0.2))
    with pytest.raises(ValueError, match=r"size|match"):
        load_optimizer_state(present, saved.state_dict())


@pytest.mark.parametrize("other", ["lion", "sgd", "lamb"])
def test_state_of_another_optimizer_is_refused(other: str) -> None:
    towers = TwoTowers(SmallModel())
    groups = parameter_groups(towers, towers.model.logit_scale, 0.2)
    state = build_optimizer(make_args("--optimizer", "adamw"), groups).state_dict()
    groups = parameter_groups(towers, towers.model.logit_scale, 0.2)
    with pytest.raises(ValueError, match="another --optimizer"):
        load_optimizer_state(build_optimizer(make_args("--optimizer", other), groups), state)


def test_step_counts_go_where_the_present_optimizer_wants_them() -> None:
    """A fused AdamW keeps them beside the parameters; a checkpoint written without `fused` must not leave them behind."""
    parameter = nn.Parameter(torch.ones(3))
    plain = torch.optim.AdamW([{"role": "decay", "params": [parameter]}], fused=False)
    parameter.grad = torch.ones(3)
    plain.step()
    fused = torch.optim.AdamW([{"role": "decay", "params": [nn.Parameter(torch.ones(3, device="meta"))]}], fused=False)
    # A meta device stands for the GPU; `fused` is set afterwards because the constructor refuses it there.
    fused.param_groups[0]["fused"] = True
    load_optimizer_state(fused, plain.state_dict())
    assert next(iter(fused.state.values()))["step"].device.type == "meta"


def test_lamb_clips_only_when_asked_to() -> None:
    towers = TwoTowers(SmallModel())
    groups = parameter_groups(towers, towers.model.logit_scale, 0.2)
    optimizer = build_optimizer(make_args("--optimizer", "lamb"), groups)
    assert optimizer.defaults["max_grad_norm"] is None


def _trajectory(name: str, fused: bool, rate: float | torch.Tensor, steps: int = 5) -> dict[str, torch.Tensor]:
    """Parameters after some steps on made-up gradients, starting from layouts of both kinds."""
    generator = torch.Generator().manual_seed(0)
    towers = TwoTowers(SmallModel())
    towers.model.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    groups = parameter_groups(towers, towers.model.logit_scale, 0.2)
    optimizer = build_optimizer(make_args("--optimizer", name), groups)
    for group in optimizer.param_groups:
        group.update(fused=fused, lr=rate)
    for _ in range(steps):
        for parameter in towers.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()
    return dict(towers.named_parameters())


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_steps_are_the_plain_ones_to_rounding(name: str, rate: float | torch.Tensor) -> None:
    plain = _trajectory(name, fused=False, rate=0.01)
    for key, value in _trajectory(name, fused=True, rate=rate).items():
        torch.testing.assert_close(value, plain[key], rtol=2e-6, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("saved", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("present", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_going_on_with_a_tower_in_another_layout(
    name: str, present: torch.memory_format, saved: torch.memory_format
) -> None:
    """A checkpoint from before convolutions were kept channels-last has moments in the other order."""
    generator = torch.Generator().manual_seed(1)
    weight, *gradients = torch.randn(4, 8, 4, 3, 3, generator=generator)

    def start(layout: torch.memory_format) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(weight.clone(memory_format=layout))
        groups = [{"role": "decay", "params": [parameter], "weight_decay": 0.1}]
        return parameter, build_optimizer(make_args("--optimizer", name), groups)

    def take(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> None:
        for gradient in gradients:
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
            optimizer.step()

    expected, optimizer = start(torch.contiguous_format)
    take(expected, optimizer, gradients)
    before, optimizer = start(saved)
    take(before, optimizer, gradients[:2])
    after, going_on = start(present)
    after.data.copy_(before.data)
    load_optimizer_state(going_on, copy.deepcopy(optimizer.state_dict()))
    take(after, going_on, gradients[2:])
    assert torch.equal(after, expected)
