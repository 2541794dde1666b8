"""The command line: the published one, spellings, synonyms, defaults that depend on other flags, and what is refused."""

from __future__ import annotations

import argparse
import io
import re
import shlex
from contextlib import redirect_stdout

import pytest

from end_to_end.published import PUBLISHED, published_flags
from neuclip.objectives import OBJECTIVES
from training.errors import UserError
from training.params import build_parser, data_config, parse_args

DATA = ["--dataset-type", "synthetic"]


def test_published_command() -> None:
    args = parse_args(published_flags())
    expected = {
        "objective": "neuclip",
        "save_frequency": 1,
        "train_data": "./data/{00000..00019}.tar",
        "train_num_samples": 13710637,
        "data_size": 19270000,
        "warmup": 500,
        "batch_size": 512,
        "epochs": 24,
        "stop_epochs": 24,
        "workers": 6,
        "model": "ViT-B-32",
        "name": "neuclip",
        "seed": 2026,
        "wd": 0.2,
        "local_loss": True,
        "multiply_tau": True,
        "temperature_scheme": "global_learnable",
        "temperature": 0.07,
        "lr": 5e-4,
        "lr_tau": 6.25e-5,
        "lr_tau_scheduler": "step_thresh",
        "rho": 11.0,
        "fastclip_eps": 1e-6,
        "gamma": 0.42,
        "gamma_schedule": "cosine",
        "gamma_decay_epochs": 24.0,
        "npn_lr": 1.0,
        "npn_num_protos": 4096,
        "npn_repetition": 10,
        "npn_restart_iter": 500,
        # not given: what the field uses
        "precision": "amp_bf16",
        "optimizer": "adamw",
        "lr_scheduler": "cosine",
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
    }
    assert {name: getattr(args, name) for name in expected} == expected


# What the sample commands of FastCLIP's publication (CC3M on 8 GPUs) have in common, and what makes a version of it.
FASTCLIP = (
    "--save-frequency 1 --train-data './cc3m/{00000..00331}.tar' --train-num-samples 2723840 --data_size 3318333 "
    "--warmup 10000 --batch-size 128 --epochs 37 --workers 6 --model RN50 --name medium --seed 2024 --profile "
    "--wd 0.1 --local-loss --lr 1e-3"
)
FASTCLIP_VERSIONS = {
    "openclip": ("--gather-with-grad", {"objective": "openclip", "lr_tau": 1e-3, "gather_with_grad": True}),
    "v0": (
        "--fastclip --temperature_scheme global_learnable --gamma 0.2 --gamma_schedule cosine --gamma_decay_epochs 18",
        {"temperature_scheme": "global_learnable", "multiply_tau": False, "gamma": 0.2, "gamma_decay_epochs": 18.0},
    ),
    "v1": (
        "--fastclip --temperature_scheme global_constant --gamma 0.2 --gamma_schedule cosine --gamma_decay_epochs 18",
        {"temperature_scheme": "global_constant", "multiply_tau": False, "fastclip_eps": 1e-14, "temperature": None},
    ),
    "v2": (
        "--fastclip --temperature_scheme individual_learnable --lr_tau 0.0133 --lr_tau_scheduler const --temperature 0.03 "
        "--rho 7.0 --gamma 0.2 --gamma_schedule cosine --gamma_decay_epochs 18",
        {"temperature_scheme": "individual_learnable", "lr_tau": 0.0133, "temperature": 0.03, "rho": 7.0},
    ),
    "v3": (
        "--fastclip --multiply_tau --temperature_scheme global_learnable --lr_tau 2e-4 --lr_tau_scheduler step_thresh "
        "--rho 6.5 --gamma 0.2 --gamma_schedule cosine --gamma_decay_epochs 18",
        {
            "multiply_tau": True,
            "lr_tau": 2e-4,
            "lr_tau_scheduler": "step_thresh",
            "rho": 6.5,
            "gamma_schedule": "cosine",
        },
    ),
}


