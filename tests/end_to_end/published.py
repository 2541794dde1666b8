"""The sample command of the method's publication, word for word but for the path of the data."""

from __future__ import annotations

import shlex

PUBLISHED = """
    --save-frequency 1 --train-data './data/{00000..00019}.tar' --train-num-samples 13710637 --data_size 19270000 --warmup 500
    --batch-size 512 --epochs 24 --workers 6 --model ViT-B-32 --name neuclip --seed 2026 --wd 0.2 --local-loss
    --fastclip --multiply_tau --temperature_scheme global_learnable --temperature 0.07 --lr 5e-4 --lr_tau 6.25e-5
    --lr_tau_scheduler step_thresh --rho 11.0 --fastclip_eps 1e-6 --gamma 0.42 --gamma_schedule cosine --gamma_decay_epochs 24
    --npn --npn_lr 1.0 --npn_num_protos 4096 --npn_repetition 10 --npn_restart_iter 500
"""


def published_flags(**changed: str) -> list[str]:
    """The words of the command, some flags (spelled with _ here) with another value."""
    words = shlex.split(PUBLISHED)
    for name, value in changed.items():
        places = [at for at, word in enumerate(words) if word.lstrip("-").replace("-", "_") == name]
        assert len(places) == 1, f"the command has no flag {name} to change"
        words[places[0] + 1] = value
    return words
