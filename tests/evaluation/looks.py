"""Runs and pairs to look into: with prototypes, and with captions that would do harm if they were taken for HTML."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .conftest import image_bytes, write_shard

HARMFUL = (
    "<script>document.title = 'run'</script>",
    '"><img src=x onerror="document.title=\'run\'">',
    "' onload='alert(1)' x='",
    "</title></style><h1>&lt;b&gt; & more",
    "right to left \u202e turned \x00 round",
    "long " * 200,
)


def write_harmful_pairs(path: Path) -> None:
    """A shard of 12 pairs; the first have harmful captions and concepts, the others harmless ones of three concepts."""
    captions = [*HARMFUL, *(f"disc number {i} icon, drawn" for i in range(12 - len(HARMFUL)))]
    samples = []
    for i, caption in enumerate(captions):
        concept = caption if caption in HARMFUL else f"disc {i % 3}"
        facts = json.dumps({"concept": concept}).encode()
        samples.append((f"{i:03d}", {"png": image_bytes(i, 48 + i), "txt": caption.encode(), "json": facts}))
    write_shard(path, samples)


def add_prototypes(checkpoint: Path, number: int = 8, width: int = 16) -> None:
    """Put the state of an objective with prototypes into a checkpoint."""
    content = torch.load(checkpoint, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    state = {
        "normalizer.prototypes": torch.randn(2, number, width, generator=generator),
        "normalizer._extra_state": {"active": number},
    }
    torch.save({**content, "objective": {"name": "neuclip", "state_dict": state}}, checkpoint)
