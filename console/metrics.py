"""What a run tells: metrics.csv, loss.png, and on the terminal a bar or, elsewhere, plain lines."""
import csv
import itertools
import math
import os
import sys
import time

import numpy as np
from tqdm import tqdm

from autograd import no_grad
from hardware import device
from storage.files import whole

PHASES = "data", "forward", "backward", "optimizer"
COLUMNS = ("step", "epoch", "tokens", "train_loss", "val_loss", "val_perplexity", "val_bits_per_byte",
           "learning_rate", "grad_norm", "loss_scale", "skipped", "tokens_per_second", "flops_per_second",
           *(f"{phase}_share" for phase in PHASES), "seconds")


# ---------------------------------------------------------------- metrics.csv and loss.png

def read(path):
    """The rows of metrics.csv as dicts of strings; a line that a crash cut short does not count."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if tuple(row) == COLUMNS and None not in row.values() and row["step"].isdecimal()]


def rewind(path, step):
    """Forget the rows after `step`, as the run goes on from there; with step 0 the file is begun."""
    rows = [row for row in read(path) if int(row["step"]) <= step]
    with whole(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append(path, row):
    """Add a row, a dict of some of COLUMNS. Numbers read back as they were; one that is not finite leaves its cell
    empty.
    """
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n").writerow(
            {name: value for name, value in row.items() if math.isfinite(value)})


def draw_loss(folder):
    """Draw loss.png from metrics.csv: training and validation loss, in nats, by step."""
    from matplotlib.figure import Figure  # here, because importing it takes as long as a small model's start

    rows = read(folder / "metrics.csv")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("train_loss", "training", "-"), ("val_loss", "validation (unseen text)", "o-")):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    with whole(folder / "loss.png") as path:
        figure.savefig(path, format="png", dpi=120)


# ---------------------------------------------------------------- numbers that say whether a loss is sane

def perplexity(loss):
    """exp(loss): as unsure as an even choice among so many tokens."""
    return math.exp(min(loss, 700)) if loss == loss else math.nan


def unigram_entropy(dataset):
    """-sum p log p in nats, p the share of each token: the loss of the best model that ignores all context."""
    counts, tokens = np.zeros(dataset.vocab_size, np.int64), dataset.tokens
    for start in range(0, len(tokens), 1 << 20):
        counts += np.bincount(tokens[start:start + (1 << 20)], minlength=dataset.vocab_size)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def diagnose(model, x):
    """Where numbers stopped being finite, in words: the first block whose weights, activations or gradients are not."""
    finite = device.xp.isfinite
    for name, parameter in model.parameters().items():
        if not finite(parameter.data).all():
            return f"weights of {name}"
    blocks = model.blocks
    try:
        with no_grad():
            for i in range(len(blocks)):
                model.blocks = blocks[:i + 1]
                if not finite(model.hidden(x).data).all():
                    return f"activations after block {i}"
    finally:
        model.blocks = blocks
    for name, parameter in reversed(model.parameters().items()):    # backward runs from the last block to the first
        if not finite(parameter.grad).all():
            return f"gradient of {name}"
    return "loss"


# ---------------------------------------------------------------- the terminal

def say(text):
    """Print a line above the bar. That nobody can read it any more is no reason to lose a run."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:                             # `… | head` has seen enough, or the log's disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """The bar on a terminal, a line now and then elsewhere; and the clock: tokens/s, time left, seconds in all."""

    def __init__(self, total, step, seconds, flops_per_token):
        self.flops_per_token = flops_per_token
        self.total, self.began, self.drawn = total, time.monotonic() - seconds, time.monotonic()
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.restart()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    @property
    def seconds(self):
        """Since the run began, over all its resumptions."""
        return time.monotonic() - self.began

    def restart(self):
        """Measure the speed from here: what came between, such as an evaluation, was no training."""
        self.tokens = self.steps = 0
        self.since = time.monotonic()
        self.spent, self.marks = dict.fromkeys(PHASES, 0.0), [(None, device.mark())]

    def phase(self, name):
        """What has passed since the last call was this one of PHASES."""
        self.marks.append((name, device.mark()))
        if len(self.marks) > 5000:              # seldom, for a GPU is waited for
            self.add_up()

    def add_up(self):
        for (_, start), (name, end) in itertools.pairwise(self.marks):
            self.spent[name] += device.seconds(start, end)
        del self.marks[:-1]

    def shares(self):
        """{phase: its share of the time of all phases since the last restart}"""
        self.add_up()
        total = max(sum(self.spent.values()), 1e-9)
        return {f"{name}_share": round(part / total, 4) for name, part in self.spent.items()}

    def advance(self, tokens):
        self.tokens, self.steps = self.tokens + tokens, self.steps + 1
        self.bar.update()

    @property
    def speed(self):
        """Tokens a second since the last restart."""
        return self.tokens / max(time.monotonic() - self.since, 1e-9)

    def redraw(self, folder, every=15):
        """Draw loss.png anew, unless that was less than `every` seconds ago: it takes a moment."""
        if time.monotonic() >= self.drawn + every:
            draw_loss(folder)
            self.drawn = time.monotonic()

    def show(self, step, loss, lr, norm):
        text = f"loss {loss:.4f}  ppl {perplexity(loss):,.1f}  lr {lr:.1e}  |g| {norm:.2f}  {self.speed:,.0f} tok/s"
        text += f"  {self.speed * self.flops_per_token / 1e9:,.1f} GFLOP/s"
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
            return
        left = (time.monotonic() - self.since) / max(self.steps, 1) * (self.total - step)
        say(f"step {step}/{self.total}  {text}  {tqdm.format_interval(left)} left")
