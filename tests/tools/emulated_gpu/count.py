"""Device operations and memory of a training step, and a generated token's:  count.py [bfloat16 [WINDOWS]]

The base configuration of benchmarks/speed.py, on the emulated device, which compiles every kernel for an H100 and
counts it, but computes nothing. An operation is a kernel, a product, a launch of CUB, a copy or a memset.
"""
import collections
import re
import sys
import time
from pathlib import Path

import emulator
import numpy as np


def count(f):
    """(a Counter of the device operations and the waits of f(), seconds)"""
    notes = []
    emulator.runtime.start(notes)
    start = time.perf_counter()
    f()
    seconds = time.perf_counter() - start
    emulator.runtime.stop()
    return collections.Counter(name or kind for kind, name in notes if kind != "malloc"), seconds


def main(dtype="float32", windows=4):
    emulator.install(execute=False)
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    import train
    from console.options import Settings
    from extras import plan
    from hardware import device
    from nanollm import Config, NanoLLM
    config = Config(vocab_size=30522)
    model = NanoLLM(config, seed=None)
    model.compute_dtype = np.dtype(dtype)
    optimizer, ids, loss = train.Adam(model), np.zeros((int(windows), 513), int), []
    step = {
        "zero": optimizer.zero_grad, "forward": lambda: loss.append(model.loss(ids[:, :-1], ids[:, 1:])),
        "backward": lambda: loss[-1].backward(),
        "norm": lambda: loss.append(train.loss_and_norm(model, loss[-1].data)),
        "adam": lambda: optimizer.step(scale=train.clipping(*loss[-1], 1.0, 1.0))}
    for _ in range(3):                          # what is made once is there from the second step on
        loss.clear()
        phases = {name: count(f) for name, f in step.items()}
    reserved = device.xp.get_default_memory_pool().total_bytes() / 1e6
    planned = plan.report(config, Settings(batch_size=int(windows), seq_len=512, dtype=dtype))
    tokens = model.generate([1] * 8, 20, temperature=0)
    for _ in range(4):
        next(tokens)
    for name, (operations, seconds) in (phases | {"token": count(lambda: next(tokens))}).items():
        waits = operations.pop("sync", 0)
        print(f"{name:9}{operations.total():5} operations, {waits} waits, {1000 * seconds:6.1f} ms of the host"
              f"   {dict(operations.most_common(12))}")
    print(f"a step   {sum(operations.total() for operations, _ in phases.values()):5} operations, "
          f"{sum(seconds for _, seconds in phases.values()) * 1000:.1f} ms of the host\n"
          f"memory   {reserved:,.1f} MB reserved; the plan: {re.search('--batch-size.*', planned)[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
