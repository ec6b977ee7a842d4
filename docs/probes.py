"""Watch the real code while it runs: a training step's ops, their time and memory (on a CPU); attention's maps."""
import math
import time
import tracemalloc
from collections import namedtuple
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np

import autograd
import nanollm
from hardware import device


@contextmanager
def hooked(forward, backward):
    """Inside, each op calls forward(op, its result) when it is done, and backward(op, dout) before its backward.

    `op` is an object with the function's name; forward and backward may store what they like in it.
    """
    plain = autograd.record

    def result(data, parents, run):
        op = SimpleNamespace(name=run.__qualname__.split(".")[0])

        def hooked_run(dout):
            backward(op, dout)
            return run(dout)
        out = plain(data, parents, hooked_run)
        forward(op, out)
        return out
    with mock.patch.object(autograd, "record", result):
        yield


Span = namedtuple("Span", "op phase seconds peak")      # phase: data, forward, backward or optimizer


def training_step(model, optimizer, batch):
    """The Spans of a training step on x, y = batch(): one for each op in forward and one in backward, in order.

    The engine's work on an op's result counts as the op's. peak: the most bytes held during it, if tracemalloc is on.
    """
    spans, running, since = [], None, time.perf_counter()

    def end(op, phase):
        nonlocal since
        spans.append(Span(op, phase, time.perf_counter() - since, tracemalloc.get_traced_memory()[1]))
        tracemalloc.reset_peak()
        since = time.perf_counter()

    def backward(op, dout):
        nonlocal running
        if running:
            end(running, "backward")
        running = op.name
    with hooked(lambda op, out: end(op.name, "forward"), backward):
        x, y = batch()
        end("batch", "data")
        model.loss(x, y).backward()
        end(running, "backward")
        optimizer.step()
        optimizer.zero_grad()
        end("Adam", "optimizer")
    return spans


def attention_maps(model, ids):
    """p = softmax(q kᵀ/√D), (n_block, H, T, T), of each attention that the model does on ids (T,).

    The op never holds the whole p, so p is computed from its q and k. Raises AssertionError if p v is not what the op
    returned.
    """
    maps, op = [], nanollm.attention

    def watched(*qkv):
        out = op(*qkv)
        q, k, v = (device.to_host(t.data[0]).astype(np.float64) for t in qkv)
        k, v = (np.repeat(x, len(q) // len(k), 0) for x in (k, v))      # one key/value head serves H/K query heads
        s = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[2])
        s[:, np.triu(np.ones(s.shape[1:], bool), 1)] = -np.inf
        p = np.exp(s - s.max(2, keepdims=True))
        p /= p.sum(2, keepdims=True)
        np.testing.assert_allclose(p @ v, device.to_host(out.data[0]), rtol=1e-4, atol=1e-5)
        maps.append(p)
        return out
    with mock.patch.object(nanollm, "attention", watched), autograd.no_grad():
        model.hidden(np.array([ids]))
    return np.array(maps)
