"""Flags that every global contrastive objective shares, under their published names (FastCLIP, arXiv 2407.01445)."""

from __future__ import annotations

import math
from argparse import Namespace, _ArgumentGroup
from collections.abc import Mapping

from neuclip.normalizers.mixing import SCHEDULES, GammaSchedule
from neuclip.objectives.base import RunShape

TITLE = "global contrastive objectives"


def add_global_arguments(group: _ArgumentGroup) -> None:
    """Add the shared flags. A default of None is filled in by the chosen objective."""
    group.add_argument(
        "--rho", type=float, default=8.0, help="ρ of the robust global loss, eq. 1 of the FastCLIP paper"
    )
    group.add_argument(
        "--fastclip_eps",
        type=float,
        default=None,
        help="ε added to the normalizers g (fastclip: 1e-14, neuclip: 1e-8 unless given)",
    )
    group.add_argument(
        "--temperature_scheme",
        choices=("global_learnable", "global_constant", "individual_learnable"),
        default="global_learnable",
        help="one learnable temperature, one constant one, or one per sample and modality",
    )
    group.add_argument(
        "--multiply_tau",
        action="store_true",
        help="multiply the loss by the temperature (neuclip and one temperature per sample always do)",
    )
    group.add_argument(
        "--gamma",
        type=float,
        default=None,
        help="final weight γ of the batch's own estimate in the normalizer, in [0, 1]; fastclip: 0.2, neuclip: 0.42 unless "
        "given; for neuclip 0 switches the mixing off altogether (Algorithm 1 of the paper as printed)",
    )
    group.add_argument(
        "--gamma_schedule",
        choices=SCHEDULES,
        default=None,
        help="γ constant, or falling from 1 along a half cosine per epoch (cosine) or per step (cosine_step)",
    )
    group.add_argument(
        "--gamma_decay_epochs",
        type=float,
        default=None,
        help="length of γ's decay in epochs (fastclip: half the run, neuclip: all of it)",
    )
    group.add_argument(
        "--data_size",
        type=int,
        default=None,
        help="number of integer keys of the data set, gaps included (≥ its samples)",
    )


def fill_defaults(args: Namespace, defaults: Mapping[str, float | str]) -> None:
    """Give an objective's own defaults to those of its flags that were not given (None)."""
    for flag, value in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)


def check_global_args(args: Namespace) -> None:
    """Check the shared flags after an objective has filled in its defaults.

    Raises:
        ValueError: a value is out of range; the message names the flag, the value and the remedy.
    """
    if not 0.0 <= args.gamma <= 1.0:
        raise ValueError(f"--gamma {args.gamma} is outside [0, 1]: it is a weight, 1 = the batch's own estimate only")
    check_range(args, "gamma_decay_epochs", above=0.0, remedy="give a number of epochs")
    check_range(args, "fastclip_eps", least=0.0, remedy="give 0 or a small number such as 1e-8")
    check_range(args, "rho", least=0.0, remedy="give 0 or a positive number such as 8")


def check_range(
    args: Namespace, flag: str, *, remedy: str, least: float | None = None, above: float | None = None
) -> None:
    """Check that a flag's value is a finite number, at least `least`, greater than `above`.

    Raises:
        ValueError: it is not; nan and inf are not either.
    """
    value = getattr(args, flag.replace("-", "_"))
    wrong = not math.isfinite(value) or (least is not None and value < least) or (above is not None and value <= above)
    if wrong:
        bound = f"at least {least:g}" if least is not None else f"greater than {above:g}"
        raise ValueError(f"--{flag} {value} must be a finite number {bound}: {remedy}")


def check_mini_batch_args(args: Namespace) -> None:
    """Check the shared flags that concern an objective without normalizers of its own.

    Raises:
        ValueError: --rho or --temperature_scheme is wrong.
    """
    check_range(args, "rho", least=0.0, remedy="it enters the reported global_loss; give 0 or a positive number")
    learns_one_temperature(args)


def learns_one_temperature(args: Namespace) -> bool:
    """Whether --temperature_scheme asks for one learnable temperature, or for a constant one.

    Raises:
        ValueError: it asks for one temperature per sample, which this objective does not have.
    """
    if args.temperature_scheme == "individual_learnable":
        raise ValueError(
            f"--temperature_scheme individual_learnable is not defined for objective {args.objective}: "
            "use global_learnable or global_constant"
        )
    return bool(args.temperature_scheme == "global_learnable")


def gamma_schedule(args: Namespace, shape: RunShape) -> GammaSchedule:
    """γ's schedule from checked arguments."""
    return GammaSchedule(args.gamma_schedule, args.gamma, args.gamma_decay_epochs, shape.steps_per_epoch)
