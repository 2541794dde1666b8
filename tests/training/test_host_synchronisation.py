"""Between logging steps a whole training step reads nothing back from the device: forward, objective, backward, update."""

from __future__ import annotations

import pytest

from host_reads import HostSynchronisation, no_host_synchronisation
from neuclip import OBJECTIVES
from small_training import make_args, make_batches, make_training
from training.loop import training_step

# The learning rate of the temperature depends on the temperature.
FLAGS = ("--lr_tau_scheduler", "step_thresh", "--grad-clip-norm", "1", "--npn_num_protos", "6")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("accum_freq", [1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_step_reads_a_value_back(name: str, accum_freq: int, optimizer: str) -> None:
    batches = make_batches(4, 4)
    flags = ("--objective", name, "--accum-freq", str(accum_freq), "--optimizer", optimizer)
    training = make_training(make_args(*flags, *FLAGS), batches)
    training.state.objective.report = False
    for step, batch in enumerate(batches):
        with no_host_synchronisation():
            training.rates.set(step)
            training_step(training, batch)


def test_the_guard_sees_into_a_step() -> None:
    batches = make_batches(1, 4)
    training = make_training(make_args(*FLAGS), batches)
    training.state.towers.register_forward_hook(lambda *_: batches[0].image.sum().item() and None)
    with pytest.raises(HostSynchronisation), no_host_synchronisation():
        training_step(training, batches[0])
