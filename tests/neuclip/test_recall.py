"""What an objective says of a batch's normalizers without learning from it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from neuclip import Objective, RunShape, make_objective
from neuclip.objectives.amorlip import AmorLIP
from neuclip.objectives.fastclip import FastCLIP
from neuclip.objectives.neuclip import NeuCLIP
from neuclip.pairwise import gather_batch

from .conftest import FeatureMaker

N, DIM = 8, 6
SCALE = torch.tensor(12.0, dtype=torch.float64)
BIAS = torch.tensor(-0.7, dtype=torch.float64)

WITHOUT = ["--objective openclip", "--objective siglip"]
WITH = [
    "--fastclip --multiply_tau",
    "--fastclip --temperature_scheme individual_learnable --lr_tau 0.02",
    "--objective neuclip --npn_num_protos 20",
    "--objective neuclip --npn_arch mlp",
    "--objective neuclip --npn_optimization simultaneous --npn_num_protos 5",
    "--objective amorlip",
    "--objective amorlip --no-fit_w_prev --lambda_fit_neg_only",
]


def trained(flags: str, features: FeatureMaker) -> Objective:
    objective = make_objective(f"{flags} --data_size 1000", RunShape(DIM, N, 1, 4, 3)).double()
    for step in range(3):
        batch = (x.detach() for x in features(step, N, DIM))
        objective(*batch, SCALE, BIAS, torch.arange(N) + N * step)
    return objective


def flat(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [item for key in sorted(state) for item in [key, *flat(state[key])]]
    return [state.clone() if isinstance(state, Tensor) else state]


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(left, right)
    )


@pytest.mark.parametrize("flags", WITHOUT)
def test_a_mini_batch_loss_has_none(flags: str, features: FeatureMaker) -> None:
    batch = [x.detach() for x in features(9, N, DIM)]
    assert trained(flags, features).recall(*batch, SCALE, BIAS) is None


@pytest.mark.parametrize("flags", WITH)
def test_nothing_changes(flags: str, features: FeatureMaker) -> None:
    objective = trained(flags, features)
    before = flat(objective.state_dict())
    batch = [x.detach() for x in features(9, N, DIM)]
    known = objective.recall(*batch, SCALE, BIAS, torch.arange(N) + 4)
    assert known is not None
    assert known.log_normalizers.shape == (2, N)
    assert same(before, flat(objective.state_dict()))


def test_an_npn_that_has_not_begun_knows_nothing(features: FeatureMaker) -> None:
    objective = make_objective("--objective neuclip", RunShape(DIM, N, 1, 4, 3))
    known = objective.recall(*(x.detach() for x in features(9, N, DIM)), SCALE)
    assert known is not None
    assert bool(known.log_normalizers.isnan().all())


def test_moving_averages_are_those_of_the_last_visit(features: FeatureMaker) -> None:
    objective = trained("--fastclip --multiply_tau --gamma_schedule constant --gamma 0.3", features)
    assert isinstance(objective, FastCLIP)
    batch = [x.detach() for x in features(20, N, DIM)]
    keys = torch.arange(N) + 500
    known = objective.recall(*batch, SCALE, None, keys)
    assert bool(known.log_normalizers.isnan().all())  # never seen
    used = objective(*batch, SCALE, None, keys).log_normalizers
    known = objective.recall(*batch, SCALE, None, keys)
    torch.testing.assert_close(known.log_normalizers, used, rtol=1e-6, atol=1e-6)  # the table is float32
    torch.testing.assert_close(known.logit_scale, SCALE)


def test_individual_temperatures_are_the_samples_own(features: FeatureMaker) -> None:
    objective = trained("--fastclip --temperature_scheme individual_learnable --lr_tau 0.02", features)
    batch = [x.detach() for x in features(20, N, DIM)]
    known = objective.recall(*batch, SCALE, None, torch.arange(N))
    row = objective.table.read(torch.arange(N)).T
    torch.testing.assert_close(known.logit_scale, 1.0 / row[2:4].double())
    assert bool((known.logit_scale != SCALE).all())


def test_prototypes_predict_the_mean_over_themselves(features: FeatureMaker) -> None:
    objective = trained("--objective neuclip --npn_num_protos 20 --fastclip_eps 1e-3", features)
    assert isinstance(objective, NeuCLIP)
    images, texts = (x.detach() for x in features(9, N, DIM))
    known = objective.recall(images, texts, SCALE).log_normalizers
    weights = objective.state_dict()["normalizer.prototypes"].double()
    for side, anchors in enumerate((images, texts)):
        for i in range(N):
            positive = float(images[i] @ texts[i])
            cosines = [float(anchors[i] @ w / w.norm()) for w in weights[side]]
            terms = [math.exp((cosine - positive) * float(SCALE)) for cosine in cosines]
            assert float(known[side, i]) == pytest.approx(math.log(1e-3 + sum(terms) / len(terms)), abs=1e-6)


def test_amortised_sums_become_means_relative_to_the_pair(features: FeatureMaker) -> None:
    objective = trained("--objective amorlip --no-fit_w_prev", features)
    assert isinstance(objective, AmorLIP)
    images, texts = (x.detach() for x in features(9, N, DIM))
    known = objective.recall(images, texts, SCALE, BIAS).log_normalizers
    raw = objective.normalizer.predict_average(torch.stack((images, texts))) + objective.settings.offset
    positive = SCALE * (images * texts).sum(1) + BIAS
    torch.testing.assert_close(known, raw - positive - math.log(N - 1))
    # Without mixing, what a step divides by is that same average before it takes in the step's network.
    used = objective(images, texts, SCALE, BIAS).log_normalizers
    torch.testing.assert_close(known, used)
    assert gather_batch(images, texts).size == N
