"""Which objectives there are, and how the command line chooses one."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace, _ArgumentGroup

from neuclip.objectives.amorlip import AmorLIP
from neuclip.objectives.base import ArgumentAdder, Objective, RunShape
from neuclip.objectives.fastclip import FastCLIP
from neuclip.objectives.neuclip import NeuCLIP
from neuclip.objectives.openclip import OpenCLIP
from neuclip.objectives.siglip import SigLIP

OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (OpenCLIP, FastCLIP, SigLIP, NeuCLIP, AmorLIP)}


def add_arguments(parser: ArgumentParser) -> None:
    """Add --objective, its published synonyms, and every objective's flags, each method in a group of its own."""
    group = parser.add_argument_group("objective", "which loss; --help lists each method's own flags below")
    lines = "; ".join(f"{name}: {cls.summary}" for name, cls in OBJECTIVES.items())
    group.add_argument("--objective", choices=sorted(OBJECTIVES), default=None, help=f"{lines}. Default: openclip.")
    for flag in _synonym_flags():
        chosen = " or ".join(_spelled(s, cls) for cls in OBJECTIVES.values() for s in cls.synonyms if flag in s)
        group.add_argument(f"--{flag}", action="store_true", help=f"published spelling: {chosen}")

    _add_common_arguments(parser.add_argument_group("temperature and memory of the loss"))
    shared: dict[ArgumentAdder, str] = {}
    for cls in OBJECTIVES.values():
        shared.update({adder: title for title, adder in cls.shared_arguments})
    for adder, title in shared.items():
        adder(parser.add_argument_group(title))
    for name, cls in OBJECTIVES.items():
        # argparse prints a group without arguments as nothing at all, so that methods without flags take no room.
        cls.add_arguments(parser.add_argument_group(f"objective {name}", cls.summary))


def _add_common_arguments(group: _ArgumentGroup) -> None:
    group.add_argument("--temperature", type=float, help="initial τ = 1/logit_scale (the objective's own unless given)")
    group.add_argument(
        "--lr_tau", type=float, default=-1.0, help="learning rate of the temperature; negative: that of the model"
    )
    group.add_argument(
        "--lr_tau_scheduler",
        choices=("const", "cosine", "step_thresh"),
        default=None,
        help="cosine: with --warmup, as the model; const; step_thresh: const, and a third of it while τ ≤ 0.03 (cosine "
        "unless given, amorlip: step_thresh)",
    )
    group.add_argument(
        "--loss-chunk-size",
        type=int,
        default=None,
        help="rows of a rank's B×N block of pairs that are formed at a time, so that the loss needs memory for that many; "
        "unless given, openclip and siglip form all at once and the others as many as fit 64 MiB",
    )


def resolve(args: Namespace) -> type[Objective]:
    """Settle `args.objective` from --objective and its synonyms, and let the chosen method check its flags.

    Raises:
        ValueError: flags contradict each other or a method's value is wrong.
    """
    given = frozenset(flag for flag in _synonym_flags() if getattr(args, flag))
    args.objective = _chosen(args.objective, given)
    cls = OBJECTIVES[args.objective]
    for flag in set().union(*cls.synonyms) if cls.synonyms else ():
        setattr(args, flag, True)
    if args.loss_chunk_size is not None and args.loss_chunk_size < 1:
        raise ValueError(f"--loss-chunk-size {args.loss_chunk_size} is too small: give 1 row or more, or leave it out")
    args.lr_tau_scheduler = args.lr_tau_scheduler or cls.temperature_schedule
    cls.resolve_args(args)
    return cls


def flags_without_effect(args: Namespace) -> list[str]:
    """Flags given that belong to another method than the chosen one, `--flag (method)`; from resolved arguments."""
    found = []
    for name, cls in OBJECTIVES.items():
        parser = ArgumentParser(add_help=False)
        cls.add_arguments(parser.add_argument_group())
        given = [action for action in parser._actions if getattr(args, action.dest, action.default) != action.default]
        found += [f"{action.option_strings[0]} ({name})" for action in given if name != args.objective]
    return found


def build_objective(args: Namespace, shape: RunShape) -> Objective:
    """The objective named by `args.objective`, from arguments that went through `resolve`."""
    objective = OBJECTIVES[args.objective].from_args(args, shape)
    objective.chunk_rows = args.loss_chunk_size
    objective.temperature_lr = max(0.0, args.lr_tau)
    return objective


def _chosen(named: str | None, given: frozenset[str]) -> str:
    flags = " ".join(f"--{flag}" for flag in sorted(given))
    if named is not None:
        # A superset of one spelling is still a contradiction; a part of one is merely short for it.
        if given and not any(given <= synonym for synonym in OBJECTIVES[named].synonyms):
            raise ValueError(f"--objective {named} contradicts {flags}: drop one of the two")
        return named
    if not given:
        return "openclip"
    matching = [name for name, cls in OBJECTIVES.items() if given in cls.synonyms]
    if not matching:
        spellings = "; ".join(_spelled(s, cls) for cls in OBJECTIVES.values() for s in cls.synonyms)
        names = ",".join(OBJECTIVES)
        raise ValueError(f"{flags} selects no objective of this version: use --objective {{{names}}} ({spellings})")
    return matching[0]


def _synonym_flags() -> list[str]:
    return sorted({flag for cls in OBJECTIVES.values() for synonym in cls.synonyms for flag in synonym})


def _spelled(synonym: frozenset[str], cls: type[Objective]) -> str:
    return f"{' '.join(f'--{flag}' for flag in sorted(synonym))} = --objective {cls.name}"


def make_objective(command_line: str, shape: RunShape) -> Objective:
    """An objective from a line of its flags, for use from Python: `make_objective("--objective neuclip --rho 6.5", shape)`.

    Raises:
        ValueError: a flag's value or a combination of flags is wrong.
        SystemExit: argparse does not know a flag.
    """
    parser = ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args(shlex.split(command_line))
    args.epochs = shape.epochs
    resolve(args)
    return build_objective(args, shape)
