"""Estimators of the log-normalizer log(ε + g) of every sample: what differs between the methods."""

from neuclip.normalizers.adagrad import PROTOTYPE_OPTIMIZERS, AdaGrad, AdaGradNorm, PrototypeOptimizer
from neuclip.normalizers.adam import Adam
from neuclip.normalizers.amortised import AmortisedNormalizer
from neuclip.normalizers.divergences import DIVERGENCES, fit_loss
from neuclip.normalizers.mixing import GammaSchedule, log_mix
from neuclip.normalizers.mlp import ResidualMLPs
from neuclip.normalizers.prototypes import PrototypeNormalizer
from neuclip.normalizers.table import PLACES, Placement, ShardedTable

__all__ = [
    "DIVERGENCES",
    "PLACES",
    "PROTOTYPE_OPTIMIZERS",
    "AdaGrad",
    "AdaGradNorm",
    "Adam",
    "AmortisedNormalizer",
    "GammaSchedule",
    "Placement",
    "PrototypeNormalizer",
    "PrototypeOptimizer",
    "ResidualMLPs",
    "ShardedTable",
    "fit_loss",
    "log_mix",
]
