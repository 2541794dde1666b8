"""AmorLIP's flags, under their published names, and what they amount to."""

from __future__ import annotations

import logging
import math
from argparse import BooleanOptionalAction, Namespace, _ArgumentGroup
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from neuclip.normalizers import DIVERGENCES
from neuclip.objectives.base import RunShape
from neuclip.objectives.global_flags import check_mini_batch_args, check_range, learns_one_temperature

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class AmorLIPSettings:
    """What the objective does beside its network. The command line's names of the fields stand in brackets.

    Attributes:
        updates: steps of Adam per batch, spread over the epochs [--lambda-update-frequency].
        update_every, average_every: steps between batches that train the network, that its moving average takes in
            [--update_lambda_every_n_steps, --update_ema_mlps_every_n_steps].
        restart_epochs: epochs between restarts of the network; 0 or less: never [--reinit_lambda_every_n_epochs].
        fit_previous: mix the network's former self into the target, and hand the target to the encoders [--fit_w_prev].
        previous_weight, previous_epochs: final β, and epochs until it is reached [--z_beta_max, --beta_decay_epochs].
        positive_weight: of the matching pair [--pos_coef].
        negatives_only: the target leaves the matching pair out; it is put back where λ̂ is used [--lambda_fit_neg_only].
        all_negatives: Z over the global batch, or K times the sum over this rank's samples [--calculate_full].
        offset: added to λ̂ [--lambda_eps].
        scale_loss: times τ (held constant) plus ρτ [--scale_loss].
        adaptive_tau: ρ plus the mean of λ̂1 + λ̂2 − 2·x_ii − 2·log N, held constant [--adaptive_tau].
        rho_list: ρ, spread over the epochs [--rho_list].
        rho: ρ of the reported global_loss [--rho].
        epochs: length of the whole run.
    """

    updates: tuple[int, ...] = (3,)
    update_every: int = 1
    average_every: int = 2
    restart_epochs: int = 1
    fit_previous: bool = True
    previous_weight: float = 0.8
    previous_epochs: float = 16.0
    positive_weight: float = 1e-3
    negatives_only: bool = False
    all_negatives: bool = True
    offset: float = 0.0
    scale_loss: bool = True
    adaptive_tau: bool = False
    rho_list: tuple[float, ...] = (8.5, -8.5, -8.5)
    rho: float = 8.0
    epochs: int = 1


def add_amorlip_arguments(group: _ArgumentGroup) -> None:
    """Add the flags of the networks, of their target, and of the loss."""
    _add_network_arguments(group)
    _add_target_arguments(group)
    _add_loss_arguments(group)


def _add_network_arguments(group: _ArgumentGroup) -> None:
    group.add_argument("--lambda-lr", type=float, default=1e-3, help="learning rate of the networks (Adam)")
    group.add_argument(
        "--lambda-update-frequency",
        default="[3]",
        metavar="N or '[N ...]'",
        help="inner updates per batch; several numbers follow each other in equal parts of the run",
    )
    group.add_argument(
        "--lambda_loss_type",
        choices=sorted(DIVERGENCES),
        default="log_l2",
        help="what the networks minimise: the squared difference of logarithms, or a divergence plus --div_reg_coef of it",
    )
    group.add_argument("--div_reg_coef", type=float, default=0.1, help="weight of log_l2 beside a divergence")
    group.add_argument("--h_dim_factor", type=float, default=1.0, help="hidden width, as a multiple of the features'")
    group.add_argument("--model_ema_beta", type=float, default=0.92, help="decay of the networks' moving average")
    group.add_argument(
        "--update_lambda_every_n_steps", type=int, default=1, help="steps between batches with inner updates"
    )
    group.add_argument(
        "--update_ema_mlps_every_n_steps", type=int, default=2, help="steps between updates of the moving average"
    )
    group.add_argument(
        "--reinit_lambda_every_n_epochs",
        type=int,
        default=1,
        help="epochs between fresh starts of the networks; 0 or less: never",
    )
    group.add_argument(
        "--lambda_tolerance",
        type=float,
        default=None,
        help="no effect, for published command lines: inner updates never stop early, which would wait for the device",
    )


def _add_target_arguments(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--fit_w_prev",
        action=BooleanOptionalAction,
        default=True,
        help="mix the networks of the epoch before into the target and use the target itself in the loss; "
        "without it the loss uses the moving average, which each fresh start sets back",
    )
    group.add_argument("--z_beta_max", type=float, default=0.8, help="final weight of the networks of the epoch before")
    group.add_argument(
        "--beta_decay_epochs",
        type=float,
        default=None,
        help="epochs until --z_beta_max is reached (half of the run, at least 1, unless given)",
    )
    group.add_argument("--pos_coef", type=float, default=1e-3, help="weight of the matching pair in the normalizer")
    group.add_argument(
        "--calculate_full",
        action=BooleanOptionalAction,
        default=True,
        help="normalizers over the global batch, or from each rank's own samples times the number of ranks",
    )
    group.add_argument(
        "--lambda_fit_neg_only",
        action="store_true",
        help="fit the negatives' part of the normalizer only; the matching pair is added where it is used",
    )
    group.add_argument("--lambda_eps", type=float, default=0.0, help="added to the log-normalizers in the loss")


