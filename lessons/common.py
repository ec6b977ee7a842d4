"""What the lessons share: a text or pictures, a small model, a short training, and the style of a figure."""
import pydoc_data.topics
from pathlib import Path

import numpy as np

from autograd import Tensor, cross_entropy, matmul, no_grad
from console import cli
from console.drawing import defaults  # noqa: F401  (each lesson's `draw` is decorated with it)
from hardware import device
from images import demo, network
from images.network import ConvNet
from nanollm import Config, NanoLLM
from train import Adam, learning_rate

FIGURES = Path(__file__).parent / "figures"
WRONG, RIGHT, GREY = "#d55e00", "#0072b2", "#5f6b76"     # colour-blind readers can tell them apart


def read_text():
    """(ids, alphabet) of the language reference that comes with every Python. A token is a byte, alphabet[id]."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()
    alphabet, ids = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    return ids, alphabet


def encode(text, alphabet):
    """The ids of a str; all its bytes must be in the alphabet."""
    return np.searchsorted(alphabet, np.frombuffer(text.encode(), np.uint8))


def decode(ids, alphabet):
    """The text that ids stand for."""
    return alphabet[list(ids)].tobytes().decode(errors="replace")


def small_model(V, T=64, C=64, n_block=2):
    """A new model for windows of T tokens out of V: 4 heads, F = 2 C, tied embeddings, seed 0."""
    return NanoLLM(Config(vocab_size=V, embedding_dim=C, n_block=n_block, n_head=4, hidden_dim=2 * C, max_context=T,
                          tie_embeddings=True), seed=0)


def batch(ids, B, T, rng):
    """x and y, (B, T) each: B windows from random places in ids, and the ids that follow."""
    at = rng.integers(0, len(ids) - T, (B, 1)) + np.arange(T)
    return ids[at], ids[at + 1]


def train(model, ids, steps, B=16, lr=3e-3, scale=1.0, watch=lambda step: None):
    """The loss (nats per token) of each step of Adam. Backward begins with `scale`, and Adam divides by it again.

    watch(step) is called before each step. The batches are the same for every model.
    """
    optimizer, rng, losses = Adam(model, betas=(0.9, 0.99)), np.random.default_rng(0), []
    for step in range(steps):
        watch(step)
        loss = model.loss(*batch(ids, B, model.config.max_context, rng))
        optimizer.zero_grad()
        loss.backward(scale)
        optimizer.step(learning_rate(step, steps, lr, lr / 10, steps // 20), 1 / scale)
        losses.append(float(loss.data))
    return losses


def loss_by_position(model, x, y):
    """The mean loss (nats per token) at each position of the windows x, y (B, T): an array (T,)."""
    with no_grad():
        z = device.to_host(model(x).data).astype(np.float64)
    z -= z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, y[..., None], -1)[..., 0].mean(0)


def digits(pair, n, seed):
    """pixels (n, 32, 32, 3) and labels (n,), 0 or 1: drawings of two digits, in many fonts, by turns."""
    rng, fonts = np.random.default_rng(seed), demo.FONTS["train"]
    drawn = [np.asarray(demo.draw(pair[i % 2], fonts[rng.integers(len(fonts))], rng)) for i in range(n)]
    return np.stack(drawn), np.arange(n) % 2


def one_logit():
    """A new small network with a single logit z: σ(z) is the probability of label 1."""
    return ConvNet(network.Config(("1",), 32, (8, 16, 32, 64)), seed=0)


def two_columns(z):
    """z (N, 1) -> logits (N, 2): (0, z), whose softmax is (1 - σ(z), σ(z))."""
    return matmul(z, Tensor(device.xp.asarray([[0, 1]], z.dtype)))


def train_on_pictures(model, pixels, labels, forward, epochs, wrong=0.0, B=32, lr=3e-3, watch=lambda epoch: None):
    """The mean loss of each epoch of Adam, with forward(pixels, key) -> z (B, 1). watch(epoch) is called after each.

    Each time a picture is shown, its label is turned round with probability `wrong`.
    """
    optimizer, rng, losses = Adam(model), np.random.default_rng(0), []
    for epoch in range(epochs):
        sums = []
        for at in np.split(rng.permutation(len(labels)), range(B, len(labels), B)):
            shown = np.where(rng.random(len(at)) < wrong, 1 - labels[at], labels[at])
            loss = cross_entropy(two_columns(forward(pixels[at], (epoch, len(sums), 0))), shown)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(lr)
            sums.append(float(loss.data) * len(at))
        losses.append(sum(sums) / len(labels))
        watch(epoch)
    return losses


def figure(title, *labels):
    """(figure, axes, …): a figure whose title says what it shows, and an Axes for each (xlabel, ylabel)."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8.4, 4.5), layout="constrained")
    drawing.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold", linespacing=1.35)
    panels = drawing.subplots(1, len(labels), squeeze=False)[0]
    for axes, (xlabel, ylabel) in zip(panels, labels, strict=True):
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return drawing, *panels


def note(axes, text, at, offset, colour, **options):
    """Write text next to the point `at` of the axes, `offset` points (1/72 inch) away from it."""
    axes.annotate(text, at, offset, textcoords="offset points", color=colour, fontsize=10, fontweight="bold", **options)


def run(main, draw, question):
    """A lesson as a command: draw what main() finds, then ask the question."""
    def lesson():
        found = main()
        draw(*found) if isinstance(found, tuple) else draw(found)
        ask(question)
    cli.run(lesson)


def ask(question):
    """End a lesson."""
    print(f"\nQuestion: {question}\n(The answer is at the end of the lesson's file.)")


def save(drawing, name):
    """Write lessons/figures/NAME.png and say so."""
    FIGURES.mkdir(exist_ok=True)
    drawing.savefig(FIGURES / f"{name}.png", dpi=140)
    print(f"figure: lessons/figures/{name}.png")
