"""A small, square gradient check accepts a transpose that is not there:  python -m lessons.gradcheck_of_small_squares

What you see. Three wrong gradients of attention's keys, one of them zero, pass a check of 8 queries, 8 keys and a head
of 8 with inputs of 0.02 and an absolute tolerance of 1e-3. A model that is trained with the first of them, ds q instead
of dsᵀ q, gets wrong gradients for 12 of its 20 parameters. Its loss falls smoothly to 1.96 nats per byte, and nobody
would suspect that the right model reaches 1.79.

Why. Query t and key j meet in one number, s_tj = q_t · k_j / √D, so with ds = dLoss/ds

    dk_j = sum over t of ds_tj q_t / √D,   that is dk = dsᵀ q / √D       key j hears from the queries that read it
    (ds q)_j = sum over t of ds_jt q_t     the other index: fits where there are as many queries as keys
    qᵀ ds = (dsᵀ q)ᵀ                       fits where the head is as large as that, too: squares everywhere

The shape says nothing, and neither does the tolerance: for inputs of size σ, dv is of size 1, ds of size σ, dk of size
σ². At 0.02, the size of fresh weights, all of dk is below 1e-3, and so is every error in it.

How nanollm avoids it. `gradcheck` allows an error of 1e-5 of the true value (and of 1e-7, for zeros), and
tests/test_autograd.py checks attention with inputs of size 1 and with more keys than queries. The engine refuses a
gradient that has not the shape of its value.
"""
import sys
from unittest.mock import patch

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from autograd import Tensor, gradcheck, record, softmax
from hardware import device
from lessons import common

QUESTION = ("Three changes to the check catch the missing transpose: more keys than queries, larger inputs, a relative "
            "tolerance. Which of them would miss a backward that returns zeros, and why?")

turned = lambda x: x.swapaxes(-1, -2)
KEY_GRADIENTS = {               # of ds (…, T, S) and q (…, T, D): dk √D
    "dsᵀ q": lambda ds, q: turned(ds) @ q,
    "ds q": lambda ds, q: ds @ q,
    "qᵀ ds": lambda ds, q: turned(q) @ ds,
    "0": lambda ds, q: 0 * (turned(ds) @ q),
}
CHECKS = {                      # (T, S, D), the size of the inputs, the tolerances
    "8 queries, 8 keys, D = 8, inputs of 0.02, absolute": ((8, 8, 8), 0.02, {"rtol": 0, "atol": 1e-3}),
    "the same with D = 4": ((8, 8, 4), 0.02, {"rtol": 0, "atol": 1e-3}),
    "the same with D = 4 and 5 queries": ((5, 8, 4), 0.02, {"rtol": 0, "atol": 1e-3}),
    "inputs of 1": ((8, 8, 8), 1, {"rtol": 0, "atol": 1e-3}),
    "a relative tolerance of 1e-5": ((8, 8, 8), 0.02, {}),
}


def attention_with(key_gradient):
    """An op: causal attention of q (…, T, D), k and v (…, S, D), whose dk is this function of ds and q, over √D."""
    def op(q, k, v):
        (T, D), S = q.shape[-2:], k.shape[-2]
        queries, keys, values = q.data, k.data, v.data
        future = device.xp.triu(device.xp.full((T, S), -device.xp.inf, q.dtype), S - T + 1)
        p = softmax(Tensor(queries @ turned(keys) * D ** -0.5 + future)).data

        def backward(dout):
            dp = dout @ turned(values)
            ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * D ** -0.5
            return ds @ keys, key_gradient(ds, queries), turned(p) @ dout
        return record(p @ values, (q, k, v), backward)
    return op


def inputs(shape, size):
    """q (T, D), k and v (S, D): random numbers of this size."""
    (T, S, D), rng = shape, np.random.default_rng(0)
    return [size * rng.standard_normal((n, D)) for n in (T, S, S)]


def verdict(op, shape, size, tolerances):
    try:
        return "passes" if gradcheck(op, *inputs(shape, size), **tolerances) else ""
    except AssertionError:
        return "fails"
    except ValueError:
        return "no fit"         # of the shapes