def _add_loss_arguments(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--scale_loss",
        action=BooleanOptionalAction,
        default=True,
        help="multiply the loss by the temperature (held constant) and add ρ of --rho_list times the temperature",
    )
    group.add_argument(
        "--rho_list",
        default="[8.5 -8.5 -8.5]",
        metavar="RHO or '[RHO ...]'",
        help="ρ of the loss, may be negative; several numbers follow each other in equal parts of the run "
        "(--rho enters the reported global_loss only)",
    )
    group.add_argument(
        "--adaptive_tau", action="store_true", help="add to ρ what the normalizers say about the temperature"
    )
    group.add_argument(
        "--learn-logit-scale",
        action="store_true",
        help="published way to say that the temperature is learnt, which it is unless --temperature_scheme is constant",
    )


def check_amorlip_args(args: Namespace) -> None:
    """Check the flags after defaults were filled in.

    Raises:
        ValueError: a value or a combination is wrong; the message names the flag, the value and the remedy.
    """
    check_mini_batch_args(args)
    _check_ranges(args)
    if args.learn_logit_scale and not learns_one_temperature(args):
        raise ValueError("--learn-logit-scale contradicts --temperature_scheme global_constant: drop one of the two")
    if args.adaptive_tau and not args.scale_loss:
        raise ValueError("--adaptive_tau has no effect with --no-scale_loss: drop one of the two")


def _check_ranges(args: Namespace) -> None:
    """Raises ValueError with flag, value and remedy for every number that is out of range."""
    check_range(args, "lambda-lr", above=0.0, remedy="published runs use 1e-3")
    check_range(args, "h_dim_factor", above=0.0, remedy="1 makes the hidden layer as wide as the features")
    check_range(args, "beta_decay_epochs", above=0.0, remedy="give a number of epochs")
    check_range(args, "pos_coef", least=0.0, remedy="published runs use 1e-3; 0 leaves the matching pair out")
    check_range(args, "div_reg_coef", least=0.0, remedy="published runs use 0.1")
    if args.lambda_tolerance is not None:
        check_range(args, "lambda_tolerance", least=0.0, remedy="leave it out, it has no effect")
    if not math.isfinite(args.lambda_eps):
        raise ValueError(f"--lambda_eps {args.lambda_eps} must be a finite number: published runs use 0")
    for flag in ("model_ema_beta", "z_beta_max"):
        if not 0.0 <= getattr(args, flag) <= 1.0:
            raise ValueError(f"--{flag} {getattr(args, flag)} is outside [0, 1]: it is a weight")
    for flag in ("update_lambda_every_n_steps", "update_ema_mlps_every_n_steps"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)} is too small: give 1 for every step, or more")
    for updates in _numbers("lambda-update-frequency", args.lambda_update_frequency, int):
        if updates < 0:
            raise ValueError(f"--lambda-update-frequency {args.lambda_update_frequency} is too small: give 0 or more")
    if not all(math.isfinite(rho) for rho in _numbers("rho_list", args.rho_list, float)):
        raise ValueError(f"--rho_list {args.rho_list} must be finite: give numbers such as '[8.5 -8.5]'")


def settings_from_args(args: Namespace, shape: RunShape) -> AmorLIPSettings:
    """The objective's settings from checked arguments; warns of a flag that is only accepted."""
    if args.lambda_tolerance is not None:
        logging.warning(
            "--lambda_tolerance has no effect: all inner updates are made, because stopping early would wait for the "
            "device at each of them"
        )
    return AmorLIPSettings(
        updates=_numbers("lambda-update-frequency", args.lambda_update_frequency, int),
        update_every=args.update_lambda_every_n_steps,
        average_every=args.update_ema_mlps_every_n_steps,
        restart_epochs=args.reinit_lambda_every_n_epochs,
        fit_previous=args.fit_w_prev,
        previous_weight=args.z_beta_max,
        previous_epochs=args.beta_decay_epochs,
        positive_weight=args.pos_coef,
        negatives_only=args.lambda_fit_neg_only,
        all_negatives=args.calculate_full,
        offset=args.lambda_eps,
        scale_loss=args.scale_loss,
        adaptive_tau=args.adaptive_tau,
        rho_list=_numbers("rho_list", args.rho_list, float),
        rho=args.rho,
        epochs=shape.epochs,
    )


def hidden_width(args: Namespace, shape: RunShape) -> int:
    """h of the networks, int(d·h_dim_factor).

    Raises:
        ValueError: it is 0.
    """
    hidden = int(shape.embed_dim * args.h_dim_factor)
    if hidden < 1:
        raise ValueError(
            f"--h_dim_factor {args.h_dim_factor} leaves no hidden layer for features of width {shape.embed_dim}: "
            "give a larger one, such as 1"
        )
    return hidden


def check_local_negatives(local_size: int) -> None:
    """Raises ValueError if a rank's own samples leave an anchor without negatives."""
    if local_size < 2:
        raise ValueError(
            f"--no-calculate_full takes the negatives from a rank's own samples, which are {local_size}: "
            "raise --batch-size to 2 or more, or drop the flag"
        )


def _numbers(flag: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """The numbers of a list such as "[8.5 -8.5]", "8.5, -8.5" or "8.5".

    Raises:
        ValueError: the text is no such list.
    """
    words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    try:
        numbers = tuple(kind(word) for word in words)
    except ValueError:
        numbers = ()
    if not numbers:
        what = "whole numbers such as 3 or '[500 100]'" if kind is int else "numbers such as 8.5 or '[8.5 -8.5]'"
        raise ValueError(f"--{flag} {text} is no list of numbers: give {what}")
    return numbers


def in_epoch(values: tuple[Number, ...], epoch: int, epochs: int) -> Number:
    """The value of an epoch: all in equal parts of the run, each at least one epoch long, and the last one for the rest."""
    length = max(1, epochs // len(values))
    return values[min(epoch // length, len(values) - 1)]
