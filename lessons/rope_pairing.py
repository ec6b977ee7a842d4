"""The right weights under the wrong pairing of RoPE:  python -m lessons.rope_pairing

What you see. A trained model is saved as a Hugging Face folder and loaded again. With the pairing of its training, its
loss is 1.56 nats per byte. If RoPE rotates neighbours (2i, 2i+1) instead of halves (i, i+D/2), the loss is 3.14,
although every shape fits and no weight has changed. At position 0 both have the same loss, 2.72; after it they
separate.

Why. RoPE rotates pair i of q and of k by the angle t θ_i. It does not matter which two of the D numbers form a pair:

    q_t · k_s = sum over pairs of |q_i| |k_i| cos(the angle from k_i to q_i + (t - s) θ_i)
    (P q) · (P k) = q · k for a permutation P of the D numbers, so a model can learn with any pairing

But the weights have learnt with one pairing. Another pairing rotates each number together with a stranger. Move row i
of each head of W_q and W_k to row 2i, and row i + D/2 to row 2i + 1. Then rotating neighbours is right, and the losses
agree to 8e-08. Converters between Meta's files (neighbours) and Hugging Face's (halves) do this.

How nanollm avoids it. `rope` in autograd.py rotates halves, as Hugging Face's Llama does, so no row is ever moved, and
tests/test_huggingface.py compares the logits of the same folder with those of transformers.
"""
import sys
import tempfile
from unittest.mock import patch

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

import autograd
from autograd import Tensor
from hardware import device
from lessons import common
from nanollm import NanoLLM

QUESTION = "Why does the wrong pairing lose nothing at position 0? There are two reasons, and each of them is enough."


def rope_of_neighbours(x, cos, sin):
    """autograd.rope with the pairs (2i, 2i+1). It has no backward."""
    half = x.shape[-1] // 2
    a, b, cos, sin = x.data[..., 0::2], x.data[..., 1::2], cos[:, :half], sin[:, :half]
    return Tensor(device.xp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape))


def sort_for_neighbours(model):
    """Rows i and i + D/2 of each head of W_q and W_k become rows 2i and 2i + 1."""
    for name, weight in model.parameters().items():
        if "q_proj" in name or "k_proj" in name:
            rows = weight.data.reshape(-1, 2, model.config.head_dim // 2, weight.shape[1])
            weight.data[...] = rows.swapaxes(1, 2).reshape(weight.shape)


def main(text=None, steps=600, **shape):
    ids, alphabet = text or common.read_text()
    model = common.small_model(len(alphabet), **shape)
    common.train(model, ids, steps)
    x, y = common.batch(ids, 1024, model.config.max_context, np.random.default_rng(1))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        right, wrong, again = (NanoLLM.load(folder) for _ in range(3))
    sort_for_neighbours(again)
    for name, model, rope in (("halves turned, as in training", right, autograd.rope),
                              ("neighbours turned", wrong, rope_of_neighbours),
                              ("neighbours turned, rows of W_q and W_k sorted for it", again, rope_of_neighbours)):
        with patch("nanollm.rope", rope):
            found[name] = common.loss_by_position(model, x, y)
        print(f"{name}: loss {found[name].mean():.2f} nats per byte, at position 0 {found[name][0]:.2f}")
    halves, _, neighbours = found.values()
    print(f"halves and neighbours with sorted rows differ by at most {abs(halves - neighbours).max():.0e}")
    return found


@common.defaults()
def draw(found):
    drawing, axes = common.figure("Same weights, wrong pairs: RoPE's two conventions do not mix",
                                  ("position in the window", "loss (nats per byte)"))
    styles = (common.RIGHT, "-", 6, 0.3, 16), (common.WRONG, "-", 2, 1, 16), (common.RIGHT, "--", 1.6, 1, -30)
    for (name, losses), (colour, style, width, alpha, above) in zip(found.items(), styles, strict=True):
        axes.plot(losses, style, color=colour, lw=width, alpha=alpha)
        common.note(axes, name, (len(losses) - 1, losses[-len(losses) // 2:].mean()), (-4, above), colour, ha="right")
    axes.set(ylim=(0, 4), xlim=(-0.5, len(losses) - 1))
    common.save(drawing, "rope_pairing")


if __name__ == "__main__":
    common.run(main, draw, QUESTION)

# The answer
# Position 0 is rotated by the angle 0, which means not at all, in any pairing. And it sees only one key, its own, and
# the softmax of a single score is 1, whatever the score.
