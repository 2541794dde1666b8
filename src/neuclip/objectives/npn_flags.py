"""The flags of NeuCLIP's normalizer-prediction network (NPN), with every ablation of the paper (arXiv 2511.08417)."""

from __future__ import annotations

from argparse import BooleanOptionalAction, Namespace, _ArgumentGroup
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from neuclip.normalizers import (
    INNER_OBJECTIVES,
    AdaGrad,
    AdaGradNorm,
    Alternating,
    InnerOptimizer,
    MLPNormalizer,
    NormalizerNetwork,
    Optimization,
    PrototypeNormalizer,
    Simultaneous,
    UnitRowsAdaGradNorm,
)
from neuclip.normalizers.network import OptimizerMaker
from neuclip.objectives.base import RunShape
from neuclip.objectives.global_flags import check_range, fill_defaults

ALTERNATING, SIMULTANEOUS = "alternating", "simultaneous"
PRODUCTS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Architecture:
    """One value of --npn_arch.

    Attributes:
        optimizers: its inner optimizers by the value of --npn_optimizer.
        defaults: values of the flags that were not given.
        inner_defaults: those of flags that only the inner loop has.
        meaningless: flags that it has no use for.
        build: the network from resolved flags.
    """

    optimizers: Mapping[str, type[InnerOptimizer]]
    defaults: Mapping[str, float | str]
    inner_defaults: Mapping[str, float | str]
    meaningless: tuple[str, ...]
    build: Callable[[Namespace, RunShape], NormalizerNetwork]


def _build_prototypes(args: Namespace, shape: RunShape) -> NormalizerNetwork:
    return PrototypeNormalizer(
        args.npn_num_protos,
        shape.embed_dim,
        args.fastclip_eps,
        INNER_OBJECTIVES[args.npn_objective](),
        _optimizer_maker(args),
        shape.global_batch_size,
        PRODUCTS[args.npn_precision],
        record=args.npn_cuda_graph,
        compiled=args.npn_compile,
    )


def _build_mlp(args: Namespace, shape: RunShape) -> NormalizerNetwork:
    return MLPNormalizer(
        shape.embed_dim,
        shape.embed_dim,
        args.fastclip_eps,
        INNER_OBJECTIVES[args.npn_objective](),
        _optimizer_maker(args),
    )


ARCHITECTURES = {
    "prototypes": Architecture(
        optimizers={"adagrad_norm": UnitRowsAdaGradNorm, "adagrad": AdaGrad},
        defaults={"npn_num_protos": 4096, "npn_restart_iter": 500, "npn_precision": "fp32"},
        inner_defaults={"npn_lr": 1.0, "npn_optimizer": "adagrad_norm", "npn_repetition": 10, "npn_compile": False},
        meaningless=(),
        build=_build_prototypes,
    ),
    # Random weights are no fresh embeddings: a restart only makes an MLP forget.
    "mlp": Architecture(
        optimizers={"adagrad_norm": AdaGradNorm, "adagrad": AdaGrad},
        defaults={"npn_restart_iter": 0},
        inner_defaults={"npn_lr": 0.01, "npn_optimizer": "adagrad", "npn_repetition": 10},
        meaningless=("npn_num_protos", "npn_precision", "npn_compile"),
        build=_build_mlp,
    ),
}


