"""A training run's folder: its parameters, its checkpoints, and the model in one of them."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor

from evaluation.errors import UserError, one_line
from evaluation.features import DualEncoder

# Parameters of a run that change the model or its preprocessing, by their names in open_clip.
MODEL_PARAMETERS = (
    "force_quick_gelu",
    "force_custom_text",
    "force_patch_dropout",
    "force_image_size",
    "force_context_length",
    "image_mean",
    "image_std",
    "image_interpolation",
    "image_resize_mode",
)


class Checkpoint(NamedTuple):
    """One checkpoint file: its path, and which epoch (or else which iteration) it was saved after, if its name or its
    content says."""

    path: Path
    epoch: int | None = None
    iteration: int | None = None

    def sha256(self) -> str:
        """The digest of the file, in hexadecimal."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    @property
    def label(self) -> str:
        """`epoch 3`, `iteration 5000`, or the file's name."""
        if self.epoch is not None:
            return f"epoch {self.epoch}"
        return f"iteration {self.iteration}" if self.iteration is not None else self.path.name


class LoadedModel(NamedTuple):
    """What open_clip needs to be used: the model in evaluation mode, the image transform, the tokenizer."""

    model: DualEncoder
    preprocess_val: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]


class RunFolder:
    """The folder that a training run wrote.

    Args:
        path: the folder, with params.txt (lines `name: value`) and checkpoints/ (epoch_N.pt, iter_S.pt, epoch_latest.pt).
        architecture: open_clip's name of the model, for the folder of a trainer that writes no params.txt.

    Attributes:
        path: the folder.
        params: the run's parameters; numbers, booleans, None, lists and tuples are parsed, everything else stays text.
        texts: the parameters as they stand in the file.

    Raises:
        UserError: if the folder is missing, has no params.txt and no architecture is given, or names another one.
    """

    def __init__(self, path: str | Path, architecture: str | None = None) -> None:
        self.path = Path(path)
        file = self.path / "params.txt"
        if not self.path.is_dir():
            raise UserError(f"run folder {self.path} does not exist; give the folder that training wrote, logs/NAME.")
        if not file.is_file() and architecture is None:
            raise UserError(f"{file} is missing: give logs/NAME, or --arch MODEL for another trainer's folder.")
        self.texts = param_texts(_text(file)) if file.is_file() else {}
        self.params = {name: _parsed(text) for name, text in self.texts.items()}
        trained = self.params.setdefault("model", architecture)
        if architecture is not None and _spelled(trained) != _spelled(architecture):
            raise UserError(f"--arch {architecture}: {file} says model: {trained}; leave --arch out.")

    @property
    def model_facts(self) -> dict[str, Any]:
        """The architecture, and the parameters that change the model or its preprocessing where they are set."""
        set_options = {name: value for name, value in self._model_options().items() if value is not False}
        return {"model": self.params["model"], **set_options}

    @property
    def name(self) -> str:
        """The name of the run, which is its folder's name."""
        return self.path.resolve().name

    @property
    def objective(self) -> str:
        """The objective the run was trained with, as params.txt calls it; empty if it does not say."""
        return str(self.params.get("objective") or "")

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints by name: epochs in order, then iterations in order. epoch_latest.pt is not among them."""
        epochs, iterations = [], []
        for path in (self.path / "checkpoints").glob("*.pt"):
            match = re.fullmatch(r"(epoch|iter)_(\d+)\.pt", path.name)
            if match and match[1] == "epoch":
                epochs.append(Checkpoint(path, epoch=int(match[2])))
            elif match:
                iterations.append(Checkpoint(path, iteration=int(match[2])))
        return sorted(epochs, key=lambda c: c.epoch or 0) + sorted(iterations, key=lambda c: c.iteration or 0)

    def checkpoint(self, epoch: int | None = None, iteration: int | None = None) -> Checkpoint:
        """Find one checkpoint; never another one than asked for.

        Args:
            epoch: the epoch N of epoch_N.pt.
            iteration: the step S of iter_S.pt. With neither, the newest by epoch: the last epoch_N.pt, or epoch_latest.pt
                where that is further on; the last iter_S.pt if there is no other.

        Raises:
            UserError: if it is not there, with what is there instead; if both an epoch and an iteration are given.
        """
        if epoch is not None and iteration is not None:
            raise UserError(f"epoch {epoch} and iteration {iteration} were both asked for; give one of them.")
        available = self.checkpoints()
        if epoch is None and iteration is None:
            return self._newest(available)
        for checkpoint in available:
            if (checkpoint.epoch, checkpoint.iteration) == (epoch, iteration):
                return checkpoint
        wanted = f"epoch_{epoch}.pt" if epoch is not None else f"iter_{iteration}.pt"
        raise UserError(f"{self.path}/checkpoints has no {wanted}; there is: {self._listing(available)}.")

    def load_model(
        self,
        epoch: int | None = None,
        iteration: int | None = None,
        device: torch.device | str = "cpu",
    ) -> LoadedModel:
        """Build the run's model with open_clip and load a checkpoint into it (weights only: nothing is unpickled).

        Model configurations in the folder's model_configs/ are registered first. Parameters that change the model
        (force_image_size and its like) are honoured. Weights are float32.

        Args:
            epoch, iteration: which checkpoint, as in `checkpoint`.
            device: where the model is put.

        Raises:
            UserError: for a missing checkpoint, an unknown architecture, or weights that do not fit it.
        """
        return self.load_checkpoint(self.checkpoint(epoch, iteration), device)

    def load_checkpoint(self, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> LoadedModel:
        """`load_model` for a checkpoint that `checkpoint` has found: the newest may be another one by now."""
        architecture = self.params.get("model")
        # open_clip keeps one registry by name, and the last entry wins: register again each time, as another run's
        # configuration of the same name may have come in between.
        for config in sorted((self.path / "model_configs").glob("*.json")):
            _register(config)
        if not architecture or _spelled(architecture) not in open_clip.list_models():
            configs = self.path / "model_configs"
            where = "params.txt says model:" if (self.path / "params.txt").is_file() else "--arch"
            raise UserError(f"{where} {architecture}, unknown to open_clip; put its JSON into {configs}.")
        try:
            model, _, preprocess_val = open_clip.create_model_and_transforms(
                architecture, pretrained=str(checkpoint.path), device=device, **self._model_options()
            )
        except Exception as error:  # a damaged file makes torch raise nearly anything
            reason = _reason(error)
            raise UserError(f"{checkpoint.path} does not load into model {architecture} ({reason}).") from error
        context_length = self.params.get("force_context_length")
        tokenizer = open_clip.get_tokenizer(architecture, context_length=context_length)
        return LoadedModel(model.eval(), preprocess_val, tokenizer)

    def _model_options(self) -> dict[str, Any]:
        return {name: self.params[name] for name in MODEL_PARAMETERS if self.params.get(name) is not None}

    def _newest(self, available: list[Checkpoint]) -> Checkpoint:
        epochs = [checkpoint for checkpoint in available if checkpoint.epoch is not None]
        latest = self.path / "checkpoints" / "epoch_latest.pt"
        if latest.is_file():
            reached = _stored_epoch(latest)
            if not epochs or reached is None or reached > (epochs[-1].epoch or 0):
                return Checkpoint(latest, epoch=reached)
        if not available:
            raise UserError(
                f"{self.path}/checkpoints holds no checkpoint; train with --save-frequency 1 or wait for one."
            )
        return epochs[-1] if epochs else available[-1]

    def _listing(self, available: list[Checkpoint]) -> str:
        names = [checkpoint.path.name for checkpoint in available]
        if (self.path / "checkpoints" / "epoch_latest.pt").is_file():
            names.append("epoch_latest.pt")
        return ", ".join(names) or "nothing"


class Subject(NamedTuple):
    """A run, the checkpoint of it to evaluate, the SHA-256 of its file in hexadecimal, and when it was written (ns)."""

    run: RunFolder
    checkpoint: Checkpoint
    sha256: str
    written_ns: int

    @classmethod
    def of(cls, run: RunFolder, checkpoint: Checkpoint) -> Subject:
        """Read the file for its digest."""
        written_ns = checkpoint.path.stat().st_mtime_ns
        return cls(run, checkpoint, checkpoint.sha256(), written_ns)

    def check_unchanged(self) -> None:
        """Call it after loading the model.

        Raises:
            UserError: the file has been replaced since its digest was taken, as epoch_latest.pt is while a run goes on.
        """
        path = self.checkpoint.path
        if not path.is_file() or path.stat().st_mtime_ns != self.written_ns:
            raise UserError(f"{path} was replaced while it was read: the run goes on; give --epoch N, or start again.")


def _spelled(architecture: object) -> str:
    """open_clip takes ViT-B/32 and ViT-B-32 for the same."""
    return str(architecture).replace("/", "-")


def _stored_epoch(path: Path) -> int | None:
    """The epoch a checkpoint says it was saved after; the weights stay on the disk."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); ask for another epoch or remove it.") from error
    epoch = content.get("epoch") if isinstance(content, dict) else None
    return epoch if isinstance(epoch, int) else None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _register(config: Path) -> None:
    """Tell open_clip of a model configuration. It must be whole: open_clip reads all it was told of again with each."""
    try:
        if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
            raise ValueError("it holds no JSON object")
        open_clip.add_model_config(config)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{config} is no model configuration ({_reason(error)}); mend or remove it.") from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({_reason(error)}); mend it or copy it again.") from None


def read_params(file: Path) -> dict[str, Any]:
    """`parse_params` of a file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    return parse_params(_text(file))


def param_texts(text: str) -> dict[str, str]:
    """Lines `name: value` → a dict of texts; other lines are left out."""
    params = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator and re.fullmatch(r"\w[\w.-]*", name.strip()):
            params[name.strip()] = value.strip()
    return params


def parse_params(text: str) -> dict[str, Any]:
    """Lines `name: value` → a dict; values that are Python literals (numbers, None, True, lists) are parsed."""
    return {name: _parsed(value) for name, value in param_texts(text).items()}


def _parsed(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # what literal_eval raises at text that only begins like a literal
