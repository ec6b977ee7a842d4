"""Gradient accumulation that averages the means of unequal parts:  python -m lessons.unequal_batches

What you see. A batch of 64 windows is computed in two parts, whose gradients are added up. If each part's mean loss
counts one half, the gradient is right for parts of 32 and 32. It is wrong by 2.2 % for 33 and 31, by 37.9 % for 48 and
16, and by 324.0 % for 63 and 1. If each part counts by its tokens, the error is never above 3.9e-07. (Errors are
relative to the gradient of the whole batch, and they are the root mean square of 6 batches.)

Why. Part i has n_i of the N tokens, and g_i is the gradient of its mean loss. The gradient g of the batch's mean is

    g = (1/N) sum of all tokens' gradients = sum_i (n_i/N) g_i     a part weighs as much as its share of the tokens
    (½ g_1 + ½ g_2) - g = (½ - n_1/N) (g_1 - g_2)                  the error: 0 only for n_1 = n_2

A small part makes it worse in two ways: its weight is far from its share, and its g_i, a mean of few tokens, is far
from g. It happens at the end of an epoch, and where padding does not count, because a part then has only the tokens of
its texts. Hugging Face's trainer did it until October 2024 (transformers, pull request 34191).

How nanollm avoids it. All its windows have T tokens, and train.py weights each part by its share of the step's windows,
so parts may differ in size. `evaluate`, whose last window is shorter, sums the losses of all tokens and divides once,
by their number.
"""
import sys

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from hardware.device import to_host
from lessons import common

QUESTION = ("Here chance decides which windows are in the small part, so the wrong gradient is only a noisier "
            "one. When is it wrong on average, too?")


def gradient(model, parts):
    """sum_i weight_i · gradient of the mean loss of part i; parts: (x, y, weight) each."""
    model.weights.grad[...] = 0
    for x, y, weight in parts:
        model.loss(x, y).backward(weight)
    return to_host(model.weights.grad).astype(np.float64)


def mean_of_means(x, y, n):
    return [(x[:n], y[:n], 1 / 2), (x[n:], y[n:], 1 / 2)]


def mean_over_tokens(x, y, n):
    return [(x[:n], y[:n], n / len(x)), (x[n:], y[n:], 1 - n / len(x))]


def main(text=None, steps=100, B=64, sizes=(32, 31, 28, 24, 16, 8, 4, 2, 1), draws=6, **shape):
    ids, alphabet = text or common.read_text()
    model, rng = common.small_model(len(alphabet), **shape), np.random.default_rng(1)
    common.train(model, ids, steps)
    errors = np.zeros((2, len(sizes), draws))
    for draw_ in range(draws):
        x, y = common.batch(ids, B, model.config.max_context, rng)
        true = gradient(model, [(x, y, 1)])
        for i, n in enumerate(sizes):
            for k, split in enumerate((mean_of_means, mean_over_tokens)):
                errors[k, i, draw_] = np.linalg.norm(gradient(model, split(x, y, n)) - true) / np.linalg.norm(true)
    errors = np.sqrt((errors ** 2).mean(-1))
    print("windows in the parts   error, mean of means   error, weighted by tokens")
    for n, wrong, right in zip(sizes, *errors, strict=True):
        print(f"{B - n:13} + {n:<7}{wrong:22.1%}{right:26.1e}")
    return sizes, errors


@common.defaults()
def draw(sizes, errors, B=64):
    drawing, axes = common.figure("Two unequal parts: the mean of their means is another gradient",
                                  ("windows in the larger part : in the smaller part",
                                   "relative error of the gradient, |g' - g| / |g|"))
    labels = ("each part's mean counts one half", "each part's mean counts by its tokens")
    for values, label, colour, below in zip(errors, labels, (common.WRONG, common.RIGHT), (36, 26), strict=True):
        axes.plot(values, "o-", color=colour, lw=2)
        common.note(axes, label, (len(sizes) - 1, values[-1]), (0, -below), colour, ha="right")
    for i, value in enumerate(errors[0][1:], 1):
        common.note(axes, f"{100 * value:.0f} %", (i, value), (0, 8), common.WRONG, ha="center")
    axes.set(yscale="log", xticks=range(len(sizes)), xticklabels=[f"{B - n} : {n}" for n in sizes], ylim=(1e-8, 30))
    common.save(drawing, "unequal_batches")


if __name__ == "__main__":
    common.run(main, draw, QUESTION)

# The answer
# When small parts hold another kind of text, such as short answers next to long articles. Each token of an answer then
# weighs as much as many tokens of an article, at every step, and no averaging over steps removes that. Another loss is
# minimised.
