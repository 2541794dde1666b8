"""The normalizer-prediction network of NeuCLIP (arXiv 2511.08417): one matrix of prototypes per modality.

α1_i = log( ε + 1/m Σ_j exp((cos(e1_i, W1_j) − s_ii)/τ) )       W1 stands for the texts of the data set
α2_i = log( ε + 1/m Σ_j exp((cos(e2_i, W2_j) − s_ii)/τ) )       W2 stands for its images

The prototypes are spread over the ranks, with their optimizer's state: a rank compares its own rows of W1 and W2 with all N
anchors, one message of 2N numbers sums what the ranks found, and the gradient of a rank's rows needs nothing more. No
gradient and no prototype crosses ranks, and every rank ends with α of all anchors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip import distributed, pairwise
from neuclip.normalizers.adagrad import UnitRowsAdaGradNorm
from neuclip.normalizers.inner_loop import InnerLoop
from neuclip.normalizers.inner_objectives import InnerObjective
from neuclip.normalizers.network import NormalizerNetwork, OptimizerMaker, register_weights
from neuclip.normalizers.row_shards import RowShards, save_whole
from neuclip.pairwise import GlobalBatch


class _Anchors(NamedTuple):
    """All anchors of a global batch, made ready once for any number of passes.

    features, scaled: [2, N, d], e and e/τ, in the number format of the matrix products.
    offsets: [N], s_ii/τ + log m; logit_scale: 0-dim, 1/τ; log_eps: 0-dim, log ε. All in the dtype of the weights.
    """

    features: Tensor
    scaled: Tensor
    offsets: Tensor
    logit_scale: Tensor
    log_eps: Tensor


class _Comparison(NamedTuple):
    """Some anchors against this rank's prototypes.

    shares: [2, rows, own], of each prototype in the sum over this rank's.
    log_means: [2, rows], the log of this rank's part of the mean over all prototypes.
    """

    shares: Tensor
    log_means: Tensor


class PrototypeNormalizer(NormalizerNetwork):
    """Predicts α of a batch's anchors by comparing them with prototypes; the gradient is in closed form.

    Args:
        num_prototypes: m, per modality.
        dim: d, width of the features.
        eps, inner_objective: see NormalizerNetwork.
        make_optimizer: the optimizer of this rank's weights [2, m/K, d]; None where an outer optimizer trains them. Then
            every rank holds all of them, and the work alone is divided.
        batch_size: N, the global batch. When m > N, the features of the last ⌈m/N⌉ batches are remembered for restarts.
        product_dtype: torch.bfloat16 rounds what goes into the matrix products to bfloat16, and sums in float32.
        record: whether updates may be recorded as a CUDA graph.
        compiled: whether updates go through torch.compile, which makes fewer kernels of them.

    Attributes:
        prototypes: [2, rows, d], this rank's rows (all rows for an outer optimizer). Whole in the state dict.
        active: how many prototypes over all ranks are in use.

    Raises:
        ValueError: num_prototypes is not positive.
    """

    prototypes: Tensor
    recent: Tensor

    def __init__(
        self,
        num_prototypes: int,
        dim: int,
        eps: float,
        inner_objective: InnerObjective,
        make_optimizer: OptimizerMaker | None,
        batch_size: int,
        product_dtype: torch.dtype | None = None,
        record: bool = True,
        compiled: bool = False,
    ) -> None:
        if num_prototypes < 1:
            raise ValueError(f"--npn_num_protos {num_prototypes}: a normalizer needs at least 1 prototype")
        # The rows that a rank works on, and those that it stores: an outer optimizer has the same parameters on every rank.
        self.shards = RowShards.over_ranks(num_prototypes)
        self.storage = RowShards.undivided(num_prototypes) if make_optimizer is None else self.shards
        shape = (2, self.storage.held, dim)
        super().__init__(eps, inner_objective, make_optimizer(shape) if make_optimizer else None)
        self.num_prototypes = num_prototypes
        self.product_dtype = product_dtype
        self.loop = InnerLoop(record)
        self.compiled = compiled
        # Rows beyond `active` are not in use yet: before the first m samples were seen there is nothing to fill them with.
        register_weights(self, "prototypes", torch.zeros(shape), outer=make_optimizer is None)
        self.active = 0
        # [image features, text features] of the last m samples, newest batch first; empty when every batch alone has m.
        self.remembers = num_prototypes > batch_size
        self.register_buffer("recent", torch.zeros(2, self.storage.held if self.remembers else 0, dim))
        self.num_recent = 0
        self._describe_state()

    def _describe_state(self) -> None:
        remembered = RowShards(self.num_prototypes if self.remembers else 0, self.storage.rank, self.storage.ranks)
        shards = {"prototypes": self.storage, "recent": remembered}
        remedies = {"prototypes": "give the --npn_num_protos that it was trained with"}
        if self.optimizer is not None and self.optimizer.accumulator.dim() == 3:
            shards["optimizer.accumulator"] = self.storage
        save_whole(self, shards, remedies)

    @property
    def filling(self) -> bool:
        """Whether fewer than m samples were there at the last restart."""
        return self.active < self.num_prototypes

    @torch.no_grad()
    def observe(self, batch: GlobalBatch) -> None:
        """Remember the features of a batch for the next restart (only where m > N)."""
        if self.remembers:
            # N is a multiple of K, so that a sample that moves on by N places stays on its rank.
            features = _with_direction(self.storage.own(batch.features).to(self.recent.dtype))
            self.recent.copy_(torch.cat((features, self.recent), dim=1)[:, : self.recent.shape[1]])
            self.num_recent = min(self.num_recent + batch.size, self.num_prototypes)

    @torch.no_grad()
    def restart(self, batch: GlobalBatch) -> None:
        """W1 ← text features, W2 ← the image features of the same samples, newest first; the optimizer forgets its past.

        `observe(batch)` comes first. With m > N and fewer than m samples seen so far, all of them become prototypes.
        """
        if self.remembers:
            self.active = self.num_recent
            source = self.recent[:, : self.storage.count(self.active)]
        else:
            self.active = min(self.num_prototypes, batch.size)
            source = _with_direction(self.storage.own(batch.features[:, : self.active]))
        rows = source.flip(0)
        self.prototypes[:, : source.shape[1]].copy_(F.normalize(rows, dim=2) if self._has_unit_rows else rows)
        if self.optimizer is not None:
            self.optimizer.reset()

    @torch.no_grad()
    def fit(self, batch: GlobalBatch, log_targets: Tensor, logit_scale: Tensor, updates: int) -> None:
        assert self.optimizer is not None, "the weights belong to an outer optimizer"
        weights, optimizer = self._own_weights(), self.optimizer
        rows = batch.chunk_rows

        def update(targets: Tensor, *anchors: Tensor) -> None:
            optimizer.update_(weights, self._differentiate(weights, _Anchors(*anchors), targets, rows)[1])

        # While prototypes come in with every batch each step would be compiled anew.
        program = torch.compile(update, dynamic=False) if self.compiled and not self.filling else update
        inputs = (log_targets.to(self.prototypes.dtype), *self._anchors(batch, logit_scale))
        constants = (self.active, rows, optimizer.lr, optimizer.weight_decay)
        self.loop.run(program, inputs, (weights, optimizer.accumulator), constants, updates)

    @torch.no_grad()
    def predict(self, batch: GlobalBatch, logit_scale: Tensor) -> Tensor:
        weights = self._own_weights()
        unit = weights if self._has_unit_rows else F.normalize(weights, dim=2)
        return self._log_normalizers(self._anchors(batch, logit_scale), unit, batch.chunk_rows)[0].to(
            batch.features.dtype
        )

    @torch.no_grad()
    def differentiate(
        self, batch: GlobalBatch, log_targets: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        anchors, targets = self._anchors(batch, logit_scale), log_targets.to(self.prototypes.dtype)
        log_normalizers, own = self._differentiate(self._own_weights(), anchors, targets, batch.chunk_rows)
        gradient = torch.zeros_like(self.prototypes)
        gradient[:, : self.active] = RowShards.over_ranks(self.active).whole(own)
        return log_normalizers.to(batch.features.dtype), tuple(self.parameters()), (gradient,)

    def _own_weights(self) -> Tensor:
        """[2, own, d], this rank's share of the rows in use: a view."""
        rows = self.prototypes.detach()
        if self.storage is not self.shards:
            rows = self.shards.own(rows)
        return rows[:, : self.shards.count(self.active)]

    @property
    def _has_unit_rows(self) -> bool:
        """Whether the optimizer keeps every row at unit length, so that no length has to be looked at."""
        return isinstance(self.optimizer, UnitRowsAdaGradNorm)

    def _anchors(self, batch: GlobalBatch, logit_scale: Tensor) -> _Anchors:
        dtype = self.prototypes.dtype
        features, positive, scale = (x.to(dtype) for x in (batch.features, batch.positive, logit_scale))
        product = self.product_dtype or dtype
        offsets = positive * scale + math.log(self.active)
        return _Anchors(
            features.to(product), (features * scale).to(product), offsets, scale, scale.new_full((), self.log_eps)
        )

    def _differentiate(
        self, weights: Tensor, anchors: _Anchors, targets: Tensor, chunk_rows: int | None
    ) -> tuple[Tensor, Tensor]:
        """α of all anchors [2, N] at `weights` [2, own, d], and the inner objective's gradient in these."""
        length = None if self._has_unit_rows else weights.norm(dim=2, keepdim=True).clamp_min(1e-12)
        unit = weights if length is None else weights / length
        log_normalizers, block = self._log_normalizers(anchors, unit, chunk_rows)
        # dα_i/dcos_ij = p_ij/τ with p_ij = the share of prototype j in exp(α_i)
        scale = anchors.logit_scale
        slope = scale * self._by_log_normalizer(log_normalizers, targets, scale, anchors.features.shape[1])
        gradient = None
        for rows in _chunks(anchors, unit, chunk_rows):
            shares, log_means = block or _compare(anchors, unit, rows)
            by_share = (log_means - log_normalizers[:, rows]).exp() * slope[:, rows]
            by_cosine = torch.empty_like(shares, dtype=anchors.features.dtype)
            torch.mul(shares, by_share[:, :, None], out=by_cosine)
            part = _product(by_cosine.transpose(1, 2), anchors.features[:, rows], unit)
            gradient = part if gradient is None else gradient.add_(part)
        if gradient is None:
            return log_normalizers, torch.zeros_like(unit)
        # A cosine does not change with a prototype's length: only what is tangent to the sphere counts.
        tangent = gradient.addcmul_((gradient * unit).sum(dim=2, keepdim=True), unit, value=-1.0)
        return log_normalizers, tangent if length is None else tangent / length

    def _log_normalizers(
        self, anchors: _Anchors, unit: Tensor, chunk_rows: int | None
    ) -> tuple[Tensor, _Comparison | None]:
        """α of all anchors [2, N] on every rank (one message), and the pairs they came from where they are one block."""
        chunks = _chunks(anchors, unit, chunk_rows)
        block = _compare(anchors, unit, chunks[0]) if len(chunks) == 1 else None
        if block is None:
            log_means = unit.new_full((2, anchors.features.shape[1]), -math.inf)
            for rows in chunks:
                log_means[:, rows] = _compare(anchors, unit, rows).log_means
        else:
            log_means = block.log_means
        log_g = distributed.all_reduce_log_sum_exp(log_means)
        return torch.logaddexp(log_g, anchors.log_eps), block

    def get_extra_state(self) -> dict[str, int]:
        return {"active": self.active, "num_recent": self.num_recent}

    def set_extra_state(self, state: dict[str, int]) -> None:
        super().set_extra_state(state)
        # The memory exists only where m > N, and N may change from one start to the next.
        self.num_recent = self.num_recent if self.remembers else 0


