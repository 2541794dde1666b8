"""Estimators of the log-normalizer log(ε + g) of every sample: what differs between the methods."""

from neuclip.normalizers.adagrad import AdaGrad, AdaGradNorm, InnerOptimizer, UnitRowsAdaGradNorm
from neuclip.normalizers.inner_objectives import INNER_OBJECTIVES, InnerObjective, Separate, Unified
from neuclip.normalizers.mixing import GammaSchedule, log_mix
from neuclip.normalizers.mlp import ResidualMLPs
from neuclip.normalizers.mlp_normalizer import MLPNormalizer
from neuclip.normalizers.network import NormalizerNetwork
from neuclip.normalizers.optimization import Alternating, Optimization, Simultaneous
from neuclip.normalizers.prototypes import PrototypeNormalizer

__all__ = [
    "INNER_OBJECTIVES",
    "AdaGrad",
    "AdaGradNorm",
    "Alternating",
    "GammaSchedule",
    "InnerObjective",
    "InnerOptimizer",
    "MLPNormalizer",
    "NormalizerNetwork",
    "Optimization",
    "PrototypeNormalizer",
    "ResidualMLPs",
    "Separate",
    "Simultaneous",
    "Unified",
    "UnitRowsAdaGradNorm",
    "log_mix",
]
