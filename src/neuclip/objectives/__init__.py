"""The objectives. Adding one: a new file beside this one and one line in registry.py."""

from neuclip.objectives.base import Objective, Output, Recollection, RunShape, TemperatureLearning
from neuclip.objectives.registry import (
    OBJECTIVES,
    add_arguments,
    build_objective,
    flags_without_effect,
    make_objective,
    resolve,
)

__all__ = [
    "OBJECTIVES",
    "Objective",
    "Output",
    "Recollection",
    "RunShape",
    "TemperatureLearning",
    "add_arguments",
    "build_objective",
    "flags_without_effect",
    "make_objective",
    "resolve",
]
