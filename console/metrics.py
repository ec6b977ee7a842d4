"""What a run measures: metrics.csv, loss.png, and two numbers that say whether a loss is sane."""
import csv
import itertools
import math
import warnings

import numpy as np

from autograd import cast, embedding, no_grad
from console import drawing
from hardware import device
from storage.files import readable, whole

COLUMNS = ("step", "epoch", "tokens", "train_loss", "val_loss", "val_perplexity", "val_bits_per_byte",
           "learning_rate", "grad_norm", "loss_scale", "skipped", "tokens_per_second", "flops_per_second", "seconds")


# ---------------------------------------------------------------- metrics.csv

def read(path, columns=COLUMNS):
    """The rows of metrics.csv, a dict of strings each."""
    return parse(path, columns)[0]


def parse(path, columns):
    """(rows, intact): the rows of metrics.csv, and whether there is nothing else in it, except for a last line that a
    crash cut short.

    A column that this version does not have is left out, and one that the file does not have is empty. A spreadsheet
    may have saved the file, with a byte-order mark, with semicolons or tabs, and with decimal commas.
    """
    if not path.exists():
        return [], True
    text = readable(path).read_text(encoding="utf-8-sig", errors="replace")
    header = text.partition("\n")[0]
    try:
        names, *lines = csv.reader(text.split("\n"), delimiter=max(",;\t", key=header.count))
    except csv.Error:                   # a cell is longer than csv allows: this is no table
        return [], False
    found = [_row(names, line, columns) for line in lines if line]
    if found and not found[-1] and "step" in names:
        found.pop()
    return list(filter(None, found)), None not in found and ("step" in names or not names)


def _row(names, cells, columns):
    """{column: text} of a line of metrics.csv, None where it is no row of numbers."""
    given = dict(zip(names, (cell.replace(",", ".") for cell in cells), strict=False))
    row = {name: given.get(name, "") for name in columns}
    try:
        finite = all(math.isfinite(float(value)) for value in row.values() if value)
    except ValueError:
        return None
    return row if finite and len(cells) == len(names) and row["step"].isdecimal() else None


def rewind(path, step, columns=COLUMNS):
    """Begin the file, or drop its rows after `step`, from which the run continues. A file that holds anything else is
    kept under another name.
    """
    rows, intact = parse(path, columns)
    if not intact:
        names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(1))
        kept = path.rename(next(name for name in names if not name.exists()))
        warnings.warn(f"{path} does not look as this program writes it, perhaps because a spreadsheet has saved it: it "
                      f"is kept as {kept.name}, and {len(rows)} of its rows were read", stacklevel=2)
    rows = [row for row in rows if int(row["step"]) <= step]
    with whole(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append(path, row, columns=COLUMNS):
    """Add a row, a dict of some of the columns. Numbers read back as they were; a number that is not finite leaves its
    cell empty.
    """
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, columns, restval="", lineterminator="\n").writerow(
            {name: value for name, value in row.items() if math.isfinite(value)})


# ---------------------------------------------------------------- loss.png

@drawing.defaults(drawing.STYLE)
def draw_loss(folder):
    """Draw loss.png from metrics.csv: training and validation loss, in nats, by step. The title is the lowest one."""
    from matplotlib.figure import Figure

    rows = read(folder / "metrics.csv")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    curves = {name: [(float(row[column]), int(row["step"])) for row in rows if row[column]]
              for name, column in (("training", "train_loss"), ("validation", "val_loss"))}
    lasts = [points[-1] for points in curves.values() if points]
    for (name, points), color, style in zip(curves.items(), (drawing.RED, drawing.BLUE), ("-", "o-"), strict=True):
        if points:
            losses, steps = zip(*points, strict=True)
            axes.plot(steps, losses, style, color=color, markersize=4)
            axes.annotate(f"{name} {losses[-1]:.3f}", (steps[-1], losses[-1]), (8, 0), textcoords="offset points",
                          va="bottom" if points[-1] == max(lasts) else "top", color=color, annotation_clip=False)
            loss, step = min(points)
            axes.set_title(f"The lowest {name} loss is {loss:.3f}, at step {step:,}", fontweight="bold")
    axes.set(xlabel="step", ylabel="loss (nats)")
    with whole(folder / "loss.png") as path:
        figure.savefig(path, format="png", dpi=120)


# ---------------------------------------------------------------- numbers that say whether a loss is sane

def perplexity(loss):
    """exp(loss): as unsure as when choosing evenly among this number of tokens."""
    return math.nan if math.isnan(loss) else math.exp(min(loss, 700))


def unigram_entropy(dataset):
    """-sum p log p in nats, where p is a token's share of the text: the loss of the best model that ignores context."""
    counts, tokens = np.zeros(dataset.vocab_size, np.int64), dataset.tokens
    for start in range(0, len(tokens), 1 << 20):
        counts += np.bincount(tokens[start:start + (1 << 20)], minlength=dataset.vocab_size)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def flops_per_token(config, seq_len):
    """Floating-point operations of training on one token of a window, forward and backward.

    Each of a matrix's N weights is multiplied and added once forward and twice backward (dx, dw): 6 N. An embedding is
    looked up, not multiplied, so it does not count unless it is the lm_head, too. A token meets T/2 keys on average, in
    two products of width H D, usually C: 6 H D T per block. What is computed twice to save memory does not count.
    (PaLM, Chowdhery et al. 2022, appendix B; it counts all T keys, masked or not: 12 H D T.)
    """
    n = sum(math.prod(shape) for shape in config.shapes().values() if len(shape) == 2)
    if not config.tie_embeddings:
        n -= config.vocab_size * config.embedding_dim
    return 6 * n + 6 * config.n_block * config.n_head * config.head_dim * seq_len


def hidden_states(model, ids):
    """Yield what each block of a language model makes of ids (B, T)."""
    h = cast(embedding(model.embed, ids), model.compute_dtype)
    for i in range(model.config.n_block):
        h = model.run_block(i, h)
        yield h


def first_not_finite(model, x, blocks=hidden_states):
    """Where NaN or infinity comes from, in words: the first weights, activations or gradients that hold any."""
    finite, parameters = device.xp.isfinite, model.parameters()
    for name, parameter in parameters.items():
        if not finite(parameter.data).all():
            return f"weights of {name}"
    with no_grad():
        for i, h in enumerate(blocks(model, x)):
            if not finite(h.data).all():
                return f"activations after block {i}"
    for name, parameter in reversed(parameters.items()):        # the order in which backward runs
        if not finite(parameter.grad).all():
            return f"gradient of {name}"
    return "loss"
