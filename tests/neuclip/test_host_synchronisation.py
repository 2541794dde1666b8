"""Between logging steps no objective reads a value back from the device: on a GPU that would stall every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from host_reads import HostSynchronisation, no_host_synchronisation
from neuclip import OBJECTIVES, RunShape, make_objective

from .conftest import FeatureMaker

RUNS = {name: f"--objective {name}" for name in OBJECTIVES}
RUNS |= {f"{name}, chunked": f"{flags} --loss-chunk-size 3" for name, flags in RUNS.items()} | {
    "fastclip v2": "--fastclip --temperature_scheme individual_learnable --gamma_schedule constant",
    "fastclip v3": "--fastclip --multiply_tau --gamma_schedule constant",
    "neuclip, m<N": "--objective neuclip --npn_num_protos 5 --npn_restart_iter 2",
    "neuclip, m>N": "--objective neuclip --npn_num_protos 20 --npn_restart_iter 4",
    "neuclip, adagrad": "--objective neuclip --npn_num_protos 20 --npn_optimizer adagrad --npn_wd 0.1",
    "neuclip, printed": "--objective neuclip --npn_num_protos 8 --gamma 0",
    "neuclip, separate": "--objective neuclip --npn_num_protos 20 --npn_objective separate",
    "neuclip, mlp": "--objective neuclip --npn_arch mlp --npn_restart_iter 2",
    "neuclip, mlp, adagrad_norm": "--objective neuclip --npn_arch mlp --npn_optimizer adagrad_norm --npn_wd 0.1",
    "neuclip, simultaneous": "--objective neuclip --npn_optimization simultaneous --npn_num_protos 20",
    "neuclip, simultaneous, mlp": "--objective neuclip --npn_optimization simultaneous --npn_arch mlp --npn_restart_iter 2",
    "amorlip, kl_div_asym": "--objective amorlip --lambda_loss_type kl_div_asym --lambda_tolerance 1",
    "amorlip, js_div": "--objective amorlip --lambda_loss_type js_div --no-fit_w_prev --no-calculate_full",
    "amorlip, kl_div_sym": "--objective amorlip --lambda_loss_type kl_div_sym --adaptive_tau --lambda_fit_neg_only",
}


@pytest.mark.parametrize("run", RUNS)
def test_no_step_reads_a_value_back(run: str, features: FeatureMaker) -> None:
    objective = make_objective(f"{RUNS[run]} --data_size 100", RunShape(6, 8, 1, 3, 2))
    objective.report = False
    for step in range(5):
        images, texts = features(step, 8, dtype=torch.float32)
        scale = torch.tensor(12.0, requires_grad=True)
        bias = None if objective.initial_logit_bias is None else torch.tensor(-4.0)
        keys = torch.arange(8)
        with no_host_synchronisation():
            if step % 3 == 0:
                objective.start_epoch(step // 3)
            objective(images, texts, scale, bias, keys).loss.backward()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: torch.equal(x, x),
        lambda x: x if x.sum() > 0 else -x,
    ],
)
def test_the_check_notices(read: Any) -> None:
    x = torch.arange(4.0)
    with pytest.raises(HostSynchronisation), no_host_synchronisation():
        read(x)
