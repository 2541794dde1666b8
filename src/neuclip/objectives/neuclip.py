"""NeuCLIP (arXiv 2511.08417): the robust global contrastive loss with normalizers predicted by a small network.

Objective of encoders, temperature and NPN together (eq. 12, with the ½ that makes it comparable to the mean of the two
cross-entropies), α1 and α2 being the predicted logarithms of ε + g1 and ε + g2:

    ½·mean_i τ·[ exp(−α1_i)·(ε + g1_i) + α1_i − 1  +  exp(−α2_i)·(ε + g2_i) + α2_i − 1 ] + τ·ρ

One step (Algorithm 1): restart the NPN if it is due; T_u updates of the NPN on this batch; then the gradient in the features
and in τ with α held constant. The paper's ablations change what the NPN is (prototypes or an MLP), what it is
trained on (the part of the objective that depends on α, or a squared error) and when (before the encoders, or with them).
"""

from __future__ import annotations

from argparse import Namespace, _ArgumentGroup

import torch
from torch import Tensor

from neuclip import distributed
from neuclip.normalizers import (
    GammaSchedule,
    NormalizerNetwork,
    Optimization,
    add_log_eps,
    log_mix,
    log_or_minus_infinity,
)
from neuclip.objectives.base import Objective, Output, Recollection, RunShape
from neuclip.objectives.global_flags import (
    TITLE,
    add_global_arguments,
    check_global_args,
    fill_defaults,
    gamma_schedule,
    learns_one_temperature,
)
from neuclip.objectives.npn_flags import add_npn_arguments, build_network, build_optimization, resolve_npn_args
from neuclip.objectives.reporting import common_metrics
from neuclip.pairwise import PairwiseGradient, batch_log_means, gather_batch, pairwise_gradient, with_gradients


class NeuCLIP(Objective):
    """The robust global contrastive loss with an NPN.

    Args:
        normalizer: the NPN.
        optimization: when and by what it is trained.
        gamma: weight of the batch's own estimate in the normalizer handed to the encoders; None for Algorithm 1 as printed.
        restart_every: T_r, steps between restarts; 0 restarts only at the beginning.
        eps, rho: ε and ρ above.
        learn_temperature: whether τ is learnt.
    """

    name = "neuclip"
    summary = "robust global contrastive loss, normalizers predicted by a small network"
    synonyms = (frozenset({"fastclip", "npn"}), frozenset({"npn"}))
    shared_arguments = ((TITLE, add_global_arguments),)

    def __init__(
        self,
        normalizer: NormalizerNetwork,
        optimization: Optimization,
        gamma: GammaSchedule | None,
        restart_every: int = 500,
        eps: float = 1e-8,
        rho: float = 8.0,
        learn_temperature: bool = True,
    ) -> None:
        super().__init__(learn_temperature)
        self.normalizer = normalizer
        self.optimization = optimization
        self.gamma = gamma
        self.restart_every = restart_every
        self.log_eps = log_or_minus_infinity(eps)
        self.rho = rho

    @classmethod
    def add_arguments(cls, group: _ArgumentGroup) -> None:
        add_npn_arguments(group)

    @classmethod
    def resolve_args(cls, args: Namespace) -> None:
        args.multiply_tau = True
        decay_epochs = float(args.epochs)
        fill_defaults(
            args,
            {"fastclip_eps": 1e-8, "gamma": 0.42, "gamma_schedule": "cosine_step", "gamma_decay_epochs": decay_epochs},
        )
        check_global_args(args)
        learns_one_temperature(args)
        resolve_npn_args(args)

    @classmethod
    def from_args(cls, args: Namespace, shape: RunShape) -> NeuCLIP:
        objective = cls(
            build_network(args, shape),
            build_optimization(args),
            gamma=gamma_schedule(args, shape) if args.gamma > 0 else None,
            restart_every=args.npn_restart_iter,
            eps=args.fastclip_eps,
            rho=args.rho,
            learn_temperature=learns_one_temperature(args),
        )
        objective.outer_weight_decay = args.npn_wd
        return objective

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        keys: Tensor | None,
    ) -> Output:
        with torch.no_grad():
            batch = gather_batch(image_features, text_features, self.chunk_rows)
            log_means = batch_log_means(batch, logit_scale)
            log_estimate = distributed.all_gather(add_log_eps(log_means, self.log_eps), dim=1)

            with self.normalizer_section(image_features.device):
                self.normalizer.observe(batch)
                if self._restart_is_due():
                    self.normalizer.restart(batch)
                learnt = self.optimization.learn(self.normalizer, batch, log_estimate, logit_scale, self.report)
            gamma = 0.0 if self.gamma is None else self.gamma.at(self.epoch, self.step)
            log_normalizers = log_mix(learnt.log_normalizers, log_estimate, gamma)

            pairwise = pairwise_gradient(batch, log_normalizers, logit_scale)
            own = log_normalizers[:, batch.local]
            value, scale_gradient = self._value_and_scale_gradient(pairwise, own, logit_scale)
        inputs = (image_features, text_features, logit_scale, *learnt.parameters)
        gradients = (pairwise.features[0], pairwise.features[1], scale_gradient, *learnt.gradients)
        loss = with_gradients(value, inputs, gradients)
        output = Output(loss, log_normalizers=own)
        if not self.report:
            return output
        with torch.no_grad():
            # The NPN's own prediction is reported, before the batch's estimate is mixed in.
            estimate, alpha = (x[:, batch.local] for x in (log_estimate, learnt.log_normalizers))
            metrics = common_metrics(batch, log_means, estimate, alpha, logit_scale, self.rho)
            metrics["gamma"] = logit_scale.new_full((), gamma)
            output.metrics = metrics | learnt.metrics
        return output

    @torch.no_grad()
    def recall(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Recollection:
        """The NPN's prediction."""
        if self.step == 0:
            # It begins with the first batch.
            return Recollection(image_features.new_full((2, len(image_features)), torch.nan), logit_scale)
        batch = gather_batch(image_features, text_features, self.chunk_rows)
        return Recollection(self.normalizer.predict(batch, logit_scale)[:, batch.local], logit_scale)

    def _value_and_scale_gradient(
        self, pairwise: PairwiseGradient, log_normalizers: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This rank's share of the objective and of its derivative by logit_scale, α held constant."""
        temperature = 1.0 / logit_scale
        # The sum over both modalities, halved, is the mean over the stack of the two.
        eps_ratio = (self.log_eps - log_normalizers).exp()
        bracket = (pairwise.ratio + eps_ratio + log_normalizers - 1.0).mean()
        # d(τ·bracket)/dτ = bracket + τ·Σ w·dh/dτ, and dh/dτ = −h/τ.
        by_temperature = bracket + self.rho - pairwise.weighted_logits.mean()
        return temperature * (bracket + self.rho), -by_temperature * temperature.square()

    def _restart_is_due(self) -> bool:
        if self.restart_every and self.step % self.restart_every == 0:
            return True
        # At the beginning there are fewer samples than prototypes when m > N: take in each batch until there are enough.
        return self.step == 0 or self.normalizer.filling
