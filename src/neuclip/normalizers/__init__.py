"""Estimators of the log-normalizer log(ε + g) of every sample: what differs between the methods."""

from neuclip.normalizers.adagrad import PROTOTYPE_OPTIMIZERS, AdaGrad, AdaGradNorm, PrototypeOptimizer
from neuclip.normalizers.mixing import GammaSchedule, log_mix
from neuclip.normalizers.prototypes import PrototypeNormalizer

__all__ = [
    "PROTOTYPE_OPTIMIZERS",
    "AdaGrad",
    "AdaGradNorm",
    "GammaSchedule",
    "PrototypeNormalizer",
    "PrototypeOptimizer",
    "log_mix",
]
