"""All attention of both towers goes through PyTorch's fused kernels, never through a matrix product and a softmax."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from torch.utils._python_dispatch import TorchDispatchMode

from end_to_end.corpus import MODEL_CONFIG
from training.model import TwoTowers

LAYERS = 2
TIMM = {"image_size": 32, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "token"}


class Kernels(TorchDispatchMode):
    """Counts what attention may come down to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "attention" in name or "softmax" in name:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def _towers(folder: Path, monkeypatch: pytest.MonkeyPatch, vision: dict[str, Any]) -> TwoTowers:
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    config = {**MODEL_CONFIG, "vision_cfg": vision, "text_cfg": {**MODEL_CONFIG["text_cfg"], "layers": LAYERS}}
    (folder / "attending.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "attending.json")
    return TwoTowers(open_clip.create_model("attending")).train()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("tower", ["open_clip", "timm"])
def test_a_training_step_uses_fused_attention_only(
    tower: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = TIMM if tower == "timm" else {**MODEL_CONFIG["vision_cfg"], "layers": LAYERS}
    towers = _towers(tmp_path, monkeypatch, vision)
    towers.model.set_grad_checkpointing(checkpointing)
    depth = len(towers.model.visual.trunk.blocks) if tower == "timm" else LAYERS
    with Kernels() as kernels:
        images, texts, *_ = towers(torch.randn(2, 3, 32, 32), torch.randint(1, 100, (2, 12)))
        (images * texts).sum().backward()
    layers = depth + LAYERS
    forward = "_scaled_dot_product_flash_attention_for_cpu"
    assert kernels.seen == {forward: (1 + checkpointing) * layers, f"{forward}_backward": layers}


def test_plain_attention_would_be_seen() -> None:
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    with Kernels() as kernels:
        ((q @ q.mT).softmax(-1) @ q).sum().backward()
    assert kernels.seen == {"_softmax": 1, "_softmax_backward_data": 1}
