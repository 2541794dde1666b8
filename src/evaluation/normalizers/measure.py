"""The normalizer estimation error (NeuCLIP, arXiv 2511.08417, figures 2c and 4): a method's log-normalizers against the truth.

For samples of the training set (probes), in batches as large as the run's, three estimates of α are compared with the α over
all n samples:

    batch   log(ε + g) over the probe's own batch: what a mini-batch loss has to do with
    own     what the method has learnt or remembers before it sees the batch: log u, the moving average of AmorLIP's networks,
            the NPN's prediction; none for a mini-batch loss
    used    the α that the next training step would divide by, after it has learnt from the batch and mixed the batch's
            estimate in; for a mini-batch loss the batch's estimate. At the end of an epoch that step is the next epoch's,
            with what changes there (γ by epochs, networks begun anew)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.collectives import gather_rows
from evaluation.errors import UserError
from evaluation.features import encode_batch, evaluating
from evaluation.normalizers.examined import Examined
from evaluation.normalizers.pool import Everything, Pool, Spots, batches, draw_spots
from evaluation.normalizers.truth import Anchors, StreamedNormalizers
from evaluation.suite import Setting
from neuclip import distributed
from neuclip.normalizers import ShardedTable, add_log_eps
from neuclip.pairwise import batch_log_means, gather_batch

SIDES = ("image", "text")


@dataclass(frozen=True)
class Probing:
    """Which samples are asked about.

    Attributes:
        batch_size: N, the global batch that the objective sees at a time.
        probes: about how many samples; rounded down to whole batches, one batch at least; all there are in a smaller set.
        seed: of their choice.
    """

    batch_size: int
    probes: int = 4096
    seed: int = 0

    @property
    def wanted(self) -> int:
        """P, a multiple of N."""
        return max(1, self.probes // self.batch_size) * self.batch_size


class Probes(NamedTuple):
    """P encoded probes: image_features, text_features [P, d]; index, keys [P] int64; the same on every rank."""

    image_features: Tensor
    text_features: Tensor
    index: Tensor
    keys: Tensor


class Estimates(NamedTuple):
    """α of P probes, [2, P] each, and the 1/τ [2, P] that they are for. own: None for a method without normalizers."""

    batch: Tensor
    own: Tensor | None
    used: Tensor
    logit_scale: Tensor


def measure(examined: Sequence[Examined], pool: Pool, probing: Probing, setting: Setting) -> list[dict[str, Any]]:
    """Measure checkpoints of one run, in one pass over its data. All ranks call it together.

    Args:
        examined: they share preprocessing and tokenizer.
        pool: the data set.
        probing: which samples. setting: how to run.

    Returns:
        For each of them a dict of plain values, the same on every rank: `samples` (n), `probes` (P), `left_out`,
        `temperature`, `truth` and `estimates`.

    Raises:
        UserError: the data set has too few samples, or none with a key where keys are needed; a model's features are not
            finite.
    """
    encoded = _encode_probes(examined, pool, probing, setting)
    estimates = [estimate(one, probes, probing.batch_size) for one, probes in zip(examined, encoded)]
    epsilons = [one.objective.log_eps for one in examined]
    for one in examined:
        one.forget_objective()
    sums = [
        StreamedNormalizers(Anchors(probes.image_features, probes.text_features, probes.index, guess.logit_scale))
        for probes, guess in zip(encoded, estimates)
    ]
    left_out = 0
    loader = batches(
        Everything(pool, setting.rank, setting.world_size), setting.batch_size, setting.workers, _pins(setting)
    )
    for batch in loader:
        left_out += int(batch["left_out"])
        for one, total in zip(examined, sums) if "image" in batch else ():
            total.add(*_encode(one, batch, setting), batch["index"])
    lost = int(gather_rows(torch.tensor([[left_out]]), setting.world_size).sum())
    records = []
    for log_eps, guess, total in zip(epsilons, estimates, sums):
        truth, number = total.log_normalizers(log_eps, setting.world_size)
        records.append({"samples": number, "left_out": lost, **_record(guess, truth)})
    return records


def _encode(one: Examined, batch: dict[str, Any], setting: Setting) -> tuple[Tensor, Tensor]:
    model = one.loaded.model
    with evaluating(model):
        return encode_batch(model, batch, setting.device, setting.autocast_context, setting.image_dtype)


def _pins(setting: Setting) -> bool:
    return torch.device(setting.device).type == "cuda"


def _encode_probes(examined: Sequence[Examined], pool: Pool, probing: Probing, setting: Setting) -> list[Probes]:
    """The probes as each model sees them."""
    wanted = probing.wanted
    # Some may turn out to be broken.
    spots = draw_spots(pool, wanted + max(8, wanted // 50), probing.seed)
    # In the order of the parts, each of which takes a while to open; drawing order comes back at the end.
    own = sorted(spots)[setting.rank :: setting.world_size]
    keys, index = [torch.empty(0, 1, dtype=torch.int64)], [torch.empty(0, 1, dtype=torch.int64)]
    features: list[list[tuple[Tensor, Tensor]]] = [[] for _ in examined]
    for batch in batches(Spots(pool, own), setting.batch_size, setting.workers, _pins(setting)):
        if "image" not in batch:
            continue
        keys.append(batch["key"][:, None])
        index.append(batch["index"][:, None])
        for one, found in zip(examined, features):
            found.append(_encode(one, batch, setting))
    all_keys, all_index = (gather_rows(torch.cat(rows), setting.world_size)[:, 0] for rows in (keys, index))
    place = {pool.offsets[part] + position: number for number, (part, position) in enumerate(spots)}
    order = torch.tensor([place[i] for i in all_index.tolist()], dtype=torch.int64).argsort()
    if len(spots) == pool.total:  # a small set: as many batches as there are
        wanted = max(1, min(wanted, len(order)) // probing.batch_size) * probing.batch_size
    order = order[:wanted]
    if len(order) < wanted:
        missing = ", with integer keys," if pool.needs_keys else ""
        raise UserError(
            f"only {len(order)} of {len(spots)} samples drawn are whole{missing} and {wanted} are needed for batches of "
            f"{probing.batch_size}: give fewer --probes or a smaller --global_batch, or mend the data"
        )
    chosen_keys = all_keys[order]
    for one in examined:
        _check_keys(one, chosen_keys)
    probes = []
    for found in features:
        sides = []
        for side in (0, 1):
            rows = torch.cat([pair[side] for pair in found]) if found else torch.empty(0, 0, device=setting.device)
            sides.append(gather_rows(rows, setting.world_size)[order.to(rows.device)])
        if not all(bool(torch.isfinite(side).all()) for side in sides):
            raise UserError("features are not finite: the model has diverged, examine an earlier checkpoint.")
        device = sides[0].device
        probes.append(Probes(sides[0], sides[1], all_index[order].to(device), chosen_keys.to(device)))
    return probes


def _check_keys(one: Examined, keys: Tensor) -> None:
    """On the host, before they go to the device."""
    try:
        one.objective.check_keys(keys)
    except ValueError as error:
        raise UserError(f"--data is not what {one.run.name} was trained on: {error}") from None


@torch.no_grad()
def estimate(one: Examined, probes: Probes, batch_size: int) -> Estimates:
    """What an objective takes for the probes' α, a global batch at a time, each from the state of the checkpoint.

    The objective is in its next epoch afterwards.

    Args:
        batch_size: N; a multiple of the number of ranks, and P of it.
    """
    objective = one.objective
    share = batch_size // distributed.world_size()
    starts = range(0, len(probes.index), batch_size)
    own_rows = [slice(s + distributed.rank() * share, s + (distributed.rank() + 1) * share) for s in starts]
    known = [_known(one, probes, rows) for rows in own_rows]
    fresh, own, scale = (None if known[0][i] is None else torch.cat([part[i] for part in known], 1) for i in range(3))  # type: ignore[misc]
    assert fresh is not None
    assert scale is not None
    objective.start_epoch(one.epoch)
    # Tables by sample are too large to be copied; of them only the rows of a batch change.
    before = None if objective.needs_keys else {k: _copied(v) for k, v in objective.state_dict().items()}
    step, tables = objective.step, [module for module in objective.modules() if isinstance(module, ShardedTable)]
    used = []
    for start, rows in zip(starts, own_rows):
        keys = probes.keys[start : start + batch_size]
        table_rows = [table.read(keys) for table in tables]
        alpha = objective(*_inputs(one, probes, rows)).log_normalizers
        used.append(None if alpha is None else distributed.all_gather(alpha, dim=1))
        for table, old in zip(tables, table_rows):
            table.write(keys, old)
        if before is not None:
            objective.load_state_dict(before)
        objective.step = step
    return Estimates(fresh, own, fresh if used[0] is None else torch.cat(used, 1), scale)  # type: ignore[arg-type]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _inputs(one: Examined, probes: Probes, rows: slice) -> tuple[Any, ...]:
    """What the objective is called with for some of the probes."""
    keys = probes.keys[rows] if one.objective.needs_keys else None
    return probes.image_features[rows], probes.text_features[rows], one.logit_scale, one.logit_bias, keys


def _known(one: Examined, probes: Probes, rows: slice) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of one global batch, [2, N] on every rank from this rank's rows: its own estimate, what the method knows, 1/τ."""
    objective, inputs = one.objective, _inputs(one, probes, rows)
    recollection = objective.recall(*inputs)
    scale = one.logit_scale if recollection is None else recollection.logit_scale
    scale = distributed.all_gather(scale.expand(2, len(inputs[0])).contiguous(), dim=1)
    fresh = add_log_eps(batch_log_means(gather_batch(*inputs[:2]), scale), objective.log_eps)
    own = None if recollection is None else distributed.all_gather(recollection.log_normalizers, dim=1)
    return distributed.all_gather(fresh, dim=1), own, scale


