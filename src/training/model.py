"""The two towers: an open_clip model behind an interface that hands out float32 features."""

from __future__ import annotations

import difflib
import json
import logging
import math
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.transform import PreprocessCfg, image_transform_v2
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from neuclip.objectives import Objective, TemperatureLearning
from training.compilation import compile_towers
from training.data_parallel import distribute
from training.distributed import World
from training.errors import UserError, reason_of

MAX_LOG_LOGIT_SCALE = math.log(100)


class TwoTowers(nn.Module):
    """Features of both towers, normalised in float32 whatever the towers computed in.

    Args:
        model: an open_clip model (encode_image, encode_text, logit_scale).
        logit_bias: initial bias for objectives that need one, where the architecture has none. It is kept here, beside the
            model, so that the model's own state dict still fits the architecture.
    """

    def __init__(self, model: nn.Module, logit_bias: float | None = None) -> None:
        super().__init__()
        self.model = model
        needs_bias = logit_bias is not None and getattr(model, "logit_bias", None) is None
        self.extra_logit_bias = nn.Parameter(torch.tensor(float(logit_bias))) if needs_bias else None

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Encode a batch.

        Args:
            image: [B, 3, H, W]. text: [B, L] int64 tokens.

        Returns:
            image features and text features [B, d] float32, L2-normalised; logit_scale = 1/τ, 0-dim; logit_bias or None.
        """
        image_features = F.normalize(self.model.encode_image(image, normalize=False).float(), dim=-1)
        text_features = F.normalize(self.model.encode_text(text, normalize=False).float(), dim=-1)
        return image_features, text_features, self.model.logit_scale.float().exp().reshape(()), self.logit_bias

    @property
    def logit_bias(self) -> Tensor | None:
        """The bias in use, the model's or the one kept here; None without one."""
        if self.extra_logit_bias is not None:
            return self.extra_logit_bias
        return getattr(self.model, "logit_bias", None)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep τ in [0.01, 1], as CLIP does (arXiv 2103.00020, section 2.5)."""
        self.model.logit_scale.clamp_(0.0, MAX_LOG_LOGIT_SCALE)


@dataclass(frozen=True)
class ModelBundle:
    """A model with what belongs to it.

    Attributes:
        towers: on the run's device.
        preprocess_train, preprocess_val: PIL image → [3, H, W].
        tokenizer: list of strings → [B, L] int64.
        embed_dim: d.
    """

    towers: TwoTowers
    preprocess_train: Callable[[Any], Tensor]
    preprocess_val: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    embed_dim: int


def register_model_configs(paths: list[str]) -> None:
    """Make the models of --model-config known to open_clip, each under its file's stem."""
    for path in map(Path, paths):
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"--model-config {file} cannot be read as json: {error}") from None
            # open_clip passes over a file that lacks one of these, without a word.
            missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(content if isinstance(content, dict) else ())
            if missing and not path.is_dir():
                raise UserError(f"--model-config {file} is no model: it lacks {', '.join(sorted(missing))}")
        open_clip.add_model_config(path)


def copy_model_configs(paths: list[str], folder: Path) -> None:
    """Copy the files of --model-config into the run folder, where evaluation looks for them."""
    for path in map(Path, paths):
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / file.name).exists() or not (folder / file.name).samefile(file):
                shutil.copy(file, folder / file.name)


def check_model(args: Namespace) -> None:
    """Check --model and --pretrained before anything is built.

    Raises:
        UserError: no such model, or neither a tag nor a file for --pretrained.
    """
    register_model_configs(args.model_config)
    if ":" in args.model:
        return
    known = open_clip.list_models()
    name = args.model.replace("/", "-")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=6, cutoff=0.4) or known[:6]
        raise UserError(
            f"--model {args.model} is unknown: use one of open_clip's ({', '.join(near)}, …) "
            "or describe your own with --model-config FILE.json"
        )
    if args.pretrained:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if args.pretrained not in tags and not Path(args.pretrained).is_file():
            raise UserError(
                f"--pretrained {args.pretrained} is neither a file nor a tag of {args.model}: "
                f"its tags are {', '.join(tags) or 'none'}"
            )


