"""Several processes train one model: data parallelism, with Adam's moments shared out (ZeRO stage 1).

Each rank, a process of number 0 … size-1, has all weights and takes its share of a step's windows. The flat arrays are
cut into one slice for each rank:

    the gradients of all ranks ─ add_up ──► slice r of their sum, on rank r ─ Adam ──► slice r of the weights
    slice r of the weights ─ share_weights ──► all weights, on all ranks

As much is sent as if every rank got the whole sum, but each keeps only 1/size of Adam's moments (Rajbhandari et al.
2020, §5.1). Gradients are added in the order of the ranks, so N ranks give the same bits in each run. Rank 0 alone
reads flags and checkpoints, writes files and speaks. It starts the others, which share its memory (local.py), or
mpiexec starts all, on one machine or on many (mpi.py). On GPUs the arrays go from card to card (nccl.py). A rank that
fails says why and ends, and the end of one is the end of all. One process alone needs none of this.
"""
import contextlib
import functools
import math
import operator
import os
import platform
import sys
import warnings
from functools import partial

import numpy as np

from hardware import device

BLOCK = 1 << 15         # gradients of a sweep's block, on each rank


class Gone(Exception):
    """The rank with this number has ended."""


class Team:
    """All ranks, as one of them sees them: `rank` of `size`, on a machine with `here` of them, as its `local_rank`.

    Rank 0 has a pipe to each other rank, {rank: pipe}, and they have one to it. Without pipes it is alone.
    """
    def __init__(self, rank=0, size=1, here=1, local_rank=0, pipes=()):
        self.rank, self.size, self.here, self.local_rank, self.pipes = rank, size, here, local_rank, dict(pipes)

    def send(self, rank, value):
        try:
            self.pipes[rank].send(value)
        except OSError:                         # nobody is at the other end
            raise Gone(rank) from None

    def receive(self, rank):
        try:
            return self.pipes[rank].recv()
        except (EOFError, OSError):
            raise Gone(rank) from None

    def exchange(self, value=None):
        """[rank 0's value, rank 1's, …] on every rank, once all of them have called this."""
        if self.rank:
            self.send(0, value)
            return self.receive(0)
        values = [value, *map(self.receive, self.pipes)]
        for rank in self.pipes:
            self.send(rank, values)
        return values

    def sum(self, value):
        return functools.reduce(operator.add, self.exchange(value))

    def scatter(self, whole):
        """This rank's slice of a host array that rank 0 has."""
        if self.rank:
            return self.receive(0)
        for rank in self.pipes:
            self.send(rank, whole[self.slices[rank]])
        return whole[self.slices[0]] if self.pipes else whole

    def gather(self, part):
        """On rank 0 the host array of which each rank has its slice; None on the others."""
        part = device.to_host(part)
        if self.rank:
            return self.send(0, part)
        return np.concatenate([part, *map(self.receive, self.pipes)]) if self.pipes else part

    @contextlib.contextmanager
    def first_here(self):
        """The first rank of each machine runs this block before the others do: they find the files that it wrote."""
        if self.local_rank:
            self.exchange()
        yield
        if not self.local_rank:
            self.exchange()

    def share(self, start, count, most):
        """Yield (first, size), at most `most` at a time: this rank's share of the `count` windows from `start`."""
        first, end = (start + count * rank // self.size for rank in (self.rank, self.rank + 1))
        for i in range(first, end, most):
            yield i, min(most, end - i)

    def adopt(self, weights):
        """Move a model's Parameters to where the ranks exchange them. All get rank 0's weights."""
        if self.size == 1:
            return
        n, self.part = weights.flat.size, math.ceil(weights.flat.size / self.size)
        ends = [min(rank * self.part, n) for rank in range(self.size + 1)]
        self.slices = list(map(slice, ends, ends[1:]))
        self.flat, self.grad = self.arrays(self.size * self.part)       # MPI and NCCL send slices of one length
        if self.rank == 0:
            self.flat[:n] = weights.flat
        weights.place(self.flat[:n], self.grad[:n], self.slices[self.rank])
        self.spread()

    def add_up(self, value):
        """The sum of all ranks' values; and in this rank's slice of the gradients, the sum of theirs.

        One rank alone does not look at the value: it may still be on its way from a GPU.
        """
        return value

    def add(self, parts):
        total = self.grad[self.slices[self.rank]]

        def block(s):
            total[s] = sum(part[s] for part in parts)
        device.sweep(block, total.size, BLOCK)

    def share_weights(self):
        """Give every rank the slices of the weights that the others have updated."""


ALONE = Team()


# ---------------------------------------------------------------- the beginning and the end

def launched():
    """How many processes mpiexec started, this one included; 1 without mpiexec."""
    return max(int(os.environ.get(name, 1)) for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))


def run(prepare, work, end):
    """Do work(plan, team) on all ranks; returns what it returns on rank 0, an exit code.

    prepare(), on rank 0 alone, gives the plan: plan.processes ranks for a model of plan.n_weight weights.
    end(function, where) runs a function and ends the process as the command ends; `where`, "" on rank 0, follows the
    command's name in a message. Raises Unavailable.
    """
    team = ALONE
    if launched() > 1:
        from hardware.mpi import Mpi  # here, because importing it starts MPI
        team = Mpi()
    task = team.exchange((work, prepare(), device.on_gpu, device.tf32_products) if team.rank == 0 else None)[0]
    if team.rank:
        follow(team, end, task)
    if task[1].processes == team.size:
        return do(team, *task)
    from hardware.local import started  # here, because it needs Team
    with started(end, task) as (team, task):
        return do(team, *task)


def follow(team, end, task):
    """Do the work of a rank other than 0, which writes nothing but its errors, and end the process."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore")
    end(partial(do, team, *task), where=f" (rank {team.rank}, {platform.node()})")


def do(team, work, plan, on_gpu, tf32):
    """Do one rank's work, on its share of the machine."""
    world = team
    if world.size > 1:
        device.use("gpu" if on_gpu else "cpu", tf32, world)
    if world.size > 1 and on_gpu:
        from hardware.nccl import Nccl  # here, because it needs Team
        team = Nccl(world)
    try:
        code = work(plan, team)
    except Gone:
        if team.rank == 0:
            raise
        sys.exit(2)                             # rank 0 says why
    world.done = True
    return code
