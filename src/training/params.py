"""The command line: open_clip's flags that people use, the flags of this trainer, and whatever the objectives bring along."""

from __future__ import annotations

import argparse
import ast
import difflib
import math
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from neuclip.objectives import add_arguments as add_objective_arguments
from neuclip.objectives import resolve as resolve_objective
from training.data.config import DECODING, DataConfig, check_flags
from training.data_parallel import COMPRESSIONS
from training.errors import UserError

PRECISIONS = ("amp_bf16", "amp_bfloat16", "amp", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")
BENCH_STEPS = 100
OPTIMIZERS = ("adamw", "lamb", "lion", "sgd")


class Parser(ArgumentParser):
    """argparse, with a user's mistake as one line instead of the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        """Raise the mistake as UserError; an unknown flag comes with those that it resembles."""
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            flags = {option.replace("_", "-"): option for option in self._option_string_actions}
            near = difflib.get_close_matches(unknown[1].replace("_", "-"), flags, n=3)
            hint = f"did you mean {' or '.join(flags[flag] for flag in near)}? " if near else ""
            raise UserError(f"{unknown[1]} is no flag: {hint}--help lists all")
        raise UserError(f"{message}; --help tells what each flag takes")


class KeyValues(argparse.Action):
    """`--aug-cfg scale='(0.5, 1.0)' color_jitter=0.4`: pairs of a name and a Python literal (or a plain string)."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None) -> None:
        pairs = {}
        for item in values:
            name, separator, text = item.partition("=")
            if not separator:
                parser.error(f"{option_string} {item}: write NAME=VALUE")
            try:
                pairs[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pairs[name] = text
        setattr(namespace, self.dest, pairs)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse and check a command line; `args.objective` is settled and every default filled in.

    Args:
        argv: words of the command line without the program's name; None for sys.argv.

    Raises:
        UserError: a value or a combination of flags is wrong.
        SystemExit: --help.
    """
    parser = build_parser()
    args = parser.parse_args(_known_spelling(parser, sys.argv[1:] if argv is None else argv))
    _fill_defaults(args)
    _check(args)
    try:
        resolve_objective(args)
    except ValueError as error:
        raise UserError(str(error)) from None
    # Drawn with replacement an epoch may have more samples than the data set.
    samples = None if args.dataset_resampled else args.train_num_samples
    if args.data_size is not None and samples is not None and args.data_size < samples:
        raise UserError(
            f"--data_size {args.data_size} is smaller than --train-num-samples {args.train_num_samples}: "
            "it counts the integer keys of the data set, gaps included, so give at least the number of samples"
        )
    return args


def data_config(args: Namespace, needs_keys: bool) -> DataConfig:
    """The flags that concern the training data.

    Args:
        needs_keys: whether the objective needs each sample's integer key.
    """
    return DataConfig(
        train_data=args.train_data,
        dataset_type=args.dataset_type,
        train_num_samples=args.train_num_samples,
        dataset_resampled=args.dataset_resampled,
        train_data_upsampling_factors=args.train_data_upsampling_factors,
        csv_img_key=args.csv_img_key,
        csv_caption_key=args.csv_caption_key,
        csv_separator=args.csv_separator,
        workers=args.workers,
        batch_size=args.batch_size,
        accum_freq=args.accum_freq,
        seed=args.seed,
        shuffle_buffer=args.shuffle_buffer,
        needs_keys=needs_keys,
        data_size=args.data_size,
        decode=args.decode,
        data_timeout=args.data_timeout,
    )


def build_parser() -> ArgumentParser:
    """The whole command line, in groups."""
    parser = Parser(
        prog="main.py",
        description="Train CLIP models with global and mini-batch contrastive objectives. Flags may be written with - or _.",
        allow_abbrev=False,
    )
    add_objective_arguments(parser)
    for add_group in (_data, _zero_shot, _model, _locking, _optimization, _run, _interruptions, _logging, _distributed):
        add_group(parser)
    return parser


def _known_spelling(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Replace --a_b by --a-b or the other way round, whichever the parser has."""
    known = {option.replace("_", "-"): option for action in parser._actions for option in action.option_strings}
    words = []
    for word in argv:
        flag, separator, value = word.partition("=")
        if flag.startswith("--"):
            flag = known.get(flag.replace("_", "-"), flag)
        words.append(flag + separator + value)
    return words


def _data(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--train-data",
        help="shards with brace expansion, several sources joined by ::, a folder of shards, or a csv file",
    )
    add("--val-data", help="image-text pairs for validation, in the same forms")
    add("--dataset-type", choices=("webdataset", "csv", "synthetic", "auto"), default="auto")
    add("--train-num-samples", type=int, help="samples of an epoch; may be left out where shard sizes are known")
    add("--val-num-samples", type=int, help="use only that many validation samples")
    add("--dataset-resampled", action="store_true", help="draw shards with replacement")
    add(
        "--train-data-upsampling-factors",
        help="weights of the :: sources, such as 1::2::0.5 (with --dataset-resampled)",
    )
    add("--csv-separator", default="\t")
    add("--csv-img-key", default="filepath", help="column of image paths")
    add("--csv-caption-key", default="title", help="column of captions")
    add("--workers", type=int, default=4, help="loader processes per rank")
    add(
        "--decode",
        choices=DECODING,
        default="fast",
        help="exact: torchvision's random resized crop to the bit; fast: large JPEGs decoded smaller, resized by PyTorch",
    )
    add(
        "--bench-data",
        type=int,
        nargs="?",
        const=BENCH_STEPS,
        metavar="STEPS",
        help=f"train nothing: run the loader alone for so many steps ({BENCH_STEPS}) and print where its time goes",
    )
    add(
        "--dry-run",
        type=int,
        nargs="?",
        const=0,
        metavar="RANKS",
        help="train nothing: resolve everything, print the plan (of RANKS ranks, if given), take two steps on synthetic data, "
        "leave nothing behind; --train-data need not be there",
    )
    add(
        "--max-bad-fraction",
        type=float,
        metavar="SHARE",
        help="end the run when more of an epoch's samples are broken (judged from 1,000 on and at its end)",
    )
    add(
        "--data-timeout",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="end the run when no batch comes for so long, and say what the first shards hold; 0: wait for ever",
    )
    add("--shuffle-buffer", type=int, default=5000, help="samples per worker among which the next one is drawn")


def _zero_shot(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(
        "zero-shot classification during training",
        "each a folder of class folders (ImageNet style) or a webdataset in the layout of clip_benchmark",
    )
    group.add_argument("--imagenet-val", help="reported as imagenet-zeroshot-val-top1 and -top5")
    group.add_argument("--imagenet-v2", help="reported as imagenetv2-zeroshot-val-top1 and -top5")
    group.add_argument("--zeroshot-data", help="any other data set, reported as zeroshot-val-top1 and -top5")
    group.add_argument("--zeroshot-frequency", type=int, default=2, help="epochs between zero-shot evaluations")


def _model(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default="ViT-B-32", help="name of an open_clip model, built in or from --model-config")
    add(
        "--model-config",
        action="append",
        default=[],
        help="json file (or folder of them) with a model named by its stem",
    )
    add("--pretrained", default=None, help="weights to start from: an open_clip tag or a checkpoint file")
    add("--pretrained-image", action="store_true", help="start the image tower from timm's weights")
    add("--precision", choices=PRECISIONS, default="amp_bf16")
    add("--force-quick-gelu", action="store_true")
    add("--force-custom-text", action="store_true")
    add("--force-patch-dropout", type=float, help="share of patches dropped in training")
    add("--force-image-size", type=int, nargs="+", help="one number, or height and width")
    add("--force-context-length", type=int)
    add("--image-mean", type=float, nargs=3, metavar="MEAN")
    add("--image-std", type=float, nargs=3, metavar="STD")
    add("--image-interpolation", choices=("bicubic", "bilinear", "random"))
    add("--image-resize-mode", choices=("shortest", "longest", "squash"), help="for evaluation images")
    add("--aug-cfg", nargs="*", default={}, action=KeyValues, metavar="NAME=VALUE", help="open_clip's AugmentationCfg")
    add("--cache-dir", help="where downloaded weights and tokenizers go")


def _locking(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("frozen towers").add_argument
    add("--lock-image", action="store_true", help="freeze the image tower")
    add("--lock-image-unlocked-groups", type=int, default=0, help="last layer groups that stay trainable")
    add("--lock-image-freeze-bn-stats", action="store_true")
    add("--lock-text", action="store_true", help="freeze the text tower")
    add("--lock-text-unlocked-layers", type=int, default=0, help="last layers that stay trainable")
    add("--lock-text-freeze-layer-norm", action="store_true")


def _optimization(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("optimization").add_argument
    add("--batch-size", type=int, default=64, help="samples per rank and step, or micro-batch with --accum-freq")
    add(
        "--accum-freq",
        type=int,
        default=1,
        help="micro-batches of --batch-size that make up a step; the objective sees all of them at once",
    )
    add("--epochs", type=int, default=32, help="length of the run, which the schedules follow")
    add("--stop_epochs", type=int, default=-1, help="stop after this epoch without changing the schedules")
    add("--optimizer", choices=OPTIMIZERS, default="adamw")
    add("--lr", type=float, help="peak learning rate (5e-4 unless given)")
    add("--wd", type=float, default=0.2, help="weight decay; none on gains, biases, logit_scale")
    add("--beta1", type=float, help="0.9 unless given")
    add("--beta2", type=float, help="0.98 for ViT models, 0.999 for others, unless given")
    add("--eps", type=float, help="1e-6 for ViT models, 1e-8 for others, unless given")
    add("--momentum", type=float, default=0.9, help="sgd only")
    add("--warmup", type=int, default=10000, help="steps of linear warmup")
    add("--lr-scheduler", choices=("cosine", "const", "const-cooldown"), default="cosine")
    add("--lr_min", type=float, default=0.0, help="where the cosine ends")
    add("--skip-scheduler", action="store_true", help="constant learning rates, no warmup")
    add("--epochs-cooldown", type=int, help="epochs of cooldown at the end (const-cooldown)")
    add("--lr-cooldown-end", type=float, default=0.0, help="learning rate at the end of the cooldown")
    add("--lr-cooldown-power", type=float, default=1.0, help="1: linear")
    add("--grad-clip-norm", type=float)
    add("--grad-checkpointing", action="store_true", help="recompute activations in backward")
    add("--torchcompile", action="store_true", help="compile the towers")
    add("--seed", type=int, default=0)


def _run(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("run folder and checkpoints").add_argument
    add("--name", help="name of the run's folder; built from the time and the main flags unless given")
    add("--logs", default="./logs", help="where run folders go")
    add("--resume", help="a checkpoint file, or 'latest': the run's newest one if there is any")
    add("--save-frequency", type=int, default=1, help="epochs between checkpoints epoch_N.pt; 0: only the last one")
    add("--save-most-recent", action="store_true", help="also write epoch_latest.pt after every epoch")
    add("--save-every-n-steps", type=int, help="also save within epochs: iter_S.pt and epoch_latest.pt")
    add("--save-every-minutes", type=float, help="the same by the clock")
    add("--save-in-background", action="store_true", help="a step waits for the copy to host memory, not for the disk")
    add("--strict-save", action="store_true", help="end the run when a checkpoint cannot be written (a full disk, say)")
    add(
        "--keep-last",
        type=int,
        default=0,
        metavar="K",
        help="keep the K iter_S.pt and the K epoch_N.pt written last; 0: all. epoch_latest.pt always stays",
    )
    add("--delete-previous-checkpoint", action="store_true", help="keep only the newest epoch_N.pt")
    add("--remote-sync", metavar="URL", help="copy checkpoints and logs there, by fsspec: s3://…, gs://…, a folder, …")
    add("--val-frequency", type=int, default=1, help="epochs between evaluations on --val-data; 0: never")


def _interruptions(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(
        "interruptions",
        "SIGUSR1, SIGTERM and SIGINT end a run after its step, with a checkpoint and exit status 75; a second one at once",
    )
    group.add_argument(
        "--requeue-on-signal",
        action="store_true",
        help="requeue the slurm job after SIGUSR1 (sbatch --signal=USR1@300), --max-hours, or a SIGTERM by which slurm "
        "preempts it; needs --name, --resume latest",
    )
    group.add_argument("--max-hours", type=float, help="end so many hours after the start as after a signal")
    group.add_argument(
        "--on-nonfinite",
        choices=("skip", "stop"),
        default="skip",
        help="a loss or gradient that is not finite is never applied; skip: go on after it, stop: end the run",
    )


def _logging(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("logging").add_argument
    add("--log-every-n-steps", type=int, default=100)
    add("--report-to", default="", help="tensorboard, wandb, or both with a comma")
    add("--wandb-project-name", default="neuclip")
    add("--wandb-notes", default="")
    add("--profile", action="store_true", help="trace a few steps of the first epoch into the run folder")
    add("--debug", action="store_true", help="log more")


def _distributed(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("devices and ranks").add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU per rank if there are any")
    add("--dist-backend", choices=("nccl", "gloo"), help="nccl on GPUs, gloo on CPUs unless given")
    add("--dist-url", default="env://", help="how ranks find each other, as torch.distributed understands it")
    add("--dist-timeout", type=int, default=1800, help="seconds after which a collective that hangs ends the run")
    add(
        "--eval-timeout",
        type=int,
        default=14400,
        help="the same while ranks wait for one that evaluates or writes a checkpoint",
    )
    add("--ddp-static-graph", action="store_true", help="tell DistributedDataParallel that the graph never changes")
    add(
        "--grad-compression",
        choices=COMPRESSIONS,
        default="none",
        help="number format in which gradients travel between ranks; bf16: half the bytes, 8 bits of precision",
    )
    add("--use-bn-sync", action="store_true", help="batch normalisation over all ranks")


def _fill_defaults(args: Namespace) -> None:
    """Defaults that depend on other flags; ViT values are those of the CLIP paper (arXiv 2103.00020)."""
    is_vit = "vit" in args.model.lower()
    defaults = {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98 if is_vit else 0.999, "eps": 1e-6 if is_vit else 1e-8}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr_tau < 0:
        args.lr_tau = args.lr
    if args.stop_epochs < 0 or args.stop_epochs > args.epochs:
        args.stop_epochs = args.epochs
    if args.dry_run is not None and args.train_data is None and args.dataset_type == "auto":
        args.dataset_type = "synthetic"
    if args.force_image_size is not None and len(args.force_image_size) == 1:
        args.force_image_size = args.force_image_size[0]


class _Range(NamedTuple):
    """Which finite values a flag takes, and how to say it."""

    holds: Callable[[float], bool]
    words: str


_COUNT = _Range(lambda value: value >= 1, "1 or more")
_NOT_NEGATIVE = _Range(lambda value: value >= 0, "a finite number of at least 0")
_POSITIVE = _Range(lambda value: value > 0, "a finite number greater than 0")
_SHARE = _Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
# where logit_scale is clamped
_TEMPERATURE = _Range(lambda value: 0.01 <= value <= 1, "at least 0.01 and at most 1")

_RANGES = {
    **dict.fromkeys(("epochs", "log_every_n_steps", "val_num_samples", "dist_timeout", "epochs_cooldown"), _COUNT),
    **dict.fromkeys(("eval_timeout", "save_every_n_steps"), _COUNT),
    **dict.fromkeys(("save_every_minutes", "max_hours"), _POSITIVE),
    **dict.fromkeys(("data_timeout", "keep_last", "dry_run"), _NOT_NEGATIVE),
    "max_bad_fraction": _SHARE,
    **dict.fromkeys(("warmup", "save_frequency", "val_frequency", "zeroshot_frequency"), _NOT_NEGATIVE),
    **dict.fromkeys(("wd", "eps", "lr_min", "lr_tau", "lr_cooldown_end", "lr_cooldown_power"), _NOT_NEGATIVE),
    **dict.fromkeys(("lock_image_unlocked_groups", "lock_text_unlocked_layers"), _NOT_NEGATIVE),
    **dict.fromkeys(("lr", "grad_clip_norm"), _POSITIVE),
    **dict.fromkeys(("beta1", "beta2", "momentum", "force_patch_dropout"), _SHARE),
    **dict.fromkeys(("accum_freq", "bench_data"), _COUNT),
    "temperature": _TEMPERATURE,
}


def _check_ranges(args: Namespace) -> None:
    for flag, allowed in _RANGES.items():
        value = getattr(args, flag)
        if value is not None and not (math.isfinite(value) and allowed.holds(value)):
            spelled = next(action.option_strings[0] for action in build_parser()._actions if action.dest == flag)
            raise UserError(f"{spelled} {value} is out of range: give {allowed.words}")


def _check(args: Namespace) -> None:
    _check_ranges(args)
    check_flags(data_config(args, needs_keys=False))
    if args.dry_run is not None and args.bench_data is not None:
        raise UserError(f"--bench-data {args.bench_data} reads data and --dry-run does not: drop one of the two")
    if args.device == "cpu" and args.dist_backend == "nccl":
        raise UserError("--dist-backend nccl needs GPUs: use gloo with --device cpu, or leave the flag out")
    if args.ddp_static_graph and args.accum_freq > 1:
        raise UserError(
            f"--accum-freq {args.accum_freq} leaves the graph of DistributedDataParallel not static, since only the last "
            "micro-batch talks to the other ranks: drop --ddp-static-graph"
        )
    if args.lr_scheduler == "const-cooldown" and not args.epochs_cooldown:
        raise UserError("--lr-scheduler const-cooldown needs --epochs-cooldown: the number of epochs of the cooldown")
    unknown = set(filter(None, args.report_to.split(","))) - {"tensorboard", "wandb"}
    if unknown:
        raise UserError(
            f"--report-to {args.report_to}: unknown {', '.join(sorted(unknown))}; choose tensorboard, wandb"
        )
    for path in args.model_config:
        if not Path(path).exists():
            raise UserError(f"--model-config {path} does not exist: give a json file or a folder of them")
    if args.requeue_on_signal and (args.name is None or args.resume != "latest"):
        raise UserError("--requeue-on-signal starts the same command again: add --name RUN and --resume latest")
    if args.resume == "latest" and args.name is None:
        raise UserError("--resume latest looks into the run's folder: say which run by --name")
    if args.name is not None and (Path(args.name).name != args.name or args.name == ".."):
        raise UserError(f"--name {args.name} must be one folder name: use --logs for the folder above it")