def build_model(args: Namespace, objective_class: type[Objective], device: torch.device) -> ModelBundle:
    """Create the model with the starting temperature and bias that the objective declares.

    Raises:
        UserError: open_clip cannot build or load it; its own reason is repeated.
    """
    # Every rank draws the same weights.
    torch.manual_seed(args.seed)
    # open_clip warns that a new model starts at random.
    with _open_clip_explained(args, logging.INFO if args.pretrained else logging.WARNING):
        model, preprocess_train, preprocess_val = open_clip.create_model_and_transforms(
            args.model,
            args.pretrained or None,
            precision=args.precision,
            device=device,
            pretrained_image=args.pretrained_image,
            **_model_options(args),
        )
        tokenizer = _tokenizer(args)
    towers = TwoTowers(model, objective_class.initial_logit_bias).to(device)
    _set_starting_point(args, objective_class, towers)
    try:
        _lock(args, model)
    except (AssertionError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise UserError(f"--lock-image / --lock-text: model {args.model} cannot be frozen that way: {error}") from error
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if is_convolutional(model.visual):
        # The order in which tensor cores read. Loaded and saved weights are in the usual one: see TrainingState.
        model.visual.to(memory_format=torch.channels_last)
    return ModelBundle(towers, preprocess_train, preprocess_val, tokenizer, _embed_dim(model, tokenizer, device))


def build_transforms(args: Namespace) -> tuple[Callable[[Any], Tensor], Callable[[list[str]], Tensor]]:
    """preprocess_train and tokenizer as `build_model` gives them, without weights: where only the loader is wanted.

    Raises:
        UserError: open_clip cannot build the model; its own reason is repeated.
    """
    with _open_clip_explained(args, logging.WARNING):
        # On the meta device parameters have shapes and no memory; what the transform asks of a model is its image size.
        with torch.device("meta"):
            model, _, _ = open_clip.create_model_and_transforms(
                args.model, args.pretrained or None, load_weights=False, device="meta", **_model_options(args)
            )
        # Made once more, since transforms may hold tensors of their own.
        config = PreprocessCfg(**model.visual.preprocess_cfg)
        return image_transform_v2(config, is_train=True, aug_cfg=args.aug_cfg), _tokenizer(args)


def is_convolutional(image_tower: nn.Module) -> bool:
    """Whether it convolves more than once: a vision transformer's patch embedding alone is one convolution."""
    return sum(isinstance(part, nn.Conv2d) for part in image_tower.modules()) > 1


def wrap(args: Namespace, towers: TwoTowers, objective: Objective, world: World) -> nn.Module:
    """What the loop calls: the towers, compiled and distributed as asked for."""
    towers.model.logit_scale.requires_grad_(objective.temperature_learning is TemperatureLearning.OUTER)
    if objective.initial_logit_bias is None and towers.logit_bias is not None:
        # A bias of the architecture that this objective does not look at: no gradient would come, and DDP waits for all.
        towers.logit_bias.requires_grad_(False)
    # The captioning head of CoCa models takes no part in a contrastive objective.
    decoder = getattr(towers.model, "text_decoder", None)
    if decoder is not None:
        decoder.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in towers.parameters()):
        raise UserError("--lock-image, --lock-text and a constant temperature leave nothing to train: drop one of them")
    if args.use_bn_sync and world.size > 1:
        if world.device.type != "cuda":
            raise UserError("--use-bn-sync works on GPUs only: drop it on CPUs")
        towers.model = convert_sync_batchnorm(towers.model)
    if args.torchcompile:
        compile_towers(towers, has_two_passes=args.accum_freq > 1)
    return distribute(towers, world, args.ddp_static_graph, args.grad_compression)


@contextmanager
def _open_clip_explained(args: Namespace, silenced: int) -> Iterator[None]:
    """Silences what open_clip tells of every step of a construction, and makes one line of what it raises."""
    if not args.debug:
        logging.disable(silenced)
    try:
        yield
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, pickle.UnpicklingError) as error:
        subject = f"--model {args.model}: open_clip cannot build it"
        if args.pretrained:
            subject = f"--pretrained {args.pretrained} does not load into --model {args.model}"
        raise UserError(f"{subject}: {reason_of(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


def _model_options(args: Namespace) -> dict[str, Any]:
    """What open_clip is told of the architecture and the transforms."""
    names = (
        *("force_quick_gelu", "force_custom_text", "force_patch_dropout", "force_image_size", "force_context_length"),
        *("image_mean", "image_std", "image_interpolation", "image_resize_mode", "aug_cfg", "cache_dir"),
    )
    return {name: getattr(args, name) for name in names}


def _tokenizer(args: Namespace) -> Callable[[list[str]], Tensor]:
    return open_clip.get_tokenizer(args.model, cache_dir=args.cache_dir, context_length=args.force_context_length)


@torch.no_grad()
def _set_starting_point(args: Namespace, objective_class: type[Objective], towers: TwoTowers) -> None:
    """Initial temperature and bias as flags and objective say; pretrained weights keep theirs."""
    # Pure half precision would round the small steps of these two away.
    towers.model.logit_scale.data = towers.model.logit_scale.data.float()
    if towers.logit_bias is not None:
        towers.logit_bias.data = towers.logit_bias.data.float()
    if not args.pretrained or args.temperature is not None:
        temperature = args.temperature or objective_class.initial_temperature
        towers.model.logit_scale.fill_(math.log(1.0 / temperature))
    if towers.logit_bias is None or objective_class.initial_logit_bias is None:
        return
    if not args.pretrained:
        towers.logit_bias.fill_(objective_class.initial_logit_bias)
    elif towers.extra_logit_bias is not None and Path(args.pretrained).suffix == ".pt":
        # One of our own checkpoints keeps a bias that the architecture does not have beside the model's weights.
        saved = torch.load(args.pretrained, map_location="cpu", weights_only=True)
        if isinstance(saved, dict) and "logit_bias" in saved and "state_dict" in saved:
            towers.extra_logit_bias.copy_(saved["logit_bias"])


def _lock(args: Namespace, model: nn.Module) -> None:
    if args.lock_image:
        model.lock_image_tower(
            unlocked_groups=args.lock_image_unlocked_groups, freeze_bn_stats=args.lock_image_freeze_bn_stats
        )
        logging.info("image tower frozen, last %d groups excepted", args.lock_image_unlocked_groups)
    if args.lock_text:
        # open_clip's own text towers know no other way than to freeze them, Hugging Face's do.
        has_choice = isinstance(getattr(model, "text", None), HFTextEncoder)
        freeze_layer_norm = args.lock_text_freeze_layer_norm or not has_choice
        model.lock_text_tower(unlocked_layers=args.lock_text_unlocked_layers, freeze_layer_norm=freeze_layer_norm)
        logging.info("text tower frozen, last %d layers excepted", args.lock_text_unlocked_layers)


@torch.no_grad()
def _embed_dim(model: nn.Module, tokenizer: Callable[[list[str]], Tensor], device: torch.device) -> int:
    # Asked of the model itself: configurations spell it in several ways, and hub models have none at hand.
    was_training = model.training
    features = model.eval().encode_text(tokenizer(["a"]).to(device), normalize=False)
    model.train(was_training)
    return features.shape[-1]
