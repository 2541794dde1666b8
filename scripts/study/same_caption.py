#!/usr/bin/env python3
"""What part of a finished run's normalizers comes from pairs with the sample's own caption: RUN/same_caption.json.

    python scripts/study/same_caption.py logs/study/neuclip-b32-s0

Such pairs are no mistakes that a loss should push apart. Few batches have any; a normalizer over all data has all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "src")]

import torch
from torch import Tensor

from evaluation import precision
from evaluation.errors import UserError
from evaluation.features import encode_batch, evaluating
from evaluation.normalizers.pool import Everything, batches, open_pool
from evaluation.ranks import joined
from evaluation.run_folder import RunFolder
from evaluation.suite import Setting
from evaluation.whole_files import write_whole

FILE = "same_caption.json"
_BLOCK = 512


def shares(anchors: Tensor, others: Tensor, captions: Tensor, probes: Tensor, logit_scale: float) -> Tensor:
    """The part of Σ_{j≠i} exp(a_i·o_j/τ) that pairs with the caption of i have.

    Args:
        anchors, others: [n, d] float32, L2-normalised features of one side and of the other.
        captions: [n] int64, equal where captions are.
        probes: [P] int64, the i that are asked about.
        logit_scale: 1/τ.

    Returns:
        [P] float32, each from 0 to 1.
    """
    parts = []
    for rows in probes.split(_BLOCK):
        logits = (anchors[rows] @ others.T).mul_(logit_scale)
        logits[torch.arange(len(rows)), rows] = -torch.inf
        total = logits.logsumexp(1)
        logits.masked_fill_(captions[rows, None] != captions[None], -torch.inf)
        parts.append((logits.logsumexp(1) - total).exp())
    return torch.cat(parts)


def encode(run: RunFolder, setting: Setting) -> tuple[Tensor, Tensor, Tensor, float]:
    """The training data as the run's last checkpoint sees them: image and text features, captions, 1/τ."""
    loaded = run.load_checkpoint(run.checkpoint(), setting.device)
    data = str(run.params["train_data"])
    pool = open_pool(data, loaded.preprocess_val, loaded.tokenizer, needs_keys=False, workers=setting.workers)
    images, texts, tokens = [], [], []
    for batch in batches(Everything(pool, 0, 1), setting.batch_size, setting.workers, pin_memory=False):
        if "image" in batch:
            with evaluating(loaded.model):
                pair = encode_batch(loaded.model, batch, setting.device, setting.autocast_context, setting.image_dtype)
            images.append(pair[0].cpu())
            texts.append(pair[1].cpu())
            tokens.append(batch["text"])
    captions = torch.cat(tokens).unique(dim=0, return_inverse=True)[1]
    return torch.cat(images), torch.cat(texts), captions, loaded.model.logit_scale.exp().item()


def measure(run: RunFolder, setting: Setting, probes: int) -> dict[str, Any]:
    """The parts for both sides, over samples drawn at random.

    Returns:
        {"temperature": τ, "samples": n, "probes": P, "repeated": share of the probes whose caption others have too,
        "image" and "text": {"mean": of the parts, "over_half": share of the probes for which it is more than half}}.
    """
    images, texts, captions, logit_scale = encode(run, setting)
    chosen = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))[:probes]
    sides = {
        "image": shares(images, texts, captions, chosen, logit_scale),
        "text": shares(texts, images, captions, chosen, logit_scale),
    }
    return {
        "temperature": 1 / logit_scale,
        "samples": len(captions),
        "probes": len(chosen),
        "repeated": (captions.bincount()[captions[chosen]] > 1).double().mean().item(),
        **{
            name: {"mean": part.double().mean().item(), "over_half": (part > 0.5).double().mean().item()}
            for name, part in sides.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--probes", type=int, default=4096, help="samples asked about")
    args = parser.parse_args(argv)
    try:
        with joined("auto") as place:
            chosen = precision.chosen_precision("auto", place.device)
            setting = Setting(place.device, workers=1, autocast_context=chosen.autocast_context)
            for path in args.runs:
                content = measure(RunFolder(path), setting, args.probes)
                write_whole(path / FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
                print(f"{path.name}: {json.dumps(content)}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
