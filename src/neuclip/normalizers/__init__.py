"""Estimators of the log-normalizer log(ε + g) of every sample: what differs between the methods."""

from neuclip.normalizers.adagrad import PROTOTYPE_OPTIMIZERS, AdaGrad, AdaGradNorm, PrototypeOptimizer
from neuclip.normalizers.mixing import GammaSchedule, log_mix
from neuclip.normalizers.prototypes import PrototypeNormalizer
from neuclip.normalizers.table import PLACES, Placement, ShardedTable

__all__ = [
    "PLACES",
    "PROTOTYPE_OPTIMIZERS",
    "AdaGrad",
    "AdaGradNorm",
    "GammaSchedule",
    "Placement",
    "PrototypeNormalizer",
    "PrototypeOptimizer",
    "ShardedTable",
    "log_mix",
]
