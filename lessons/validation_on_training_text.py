"""Validation on the training text measures memorisation:  python -m lessons.validation_on_training_text

What you see. A model reads 8,000 bytes again and again. Its training loss falls, and so does its "validation" loss on
the second half of those bytes: to 0.53, better at each evaluation. On the 4,000 bytes that follow, which it never
reads, the loss is lowest at step 300, at 2.28, and ends at 2.61. One curve says: continue. The other says: stop.

Why. Let L be the loss on all the text there could be, L_S the loss on the training text S. For a model θ* that does not
depend on S, L_S is an unbiased estimate of L: E[L_S(θ*)] = L(θ*), with E the mean over all S. Training
picks a θ that does depend on S:

    L_S(θ) <= L_S(θ*) for every θ*,      because training minimises L_S; let θ* be the best model of all text
    E[L_S(θ)] <= E[L_S(θ*)] = L(θ*) <= L(θ)          the gap between the two ends is memorisation

How nanollm avoids it. `TokenDataset.split` in data.py cuts off the end of the text before any window is made, so no
token is in both parts. `--patience` in train.py ends training when the loss on that part no longer falls.
"""
import math
import sys

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from autograd import no_grad
from lessons import common

QUESTION = ("A window of T tokens begins every T/2 tokens. Someone shuffles the windows and keeps a tenth of them for "
            "validation: no window is in both parts. Is that loss honest?")


def loss_on(model, ids):
    """The loss (nats per token) on consecutive windows of ids."""
    T = model.config.max_context
    n = (len(ids) - 1) // T * T
    with no_grad():
        return float(model.loss(ids[:n].reshape(-1, T), ids[1:n + 1].reshape(-1, T)).data)


def main(text=None, n=8000, start=100_000, steps=600, every=25, **shape):
    ids, alphabet = text or common.read_text()
    train_ids, held_out = ids[start:start + n], ids[start + n:start + n + n // 2]
    model, rows = common.small_model(len(alphabet), **shape), []

    def watch(step):
        if step % every == 0:
            rows.append((step, loss_on(model, train_ids[n // 2:]), loss_on(model, held_out)))
    losses = common.train(model, train_ids, steps, watch=watch)
    watch(math.ceil(steps / every) * every)
    print("step   training   on training text   held out")
    for step, memory, truth in rows:
        near = losses[max(step - every, 0):step] or losses[:1]
        print(f"{step:4}{np.mean(near):11.2f}{memory:19.2f}{truth:11.2f}")
    best = min(rows, key=lambda row: row[2])
    print(f"held out: lowest at step {best[0]}, {best[2]:.2f}; at the end {rows[-1][2]:.2f}")
    return losses, rows


@common.defaults()
def draw(losses, rows):
    drawing, axes = common.figure("“Validation” on the training text keeps falling; on unseen text the loss turns",
                                  ("step", "loss (nats per byte)"))
    steps, memory, truth = zip(*rows, strict=True)
    axes.plot(losses, color=common.GREY, alpha=0.45, lw=0.8)
    axes.plot(steps, memory, color=common.WRONG, lw=2)
    axes.plot(steps, truth, color=common.RIGHT, lw=2)
    best = int(np.argmin(truth))
    axes.plot(steps[best], truth[best], "o", color=common.RIGHT, ms=8)
    third = steps[len(steps) // 3], memory[len(steps) // 3]
    common.note(axes, "held-out text", (steps[-1], truth[-1]), (0, 9), common.RIGHT, ha="right")
    common.note(axes, f"lowest at step {steps[best]}: stop here", (steps[best], truth[best]), (0, 12), common.RIGHT,
                ha="center")
    common.note(axes, "“validation” on training text", (steps[-1], memory[-1]), (0, 22), common.WRONG, ha="right")
    common.note(axes, "training loss, each step", third, (-16, -22), common.GREY, ha="right")
    axes.set(ylim=(0, None), xlim=(0, steps[-1]))
    common.save(drawing, "validation_on_training_text")


if __name__ == "__main__":
    common.run(main, draw, QUESTION)

# The answer
# No. Each half of a window is also half of a neighbouring window, which is in the training part with probability 0.9.
# So nine tenths of the validation tokens are trained on. Cut the text first, then make windows of each part.
