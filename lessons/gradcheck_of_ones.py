"""A gradient check that begins with ones accepts a softmax whose gradient is 0:  python -m lessons.gradcheck_of_ones

What you see. Seven backward functions of softmax, six of them wrong, are compared with finite differences twice: with
dout = 1 everywhere, which is the check of out.sum(), and with a random dout. Four of the six pass the first check with
an error of 8.7e-12, no larger than the error of the right one. All six fail the second, with errors of 0.1 and more.

Why. Let p = softmax(x). Its elements sum to 1 for every x, so

    d(sum_i p_i)/dx_j = d(1)/dx_j = 0              the true gradient of out.sum() is 0, whatever x is
    dx_j = p_j (dout_j - sum_i dout_i p_i)         and with dout = 1 the bracket is 1 - sum_i p_i = 0

So zeros are right, and so is every multiple of the bracket: half of it, its negative, or the bracket without p_j. The
check compares 0 with 0. Layer normalisation has the same hole, because its outputs sum to 0.

How nanollm avoids it. `gradcheck` in autograd.py draws a random dout, and tests/test_autograd.py plants wrong backward
functions, including one that returns zeros, which the check must reject.
"""
import sys

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from autograd import Tensor, gradcheck, record, softmax
from hardware import device
from lessons import common

QUESTION = "One random dout is enough. Why is there no need to try many?"

inside = lambda p, dout: dout - (dout * p).sum(-1, keepdims=True)
BACKWARD = {
    "right:  p (dout - Σ dout p)": lambda p, dout: p * inside(p, dout),
    "zeros": lambda p, dout: 0 * p,
    "half of it": lambda p, dout: 0.5 * p * inside(p, dout),
    "the wrong sign": lambda p, dout: -p * inside(p, dout),
    "p in front forgotten": lambda p, dout: inside(p, dout),
    "Σ forgotten:  p dout": lambda p, dout: p * dout,
    "Σ over the wrong axis": lambda p, dout: p * (dout - (dout * p).sum(0, keepdims=True)),
}


def softmax_with(backward):
    """An op that is softmax forward, and this function of p and dout backward."""
    def op(x):
        p = softmax(x).data
        return record(p, (x,), lambda dout: (backward(p, dout),))
    return op


def error(op, x, dout, h=1e-5):
    """The largest difference between op's backward and central differences of sum(op(x) * dout)."""
    leaf, numeric = Tensor(device.xp.asarray(x), requires_grad=True), np.zeros_like(x)
    op(leaf).backward(dout)
    for i in np.ndindex(x.shape):
        e = h * (np.arange(x.size) == np.ravel_multi_index(i, x.shape)).reshape(x.shape)
        above, below = (device.to_host(softmax(Tensor(device.xp.asarray(at))).data) for at in (x + e, x - e))
        numeric[i] = ((above - below) * dout).sum() / (2 * h)
    return float(abs(device.to_host(leaf.grad) - numeric).max())


def verdict(f, x):
    try:
        return "passes" if gradcheck(f, x) else ""
    except AssertionError:
        return "fails"


def main():
    x, random = np.random.default_rng(0).standard_normal((2, 3, 7))
    found, line = {}, "{:30}{:>14}{:>15}   {:25}{}"
    print(line.format("backward", "error, ones", "error, random", "gradcheck of out.sum()", "gradcheck of out"))
    for name, backward in BACKWARD.items():
        op = softmax_with(backward)
        found[name] = error(op, x, np.ones_like(x)), error(op, x, random)
        verdicts = verdict(lambda x, op=op: op(x).sum(), x), verdict(op, x)
        print(line.format(name, *(f"{e:.1e}" for e in found[name]), *verdicts))
    return found


@common.defaults()
def draw(found):
    drawing, axes = common.figure("Checked with ones, four of six wrong backward functions of softmax look right",
                                  ("largest |backward - finite differences| (no unit)", "what backward returns"))
    axes.axvspan(1e-13, 1e-7, color=common.GREY, alpha=0.10, lw=0)
    axes.text(2e-13, 0.42, "here the check passes", color=common.GREY, fontsize=9)
    for y, pair in enumerate(found.values()):
        axes.plot(pair, (y, y), color=common.GREY, alpha=0.4, lw=2, zorder=1)
    for k, (label, colour, size) in enumerate([("ones", common.WRONG, 110), ("random", common.RIGHT, 50)]):
        axes.scatter([pair[k] for pair in found.values()], range(len(found)), size, colour, label=f"dout: {label}")
    axes.set(xscale="log", xlim=(1e-13, 30), yticks=range(len(found)), yticklabels=found)
    axes.invert_yaxis()
    axes.legend(loc="lower left", frameon=False)
    common.save(drawing, "gradcheck_of_ones")


if __name__ == "__main__":
    common.run(main, draw, QUESTION)

# The answer
# A backward pass is linear in dout: it computes W dout, where Jᵀ dout is right (J is the Jacobian, d out_i / dx_j). A
# wrong W agrees with Jᵀ only for those dout with (W - Jᵀ) dout = 0. They form a space of fewer dimensions, and a random
# dout lies in it with probability 0. One check cannot see a mistake that shows only at other x, so other shapes and
# values are checked, too.