def add_npn_arguments(group: _ArgumentGroup) -> None:
    """Add the flags. A default of None depends on other flags and is filled in by `resolve_npn_args`."""
    group.add_argument(
        "--npn_arch",
        choices=tuple(ARCHITECTURES),
        default="prototypes",
        help="prototypes compared by cosine, or a residual MLP per modality",
    )
    group.add_argument(
        "--npn_objective",
        choices=tuple(INNER_OBJECTIVES),
        default="unified",
        help="unified: the NPN shares the encoders' objective; separate: mean squared error of the log-normalizers",
    )
    group.add_argument(
        "--npn_optimization",
        choices=(ALTERNATING, SIMULTANEOUS),
        default=ALTERNATING,
        help="alternating: T_u updates of the NPN, then a step of the encoders; simultaneous: the NPN's weights join the "
        "outer optimizer at its learning rate --lr (--npn_lr, --npn_repetition and --npn_optimizer have no effect then)",
    )
    group.add_argument("--npn_num_protos", type=int, help="m, prototypes per modality (4096 unless given)")
    group.add_argument("--npn_repetition", type=int, help="T_u, NPN updates per batch (10 unless given)")
    group.add_argument(
        "--npn_restart_iter",
        type=int,
        help="T_r, steps between restarts, 0: never. Prototypes restart from fresh features (500 unless given), an mlp from "
        "random weights (0 unless given)",
    )
    group.add_argument(
        "--npn_lr", type=float, help="learning rate of the inner loop (prototypes: 1.0, mlp: 0.01 unless given)"
    )
    group.add_argument(
        "--npn_wd",
        type=float,
        default=0.0,
        help="weight decay of the NPN; not for prototypes of unit length, those of adagrad_norm",
    )
    group.add_argument(
        "--npn_optimizer",
        choices=("adagrad_norm", "adagrad"),
        help="adagrad_norm: one step size per modality, prototypes of unit length (their default); adagrad: one step size "
        "per weight (the default of mlp)",
    )
    group.add_argument(
        "--npn_precision",
        choices=tuple(PRODUCTS),
        help="matrix products of the prototypes: fp32 (unless given), or bf16 with sums in float32, for tensor cores",
    )
    group.add_argument(
        "--npn_cuda_graph",
        action=BooleanOptionalAction,
        default=True,
        help="on GPUs, record an update of the prototypes as a CUDA graph and replay it",
    )
    group.add_argument(
        "--npn_compile",
        action="store_true",
        default=None,
        help="compile an update of the prototypes (torch.compile), which then is fewer and larger kernels",
    )


def resolve_npn_args(args: Namespace) -> None:
    """Fill in defaults and check.

    Raises:
        ValueError: a value or a combination is wrong; the message names the flag, the value and the remedy.
    """
    architecture = ARCHITECTURES[args.npn_arch]
    _refuse(args, architecture.meaningless, f"has no meaning for --npn_arch {args.npn_arch}", "--npn_arch prototypes")
    fill_defaults(args, architecture.defaults)
    if args.npn_optimization == SIMULTANEOUS:
        why = f"has no effect with --npn_optimization {SIMULTANEOUS}, where the outer optimizer trains the NPN at --lr"
        _refuse(args, tuple(architecture.inner_defaults), why, f"--npn_optimization {ALTERNATING}")
    else:
        fill_defaults(args, architecture.inner_defaults)
    for flag, least in (("npn_num_protos", 1), ("npn_repetition", 0), ("npn_restart_iter", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag} {value} is too small: give {least} or more")
    check_range(args, "npn_wd", least=0.0, remedy="the paper uses 0")
    if args.npn_lr is not None:
        check_range(args, "npn_lr", above=0.0, remedy="the paper uses 1.0")
    make_optimizer = _optimizer_maker(args)
    if make_optimizer is not None:
        make_optimizer((2, 1, 1))  # checks --npn_wd


def build_network(args: Namespace, shape: RunShape) -> NormalizerNetwork:
    """The NPN from resolved flags."""
    return ARCHITECTURES[args.npn_arch].build(args, shape)


def build_optimization(args: Namespace) -> Optimization:
    """When the NPN learns, from resolved flags."""
    return Simultaneous() if args.npn_optimization == SIMULTANEOUS else Alternating(args.npn_repetition)


def _optimizer_maker(args: Namespace) -> OptimizerMaker | None:
    """What makes the inner optimizer for weights of some shape; None where there is no inner loop."""
    if args.npn_optimization == SIMULTANEOUS:
        return None
    optimizer = ARCHITECTURES[args.npn_arch].optimizers[args.npn_optimizer]
    return lambda weights_shape: optimizer(weights_shape, args.npn_lr, args.npn_wd)


def _refuse(args: Namespace, flags: tuple[str, ...], why: str, alternative: str) -> None:
    """Raises ValueError if one of the flags was given."""
    for flag in flags:
        value = getattr(args, flag)
        if value is not None:
            raise ValueError(f"--{flag} {value} {why}: leave it out, or use {alternative}")
