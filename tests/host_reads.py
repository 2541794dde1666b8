"""A guard under which reading a value back from the device fails, on a machine without one.

On a GPU every such read makes the host wait until the device has caught up. Here tensors are on the CPU, so the guard refuses
the calls that would wait, whatever tensor they are made on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
