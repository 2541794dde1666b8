"""Contrastive objectives for CLIP training, in plain PyTorch.

The package computes objectives from features and nothing else: it knows no data loader, no command line and no checkpoint
file, so that any training loop can use it.

    from neuclip import RunShape, make_objective
"""

from neuclip.objectives import OBJECTIVES, Objective, Output, RunShape, build_objective, make_objective

__all__ = ["OBJECTIVES", "Objective", "Output", "RunShape", "build_objective", "make_objective"]
