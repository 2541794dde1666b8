"""What a training step of NeuCLIP costs, worked out on paper: FLOPs, bytes of memory and messages, and milliseconds from them.

    PYTHONPATH=src python benchmarks/cost_model.py                      # the table of docs/performance.md

Nothing is measured here. FLOPs, kernels and messages are exact where all pairs are formed as one block: tests count those of
the running objective and compare. Times follow from the assumptions in `Machine`, which are round numbers for an H100 SXM;
parts are added, as if nothing overlapped.

N = K·B samples a step, m prototypes per modality, width d, T_u inner updates, K ranks.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, replace

from measure import table

FLOAT, DOUBLE = 4, 8  # bytes
LOSS_KERNELS = 89


@dataclass(frozen=True)
class Machine:
    """Assumed speeds of one GPU and of the network between K of them.

    Attributes:
        matrix, float32: FLOP/s reached by bfloat16 matrix products (of a peak of 989e12) and by float32 ones (of 67e12).
        towers: FLOP/s reached by the towers as a whole, 40 % of the peak.
        memory: bytes/s reached (of a peak of 3.35e12).
        bandwidth: bytes/s at which a ring of all ranks moves large messages.
        latency: seconds of a small message, whatever the number of ranks.
        kernel: seconds that a kernel takes beyond its work, within a CUDA graph or a full queue.
    """

    matrix: float = 600e12
    float32: float = 45e12
    towers: float = 400e12
    memory: float = 2.5e12
    bandwidth: float = 350e9
    latency: float = 20e-6
    kernel: float = 2e-6


NVLINK = Machine()
# 400 Gb/s per GPU between nodes: 50e9 bytes/s, of which nine tenths; more hops for a small message.
INFINIBAND = Machine(bandwidth=45e9, latency=40e-6)


@dataclass(frozen=True)
class Run:
    """Sizes of a run; the defaults are those of the paper's large run. `precision` is --npn_precision.

    Attributes:
        tower_flops: forward FLOPs of both towers for one sample. parameters: of both towers.
    """

    ranks: int = 8
    batch: int = 512
    prototypes: int = 4096
    dim: int = 512
    updates: int = 10
    precision: str = "fp32"
    tower_flops: float = 0.0
    parameters: int = 0

    @property
    def global_batch(self) -> int:
        """N."""
        return self.ranks * self.batch

    @property
    def rows(self) -> float:
        """Prototypes of a rank, per modality."""
        return self.prototypes / self.ranks


@dataclass(frozen=True)
class Message:
    """A collective: its kind, what a rank puts into it in bytes, and how often it happens in a step."""

    kind: str
    num_bytes: int
    times: int

    def seconds(self, machine: Machine, ranks: int) -> float:
        """Of all its occurrences. A ring moves (K−1)/K of the whole, an all-reduce twice."""
        if ranks == 1:
            return 0.0
        whole = self.num_bytes * (ranks if self.kind == "all_gather" else 2)
        return self.times * (machine.latency + whole * (ranks - 1) / ranks / machine.bandwidth)


@dataclass(frozen=True)
class Part:
    """A part of the step on one rank.

    Attributes:
        flops: of matrix products. exact: whether they are float32 products, not those of tensor cores.
        num_bytes: that have to go through memory. messages: as above. kernels: how many operators are launched.
    """

    name: str
    flops: float
    exact: bool
    num_bytes: float
    messages: tuple[Message, ...] = ()
    kernels: int = 0

    def seconds(self, machine: Machine, ranks: int) -> float:
        """Without any overlap."""
        rate = machine.towers if self.name == "towers" else machine.float32 if self.exact else machine.matrix
        talking = sum(message.seconds(machine, ranks) for message in self.messages)
        return self.flops / rate + self.num_bytes / machine.memory + self.kernels * machine.kernel + talking


def pairs(run: Run) -> Part:
    """Features gathered, the batch's own log g, and the gradient at given normalizers: three pairs of products B×N×d."""
    b, n, d = run.batch, run.global_batch, run.dim
    # The two blocks are formed twice; about twenty passes of reading or writing over each pair of blocks.
    passes = 2 * 20 * b * n * FLOAT
    messages = (Message("all_gather", 2 * b * d * FLOAT, 1), Message("all_gather", 2 * b * FLOAT, 1))
    # Packing for the two messages takes one more each.
    return Part("loss", 12 * b * n * d, True, passes, messages, LOSS_KERNELS + 2 * (run.ranks > 1))