def _record(guess: Estimates, truth: Tensor) -> dict[str, Any]:
    named = {"batch": guess.batch, "own": guess.own, "used": guess.used}
    return {
        "probes": truth.shape[1],
        "temperature": float((1 / guess.logit_scale).mean()),
        "truth": {side: float(values.mean()) for side, values in zip(SIDES, truth)},
        "estimates": {name: None if alpha is None else compare(alpha.double(), truth) for name, alpha in named.items()},
    }


def compare(estimates: Tensor, truth: Tensor) -> dict[str, Any]:
    """Errors of estimated α, both [2, P] float64; NaN where an estimate is missing.

    Returns:
        For `image` and `text`: mse (mean of (estimate − truth)²), bias (mean of estimate − truth), mean (of the estimate), all
        over the probes that have one; `mse`, the mean of the two sides; `unknown`, the share of probes without an estimate.
        None for a number that does not exist.
    """
    sides = {}
    for side, guess, true in zip(SIDES, estimates, truth):
        error = (guess - true)[~guess.isnan()]
        numbers = (error.square().mean(), error.mean(), guess[~guess.isnan()].mean())
        sides[side] = {name: _finite(float(number)) for name, number in zip(("mse", "bias", "mean"), numbers)}
    each = [sides[side]["mse"] for side in SIDES]
    both = None if None in each else sum(each) / 2  # type: ignore[arg-type]
    return {**sides, "mse": both, "unknown": float(estimates.isnan().double().mean())}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
