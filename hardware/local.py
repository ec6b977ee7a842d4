"""Processes of one machine, which rank 0 starts: they share the weights, and read each other's gradients.

Python's own multiprocessing starts them, so rank 0 is the process that the user started: it keeps the terminal. A pipe
breaks when the process at its other end dies, however that happens, and a process that waits at one costs nothing.
"""
import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading

import numpy as np

from hardware.device import Unavailable
from hardware.ranks import Gone, Team, follow


class Local(Team):
    """Processes that rank 0 started. `shared` is the memory of the weights and of each rank's gradients."""

    def __init__(self, rank, pipes, shared):
        super().__init__(rank, len(shared) - 1, len(shared) - 1, rank, pipes)
        self.shared = shared

    def arrays(self, n):
        weights, *self.gradients = (np.frombuffer(array, np.float32) for array in self.shared)
        return weights, self.gradients[self.rank]

    def add_up(self, value):
        value = self.sum(float(value))                 # and so all gradients are there
        self.add([gradients[self.slices[self.rank]] for gradients in self.gradients])
        return value

    share_weights = spread = Team.exchange      # they are there for all as soon as all have written


def packed(task, context):
    """(a pickle of the task, the shared memory of the arrays in it): `pickle.loads(*packed)` copies no array."""
    buffers = []
    words = pickle.dumps(task, 5, buffer_callback=buffers.append)
    memory = [context.RawArray("B", buffer.raw().nbytes) for buffer in buffers]
    for shared, buffer in zip(memory, buffers, strict=True):
        np.frombuffer(shared, np.uint8)[:] = buffer.raw()
    return words, memory


@contextlib.contextmanager
def started(end, task):
    """(rank 0's team, its task): the processes of the other ranks do not outlive this block. All share the task's
    arrays, such as pictures.

    Raises Unavailable for a process that cannot start or that ends too early, unless that has told the user why.
    """
    context, (work, plan, on_gpu, _) = multiprocessing.get_context("spawn"), task
    script = getattr(sys.modules["__main__"], "__file__", None if work.__module__ == "__main__" else __file__)
    if not script or not os.path.exists(script) or hasattr(sys, "frozen"):
        raise Unavailable("other processes can start only from a file: run python train.py, or use --processes 1")
    shared = [context.RawArray("f", 0 if on_gpu else plan.n_weight) for _ in range(1 + plan.processes)]
    words, memory = packed(task, context)
    task = pickle.loads(words, buffers=memory)
    plan = task[1]                              # nobody needs the arrays of the other one now
    pipes, others = {}, {}
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)       # the others inherit it: Ctrl-C is for rank 0
        try:
            for rank in range(1, plan.processes):
                pipes[rank], theirs = context.Pipe()
                team = Local(rank, {0: theirs}, shared)
                others[rank] = context.Process(target=other, args=(team, end, words, memory), daemon=True)
                others[rank].start()
                theirs.close()                  # so that the pipe breaks when the process ends
        except OSError as problem:
            others.pop(rank)
            raise Unavailable(f"process {rank} could not start ({problem.strerror}): use fewer --processes") from None
        finally:
            signal.signal(signal.SIGINT, before)
        yield Local(0, pipes, shared), task
        for process in others.values():
            process.join()
    except Gone as gone:
        raise_for(gone.args[0], others)
    finally:
        for process in others.values():
            process.kill()


def raise_for(rank, others):
    """Say why the process of this rank has ended, unless it has done so itself, with code 2."""
    others[rank].join()
    code = others[rank].exitcode
    if code == 2:
        sys.exit(2)
    raise Unavailable(f"process {rank} of {1 + len(others)} has ended "
                      f"({signal.Signals(-code).name if code < 0 else f'exit code {code}'}), and the training with it: "
                      "continue with --resume, or use --processes 1") from None


def other(team, end, words, memory):
    """What the process of another rank runs. If rank 0's process ends, it ends at once."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(2)), daemon=True).start()
    follow(team, end, pickle.loads(words, buffers=memory))
