"""Between logging steps no objective reads a value back from the device: on a GPU that would stall every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neuclip import OBJECTIVES, RunShape, make_objective

from .conftest import FeatureMaker

READERS = (
    *("item", "cpu", "tolist", "nonzero", "numpy", "unique", "masked_select"),
    *("__bool__", "__float__", "__int__", "__index__", "__contains__", "__array__"),
)

# What the methods above, and others like torch.where(condition), come down to below Python.
OPERATORS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim", "item")


class HostSynchronisation(AssertionError):
    """A value was read back from the device."""


class RefuseReads(TorchDispatchMode):
    """Fails on operators whose result the host has to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in OPERATORS:
            raise HostSynchronisation(name)
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise HostSynchronisation(f"{name} with a mask")
        if name == "_to_copy" and (kwargs or {}).get("device") is not None:
            raise HostSynchronisation("a copy to a named device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_synchronisation() -> Iterator[None]:
    def refuse(name: str) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            raise HostSynchronisation(f"Tensor.{name}")

        return method

    with pytest.MonkeyPatch.context() as patch:
        for name in READERS:
            patch.setattr(Tensor, name, refuse(name), raising=False)
        with RefuseReads():
            yield


RUNS = {name: f"--objective {name}" for name in OBJECTIVES}
RUNS |= {f"{name}, chunked": f"{flags} --loss-chunk-size 3" for name, flags in RUNS.items()} | {
    "fastclip v2": "--fastclip --temperature_scheme individual_learnable --gamma_schedule constant",
    "fastclip v3": "--fastclip --multiply_tau --gamma_schedule constant",
    "neuclip, m<N": "--objective neuclip --npn_num_protos 5 --npn_restart_iter 2",
    "neuclip, m>N": "--objective neuclip --npn_num_protos 20 --npn_restart_iter 4",
    "neuclip, adagrad": "--objective neuclip --npn_num_protos 20 --npn_optimizer adagrad --npn_wd 0.1",
    "neuclip, printed": "--objective neuclip --npn_num_protos 8 --gamma 0",
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