@pytest.mark.parametrize("version", FASTCLIP_VERSIONS)
def test_published_fastclip_commands(version: str) -> None:
    command, expected = FASTCLIP_VERSIONS[version]
    args = parse_args(shlex.split(f"{FASTCLIP} {command}"))
    expected = {"objective": "fastclip", "data_size": 3318333, "batch_size": 128, "wd": 0.1, **expected}
    assert {name: getattr(args, name) for name in expected} == expected


def test_temperature_schedule_is_the_objectives_unless_given() -> None:
    for name, cls in OBJECTIVES.items():
        words = [*DATA, "--objective", name, "--data_size", "9"]
        assert parse_args(words).lr_tau_scheduler == cls.temperature_schedule
        assert parse_args([*words, "--lr_tau_scheduler", "const"]).lr_tau_scheduler == "const"
    assert OBJECTIVES["amorlip"].temperature_schedule == "step_thresh"


def test_an_epoch_drawn_with_replacement_may_be_longer_than_the_data_set() -> None:
    words = ["--train-data", "a.tar", "--train-num-samples", "70", "--data_size", "50"]
    assert parse_args([*words, "--dataset-resampled"]).data_size == 50
    with pytest.raises(UserError, match="--data_size 50 is smaller than --train-num-samples 70"):
        parse_args(words)


def test_published_amorlip_command() -> None:
    command = (
        '--amorlip --lambda-lr 0.001 --lambda-update-frequency "[3]" --learn-logit-scale --lambda_tolerance=5e-3 '
        "--calculate_full --h_dim_factor 1 --lr_tau 1e-4 --scale_loss --model_ema_beta 0.92 --beta_decay_epochs 16 "
        "--z_beta_max 0.8 --update_ema_mlps_every_n_steps 2 --pos_coef 1e-3 --fit_w_prev --lambda_eps 0. "
        '--reinit_lambda_every_n_epochs 1 --rho_list="[8.5 -8.5 -8.5]" --lambda_loss_type "log_l2" --grad-clip-norm 1.0'
    )
    args = parse_args([*DATA, *shlex.split(command)])
    expected = {
        "objective": "amorlip",
        "lambda_lr": 1e-3,
        "lambda_update_frequency": "[3]",
        "learn_logit_scale": True,
        "lambda_tolerance": 5e-3,
        "calculate_full": True,
        "h_dim_factor": 1.0,
        "lr_tau": 1e-4,
        "scale_loss": True,
        "model_ema_beta": 0.92,
        "beta_decay_epochs": 16.0,
        "z_beta_max": 0.8,
        "update_ema_mlps_every_n_steps": 2,
        "pos_coef": 1e-3,
        "fit_w_prev": True,
        "lambda_eps": 0.0,
        "reinit_lambda_every_n_epochs": 1,
        "rho_list": "[8.5 -8.5 -8.5]",
        "lambda_loss_type": "log_l2",
        "grad_clip_norm": 1.0,
    }
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("flag", ["fit_w_prev", "scale_loss", "calculate_full"])
def test_switches_are_turned_off_in_every_spelling(flag: str) -> None:
    hyphens = flag.replace("_", "-")
    for spelling in (f"--no-{flag}", f"--no_{flag}", f"--no-{hyphens}"):
        assert getattr(parse_args([*DATA, "--amorlip", spelling]), flag) is False
    for spelling in ([], [f"--{flag}"], [f"--{hyphens}"]):
        assert getattr(parse_args([*DATA, "--amorlip", *spelling]), flag) is True


def test_published_command_needs_no_line_breaks() -> None:
    assert vars(parse_args(shlex.split(PUBLISHED.replace("\n", " ")))) == vars(parse_args(published_flags()))


def _flags() -> list[tuple[str, argparse.Action]]:
    actions = [action for action in build_parser()._actions if action.dest != "help"]
    return [(option, action) for action in actions for option in action.option_strings]


def _words_for(action: argparse.Action) -> list[str]:
    """A value that the flag accepts."""
    if action.nargs == 0:
        return []
    if action.dest == "aug_cfg":
        return ["use_timm=True"]
    if action.choices:
        return [str(next(iter(action.choices)))]
    word = "7" if action.type in (int, float) else "word"
    return [word] * (action.nargs if isinstance(action.nargs, int) else 1)


