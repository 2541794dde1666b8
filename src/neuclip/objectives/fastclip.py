"""FastCLIP v0–v3 (arXiv 2407.01445), and with a constant γ SogCLR (2202.12387) and iSogCLR (2305.11965).

Every sample has a moving average u of its normalizer per modality, kept by the sample's key:

    u_i ← (1−γ)·u_i + γ·(ε + g_i(batch))          in logarithms; a u_i that was never seen is set to the batch's value

and the encoders follow the gradient of  τ̃·½·mean_i [ g1_i/u1_i + g2_i/u2_i ]  with u and the factor τ̃ held constant.

| version | --temperature_scheme, --multiply_tau   | temperature                           | factor τ̃ |
| v0      | global_learnable                       | learnt through the unscaled loss      | 1         |
| v1      | global_constant (SogCLR: constant γ)   | constant                              | 1         |
| v2      | individual_learnable (iSogCLR likewise)| one per sample and modality           | τ_i       |
| v3      | global_learnable --multiply_tau        | learnt through the robust global loss | τ         |

Differences from the release. ε is inside u (at its default of 1e-14 the two agree to float32). In v0 and v3 the gradient of τ
is that of the formula, where the release counts the part that comes through g twice. In v2 the gradient carries the factor
τ_i of the robust loss (eq. 2 of the paper), which the release leaves out.
"""

from __future__ import annotations

import math
from argparse import Namespace, _ArgumentGroup
from dataclasses import dataclass

import torch
from torch import Tensor

from neuclip import distributed
from neuclip.normalizers import (
    PLACES,
    GammaSchedule,
    Placement,
    ShardedTable,
    add_log_eps,
    log_mix,
    log_or_minus_infinity,
)
from neuclip.objectives.base import Objective, Output, Recollection, RunShape, TemperatureLearning
from neuclip.objectives.global_flags import (
    TITLE,
    add_global_arguments,
    check_global_args,
    check_range,
    fill_defaults,
    gamma_schedule,
)
from neuclip.objectives.reporting import common_metrics
from neuclip.pairwise import (
    GlobalBatch,
    PairwiseGradient,
    batch_log_means,
    gather_batch,
    pairwise_gradient,
    with_gradients,
)

NEVER_SEEN = -math.inf  # log u before the first visit

# Individual temperatures: their range, the bound of their gradient and Adam's constants, as in the release.
TEMPERATURES = (0.01, 1.0)
GRADIENT_BOUND = 5.0
BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class Averages:
    """What the moving averages say about a batch.

    Attributes:
        log_means: [2, B], log g of this rank's anchors over the batch.
        log_estimate: [2, N], log(ε + g) over the batch. log_u: [2, N], the updated averages.
    """

    log_means: Tensor
    log_estimate: Tensor
    log_u: Tensor


