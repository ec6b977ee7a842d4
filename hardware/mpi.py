"""Processes that mpiexec started, on one machine or on many:  mpiexec -n 4 python train.py ...

No files are shared: a machine needs the text and the tokenizer, and gets everything else from rank 0. The gradients are
sent by MPI but added here, in the order of the ranks, so the bits are those of the same number of ranks without MPI.
"""
import atexit
from functools import partial
from types import SimpleNamespace

import numpy as np

from hardware import ranks
from hardware.device import Unavailable


class Mpi(ranks.Team):
    def __init__(self):
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as problem:          # RuntimeError: it finds no MPI library
            raise Unavailable(f"mpiexec needs mpi4py ({problem}): pip install -r requirements-mpi.txt") from None
        self.world, self.in_place, self.done = MPI.COMM_WORLD, MPI.IN_PLACE, False
        rank, size, here = self.world.rank, self.world.size, self.world.Split_type(MPI.COMM_TYPE_SHARED)
        if size != ranks.launched():
            raise Unavailable(f"mpiexec started {ranks.launched()} processes, but mpi4py sees {size}: it belongs to "
                              "another MPI; use the mpiexec of that one, or pip install -r requirements-mpi.txt")
        super().__init__(rank, size, here.size, here.rank, {
            other: SimpleNamespace(send=partial(self.world.send, dest=other),
                                   recv=partial(self.world.recv, source=other))
            for other in ([0] if rank else range(1, size))})
        atexit.register(lambda: self.done or self.world.Abort(2))       # after an error the others would wait forever

    def arrays(self, n):
        flat, grad, self.received = (np.zeros(n, np.float32) for _ in range(3))
        return flat, grad

    def spread(self):
        self.world.Bcast(self.flat)

    def add_up(self, value):
        value = self.sum(float(value))
        self.world.Alltoall(self.grad, self.received)           # slice r of every rank's gradients goes to rank r
        self.add(self.received.reshape(self.size, self.part))
        return value

    def share_weights(self):
        self.world.Allgather(self.in_place, self.flat)
