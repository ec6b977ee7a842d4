"""Tied weights whose gradient counts the lookup alone:  python -m lessons.tied_weights_counted_once

What you see. The embedding and the output layer share one matrix W. If only the lookup is counted, 76 % of its gradient
is missing at the first step (the norm of what is missing, over the norm of the whole), and after 400 steps the loss is
2.43 nats per byte instead of 1.79. Yet every op is right: both uses of W pass a gradient check of their own. A check of
the whole model finds the mistake at once. Its derivatives along a random direction in each parameter agree with finite
differences to 4e-07, except W's, which is wrong by 61 %.

Why. W is used twice, x = W[ids] and logits = h Wᵀ. By the chain rule the loss depends on W through both, so

    dW = dW_lookup + dW_output       a value used in several places receives the sum of what they send back
    dW_lookup[v] = sum of dx where id = v,   dW_output = doutᵀ h

In a library without an engine, or with two copies of W, it is easy to keep one part: `grad = ...` in place of
`grad += ...`, or an optimizer that knows only one of the two names. No op is to blame, so no check of an op can see it.

How nanollm avoids it. With tie_embeddings, `lm_head` and `embed` are one Tensor, and the engine adds up what a leaf
receives. tests/test_nanollm.py checks the derivative of the whole model, tied and not.
"""
import sys

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from autograd import Tensor, embedding, gradcheck, linear, no_grad
from hardware import device
from lessons import common
from nanollm import NanoLLM

QUESTION = ("Adam divides each weight's gradient by its usual size, so a missing factor does no harm. Why does Adam "
            "not repair this gradient?")
W = "model.embed_tokens.weight"


def count_only(counted, model):
    """The model, in which W's gradient counts both uses or one: the other reads the same numbers, but as a constant."""
    constant = Tensor(model.embed.data)
    if counted == "the lookup alone":
        model.lm_head = constant
    if counted == "the output alone":
        model.embed = constant
    return model


def gradients(model, x, y):
    """{name: the gradient of the loss, on the host}"""
    model.weights.grad[...] = 0
    model.loss(x, y).backward()
    return {name: device.to_host(w.grad).copy() for name, w in model.parameters().items()}


def errors_by_parameter(model, x, y, h=1e-5):
    """{name: the relative error of the loss's derivative along a random direction in this parameter}"""
    grads, rng, found = gradients(model, x, y), np.random.default_rng(2), {}
    for name, w in model.parameters().items():
        d, start = rng.standard_normal(w.shape), w.data.copy()
        ends = []
        for step in (h, -h):
            w.data[...] = start + device.xp.asarray(step * d)
            with no_grad():
                ends.append(float(model.loss(x, y).data))
        w.data[...] = start
        numeric = (ends[0] - ends[1]) / (2 * h)
        found[name] = abs(float((grads[name] * d).sum()) / numeric - 1)
    return found


def main(text=None, steps=400, **shape):
    ids, alphabet = text or common.read_text()
    x, y = common.batch(ids, 16, shape.get("T", 64), np.random.default_rng(1))
    w, h = np.random.default_rng(0).standard_normal((2, 5, 3))
    print(f"gradcheck of the lookup: {gradcheck(lambda w: embedding(w, [[4, 1], [1, 0]]), w)}, of the output layer: "
          f"{gradcheck(linear, h, w)}")
    found, whole = {}, None
    for counted in ("both uses", "the lookup alone", "the output alone"):
        model = count_only(counted, common.small_model(len(alphabet), **shape))
        part = gradients(model, x, y)[W]
        whole = part if whole is None else whole
        missing = np.linalg.norm(whole - part) / np.linalg.norm(whole)
        cosine = (part * whole).sum() / np.linalg.norm(part) / np.linalg.norm(whole)
        losses = common.train(model, ids, steps)
        precise = count_only(counted, NanoLLM(model.config, seed=0, dtype=np.float64))
        errors = errors_by_parameter(precise, x[:4], y[:4])
        of_w, others = errors.pop(W), list(errors.values())
        print(f"{counted}: loss of the last 20 steps {np.mean(losses[-20:]):.2f} nats per byte\n"
              f"    W's gradient at the first step: {missing:.0%} is missing, cosine with the whole {cosine:.2f}\n"
              f"    error of the derivative with respect to W {of_w:.1e}, to others at most {max(others):.0e}")
        found[counted] = losses, missing, of_w, others
    return found


@common.defaults()
def draw(found):
    drawing, left, right = common.figure(
        "Tied weights counted once: each op is right, the sum is not",
        ("relative error of the loss's derivative", ""), ("step", "training loss (nats per byte)"))
    styles = (common.RIGHT, -34), (common.WRONG, 42), (common.GREY, -50)
    for y, ((name, (losses, _, of_w, others)), (colour, above)) in enumerate(zip(found.items(), styles, strict=True)):
        left.plot(others, [y] * len(others), "o", color=common.GREY, alpha=0.35, ms=6)
        left.plot(of_w, y, "o", color=colour, ms=10)
        common.note(left, "W", (of_w, y), (0, 9), colour, ha="center")
        right.plot(losses, color=colour, lw=1.2)
        end = np.mean(losses[-20:])
        common.note(right, f"{name}: {end:.2f}", (len(losses) - 1, end), (0, above), colour, ha="right")
    left.set(xscale="log", xlim=(1e-12, 10), ylim=(2.5, -0.6), yticks=range(len(found)), yticklabels=found)
    left.text(2e-12, 2.4, "grey: all other parameters", color=common.GREY, fontsize=9)
    right.set_ylim(0, 5)
    common.save(drawing, "tied_weights_counted_once")


if __name__ == "__main__":
    common.run(main, draw, QUESTION)

# The answer
# What is missing is not a factor. The part that is left points elsewhere: its cosine with the whole gradient is 0.66.
# The lookup tells a token's row only what the blocks would like to read there. Only the output layer tells it
# after which contexts the row is a good answer, and after which a bad one.
