"""Estimators of the log-normalizer log(ε + g) of every sample: what differs between the methods."""

from neuclip.normalizers.adagrad import AdaGrad, AdaGradNorm, InnerOptimizer, UnitRowsAdaGradNorm
from neuclip.normalizers.adam import Adam
from neuclip.normalizers.amortised import AmortisedNormalizer
from neuclip.normalizers.divergences import DIVERGENCES, fit_loss
from neuclip.normalizers.inner_loop import release_recordings
from neuclip.normalizers.inner_objectives import INNER_OBJECTIVES, InnerObjective, Separate, Unified
from neuclip.normalizers.mixing import GammaSchedule, add_log_eps, log_mix, log_or_minus_infinity
from neuclip.normalizers.mlp import ResidualMLPs
from neuclip.normalizers.mlp_normalizer import MLPNormalizer
from neuclip.normalizers.network import NormalizerNetwork
from neuclip.normalizers.optimization import Alternating, Optimization, Simultaneous
from neuclip.normalizers.prototypes import PrototypeNormalizer
from neuclip.normalizers.table import PLACES, Placement, ShardedTable

__all__ = [
    "DIVERGENCES",
    "INNER_OBJECTIVES",
    "PLACES",
    "AdaGrad",
    "AdaGradNorm",
    "Adam",
    "Alternating",
    "AmortisedNormalizer",
    "GammaSchedule",
    "InnerObjective",
    "InnerOptimizer",
    "MLPNormalizer",
    "NormalizerNetwork",
    "Optimization",
    "Placement",
    "PrototypeNormalizer",
    "ResidualMLPs",
    "Separate",
    "ShardedTable",
    "Simultaneous",
    "Unified",
    "UnitRowsAdaGradNorm",
    "add_log_eps",
    "fit_loss",
    "log_mix",
    "log_or_minus_infinity",
    "release_recordings",
]
