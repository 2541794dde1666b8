"""The outer optimizer and its parameter groups."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuclip.objectives import Objective
from training.schedules import TEMPERATURE_GROUP


def parameter_groups(
    module: nn.Module, logit_scale: nn.Parameter, weight_decay: float, objective: Objective | None = None
) -> list[dict[str, Any]]:
    """Matrices with weight decay; gains, biases and other vectors without; logit_scale in a group of its own.

    What the objective leaves to the outer optimizer follows in a last group. Parameters that are frozen are left out. Each
    group carries its "role", which is saved with the optimizer's state.
    """
    decayed, plain, temperature = [], [], []
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        if parameter is logit_scale:
            temperature.append(parameter)
        else:
            (plain if parameter.ndim < 2 else decayed).append(parameter)
    groups = [
        {"role": "decay", "params": decayed, "weight_decay": weight_decay},
        {"role": "no_decay", "params": plain, "weight_decay": 0.0},
        {"role": TEMPERATURE_GROUP, "params": temperature, "weight_decay": 0.0},
    ]
    if objective is not None:
        learnt = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        groups.append({"role": "objective", "params": learnt, "weight_decay": objective.outer_weight_decay})
    return [group for group in groups if group["params"]]


def build_optimizer(args: Namespace, groups: list[dict[str, Any]]) -> Optimizer:
    """AdamW and SGD from PyTorch, fused: one pass over the memory of all parameters. LAMB and Lion from timm.

    What is fused takes a learning rate that lives on the device, and a gradient scaler does not make it wait for the host.
    It walks through memory, so a parameter, its gradient and its moments must lie in the same order (strides). Autograd and
    DistributedDataParallel lay gradients out like their parameters; `load_optimizer_state` does so with moments.
    """
    betas = (args.beta1, args.beta2)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=args.eps, fused=True)
    if args.optimizer == "lamb":
        # timm's LAMB would clip gradients of its own accord; --grad-clip-norm is for that.
        return timm.optim.Lamb(groups, lr=args.lr, betas=betas, eps=args.eps, max_grad_norm=None)
    if args.optimizer == "lion":
        return timm.optim.Lion(groups, lr=args.lr, betas=betas)
    sgd = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, nesterov=args.momentum > 0, fused=True)
    if args.momentum > 0:
        # It would take memory as it comes in its first update and fill it there, unless that update is left out, because its
        # gradient is not finite. From 0 the first update makes the same of it.
        for parameter in (parameter for group in groups for parameter in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load moments and step counts; hyper-parameters stay those of the present command line and device.

    Raises:
        ValueError: the groups do not match, or the state is of another optimizer.
    """
    saved = [dict(group) for group in state["param_groups"]]
    if len(saved) != len(optimizer.param_groups):
        raise ValueError("its optimizer has other parameter groups (frozen towers or a constant temperature?)")
    for group, current in zip(saved, optimizer.param_groups):
        if group.keys() != current.keys():
            raise ValueError("it is of another --optimizer")
        # Before loading: where PyTorch puts the step counts depends on `fused`, which depends on the device.
        group.update({name: value for name, value in current.items() if name != "params"})
    optimizer.load_state_dict({**state, "param_groups": saved})
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
