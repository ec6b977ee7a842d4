"""Half precision without loss scaling: small gradients become 0:  python -m lessons.float16_without_loss_scaling

What you see. A batch of 2^19 tokens, the size for GPT-3's smaller models (Brown et al. 2020, table 2.1), comes in 1,024
parts, so a part's backward begins with 1/1,024. In float16, 12 % of the activations' gradients then become 0 and
nearly all others lose digits: the gradient of the weights is wrong by 34 %. If backward begins with 2^16/1,024 = 64, it
is wrong by 0.15 %. After 160 steps the loss is 3.13 without the scale, 2.77 with it, and 2.64 in float32.

Why. float16 has 5 bits of exponent: its smallest positive number is 2^-24 = 6e-8, and below 2^-14 = 6e-5 it has fewer
digits. The loss is a mean over N tokens, so every gradient carries 1/N:

    dLoss/dz = (softmax(z) - onehot) / N         1/N = 2^-19, and small weights make it smaller on the way down
    backward is linear in what it begins with:   if that is s, it gives s · dLoss/dx, so s = 2^16 moves all of them up

A power of two changes the exponent and no digit, and Adam divides by it in float32.  (Micikevicius et al. 2018, §3.2)

How nanollm avoids it. train.py begins backward with loss_scale times the part's share of the step's windows, and
`adapt_loss_scale` halves the scale after an overflow and doubles it after 1,000 steps without one. Weights and their
gradients stay float32.
"""
import sys
from unittest import mock

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from autograd import Tensor
from hardware import device
from lessons import common

QUESTION = ("bfloat16 has only 16 bits, too. Why does nanollm train in it with a loss scale of 1, and what is the "
            "price?")


def gradients(model, x, y, dtype, start):
    """The gradients (of all activations, of all weights), divided by `start`, where backward begins; float64 arrays."""
    model.compute_dtype, zeros = np.dtype(dtype), []

    def listen(h, p, key):      # h + 0: the gradient of this 0 is that of h
        zeros.append(Tensor(device.xp.zeros(h.shape, h.dtype), requires_grad=True))
        return h + zeros[-1]
    model.weights.grad[...] = 0
    with mock.patch("nanollm.dropout", listen):         # at every place where the model would drop activations
        model.loss(x, y).backward(start)
    of_activations = np.concatenate([device.to_host(zero.grad).ravel() for zero in zeros])
    return of_activations.astype(np.float64) / start, device.to_host(model.weights.grad).astype(np.float64) / start


def main(text=None, steps=160, B=8, batch_tokens=2 ** 19, scale=2.0 ** 16, **shape):
    ids, alphabet = text or common.read_text()
    part = B * shape.get("T", 64) / batch_tokens
    found = {}
    for name, dtype, start in (("float32", "float32", 1.0), ("unscaled", "float16", part),
                               ("scaled", "float16", scale * part)):
        model = common.small_model(len(alphabet), **shape)
        model.compute_dtype = np.dtype(dtype)
        found[name] = {"start": start, "loss": np.mean(common.train(model, ids, steps, B, scale=start)[-10:])}
    print(f"part: 1/{1 / part:,.0f} of a batch; loss after {steps} steps in float32 {found.pop('float32')['loss']:.2f}")
    x, y = common.batch(ids, B, model.config.max_context, np.random.default_rng(1))
    true, true_weights = gradients(model, x, y, "float32", 1.0)
    for name, row in found.items():
        half, weights = gradients(model, x, y, "float16", row["start"])
        row |= {"zeros": 100 * np.mean((half == 0) & (true != 0)), "true": true * row["start"],
                "error": 100 * np.linalg.norm(weights - true_weights) / np.linalg.norm(true_weights)}
        print("{}: backward begins with {start:.3g}; {zeros:.2g} % of the activations' gradients become 0; the "
              "gradient of the weights is wrong by {error:.2g} %; loss {loss:.2f}".format(name, **row))
    return found


@common.defaults()
def draw(found):
    drawing, axes = common.figure(
        "Without loss scaling, float16 cannot hold the gradients",
        ("size of an activation's gradient, as backward meets it (nats per unit)", "share of all gradients"))
    for low, high, label, shade in ((-46, -25, "becomes 0", 0.16), (-25, -14, "loses digits", 0.07),
                                    (-14, 16, "held in full", 0), (16, 22, "∞", 0.16)):
        axes.axvspan(low, high, color=common.GREY, alpha=shade, lw=0)
        axes.text((low + high) / 2, 0.27, label, color=common.GREY, ha="center", va="top")
    for (name, row), colour, x in zip(found.items(), (common.WRONG, common.RIGHT), (-45, -4), strict=True):
        exponents = np.floor(np.log2(abs(row["true"][row["true"] != 0])))
        at, count = np.unique(exponents, return_counts=True)
        axes.bar(at + 0.5, count / len(exponents), 0.9, color=colour, alpha=0.8)
        common.note(axes, f"{name}: {row['zeros']:.2g} % become 0,\nthe weights' gradient\nis wrong by "
                    f"{row['error']:.2g} %,\nthe loss ends at {row['loss']:.2f} nats", (x, 0.2), (0, 0), colour)
    axes.set(xlim=(-46, 22), ylim=(0, 0.28), yticks=(0, 0.1, 0.2), yticklabels=("0", "10 %", "20 %"))
    axes.set_xticks(range(-40, 23, 8), [f"$2^{{{k}}}$" for k in range(-40, 23, 8)])
    common.save(drawing, "float16_without_loss_scaling")


if __name__ == "__main__":
    common.run(main, draw, QUESTION)

# The answer
# bfloat16 has 8 bits of exponent, like float32, and reaches down to 1e-38, so nothing vanishes. The price is precision:
# 8 bits, where float16 has 11. Each rounding may be wrong by 2^-8 = 0.4 %, eight times as much as float16's 2^-11.
