"""The picture of an evaluation: the loss by position in the context, and the text coloured token by token."""
import itertools
import math
import tempfile
import unicodedata
import warnings
from pathlib import Path

import numpy as np

from console import drawing
from storage.files import InputError, require, whole
from storage.tokens import Decoder, vocab_size

TOKENS = 1000                                   # highest number of tokens shown
COLUMNS, ROWS = 84, 26                          # of the text
SIZE = 9                                        # of the letters, in points
FONTS = ("DejaVu Sans Mono",                    # the first and the last come with Matplotlib
         "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
         "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS",
         "Noto Emoji", "Segoe UI Symbol", "Symbola", "DejaVu Sans")
ASIDE = {"\n": "↵", "\t": "⇥", "\r": "←"}       # shown in place of characters that are invisible


def check_path(path, flag="--figure"):
    """Raise InputError unless a PNG can be written there. Tests by making a temporary folder."""
    path = Path(path)
    require(path.suffix.lower() == ".png", f"{flag} {path}: only a PNG can be drawn, name a file that ends in .png")
    try:
        require(not path.is_dir(), f"{flag} {path} is a folder: name a file in it")
        with tempfile.TemporaryDirectory(".nanollm", f".{path.name}.", path.parent):    # the name that `whole` takes
            pass
    except OSError as problem:
        raise InputError(f"cannot write to {flag} {path} ({problem.strerror}): name another file") from None


# ---------------------------------------------------------------- the loss by position

def by_position(count, total, squares):
    """(tokens of context, mean, standard error) of the losses in bins of context, four or more per octave.

    count, total, squares (T,): the number, the sum and the sum of squares of the losses at each position; position t
    has t + 1 tokens of context. If windows overlap, only the first has new targets at its first positions. They are
    left out, because one sample is noise.
    """
    known = np.flatnonzero(2 * count >= count.max())
    first, last = known[0] + 1, known[-1] + 1
    edges = np.unique(np.geomspace(first, last + 1, max(12, int(4 * math.log2(last / first)))).round().astype(int))
    n, total, squares = (np.add.reduceat(array[:last], edges[:-1] - 1) for array in (count, total, squares))
    mean = total / n
    error = np.sqrt(np.maximum(squares / n - mean ** 2, 0) / n)
    return np.sqrt(edges[:-1] * (edges[1:] - 1)), mean, error


def _draw_positions(axes, scores, mean):
    x, loss, error = by_position(scores.count, scores.total, scores.squares)
    axes.fill_between(x, loss - 2 * error, loss + 2 * error, alpha=0.2, linewidth=0)
    axes.plot(x, loss, "o-", markersize=3.5, linewidth=1.4, label="mean, and two standard errors about it")
    axes.axhline(mean, color="0.4", linewidth=1, linestyle=(0, (4, 3)), label=f"mean of all tokens, {mean:.3f}")
    axes.set_xscale("log")
    ends = round(x[0]), round(x[-1])
    ticks = [*ends, *(2 ** i for i in range(21) if 1.2 * ends[0] < 2 ** i < ends[1] / 1.2)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="tokens of context before it", ylabel="loss of a token (nats)")
    axes.set_title("Loss by length of context", loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


# ---------------------------------------------------------------- the text

def pieces(tokenizer, ids):
    """[(text, n), …]: the text of ids in pieces, each with its number of tokens. The tokens over which a character is
    spread make one piece. A character that is not complete at the end is left out.
    """
    decoder, found, n = Decoder(tokenizer), [], 0
    for token in ids:
        n += 1
        if text := decoder.add(token):
            found.append((text, n))
            n = 0
    if text := decoder.rest():
        found.append((text, n))
    return found


def cells(text):
    """How many columns a text takes: a Chinese character two, a combining accent none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def layout(found, losses):
    """At most ROWS lines [(column, text, losses of its tokens), …]. A line feed begins a new line."""
    lines, column, at = [[]], 0, 0
    for text, n in found:
        ends = "\n" in text
        text = "".join(ASIDE.get(c, c if c.isprintable() else "□") for c in text.replace("\r\n", "\n"))
        while cells(text) > COLUMNS:
            text = text[:len(text) // 2] + "…"
        if column + cells(text) > COLUMNS:
            lines.append([])
            column = 0
        lines[-1].append((column, text, losses[at:at + n]))
        column, at = column + max(cells(text), 1), at + n
        if ends:
            lines.append([])
            column = 0
    return [line for line in lines if line][:ROWS]


def families():
    """The fonts of FONTS that are installed. Matplotlib takes each character from the first that has it."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return [name for name in FONTS if name in installed]


def _draw_text(axes, lines, most):
    """Draw a box for each token, coloured by its loss from 0 to `most` nats, and the text over the boxes."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LinearSegmentedColormap

    boxes, losses, fonts = [], [], families()
    for row, line in enumerate(lines):
        for column, text, of_tokens in line:
            edges = np.linspace(column, column + max(cells(text), 1), len(of_tokens) + 1)
            boxes += [[(a, row), (b, row), (b, row + 0.9), (a, row + 0.9)] for a, b in itertools.pairwise(edges)]
            losses += of_tokens.tolist()
            axes.text(column, row + 0.45, text, fontfamily=fonts, fontsize=SIZE, va="center_baseline", parse_math=False)
    colors = LinearSegmentedColormap.from_list("surprise", ["#ffffff", "#ffe9a8", "#fdae61", "#e8604c"])
    shades = PolyCollection(boxes, array=np.ma.masked_invalid(losses), cmap=colors.with_extremes(bad="0.88"),
                            edgecolor="white", linewidth=0.8, clim=(0, most))
    axes.add_collection(shades)
    axes.set(xlim=(0, COLUMNS), ylim=(len(lines), 0))
    axes.set_title("How the text begins: the redder a token, the more it surprised the model", loc="left", fontsize=11)
    axes.axis("off")
    return shades


# ---------------------------------------------------------------- both

@drawing.defaults()
def draw(path, scores, tokenizer, ids, result):
    """Write the PNG `path`: scores as evaluate.py's Scores, ids the first tokens of the text, result `evaluate`'s."""
    from matplotlib.figure import Figure

    lines = layout(pieces(tokenizer, ids), np.append(np.nan, scores.first))
    cell, line = 0.602 * SIZE / 72, 1.75 * SIZE / 72        # inches; 0.602: the width of a letter
    text, width, height = len(lines) * line, COLUMNS * cell + 1.65, len(lines) * line + 4.1
    figure = Figure(figsize=(width, height))

    def axes(left, bottom, w, h):               # in inches
        return figure.add_axes((left / width, bottom / height, w / width, h / height))
    _draw_positions(axes(0.7, text + 1.15, width - 0.95, 2.6), scores, result["loss"])
    shades = _draw_text(axes(0.7, 0.3, COLUMNS * cell, text), lines, math.log(max(vocab_size(tokenizer), 2)))
    long = min(text, 3)
    bar = figure.colorbar(shades, cax=axes(width - 0.8, 0.3 + text - long, 0.14, long), extend="max")
    bar.set_label("loss (nats)")
    with whole(path) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")     # such a character is drawn as a box
        figure.savefig(draft, format="png", dpi=130)
