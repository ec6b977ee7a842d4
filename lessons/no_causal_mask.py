"""Without the causal mask the loss falls to nothing and the text is nonsense:  python -m lessons.no_causal_mask

What you see. The same model is trained twice, from the same weights on the same batches. With the mask the loss reaches
1.79 nats per byte, without it 0.07. By its loss the second model is better, but what it writes is not even words.

Why. Position t must predict y_t. But y_t = x_{t+1} is in the input, one place to the right, and without a mask

    out_t = sum over all s of p_ts v_s,   so p_{t,t+1} = 1 copies the answer
    loss ≈ 1/T · (0 + 0 + … + 0 + the loss at the last position)

Only the last position has no answer to its right, and it is the one from which a model writes. Its loss is 3.06, but
1.91 with the mask. It counts for only 1/T of the loss, so training hardly notices.

How nanollm avoids it. `attention` in autograd.py gives no weight to later keys: `attention_plain` shows it, and sets
their scores to -inf. tests/test_nanollm.py changes one token and demands that no logit before it changes, not even in
its last bit.
"""
import sys
from unittest.mock import patch

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

import autograd
from autograd import no_grad, softmax
from hardware.device import to_host
from lessons import common

QUESTION = ("Someone shows you a loss of 0.05. Which two forward passes tell you whether their model peeks, and "
            "what must the difference be?")


def attention_without_mask(q, k, v):
    """softmax(q kᵀ / √D) v: every position sees every other one, including the answer."""
    return softmax(q @ k.transpose(0, 1, 3, 2) * q.shape[-1] ** -0.5) @ v


def logits_moved(model, x):
    """The largest change of a logit before the last position when the last token is changed."""
    changed = x.copy()
    changed[:, -1] = (x[:, -1] + 1) % model.config.vocab_size
    with no_grad():
        before, after = (to_host(model(ids).data)[:, :-1] for ids in (x, changed))
    return float(abs(after - before).max())


def main(text=None, steps=400, prompt="The function ", **shape):
    ids, alphabet = text or common.read_text()
    x, y = common.batch(ids, 256, shape.get("T", 64), np.random.default_rng(1))
    found, attentions = {}, {"with the mask": autograd.attention, "without": attention_without_mask}
    for name, attention in attentions.items():
        with patch("nanollm.attention", attention):
            model = common.small_model(len(alphabet), **shape)
            losses = common.train(model, ids, steps)
            by_position = common.loss_by_position(model, x, y)
            start = common.encode(prompt, alphabet)
            sample = common.decode(model.generate(start, 160, temperature=0.6, seed=0, use_cache=False), alphabet)
            found[name] = losses, by_position, logits_moved(model, x[:8])
        print(f"{name}: loss of the last 20 steps {np.mean(losses[-20:]):.2f} nats per byte; at the last position, "
              f"which sees no answer, {by_position[-1]:.2f}\n    when the last token changes, earlier logits change by "
              f"{found[name][2]:.3g}\n    it writes: {prompt + sample!r}")
    return found


@common.defaults()
def draw(found):
    drawing, left, right = common.figure(
        "Without the causal mask the loss falls to nothing, except where it counts",
        ("step", "training loss (nats per byte)"), ("position in the window", "loss after training (nats per byte)"))
    styles = (common.RIGHT, 30), (common.WRONG, 14)
    for (name, (losses, by_position, _)), (colour, above) in zip(found.items(), styles, strict=True):
        left.plot(losses, color=colour, lw=1.2)
        common.note(left, name, (len(losses) - 1, np.mean(losses[-20:])), (0, above), colour, ha="right")
        right.plot(by_position, color=colour, lw=1.2)
        end = len(by_position) - 1, by_position[-1]
        right.plot(*end, "o", color=colour, ms=7, clip_on=False)
        common.note(right, f"{end[1]:.2f}", end, (-9, 5), colour, ha="right")
    middle = len(by_position) / 2, by_position[:-1].mean()
    common.note(right, "every position copies its answer", middle, (0, 10), common.WRONG, ha="center")
    common.note(right, "the last one cannot,\nand it is the one that writes", end, (-45, -4), common.WRONG, ha="right",
                va="center")
    left.set_ylim(0, 5)
    right.set_ylim(0, 5)
    common.save(drawing, "no_causal_mask")


if __name__ == "__main__":
    common.run(main, draw, QUESTION)

# The answer
# Run a window, change its last token, and run it again. No logit before the last position may change, not even by one
# bit, because the same numbers are computed in the same order. Here the logits change by 0 with the mask and by up to
# 16.1 without it.