def _compare(anchors: _Anchors, unit: Tensor, rows: slice) -> _Comparison:
    """Some anchors against prototypes [2, own, d] of unit length."""
    # Few passes over the block: softmax is one, and gives the log of its sum away at the largest element.
    logits = _product(anchors.scaled[:, rows], unit.transpose(1, 2).to(anchors.scaled.dtype), unit)
    largest, where = logits.max(dim=2)
    shares = logits.softmax(dim=2)
    log_sums = largest - shares.gather(2, where[:, :, None])[:, :, 0].log()
    return _Comparison(shares, log_sums - anchors.offsets[rows])


def _chunks(anchors: _Anchors, unit: Tensor, chunk_rows: int | None) -> list[slice]:
    """Consecutive chunks of anchors, compared with this rank's prototypes one chunk at a time; none without prototypes."""
    size, own = anchors.features.shape[1], unit.shape[1]
    if own == 0:
        return []
    rows = chunk_rows or max(1, pairwise.MAX_BLOCK_ELEMENTS // own)
    return [slice(first, min(first + rows, size)) for first in range(0, size, rows)]


def _product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """[2, x, k] @ [2, k, y] in the dtype of `like`. Of bfloat16 numbers products are exact and sums float32."""
    if a.dtype != torch.bfloat16:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32).to(like.dtype)
    return torch.bmm(a.float(), b.float()).to(like.dtype)


def _with_direction(features: Tensor) -> Tensor:
    """Features [2, N, d]; those of zeros or of no numbers (a tower that broke down) get some direction, whichever."""
    length = features.norm(dim=2, keepdim=True)
    return torch.where((length > 0) & torch.isfinite(length), features, features.shape[2] ** -0.5)