def normalizer(run: Run) -> Part:
    """T_u updates of the prototypes and one prediction, with the optimizer adagrad_norm."""
    n, d, rows, updates = run.global_batch, run.dim, run.rows, run.updates
    block, features = 2 * n * rows, 2 * n * d
    bf16 = run.precision == "bf16"
    operand = FLOAT / 2 if bf16 else FLOAT
    # Over the block of pairs: written by a product, read for the largest, read and written by softmax and again (rounded in
    # bfloat16) by the factors of the gradient, read by a product. Over the features: read by either product.
    per_update = block * (5 * FLOAT + 2 * operand) + features * 2 * operand
    prediction = block * 4 * FLOAT + features * operand
    # About ten passes over a rank's prototypes and their gradient.
    weights = 10 * 2 * rows * d * FLOAT
    messages = (Message("all_reduce", 2 * n * DOUBLE, updates + 1), Message("all_reduce", 2 * FLOAT, updates))
    flops = 8 * n * rows * d * updates + 4 * n * rows * d
    # A sum over ranks needs four small ones: to float64, exp, log, and back. m > N: features are remembered.
    kernels = 16 + 7 * bf16 + updates * (36 + 5 * bf16) + 4 * (updates + 1) * (run.ranks > 1)
    kernels += 11 * (run.prototypes > n)
    return Part("NPN", flops, not bf16, updates * (per_update + weights) + prediction, messages, kernels)


def data_parallel_normalizer(run: Run) -> Part:
    """The same with all prototypes on every rank and the anchors divided: a gradient of 2·m·d numbers per update."""
    sharded = normalizer(run)
    weights = 10 * 2 * (run.prototypes - run.rows) * run.dim * FLOAT
    gradient = Message("all_reduce", 2 * run.prototypes * run.dim * FLOAT, run.updates)
    messages = (gradient, Message("all_gather", 2 * run.batch * FLOAT, 1))
    moved = sharded.num_bytes + run.updates * weights
    return replace(sharded, name="NPN, data parallel", num_bytes=moved, messages=messages)


def towers(run: Run) -> Part:
    """Forward and backward of both towers (three forward passes' FLOPs). Bytes are within the assumed FLOP/s."""
    return Part("towers", 3 * run.tower_flops * run.batch, False, 0.0)


def outer(run: Run) -> Part:
    """Gradients summed over the ranks, and AdamW: parameter, gradient and two moments read, three of them written."""
    gradients = (Message("all_reduce", run.parameters * FLOAT, 1),) if run.ranks > 1 else ()
    return Part("optimizer", 0.0, True, 7 * run.parameters * FLOAT, gradients)


# FLOPs of one forward pass of both towers for one sample (torch.utils.flop_counter) and parameters, by open_clip's name.
MODELS = {"ViT-B-32": (14.78e9, 151_277_313), "ViT-B-16": (41.09e9, 149_620_737)}
WORLDS = (("8 GPUs, one node", 8, NVLINK), ("8 GPUs, 2 nodes", 8, INFINIBAND), ("64 GPUs, 8 nodes", 64, INFINIBAND))


def rows_of(model: str, precision: str) -> list[list[str]]:
    """One row of milliseconds per world."""
    flops, parameters = MODELS[model]
    found = []
    for name, ranks, machine in WORLDS:
        run = Run(ranks=ranks, precision=precision, tower_flops=flops, parameters=parameters)
        parts = {part.name: 1e3 * part.seconds(machine, ranks) for part in (towers(run), pairs(run), normalizer(run))}
        optimizer = 1e3 * outer(run).seconds(machine, ranks)
        before = 1e3 * data_parallel_normalizer(run).seconds(machine, ranks)
        total = sum(parts.values()) + optimizer
        numbers = [*parts.values(), optimizer, total]
        share = f"{100 * parts['NPN'] / total:.1f} %"
        found.append([model, name, precision, *(f"{ms:.2f}" for ms in numbers), share, f"{before:.2f}"])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    head = ("model", "world", "products", "towers", "loss", "NPN", "optimizer", "sum", "NPN's share")
    rows = [row for model in MODELS for precision in ("fp32", "bf16") for row in rows_of(model, precision)]
    print("Worked out, not measured. Milliseconds per step, B 512, m 4096, d 512, T_u 10.\n")
    print(table((*head, "NPN, data parallel"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
