"""Two stages of first_on_a_card.sh:  python tests/tools/first_on_a_card.py device|steps base|tiny"""
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from extras import plan
from hardware import device
from nanollm import Config, NanoLLM

SIZES = {"base": (Config(vocab_size=30522), 4, 10), "tiny": (Config(300, 32, 2, 4, 2, 32, 64), 2, 2)}   # batch, steps
FULL = "base" in sys.argv
wrong = []


def check(ok, text):
    print("ok    " if ok else "WRONG ", text)
    if not ok:
        wrong.append(text)


def seconds(f, times):
    """(median seconds until f() has returned, and until the card is done)"""
    wait, pairs = device.xp.cuda.Device().synchronize, []
    for _ in range(times):
        wait()
        start = time.perf_counter()
        f()
        returned = time.perf_counter() - start
        wait()
        pairs.append((returned, time.perf_counter() - start))
    return [statistics.median(column) for column in zip(*pairs, strict=True)]


class Training:
    def __init__(self, dtype):
        config, self.batch, self.times = SIZES["base" if FULL else "tiny"]
        device.use(tf32=dtype == "tf32")
        self.dtype = np.dtype("float32" if dtype == "tf32" else dtype)
        self.model = NanoLLM(config, seed=3)
        self.model.compute_dtype = self.dtype
        self.adam = train.Adam(self.model, 1e-3)
        ids = np.random.default_rng(1).integers(0, config.vocab_size, (self.batch, config.max_context + 1))
        self.x, self.y = ids[:, :-1], ids[:, 1:]

    def gradient(self):
        self.adam.zero_grad()
        loss = self.model.loss(self.x, self.y)
        loss.backward()
        return loss

    def step(self):
        self.loss, norm = train.loss_and_norm(self.model, self.gradient().data)
        self.adam.step(scale=train.clipping(self.loss, norm, 1, 1))


def first():
    """A kernel, products, the memory's limit and what an unclean memory changes; the card's own speed."""
    xp = device.xp
    print(device.reason, "| driver", xp.cuda.runtime.driverGetVersion(), "| Python", sys.version.split()[0],
          "| NumPy", np.__version__)
    for name in "float64", "float32", "float16", "bfloat16":
        a = xp.asarray(np.arange(6).reshape(2, 3), np.dtype(name))
        check((device.to_host(device.matmul(a, a.T)) == [[5, 14], [14, 50]]).all(), f"a product of {name}")
    try:
        xp.empty(1 << 42, np.float32)
        check(False, "16 TB are refused")
    except MemoryError as problem:
        check(float(xp.ones(3).sum()) == 3, f"16 TB are refused ({str(problem)[:60]}), and the card continues")
    for name in "float32", "bfloat16":
        training, gradients = Training(name), []
        for value in 0, np.nan:
            rest = [xp.full(1 << (24 if FULL else 14) - i % 8, value, np.float32) for i in range(64)]
            del rest                            # the pool keeps the memory, and hands it out again
            training.gradient()
            gradients.append(device.to_host(training.model.weights.grad[training.model.embed.data.size:]))
        check((gradients[0] == gradients[1]).all(), f"NaN in free memory changes no gradient of {name}")
    n = 8192 if FULL else 64
    x, y = xp.ones((n, n), np.float32), xp.empty((n, n), np.float32)
    print(f"copying: {2 * x.nbytes / seconds(lambda: xp.copyto(y, x), 5)[1] / 1e12:.2f} TB/s, read and written")
    for name in "bfloat16", "tf32", "float32":
        device.use(tf32=name == "tf32")
        z = x.astype("float32" if name == "tf32" else np.dtype(name))
        print(f"products of {name}: {2 * n ** 3 / seconds(lambda: device.matmul(z, z), 5)[1] / 1e12:.1f} TFLOP/s")  # noqa: B023


def steps():
    """Time and memory of a training step. If it has returned as late as the card is done, the host sets the pace."""
    for name in "bfloat16", "tf32", "float32", "float16":
        device.xp.get_default_memory_pool().free_all_blocks()
        start, training = time.perf_counter(), Training(name)
        training.step()
        first, config = float(training.loss), training.model.config
        print(f"{name}: the first step after {time.perf_counter() - start:.1f} s")
        returned, done = seconds(training.gradient, training.times)
        _, whole = seconds(training.step, training.times)
        size, n = training.dtype.itemsize, training.model.weights.flat.size
        norms = plan.parameters(config)["norms"]
        moments = plan.moments(config, training.batch, config.max_context, size)
        planned = 16 * n + (2 * (n - norms) if size == 2 else 0) + max(sum(kept.values()) for kept in moments.values())
        reserved = device.xp.get_default_memory_pool().total_bytes()
        tokens = training.batch * config.max_context
        print(f"{name}: a step {1000 * whole:.2f} ms, {tokens / whole:,.0f} tokens/s; forward and backward returned "
              f"after {1000 * returned:.2f} ms, done after {1000 * done:.2f} ms; {reserved / 1e6:,.0f} MB, "
              f"planned {planned / 1e6:,.0f} MB")
        loss = float(training.loss)
        check(np.isfinite(loss) and loss < first, f"{name}: loss {first:.3f} -> {loss:.3f}")
        del training


if __name__ == "__main__":
    {"device": first, "steps": steps}[sys.argv[1]]()
    sys.exit(f"{len(wrong)} wrong" if wrong else 0)
