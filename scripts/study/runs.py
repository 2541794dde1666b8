"""The runs of the study: which flags each method gets, and which runs each stage consists of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from study.errors import StudyError

METHODS = ("openclip", "siglip", "fastclip", "amorlip", "neuclip")
# Of 100,000 pairs 32 are what 1,024 are of CC3M's 2.7 million: the share of the data that a published batch has.
BATCH_SIZES = (32, 128)
SEEDS = (0, 1, 2)
# Learning rates are tried from these on, for each batch size; where the best lies at an end, the next one beyond is tried too.
LEARNING_RATES = {32: (2.5e-4, 5e-4, 1e-3), 128: (5e-4, 1e-3, 2e-3)}
FURTHEST = (1.25e-4, 1.6e-2)
# γ as published for CC3M with FastCLIP, and for DFN-14M with NeuCLIP; all of GAMMAS are tried for both.
PUBLISHED_GAMMA = {"fastclip": 0.2, "neuclip": 0.42}
GAMMAS = (0.2, 0.42, 0.8)

# The prototypes begin anew after so many samples: T_r = 500, as published, at a batch of 32; a sixth of the data, as on CC3M.
_SAMPLES_PER_RESTART = 16_000
# CC3M's 6.5, less the logarithm of how many times fewer the samples are: a divergence from the mean over n samples is at most
# log n. With 8.5 τ falls all the time; 3 is what the divergence comes to at the τ that the mini-batch loss learns.
_RHO = f"{6.5 - math.log(2.72e6 / 1e5):.1f}"
# So many times the epochs, over a part of the data as much smaller: the same samples seen.
MORE_VISITS = 5
# Those of which the papers say in what order they come; and gamma1: FastCLIP's loss and temperature without its memory.
VISITED = ("openclip", "gamma1", "fastclip", "neuclip")
# The γ at which nothing but the present batch counts.
FORGET = 1.0
# FastCLIP by what its γ falls to.
_GAMMA_OF = {f"gamma{gamma:g}": gamma for gamma in (*GAMMAS, FORGET)}
MEMORIES = ("openclip", *_GAMMA_OF)
_WARMUP_SAMPLES = 25_600

Flags = dict[str, str]
Case = tuple[str, int]  # a method and a batch size


class Choice(NamedTuple):
    """What tuning chooses for a method at a batch size: the learning rate, and γ where the method has one."""

    lr: float
    gamma: float | None = None


@dataclass(frozen=True)
class Setup:
    """Where things are and how long a run is.

    Args:
        data: what scripts/data/build_study.py has made.
        logs: where the runs' folders go.
        epochs: of a run of the comparison.
        short_epochs: of the runs that choose learning rates, and of the ablations.
        pairs: training pairs, as many whole shards as hold at most so many.
        precision: of the towers: many CPUs have no instructions for bf16.
    """

    data: Path
    logs: Path
    epochs: int
    short_epochs: int
    pairs: int
    precision: str = "fp32"

    @property
    def shards(self) -> tuple[str, int]:
        """The training shards as --train-data takes them, and the number of their samples, whose keys are 0, 1, …

        Raises:
            StudyError: the data has no shard as small as that.
        """
        sizes = json.loads((self.data / "train" / "sizes.json").read_text(encoding="utf-8"))
        names, total = [], 0
        for name in sorted(sizes):
            if total + sizes[name] > self.pairs:
                break
            names.append(name.removesuffix(".tar"))
            total += sizes[name]
        if not names:
            raise StudyError(
                f"--pairs {self.pairs} is less than the first shard of {self.data / 'train'} holds: give more"
            )
        return f"{self.data / 'train'}/{{{names[0]}..{names[-1]}}}.tar", total


@dataclass(frozen=True)
class Run:
    """One training: flags as for src/training/main.py, without the dashes."""

    name: str
    flags: Flags = field(hash=False)

    def command(self) -> list[str]:
        """The words after src/training/main.py."""
        words = [f"--name={self.name}"]
        for flag, value in self.flags.items():
            words.append(f"--{flag}={value}" if value else f"--{flag}")
        return words

    @property
    def epochs(self) -> int:
        """How many there are to be."""
        return int(self.flags["epochs"])


def method_flags(method: str, batch_size: int, choice: Choice) -> Flags:
    """What a method is trained with: its flags on CC3M (scripts/slurm/cc3m), the published data set nearest in size.

    The temperature learns at lr / 8 (amorlip: lr / 4) where it has a rate of its own, which is their ratio there. γ falls
    with every step and not with every epoch: there are few epochs.
    """
    lr, gamma = choice
    global_loss = {
        **{"temperature_scheme": "global_learnable", "multiply_tau": "", "rho": _RHO, "fastclip_eps": "1e-14"},
        **{"lr_tau": f"{lr / 8:g}", "lr_tau_scheduler": "step_thresh", "gamma_schedule": "cosine_step"},
        **({} if gamma is None else {"gamma": f"{gamma:g}"}),
    }
    restart = {"npn_restart_iter": str(max(1, _SAMPLES_PER_RESTART // batch_size))}
    return {
        "openclip": {"objective": "openclip"},
        "siglip": {"objective": "siglip"},
        "fastclip": {"objective": "fastclip", **global_loss},  # v3
        "amorlip": {"objective": "amorlip", "lr_tau": f"{lr / 4:g}", "grad-clip-norm": "1.0"},
        "neuclip": {"objective": "neuclip", **global_loss, "npn_num_protos": "4096", **restart},
    }[method]


def training_run(
    setup: Setup,
    name: str,
    method: str,
    batch_size: int,
    choice: Choice,
    seed: int,
    epochs: int,
    more: Mapping[str, str | None] | None = None,
) -> Run:
    """A run of the comparison or of the ablations, evaluated on held-out drawing styles at every epoch.

    Args:
        more: flags in place of the method's; None takes one away.
    """
    flags = {
        **_common(setup, batch_size, choice.lr, seed, epochs),
        **method_flags(method, batch_size, choice),
        "val-data": str(setup.data / "retrieval_set"),
        "zeroshot-data": str(setup.data / "zeroshot"),
        "zeroshot-frequency": "1",
        # The normalizers' error over training is measured on the first seed's.
        "save-frequency": "1" if seed == SEEDS[0] else str(epochs),
        **_length_flags(method, setup, epochs),
    }
    changed = {**flags, **(more or {})}
    return Run(name, {flag: value for flag, value in changed.items() if value is not None})


def tuning_run(setup: Setup, method: str, batch_size: int, choice: Choice) -> Run:
    """A shorter run, evaluated once on pairs that nothing else is measured on."""
    flags = {
        **_common(setup, batch_size, choice.lr, SEEDS[0], setup.short_epochs),
        **method_flags(method, batch_size, choice),
        "val-data": str(setup.data / "retrieval_combo"),
        "val-frequency": str(setup.short_epochs),
        "save-frequency": str(setup.short_epochs),
        **_length_flags(method, setup, setup.short_epochs),
    }
    changed = "" if choice.gamma == PUBLISHED_GAMMA.get(method) else f"-gamma{choice.gamma:g}"
    return Run(f"tune-{method}-b{batch_size}-lr{choice.lr:g}{changed}", flags)


def comparison_runs(setup: Setup, choices: Mapping[Case, Choice]) -> list[Run]:
    """All methods, batch sizes and seeds; the first seed of everything first."""
    return [
        training_run(setup, f"{method}-b{size}-s{seed}", method, size, choices[method, size], seed, setup.epochs)
        for seed in SEEDS
        for size in BATCH_SIZES
        for method in METHODS
    ]


def ablation_runs(setup: Setup, choices: Mapping[Case, Choice]) -> list[Run]:
    """Short runs of NeuCLIP at the smaller batch with one thing changed, and with none."""
    size = BATCH_SIZES[0]
    choice = choices["neuclip", size]
    return [
        training_run(setup, f"ablation-{name}-s{seed}", "neuclip", size, choice, seed, setup.short_epochs, flags)
        for seed in SEEDS
        for name, flags in variants(choice)
    ]


def visits_runs(setup: Setup, choices: Mapping[Case, Choice]) -> list[Run]:
    """As many samples seen at the smaller batch, but of fewer pairs, each of them more often.

    What is remembered per sample is out of date by an epoch, and how much a model changes within one depends on how many
    there are.
    """
    few = replace(setup, pairs=setup.pairs // MORE_VISITS, epochs=setup.epochs * MORE_VISITS)
    seldom = {"save-frequency": str(max(1, few.epochs // 4)), "keep-last": "4"}
    return _explaining_runs("visits", VISITED, few, few.epochs, choices, seldom)


def memory_runs(setup: Setup, choices: Mapping[Case, Choice]) -> list[Run]:
    """Short runs of FastCLIP at the smaller batch by what γ falls to, and of OpenCLIP, which remembers nothing."""
    return _explaining_runs("memory", MEMORIES, setup, setup.short_epochs, choices)


def _explaining_runs(
    stage: str,
    names: Sequence[str],
    setup: Setup,
    epochs: int,
    choices: Mapping[Case, Choice],
    more: Mapping[str, str | None] | None = None,
) -> list[Run]:
    """Runs at the smaller batch of what is named: a method, or gammaX, which is FastCLIP with γ falling to X."""
    size = BATCH_SIZES[0]
    lr = choices["fastclip", size].lr
    cases = {name: ("fastclip", Choice(lr, gamma)) for name, gamma in _GAMMA_OF.items()}
    cases |= {method: (method, choices[method, size]) for method in METHODS}
    return [
        training_run(setup, f"{stage}-{name}-s{seed}", method, size, choice, seed, epochs, more)
        for seed in SEEDS
        for name in names
        for method, choice in (cases[name],)
    ]


def variants(choice: Choice) -> Iterator[tuple[str, dict[str, str | None]]]:
    """The ablations of NeuCLIP: a name, and the flags in place of its own (None takes one away)."""
    yield "none", {}
    # An MLP has nothing to begin anew from but random weights.
    yield "mlp", {"npn_arch": "mlp", "npn_num_protos": None, "npn_restart_iter": "0"}
    yield "separate", {"npn_objective": "separate"}
    yield "simultaneous", {"npn_optimization": "simultaneous"}
    for value in ("0", "50", "5000"):
        yield f"Tr{value}", {"npn_restart_iter": value}
    for value in ("1", "30"):
        yield f"Tu{value}", {"npn_repetition": value}
    yield "m1024", {"npn_num_protos": "1024"}
    # At 0 the prototypes' normalizers are not mixed with the batch's, at 1 there are the batch's alone.
    for gamma in (0.0, *GAMMAS, FORGET):
        if gamma != choice.gamma:
            schedule = {"gamma_schedule": "constant"} if gamma == 0 else {}
            yield f"gamma{gamma:g}", {"gamma": f"{gamma:g}", **schedule}
    for value in ("2", "8.5"):
        yield f"rho{value}", {"rho": value}
    yield "adagrad", {"npn_optimizer": "adagrad"}
    yield "adagrad-lr0.001", {"npn_optimizer": "adagrad", "npn_lr": "0.001"}


def _common(setup: Setup, batch_size: int, lr: float, seed: int, epochs: int) -> Flags:
    return {
        "logs": str(setup.logs),
        "resume": "latest",
        "model": "study",
        "model-config": "src/training/model_configs/study.json",
        "train-data": setup.shards[0],
        "epochs": str(epochs),
        "batch-size": str(batch_size),
        "lr": f"{lr:g}",
        "wd": "0.1",
        "beta2": "0.98",
        "eps": "1e-6",
        "warmup": str(_WARMUP_SAMPLES // batch_size),
        "seed": str(seed),
        "precision": setup.precision,
        "workers": "1",
        "log-every-n-steps": str(max(1, 6400 // batch_size)),
        "save-every-minutes": "5",
        "keep-last": str(max(2, epochs)),
    }


def _length_flags(method: str, setup: Setup, epochs: int) -> Flags:
    """What depends on the length of the run or of the data: half of the run for what falls over half of it as published."""
    half = str(max(1, epochs // 2))
    return {
        "fastclip": {"gamma_decay_epochs": half, "data_size": str(setup.shards[1])},
        "amorlip": {"beta_decay_epochs": half},
    }.get(method, {})
