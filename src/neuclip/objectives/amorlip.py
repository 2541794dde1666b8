"""AmorLIP: log-normalizers amortised by one small network per modality (formulas restated from the paper and its release).

With x_ik = s_ik/τ (+ bias), the logits of image anchor i, and pos_coef the weight of the matching pair,

    log Z1_i = log( Σ_{k≠i} exp(x_ik) + pos_coef·exp(x_ii) )                       over the global batch
    T1_i     = log( β·exp(λ1_prev(e1_i)) + (1 − β)·Z1_i )                          the target; β by the epoch
    λ1       is fitted to T1 by some steps of Adam on this batch, and a moving average of its weights follows
    λ̂1_i     = T1_i, or the output of the moving average
    loss     = mean_i [ −2·x_ii + Σ_k c_ik·exp(x_ik − λ̂1_i) + Σ_k c_ik·exp(x_ki − λ̂2_i) ],  c_ii = pos_coef, else 1

with λ̂ held constant, divided by 1/τ (held constant) plus ρ·τ. Everything stays in the log domain, and a pair's weight is
exp(h_ik − α_i) with α_i = λ̂_i − x_ii, in terms of the package's geometry.
"""

from __future__ import annotations

import math
from argparse import Namespace, _ArgumentGroup

import torch
from torch import Tensor

from neuclip import distributed
from neuclip.normalizers import AmortisedNormalizer, log_mix, log_or_minus_infinity
from neuclip.objectives.amorlip_flags import (
    AmorLIPSettings,
    add_amorlip_arguments,
    check_amorlip_args,
    check_local_negatives,
    hidden_width,
    in_epoch,
    settings_from_args,
)
from neuclip.objectives.base import Objective, Output, Recollection, RunShape
from neuclip.objectives.global_flags import TITLE, add_global_arguments, fill_defaults, learns_one_temperature
from neuclip.objectives.reporting import common_metrics
from neuclip.pairwise import (
    LOG_WEIGHT_CEILING,
    GlobalBatch,
    WeightedPairs,
    batch_log_means,
    gather_batch,
    weighted_pairs,
    with_gradients,
)