@pytest.mark.parametrize(("option", "action"), [pytest.param(o, a, id=o) for o, a in _flags()])
def test_every_flag_with_hyphens_and_underscores(
    option: str, action: argparse.Action, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the spelling is looked at here, so the checks of values and combinations are left out.
    for check in ("_check", "resolve_objective"):
        monkeypatch.setattr(f"training.params.{check}", lambda args: None)
    values = _words_for(action)
    found = []
    for spelling in {option, "--" + option[2:].replace("_", "-"), "--" + option[2:].replace("-", "_")}:
        found.append(getattr(parse_args([spelling, *values]), action.dest))
        if len(values) == 1:
            found.append(getattr(parse_args([f"{spelling}={values[0]}"]), action.dest))
    assert all(value == found[0] for value in found)
    if isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-"):
        assert found[0] is False
    else:
        assert found[0] not in (None, False)


def test_mixed_spellings_within_a_flag() -> None:
    assert parse_args([*DATA, "--lr-tau_scheduler", "const"]).lr_tau_scheduler == "const"


def test_values_are_left_as_they_are() -> None:
    args = parse_args(["--train-data", "./my_data/a_b.tar", "--name=a-b_c", "--wandb-notes", "x_y-z"])
    assert (args.train_data, args.name, args.wandb_notes) == ("./my_data/a_b.tar", "a-b_c", "x_y-z")


def test_abbreviations_are_refused() -> None:
    with pytest.raises((UserError, SystemExit)):
        parse_args([*DATA, "--batch", "3"])


@pytest.mark.parametrize(
    ("flags", "objective"),
    [
        ("", "openclip"),
        ("--objective openclip", "openclip"),
        ("--objective siglip", "siglip"),
        ("--siglip", "siglip"),
        ("--objective siglip --siglip", "siglip"),
        ("--objective neuclip", "neuclip"),
        ("--fastclip --npn", "neuclip"),
        ("--npn --fastclip", "neuclip"),
        ("--npn", "neuclip"),
        ("--objective neuclip --fastclip", "neuclip"),
        ("--objective neuclip --fastclip --npn", "neuclip"),
        ("--amorlip", "amorlip"),
        ("--objective amorlip --amorlip", "amorlip"),
    ],
)
def test_synonyms(flags: str, objective: str) -> None:
    assert parse_args([*DATA, *flags.split()]).objective == objective


@pytest.mark.parametrize(
    "flags",
    [
        "--objective siglip --npn",
        "--objective openclip --npn",
        "--objective openclip --siglip",
        "--objective neuclip --siglip",
        "--siglip --npn",
        "--amorlip --npn",
        "--objective amorlip --siglip",
        "--siglip --fastclip --npn",
        "--objective neuclip --fastclip --npn --siglip",
    ],
)
def test_contradictions(flags: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_args([*DATA, *flags.split()])
    for word in flags.split():
        if word not in ("--objective",) and word.startswith("--"):
            assert word in str(refusal.value)


def _help() -> str:
    text = io.StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit) as leaving:
        parse_args(["--help"])
    assert leaving.value.code == 0
    return text.getvalue()


def _group(title: str) -> str:
    """One group of --help: from its title to the next one."""
    match = re.search(rf"^{re.escape(title)}:\n(.*?)(?=^\S)", _help() + "\nend", re.MULTILINE | re.DOTALL)
    assert match, f"no group {title!r}"
    return match.group(1)


@pytest.mark.parametrize(
    ("title", "flags"),
    [
        ("objective", ["--objective", "--fastclip", "--npn", "--siglip"]),
        (
            "global contrastive objectives",
            ["--rho", "--fastclip_eps", "--gamma", "--data_size", "--temperature_scheme"],
        ),
        (
            "temperature and memory of the loss",
            ["--temperature", "--lr_tau", "--lr_tau_scheduler", "--loss-chunk-size"],
        ),
        ("objective openclip", ["--local-loss", "--gather-with-grad"]),
        ("objective siglip", ["--loss-dist-impl"]),
        ("objective neuclip", ["--npn_num_protos", "--npn_repetition", "--npn_restart_iter", "--npn_lr"]),
        ("objective neuclip", ["--npn_arch", "--npn_objective", "--npn_optimization", "--npn_optimizer", "--npn_wd"]),
        ("objective amorlip", ["--lambda-lr", "--fit_w_prev", "--rho_list", "--learn-logit-scale"]),
        ("data", ["--train-data", "--val-data", "--train-num-samples", "--csv-separator", "--workers"]),
        ("model", ["--model", "--model-config", "--pretrained", "--precision", "--force-image-size", "--aug-cfg"]),
        ("frozen towers", ["--lock-image", "--lock-text", "--lock-image-unlocked-groups"]),
        (
            "optimization",
            ["--lr", "--wd", "--beta1", "--warmup", "--batch-size", "--epochs", "--optimizer"],
        ),
        ("run folder and checkpoints", ["--name", "--logs", "--resume", "--save-frequency", "--save-most-recent"]),
        ("logging", ["--report-to", "--wandb-project-name", "--log-every-n-steps", "--profile", "--debug"]),
    ],
)
def test_help_is_grouped(title: str, flags: list[str]) -> None:
    group = _group(title)
    for flag in flags:
        assert re.search(rf"^  {flag}\b", group, re.MULTILINE), f"{flag} is not in {title}"


@pytest.mark.parametrize("objective", list(OBJECTIVES.values()), ids=list(OBJECTIVES))
def test_a_methods_flags_stand_in_no_other_group(objective: type) -> None:
    parser = argparse.ArgumentParser()
    own = parser.add_argument_group("own")
    objective.add_arguments(own)  # type: ignore[attr-defined]
    flags = [option for action in own._group_actions for option in action.option_strings]
    for group in build_parser()._action_groups:
        inside = {option for action in group._group_actions for option in action.option_strings}
        expected = set(flags) if group.title == f"objective {objective.name}" else set()  # type: ignore[attr-defined]
        assert inside & set(flags) == expected


def test_every_flag_belongs_to_a_titled_group() -> None:
    parser = build_parser()
    assert {action.dest for action in parser._optionals._group_actions} == {"help"}


@pytest.mark.parametrize(
    ("model", "beta2", "eps"),
    [("ViT-B-32", 0.98, 1e-6), ("vit_medium", 0.98, 1e-6), ("RN50", 0.999, 1e-8), ("convnext_base", 0.999, 1e-8)],
)
def test_defaults_by_model_name(model: str, beta2: float, eps: float) -> None:
    args = parse_args([*DATA, "--model", model])
    assert (args.lr, args.beta1, args.beta2, args.eps) == (5e-4, 0.9, beta2, eps)
    args = parse_args([*DATA, "--model", model, "--lr", "1", "--beta1", "0.1", "--beta2", "0.2", "--eps", "0.3"])
    assert (args.lr, args.beta1, args.beta2, args.eps) == (1.0, 0.1, 0.2, 0.3)


def test_temperature_learns_as_the_model_unless_told() -> None:
    assert parse_args([*DATA, "--lr", "0.3"]).lr_tau == 0.3
    assert parse_args([*DATA, "--lr", "0.3", "--lr_tau", "-1"]).lr_tau == 0.3
    assert parse_args([*DATA, "--lr", "0.3", "--lr_tau", "0.1"]).lr_tau == 0.1
    assert parse_args([*DATA, "--lr_tau", "0"]).lr_tau == 0.0


@pytest.mark.parametrize(("given", "stop"), [([], 8), (["--stop_epochs", "3"], 3), (["--stop_epochs", "9"], 8)])
def test_stop_epochs(given: list[str], stop: int) -> None:
    args = parse_args([*DATA, "--epochs", "8", *given])
    assert (args.epochs, args.stop_epochs) == (8, stop)


@pytest.mark.parametrize(("given", "size"), [("64", 64), ("64 96", [64, 96])])
def test_image_size(given: str, size: object) -> None:
    assert parse_args([*DATA, "--force-image-size", *given.split()]).force_image_size == size


def test_augmentation_values_are_python_literals() -> None:
    flags = ["--aug-cfg", "scale=(0.5, 1.0)", "use_timm=True", "color_jitter=0.4", "interpolation=random"]
    expected = {"scale": (0.5, 1.0), "use_timm": True, "color_jitter": 0.4, "interpolation": "random"}
    assert parse_args([*DATA, *flags]).aug_cfg == expected


def test_model_config_is_repeatable(tmp_path: object) -> None:
    folder = str(tmp_path)
    assert parse_args([*DATA, "--model-config", folder, "--model-config", folder]).model_config == [folder, folder]


def test_data_config_takes_over_every_field() -> None:
    flags = {
        "train_data": "a.tar",
        "dataset_type": "webdataset",
        "train_num_samples": 70,
        "dataset_resampled": True,
        "train_data_upsampling_factors": "1",
        "csv_img_key": "i",
        "csv_caption_key": "c",
        "csv_separator": ";",
        "workers": 3,
        "batch_size": 5,
        "accum_freq": 3,
        "seed": 11,
        "shuffle_buffer": 13,
        "data_size": 90,
        "decode": "exact",
        "data_timeout": 7.5,
    }
    words = [
        part
        for name, value in flags.items()
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    assert vars(data_config(parse_args(words), needs_keys=True)) == {**flags, "needs_keys": True}


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 0",
        "--warmup -1",
        "--save-frequency -1",
        "--val-frequency -1",
        "--zeroshot-frequency -1",
        "--log-every-n-steps 0",
        "--lr 0",
        "--lr=-1e-3",
        "--temperature 0",
        "--temperature 0.001",
        "--batch-size 0",
        "--accum-freq 0",
        "--accum-freq -2",
        "--ddp-static-graph --accum-freq 2",
        "--workers -1",
        "--train-num-samples 0",
        "--seed -1",
        "--report-to tensorflow",
        "--model-config nowhere.json",
        "--name a/b",
        "--name ..",
        "--lr-scheduler const-cooldown",
        "--train-num-samples 100 --data_size 99",
        "--resume latest",
        "--objective neuclip --gamma 1.5",
        "--objective neuclip --gamma=-0.1",
        "--objective neuclip --gamma_decay_epochs 0",
        "--objective neuclip --fastclip_eps=-1",
        "--objective neuclip --npn_num_protos 0",
        "--objective neuclip --npn_repetition -1",
        "--objective neuclip --npn_restart_iter -1",
        "--objective neuclip --npn_lr 0",
        "--objective neuclip --npn_wd 0.1",
        "--objective neuclip --temperature_scheme individual_learnable",
        "--grad-clip-norm 0",
        "--grad-clip-norm -1",
        "--wd -0.1",
        "--beta2 1.0",
        "--force-patch-dropout 1.0",
        "--lr nan",
    ],
)
def test_values_out_of_range_are_refused_by_name(flags: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_args([*DATA, *flags.split()])
    message = str(refusal.value)
    assert "\n" not in message
    flag = re.split("[ =]", flags.replace("--objective neuclip ", ""))[0]
    assert flag.replace("_", "-") in message.replace("_", "-")
    last = re.split("[ =]", flags)[-1]
    shown = {last, str(float(last))} if re.fullmatch(r"-?\d[\d.e-]*", last) else {last}
    assert any(value in message for value in shown), message


@pytest.mark.parametrize(
    "flags",
    ["--no-such-flag 3", "--precision fp12", "--batch-size many", "--accum-freq 2.5", "stray", "--aug-cfg scale"],
    ids=str,
)
def test_mistakes_that_argparse_finds_are_one_line_too(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as refusal:
        parse_args([*DATA, *flags.split()])
    assert "\n" not in str(refusal.value)
    assert flags.split()[-1] in str(refusal.value) or flags.split()[0] in str(refusal.value)
    assert capsys.readouterr().err == ""