def error(op, size):
    """The largest error of dk with inputs of this size: of this op, compared with the right one."""
    grads = []
    for f in (op, attention_with(KEY_GRADIENTS["dsᵀ q"])):
        q, k, v = (Tensor(device.xp.asarray(x), requires_grad=True) for x in inputs((8, 8, 8), size))
        f(q, k, v).backward(np.random.default_rng(1).standard_normal((8, 8)))
        grads.append(device.to_host(k.grad))
    return float(abs(grads[0] - grads[1]).max())


def main(text=None, steps=400, **shape):
    ids, alphabet = text or common.read_text()
    ops = {name: attention_with(key_gradient) for name, key_gradient in KEY_GRADIENTS.items()}
    print(f"{'check':52}" + "".join(f"{'dk = ' + name:>14}" for name in ops))
    verdicts = {check: [verdict(op, *how) for op in ops.values()] for check, how in CHECKS.items()}
    for check, row in verdicts.items():
        print(f"{check:52}" + "".join(f"{word:>14}" for word in row))
    sizes = 10.0 ** np.arange(-2, 0.1, 0.25)
    errors = {name: [error(ops[name], size) for size in sizes] for name in ("ds q", "0")}
    losses, grads = {}, []
    for name in ("dsᵀ q", "ds q"):
        with patch("nanollm.attention", ops[name]):
            model = common.small_model(len(alphabet), **shape)
            losses[name] = common.train(model, ids, steps)
        print(f"dk = {name}: loss of the last 20 steps {np.mean(losses[name][-20:]):.2f} nats per byte")
    x, y = common.batch(ids, 16, model.config.max_context, np.random.default_rng(1))
    for name in losses:
        with patch("nanollm.attention", ops[name]):
            model.weights.grad[...] = 0
            model.loss(x, y).backward()
            grads.append({key: device.to_host(w.grad).copy() for key, w in model.parameters().items()})
    right, wrong = grads
    off = [key for key in right if np.linalg.norm(right[key] - wrong[key]) > 0.01 * np.linalg.norm(right[key])]
    print(f"gradients that are wrong by more than 1 %: {len(off)} of {len(right)} parameters")
    return verdicts, sizes, errors, losses, len(off) / len(right)


@common.defaults()
def draw(verdicts, sizes, errors, losses, share):
    drawing, left, right = common.figure(
        "Small squares hide a missing transpose, and the training looks healthy",
        ("size of q, k and v", "largest error of dk (no unit)"), ("step", "training loss (nats per byte)"))
    left.axhspan(1e-6, 1e-3, color=common.GREY, alpha=0.10, lw=0)
    left.text(1.05, 2e-6, "here the check passes", color=common.GREY, fontsize=9, ha="right")
    for (name, values), style, below in zip(errors.items(), ("o-", "s--"), (4, -16), strict=True):
        left.plot(sizes, values, style, color=common.WRONG, lw=1.5, ms=4)
        common.note(left, f"dk = {name}", (sizes[-4], values[-4]), (-6, 4) if below > 0 else (6, below), common.WRONG,
                    ha="right" if below > 0 else "left")
    left.set(xscale="log", yscale="log", ylim=(1e-6, 10))
    for (name, values), colour, above in zip(losses.items(), (common.RIGHT, common.WRONG), (-34, 28), strict=True):
        right.plot(values, color=colour, lw=1.2)
        common.note(right, f"dk = {name}: {np.mean(values[-20:]):.2f}", (len(values) - 1, np.mean(values[-20:])),
                    (0, above), colour, ha="right")
    right.set_ylim(0, 5)
    common.save(drawing, "gradcheck_of_small_squares")


if __name__ == "__main__":
    common.run(main, draw, QUESTION)

# The answer
# More keys than queries, because zeros fit every shape. Larger inputs raise the true gradient above what the check
# forgives, because dk grows with the square of the inputs; a relative tolerance lowers what it forgives. How large the
# inputs must be differs from op to op; a relative tolerance works at any size. It needs a tiny absolute one as
# well: where the true gradient is 0, finite differences give only nearly 0.
