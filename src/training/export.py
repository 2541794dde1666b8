"""The model's weights alone, for open_clip and for publishing: python -m training.export CHECKPOINT OUT.pt|OUT.safetensors

    open_clip.create_model("ViT-B-32", pretrained="OUT.safetensors")

Optimizer, objective and the state of the run stay behind.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from training.atomic_files import read_sidecar, replacing, verify
from training.errors import UNREADABLE, UserError, reason_of
from training.params import Parser

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUFFIXES = (".pt", ".safetensors")


def export(checkpoint: Path, out: Path, dtype: torch.dtype | None = None, force: bool = False) -> list[str]:
    """Write the weights of a checkpoint to a file of their own, which is never there half.

    OUT.pt holds {"state_dict": weights}, OUT.safetensors the weights, with the run's name, model, epoch and step as metadata.

    Args:
        checkpoint: of this trainer, or any file with a "state_dict" that holds tensors only.
        dtype: of the weights; None leaves them as they are. Integers, and scalars such as logit_scale, which cost nothing and
            lose much, are left in any case.
        force: write over a file that is there.

    Returns:
        What was done, in lines for the user.

    Raises:
        UserError: a mistake in one of the files, or the place cannot be written to.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"{out}: its name says the format, so it must end in {' or '.join(SUFFIXES)}")
    if out.exists() and not force:
        raise UserError(f"{out} is there already: choose another name, or add --force to write over it")
    content = _read(checkpoint)
    weights = {name: _exported(value, dtype) for name, value in content["state_dict"].items()}
    try:
        with replacing(out) as file:
            if out.suffix == ".pt":
                torch.save({"state_dict": weights}, file)
            else:
                file.write(to_safetensors(weights, _metadata(content)))
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(f"{out} cannot be written: {reason}") from None
    number = sum(value.numel() for value in weights.values())
    lines = [f"{out}: {len(weights)} tensors, {number:,} values, {out.stat().st_size:,} bytes"]
    if "logit_bias" in content:
        value = float(content["logit_bias"])
        lines.append(
            f"left out: logit_bias {value!r}, which this architecture does not have (logits = scale·cos + bias)"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 after a user's mistake (one line on stderr)."""
    parser = Parser(prog="python -m training.export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="such as logs/NAME/checkpoints/epoch_3.pt")
    parser.add_argument("out", type=Path, help="what to write, OUT.pt or OUT.safetensors")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are; scalars always are)")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    try:
        args = parser.parse_args(arguments)
        lines = export(args.checkpoint, args.out, DTYPES.get(args.dtype), args.force)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def _read(checkpoint: Path) -> dict[str, Any]:
    if not checkpoint.is_file():
        raise UserError(
            f"{checkpoint}: there is no such file; give a checkpoint, such as logs/NAME/checkpoints/epoch_3.pt"
        )
    wrong = verify(checkpoint) if read_sidecar(checkpoint) is not None else None
    if wrong is not None:
        raise UserError(f"{checkpoint} is not whole: {wrong}; choose another checkpoint")
    try:
        # Mapped: the optimizer's two thirds of the file are never read.
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise UserError(f"{checkpoint} cannot be read as a checkpoint: {reason_of(error)}") from None
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()) or not weights:
        raise UserError(f'{checkpoint} holds no weights under "state_dict": give a checkpoint of a run')
    return content


def _exported(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor of its own, in the usual order in memory: safetensors takes no views, nor two names for the same memory."""
    keeps_type = dtype is None or not value.is_floating_point() or value.ndim == 0
    return value.detach().to(value.dtype if keeps_type else dtype, copy=True, memory_format=torch.contiguous_format)


def _metadata(content: dict[str, Any]) -> dict[str, str]:
    facts = {name: str(content[name]) for name in ("name", "model", "epoch", "step") if name in content}
    return {"format": "pt", **facts}


if __name__ == "__main__":
    sys.exit(main())