class FastCLIP(Objective):
    """FastCLIP with one temperature: v0, v1 and v3.

    Args:
        table: two columns, log u1 and log u2.
        gamma: schedule of γ.
        multiply_tau: whether the loss has the factor τ.
        eps, rho: ε above; ρ of the robust global loss.
        learn_temperature: whether τ is learnt.
    """

    name = "fastclip"
    summary = "global contrastive losses, normalizers remembered for every sample as moving averages"
    synonyms = (frozenset({"fastclip"}),)
    shared_arguments = ((TITLE, add_global_arguments),)
    needs_keys = True

    def __init__(
        self,
        table: ShardedTable,
        gamma: GammaSchedule,
        multiply_tau: bool = True,
        eps: float = 1e-14,
        rho: float = 8.0,
        learn_temperature: bool = True,
    ) -> None:
        super().__init__(learn_temperature)
        self.table = table
        self.gamma = gamma
        self.multiply_tau = multiply_tau
        self.log_eps = log_or_minus_infinity(eps)
        self.rho = rho

    @classmethod
    def add_arguments(cls, group: _ArgumentGroup) -> None:
        group.add_argument(
            "--table-device",
            choices=PLACES,
            default="auto",
            help="where a rank's share of the per-sample tables lives: in its GPU's memory, in page-locked host memory that "
            "the GPU reaches directly, or (auto) on the GPU if the share fits --table-gpu-gib",
        )
        group.add_argument(
            "--table-gpu-gib", type=float, default=4.0, help="GPU memory that --table-device auto may take, GiB per GPU"
        )

    @classmethod
    def resolve_args(cls, args: Namespace) -> None:
        decay_epochs = max(1.0, args.epochs / 2)
        fill_defaults(
            args, {"fastclip_eps": 1e-14, "gamma": 0.2, "gamma_schedule": "cosine", "gamma_decay_epochs": decay_epochs}
        )
        check_global_args(args)
        check_range(args, "table_gpu_gib", least=0.0, remedy="it is a number of GiB")
        if args.data_size is None:
            raise ValueError(
                "--fastclip needs --data_size: the number of integer keys of the data set, gaps included (largest key + 1)"
            )
        if args.data_size < 1:
            raise ValueError(f"--data_size {args.data_size} is too small: give the largest key + 1")
        if args.temperature_scheme == "individual_learnable":
            args.multiply_tau = True
            if args.lr_tau_scheduler == "step_thresh":
                raise ValueError(
                    "--lr_tau_scheduler step_thresh follows one temperature and --temperature_scheme individual_learnable "
                    "has one per sample: use const or cosine"
                )

    @classmethod
    def from_args(cls, args: Namespace, shape: RunShape) -> FastCLIP:
        placement = Placement(args.table_device, int(args.table_gpu_gib * 2**30))
        gamma = gamma_schedule(args, shape)
        if args.temperature_scheme == "individual_learnable":
            temperature = args.temperature or cls.initial_temperature
            table = ShardedTable(args.data_size, IndividualFastCLIP.first_row(temperature), placement)
            return IndividualFastCLIP(table, gamma, eps=args.fastclip_eps, rho=args.rho)
        return FastCLIP(
            ShardedTable(args.data_size, (NEVER_SEEN, NEVER_SEEN), placement),
            gamma,
            multiply_tau=args.multiply_tau,
            eps=args.fastclip_eps,
            rho=args.rho,
            learn_temperature=args.temperature_scheme == "global_learnable",
        )

    def check_keys(self, keys: Tensor) -> None:
        self.table.check_keys(keys)

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        keys: Tensor | None,
    ) -> Output:
        with torch.no_grad():
            batch, all_keys, remembered = self._look_up(image_features, text_features, keys)
            averages = self._average(batch, remembered, logit_scale)
            pairwise = pairwise_gradient(batch, averages.log_u, logit_scale)
            self._remember(all_keys, averages.log_u, remembered[:2])
            own_log_u = averages.log_u[:, batch.local]
            value, scale_gradient = self._value_and_scale_gradient(pairwise, own_log_u, logit_scale)
            # dh/ds = 1/τ, which pairwise_gradient lets cancel the factor τ.
            gradient = pairwise.features if self.multiply_tau else pairwise.features * logit_scale
        inputs = (image_features, text_features, logit_scale)
        loss = with_gradients(value, inputs, (gradient[0], gradient[1], scale_gradient))
        return Output(loss, self._metrics(batch, averages, logit_scale) if self.report else {}, own_log_u)

    @torch.no_grad()
    def recall(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Recollection:
        """log u of the samples."""
        batch, _, remembered = self._look_up(image_features, text_features, keys)
        own = remembered[:, batch.local]
        return Recollection(
            torch.where(torch.isfinite(own[:2]), own[:2], torch.nan), self._logit_scale(own, logit_scale)
        )

    def _logit_scale(self, remembered: Tensor, logit_scale: Tensor) -> Tensor:
        """1/τ of the samples whose columns [columns, B] these are."""
        return logit_scale

    def _look_up(
        self, image_features: Tensor, text_features: Tensor, keys: Tensor | None
    ) -> tuple[GlobalBatch, Tensor, Tensor]:
        """The global batch, its keys [N] and the columns [columns, N] that the table has for them."""
        if keys is None:
            raise ValueError("objective fastclip needs the samples' integer keys")
        batch = gather_batch(image_features, text_features, self.chunk_rows)
        with self.normalizer_section(batch.features.device):
            all_keys = distributed.all_gather(keys, dim=0)
            return batch, all_keys, self.table.read(all_keys).T.to(batch.features.dtype)

    @torch.no_grad()
    def _metrics(self, batch: GlobalBatch, averages: Averages, logit_scale: Tensor) -> dict[str, Tensor]:
        own_estimate, own_log_u = averages.log_estimate[:, batch.local], averages.log_u[:, batch.local]
        metrics = common_metrics(batch, averages.log_means, own_estimate, own_log_u, logit_scale, self.rho)
        metrics["gamma"] = own_log_u.new_full((), self.gamma.at(self.epoch, self.step))
        return metrics

    def _average(self, batch: GlobalBatch, remembered: Tensor, logit_scale: Tensor) -> Averages:
        """The moving averages after this batch; `remembered` [columns, N] is what the table has."""
        log_means = batch_log_means(batch, logit_scale)
        log_estimate = distributed.all_gather(add_log_eps(log_means, self.log_eps), dim=1)
        with self.normalizer_section(batch.features.device):
            mixed = log_mix(remembered[:2], log_estimate, self.gamma.at(self.epoch, self.step))
            # Also if a broken batch left something that is no number.
            log_u = torch.where(torch.isfinite(remembered[:2]), mixed, log_estimate)
        return Averages(log_means, log_estimate, log_u)

    def _remember(self, keys: Tensor, values: Tensor, old: Tensor) -> None:
        """Write columns [columns, N], but nothing that is no number: it would spoil its sample for good."""
        with self.normalizer_section(values.device):
            self.table.write(keys, torch.where(torch.isfinite(values), values, old).T)

    def _value_and_scale_gradient(
        self, pairwise: PairwiseGradient, log_u: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This rank's share of the loss and of its derivative by logit_scale, u held constant."""
        # The sum over both modalities, halved, is the mean over the stack of the two.
        weighted_logits = pairwise.weighted_logits.mean()
        if not self.multiply_tau:
            return pairwise.ratio.mean(), weighted_logits / logit_scale  # dh/dlogit_scale = h/logit_scale
        temperature = 1.0 / logit_scale
        # Eq. 1 by τ: log u + ρ, and τ·Σ w·dh/dτ with dh/dτ = −h/τ. As a value, the global loss itself at these u.
        robust = log_u.mean() + self.rho
        return temperature * robust, -(robust - weighted_logits) * temperature.square()


class IndividualFastCLIP(FastCLIP):
    """FastCLIP v2: a temperature of its own for every sample and modality, learnt here.

    Each sample's τ_i follows the gradient of τ_i·(log u_i + ρ),  log u_i + ρ − 1/(N−1)·Σ_j exp(h_ij)·h_ij/u_i, clamped to
    ±5, by an Adam that counts epochs instead of steps, since an epoch visits a sample once. As in the release both β are 0
    in epoch 0 while the bias correction of later epochs assumes that they were not, which leaves steps of about a fifth of
    the learning rate from epoch 1 on; the published --lr_tau was chosen with that.

    Args:
        table: eight columns: log u1, log u2, τ1, τ2, both first moments, both second moments.
        gamma, eps, rho: see FastCLIP.
    """

    def __init__(self, table: ShardedTable, gamma: GammaSchedule, eps: float = 1e-14, rho: float = 8.0) -> None:
        super().__init__(table, gamma, multiply_tau=True, eps=eps, rho=rho, learn_temperature=False)
        self.temperature_learning = TemperatureLearning.OBJECTIVE

    @staticmethod
    def first_row(temperature: float) -> tuple[float, ...]:
        """A row of the table before its sample was seen."""
        return (NEVER_SEEN, NEVER_SEEN, temperature, temperature, 0.0, 0.0, 0.0, 0.0)

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        keys: Tensor | None,
    ) -> Output:
        with torch.no_grad():
            batch, all_keys, remembered = self._look_up(image_features, text_features, keys)
            temperatures = remembered[2:4]
            logit_scales = 1.0 / temperatures
            averages = self._average(batch, remembered, logit_scales)
            pairwise = pairwise_gradient(batch, averages.log_u, logit_scales)
            robust = averages.log_u + self.rho
            gradient = robust - distributed.all_gather(pairwise.weighted_logits, dim=1)
            learnt = self._adam(remembered[2:], gradient.clamp(-GRADIENT_BOUND, GRADIENT_BOUND))
            self._remember(all_keys, torch.cat((averages.log_u, learnt)), remembered)
            value = (temperatures * robust)[:, batch.local].mean()
            # The model's one temperature takes no part.
            scale_gradient = torch.zeros_like(logit_scale)
        inputs = (image_features, text_features, logit_scale)
        loss = with_gradients(value, inputs, (pairwise.features[0], pairwise.features[1], scale_gradient))
        output = Output(loss, log_normalizers=averages.log_u[:, batch.local])
        if self.report:
            output.metrics = self._metrics(batch, averages, logit_scales[:, batch.local])
            output.metrics["lr_tau"] = value.new_full((), self.temperature_lr)
        return output

    def _logit_scale(self, remembered: Tensor, logit_scale: Tensor) -> Tensor:
        return 1.0 / remembered[2:4]

    def _adam(self, columns: Tensor, gradient: Tensor) -> Tensor:
        """Temperatures and moments after one step, [6, N]; `columns` [6, N] before, `gradient` [2, N]."""
        temperature, first, second = columns.split(2)
        beta1, beta2 = BETAS if self.epoch > 0 else (0.0, 0.0)
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient.square()
        visits = self.epoch + 1
        direction = first / (1 - beta1**visits) / ((second / (1 - beta2**visits)).sqrt() + ADAM_EPS)
        moved = (temperature - self.temperature_lr * direction).clamp(*TEMPERATURES)
        return torch.cat((moved, first, second))