class AmorLIP(Objective):
    """Contrastive learning with amortised log-normalizers.

    Args:
        normalizer: the networks.
        settings: everything else.
        learn_temperature: whether τ is learnt.
    """

    name = "amorlip"
    summary = "log-normalizers amortised by small networks of the features"
    synonyms = (frozenset({"amorlip"}),)
    shared_arguments = ((TITLE, add_global_arguments),)
    sums_over_batch = True
    temperature_schedule = "step_thresh"  # the only one of the release

    def __init__(
        self, normalizer: AmortisedNormalizer, settings: AmorLIPSettings, learn_temperature: bool = True
    ) -> None:
        super().__init__(learn_temperature)
        self.normalizer = normalizer
        self.settings = settings
        self.log_positive_weight = log_or_minus_infinity(settings.positive_weight)

    @classmethod
    def add_arguments(cls, group: _ArgumentGroup) -> None:
        add_amorlip_arguments(group)

    @classmethod
    def resolve_args(cls, args: Namespace) -> None:
        fill_defaults(args, {"beta_decay_epochs": max(1.0, args.epochs / 2)})
        check_amorlip_args(args)

    @classmethod
    def from_args(cls, args: Namespace, shape: RunShape) -> AmorLIP:
        settings = settings_from_args(args, shape)
        if not settings.all_negatives:
            check_local_negatives(shape.batch_size)
        normalizer = AmortisedNormalizer(
            shape.embed_dim,
            hidden_width(args, shape),
            lr=args.lambda_lr,
            loss=args.lambda_loss_type,
            regularisation=args.div_reg_coef,
            average_decay=args.model_ema_beta,
            # The training program has a seed; from another loop there may be none.
            seed=getattr(args, "seed", 0),
        )
        return cls(normalizer, settings, learns_one_temperature(args))

    @property
    def previous_weight(self) -> float:
        """β of the current epoch, from 0 along a half cosine."""
        settings = self.settings
        if not settings.fit_previous:
            return 0.0
        fraction = min(self.epoch / settings.previous_epochs, 1.0)
        return settings.previous_weight * 0.5 * (1.0 - math.cos(math.pi * fraction))

    @property
    def rho(self) -> float:
        """ρ of the current epoch."""
        return in_epoch(self.settings.rho_list, self.epoch, self.settings.epochs)

    def start_epoch(self, epoch: int) -> None:
        # The epoch is part of the state, and a new objective is one that has started epoch 0: whoever resumes within an
        # epoch may start it again.
        if epoch != self.epoch:
            every = self.settings.restart_epochs
            self.normalizer.start_epoch(epoch, restart=every > 0 and epoch % every == 0)
        super().start_epoch(epoch)

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
            positive = batch.positive * logit_scale + (0.0 if logit_bias is None else logit_bias)
            with self.normalizer_section(image_features.device):
                estimates, fit_losses = self._fit(batch, log_means, positive[batch.local], logit_scale)
            log_normalizers = distributed.all_gather(estimates, dim=1)
            pairs = weighted_pairs(batch, log_normalizers - positive, logit_scale)
            value, gradients = self._value_and_gradients(batch, pairs, estimates, positive[batch.local], logit_scale)
            alpha = (estimates - positive[batch.local] - math.log(batch.size - 1)).detach()
        inputs: tuple[Tensor, ...] = (image_features, text_features, logit_scale)
        if logit_bias is not None:
            inputs = (*inputs, logit_bias)
        loss = with_gradients(value, inputs, gradients[: len(inputs)])
        output = Output(loss, log_normalizers=alpha)
        if not self.report:
            return output
        with torch.no_grad():
            metrics = common_metrics(batch, log_means, log_means, alpha, logit_scale, self.settings.rho)
            metrics |= {name: value.to(loss.dtype) for name, value in fit_losses.items()}
            metrics["z_beta"] = logit_scale.new_full((), self.previous_weight)
            metrics["rho"] = logit_scale.new_full((), self.rho)
        output.metrics = metrics
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
        """The moving average of the networks. It stands for a sum over a global batch: relative to the pair, and as a mean.

        The sum holds pos_coef·exp(x_ii), which stays in.
        """
        positive = (image_features * text_features).sum(dim=1) * logit_scale + (
            0.0 if logit_bias is None else logit_bias
        )
        estimates = self._finished(
            self.normalizer.predict_average(torch.stack((image_features, text_features))), positive
        )
        negatives = len(positive) * distributed.world_size() - 1
        return Recollection(estimates - positive - math.log(negatives), logit_scale)

    def _fit(
        self, batch: GlobalBatch, log_means: Tensor, positive: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Train the network on this batch.

        Args:
            log_means: [2, B], log g over the global batch.
            positive: [B], x_ii of this rank's samples.

        Returns:
            λ̂ of this rank's anchors, [2, B], and at logging steps the fit's loss before and after.
        """
        settings, normalizer = self.settings, self.normalizer
        anchors = batch.features[:, batch.local]
        log_sums = self._log_sums(batch, log_means, positive, logit_scale)
        targets = log_sums
        if self.previous_weight > 0.0:
            targets = log_mix(normalizer.predict_previous(anchors), log_sums, 1.0 - self.previous_weight)

        losses = {}
        if self.report:
            losses["inner_loss_before"] = normalizer.loss_of_fit(anchors, targets, log_sums)
        if self.step % settings.update_every == 0:
            updates = in_epoch(settings.updates, self.epoch, settings.epochs)
            normalizer.fit(anchors, targets, log_sums, updates)
        if self.report:
            losses["inner_loss_after"] = normalizer.loss_of_fit(anchors, targets, log_sums)

        estimates = targets if settings.fit_previous else normalizer.predict_average(anchors)
        if self.step % settings.average_every == 0:
            normalizer.update_average()
        return self._finished(estimates, positive), losses

    def _finished(self, estimates: Tensor, positive: Tensor) -> Tensor:
        """λ̂ from what the networks stand for; both [2, B]."""
        estimates = estimates + self.settings.offset
        if self.settings.negatives_only:
            estimates = torch.logaddexp(estimates, self.log_positive_weight + positive)
        return estimates

    def _log_sums(self, batch: GlobalBatch, log_means: Tensor, positive: Tensor, logit_scale: Tensor) -> Tensor:
        """log Z of this rank's anchors, [2, B]."""
        # Σ_{k≠i} exp(x_ik) = (N − 1)·g_i·exp(x_ii)
        if self.settings.all_negatives:
            log_sums = log_means + math.log(batch.size - 1) + positive
        else:
            check_local_negatives(batch.local_size)
            own = GlobalBatch(
                batch.features[:, batch.local], batch.positive[batch.local], 0, batch.local_size, batch.chunk_rows
            )
            ranks = batch.size // batch.local_size
            log_sums = batch_log_means(own, logit_scale) + math.log(ranks * (batch.local_size - 1)) + positive
        if self.settings.negatives_only:
            return log_sums
        return torch.logaddexp(log_sums, self.log_positive_weight + positive)

    def _value_and_gradients(
        self, batch: GlobalBatch, pairs: WeightedPairs, estimates: Tensor, positive: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """This rank's share of the loss, and of its gradients by both features, logit_scale and logit_bias; λ̂ constant.

        The shares' mean over the ranks is the whole, for values and for gradients; a feature's gradient is therefore K times
        that of the mean over N.

        Args:
            pairs: sums with the weights exp(x_ik − λ̂_i), k ≠ i.
            estimates: [2, B], λ̂ of this rank's anchors.
            positive: [B], x_ii of this rank's samples.
        """
        similarity = batch.positive[batch.local]
        matching = (self.log_positive_weight + positive - estimates).clamp(max=LOG_WEIGHT_CEILING).exp()
        weights = pairs.weights + matching
        value = (weights.sum(dim=0) - 2.0 * positive).mean()

        # Unlike h_ik, x_ik does not contain −s_ii: only the matching pair itself weighs on s_ii.
        partners = batch.features[:, batch.local].flip(0)
        on_partners = matching.sum(dim=0) - 2.0
        by_features = logit_scale * (pairs.features + on_partners[None, :, None] * partners) / batch.local_size
        # dx_ik/d logit_scale = s_ik = h_ik·τ + s_ii
        by_scale = (pairs.weighted_logits / logit_scale + similarity * weights).sum(dim=0) - 2.0 * similarity
        by_scale, by_bias = by_scale.mean(), (weights.sum(dim=0) - 2.0).mean()
        if self.settings.scale_loss:
            temperature = 1.0 / logit_scale
            rho = temperature.new_full((), self.rho)
            if self.settings.adaptive_tau:
                rho = rho + (estimates.sum(dim=0) - 2.0 * positive).mean() - 2.0 * math.log(batch.size)
            value = temperature * (value + rho)
            by_features, by_bias = temperature * by_features, temperature * by_bias
            by_scale = temperature * by_scale - temperature.square() * rho
        return value, (by_features[0], by_features[1], by_scale, by_bias)
