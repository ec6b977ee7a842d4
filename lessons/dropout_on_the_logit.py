"""Dropout on the output makes a model too modest:  python -m lessons.dropout_on_the_logit

What you see. A network learns to tell a drawn 0 from a 1, but each time that a picture is shown its label is wrong
with a probability of 20 %. No expected loss is below 0.500. With dropout (p = 1/2) on its one logit, the training loss
ends at 0.611, above the validation loss, 0.562, and simply doubling the logits lowers the validation loss to 0.524.
With dropout on the features the validation loss is 0.514 as it is.

Why. Dropout sets half of the logits to 0 and doubles the others, because 1/(1-p) = 2. On the average over both

    loss = ½ ln 2 + ½ CE(2z)        CE: the cross-entropy of a logit; a logit of 0 is an even guess

The first half never falls and has no gradient: ½ ln 2 = 0.347 of the loss is lost for good. The other half is lowest
where 2z, not z, is the log-odds of the truth. At evaluation nothing is dropped, and the model says σ(z): for a truth of
80 % it says 67 %. The expected logit is right, and the loss is not linear in it. On features the same noise is one of
many summands, and the layers after it learn with it.

How nanollm avoids it. `ConvNet` in images/network.py drops features, before the last linear layer, and a test says that
the logits themselves are never dropped. In the language model dropout is in front of the last norm and its lm_head.
"""
import sys

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from autograd import Tensor, cross_entropy, dropout, no_grad
from hardware.device import to_host
from lessons import common

QUESTION = "Is a training loss above the validation loss always a mistake?"
SCALES = np.linspace(0.4, 4, 37)


WRONG = 0.2             # the probability that a label is wrong


def expected_loss(z, truth):
    """The mean loss of logits z (N, 1) over all labels that there may be, right ones and wrong ones."""
    right, wrong = (float(cross_entropy(common.two_columns(Tensor(z)), labels).data) for labels in (truth, 1 - truth))
    return (1 - WRONG) * right + WRONG * wrong


def main(n=1000, epochs=20, p=0.5):
    (pixels, labels), (unseen, truth) = (common.digits("01", size, seed) for size, seed in ((n, 0), (n // 2, 1)))
    found = {}
    for name in ("on the logit", "on the features"):
        model = common.one_logit()
        forward = {"on the logit": lambda x, key, model=model: dropout(model(x), p, key),
                   "on the features": lambda x, key, model=model: model(x, p, key)}[name]
        losses = common.train_on_pictures(model, pixels, labels, forward, epochs, WRONG)
        with no_grad():
            z = to_host(model(unseen).data)
        curve = [expected_loss(scale * z, truth) for scale in (1, 2, *SCALES)]
        found[name] = losses[-1], *curve[:2], np.array(curve[2:])
        print(f"dropout {name:16} training loss {losses[-1]:.3f}   validation loss {curve[0]:.3f}   with doubled "
              f"logits {curve[1]:.3f}   lowest at {SCALES[np.argmin(curve[2:])]:.1f} times the logits")
    return found


@common.defaults()
def draw(found):
    drawing, axes = common.figure("Trained with dropout on its logit, a model says half of what it knows",
                                  ("the logits times this number", "validation loss (nats per picture)"))
    for (name, (_, now, _, curve)), colour, place in zip(found.items(), (common.WRONG, common.RIGHT),
                                                         ((12, 14), (12, -24)), strict=True):
        axes.plot(SCALES, curve, color=colour, lw=2)
        axes.plot(1, now, "o", color=colour)
        low = np.argmin(curve)
        axes.plot(SCALES[low], curve[low], "v", color=colour, markersize=9)
        common.note(axes, f"dropout {name}", (1, now), place, colour)
    axes.axvline(1, color=common.GREY, lw=1, linestyle=(0, (4, 3)))
    axes.set(ylim=(0.45, 0.75))
    common.save(drawing, "dropout_on_the_logit")


if __name__ == "__main__":
    common.run(main, draw, QUESTION)

# The answer
# No. With dropout on features it is usual, too: training is measured with noise and while the weights still change,
# validation without noise and after that. Suspicious is a factor far above 1 on the logits that lowers the loss: a
# model that minimises the right loss has already found the best factor for its training data, which is 1.
