"""An accuracy that is a constant, because argmax looks at one column:  python -m lessons.accuracy_of_one_column

What you see. A network learns to tell a drawn 3 from an 8. The accuracy that its training shows is 50.0 % after all 8
epochs, while the loss falls from 0.710 to 0.003. The true accuracy, on drawings it has not seen, reaches 100.0 %.

Why. The network has one output z, and σ(z) is the probability of the second class. The metric was written for one
output a class: it takes the class with the largest one.

    argmax over (z)      is 0 for every z, because there is nothing else to choose
    argmax over (0, z)   is 1 exactly where z > 0, that is where σ(z) > 1/2

So the first is the share of class 0, whatever the network has learnt. With as many pictures of both classes it is 50 %,
which looks like a network that learns nothing; with 90 % of class 0 it is 90 %, which looks like success. The original
of nanollm measured its image classifier in this way.

How nanollm avoids it. Its classifier has K ≥ 2 logits also for two classes, and softmax and cross-entropy for all K. A
test compares the accuracy with PyTorch's. The first lines of a run say what always giving the same answer would score.
"""
import sys

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

from autograd import no_grad
from hardware.device import to_host
from lessons import common

QUESTION = "Which number, printed at each epoch next to the accuracy, would have shown the mistake at once?"


def main(pair="38", n=600, epochs=8):
    (pixels, labels), (unseen, truth) = common.digits(pair, n, 0), common.digits(pair, n // 2, 1)
    model, rows = common.one_logit(), []

    def watch(epoch):
        with no_grad():
            z = to_host(model(unseen).data)                                     # (N, 1)
        rows.append(((z.argmax(1) == truth).mean(), ((z[:, 0] > 0) == truth).mean()))
    losses = common.train_on_pictures(model, pixels, labels, lambda x, key: model(x), epochs, watch=watch)
    print("epoch   training loss   accuracy by argmax over one column   true accuracy")
    for epoch, (loss, (shown, true)) in enumerate(zip(losses, rows, strict=True), 1):
        print(f"{epoch:5}{loss:16.3f}{shown:37.1%}{true:16.1%}")
    return losses, np.array(rows)


@common.defaults()
def draw(losses, rows):
    drawing, left, right = common.figure("The loss falls, and the accuracy that is shown does not move",
                                         ("epoch", "training loss (nats per picture)"), ("epoch", "accuracy (%)"))
    epochs = range(1, len(losses) + 1)
    left.plot(epochs, losses, "o-", color=common.GREY, lw=2)
    left.set(ylim=(0, None))
    for values, label, colour, below in zip(100 * rows.T, ("argmax over one column", "z > 0: the truth"),
                                            (common.WRONG, common.RIGHT), (14, 22), strict=True):
        right.plot(epochs, values, "o-", color=colour, lw=2)
        common.note(right, label, (epochs[-1], values[-1]), (0, -below), colour, ha="right")
    right.set(ylim=(0, 102))
    common.save(drawing, "accuracy_of_one_column")


if __name__ == "__main__":
    common.run(main, draw, QUESTION)

# The answer
# How often the network gave each answer. Here it would have been "class 0: 100 %, class 1: 0 %" from the first epoch to
# the last. A table of what was taken for what, the confusion matrix, shows the same, and with it which classes are
# really confused.
