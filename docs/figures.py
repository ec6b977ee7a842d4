"""Draw the figures of the documentation from runs of the real code:  python docs/figures.py [NAME ...]

Each function in FIGURES runs what it shows and returns (figure, caption). `main` writes the figures to
docs/figures/NAME.svg, and their captions and commands to docs/figures/README.md. The figures of a trained model share
one run of train.py.
"""
import functools
import html
import math
import subprocess
import sys
import tempfile
import tracemalloc
from collections import Counter, namedtuple
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from cycler import cycler
from results import ROOT, commit, cpu

sys.path.insert(0, str(ROOT))
from probes import attention_maps, hooked, training_step

from autograd import Tensor, no_grad, rmsnorm, rope
from console import drawing, metrics
from console.drawing import BLUE, GREEN, GREY, INK, PALE, PAPER, PINK, RED
from data import TokenDataset
from generate import open_model
from hardware import device
from hardware.sampling import probabilities
from lessons.common import decode, read_text
from nanollm import Config, NanoLLM
from train import Adam

FOLDER, SEED = ROOT / "docs" / "figures", 0
FLAGS = r"""--text reference.txt --size tiny --vocab-size 2048 --max-context 64 --batch-size 32 --max-steps 400 \
        --log-every 5 --eval-every 80 --sample-every 400 --device cpu"""
LARGER = Config(2048, 256, 8, 4, max_context=256, hidden_dim=688)       # for `memory`
SENTENCE, CONTEXT = " If the file does not exist, the file is created.", "This function can be used"

# ---------------------------------------------------------------- the common style

STYLE = drawing.STYLE | {"axes.prop_cycle": cycler(color=[BLUE, RED, GREEN, PINK]), "svg.hashsalt": "nanollm"}


def shades():
    """The colours from the paper's to a dark blue."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shades", [PAPER, "#9ecae1", BLUE, "#00294a"])


def canvas(title, height, layout="constrained"):
    """A figure of the common width and this height, in inches, with its finding as the title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout=layout)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold")
    return figure


def bare(axes):
    """Remove the frame, the grid and the ticks."""
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def dotted(axes, y, label, color=GREY, x=1):
    """Draw a level, with its name above it and ending at x."""
    axes.axhline(y, color=color, linestyle=":", linewidth=1.4)
    axes.text(x, y, label, transform=axes.get_yaxis_transform(), color=color, ha="right", va="bottom", fontsize=10)


def scientific(x):
    """2·10⁻¹¹ for 2.3e-11."""
    digit, power = f"{x:.0e}".split("e")
    return f"{digit}·10{str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def words(tokenizer, ids):
    """The text of each token, with a dot for a space."""
    return [tokenizer.decode([i]).replace(" ", "·").replace("\n", "⏎") for i in ids]


# ---------------------------------------------------------------- the trained model

Trained = namedtuple("Trained", "model tokenizer train_set rows")       # rows: of metrics.csv


@functools.cache
def trained():
    """The model of one run of train.py with FLAGS, its data and its metrics."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, text = Path(temporary) / "run", Path(temporary) / "reference.txt"
        text.write_text(decode(*read_text()), encoding="utf-8")
        flags = FLAGS.replace("\\", "").replace("reference.txt", str(text)).split()
        subprocess.run([sys.executable, "train.py", *flags, "--seed", str(SEED), "--artifact-dir", folder],
                       cwd=ROOT, check=True)
        model, tokenizer, _ = open_model(folder)
        rows = metrics.read(folder / "metrics.csv")
        train_set, _ = TokenDataset.from_text(str(text), str(folder / "tokenizer.json"),
                                              model.config.max_context).split(0.1)
    return Trained(model, tokenizer, train_set, rows)


# ---------------------------------------------------------------- the engine

RULES = {"mul": ("da = dout · b", "db = dout · a"), "sum": ("dx = dout, repeated",), "add": ("da = db = dout",),
         "power": ("dx = dout · p xᵖ⁻¹",)}


def graph():
    """The graph of a small expression, its values and gradients."""
    svg = graph_svg("((x * w).sum() + b) ** 2", {"x": [1.0, 2.0, 3.0], "w": [0.5, -1.0, 2.0], "b": -3.0})
    return svg, (
        "Each box is an op of the graph. It shows the op's value, out, and below it dout, its gradient, which backward "
        "found by walking through the boxes from right to left. The rule under a box is the op's backward rule: check "
        "the numbers with it.")


def graph_svg(expression, leaves):
    """The graph of a scalar expression of these leaves, drawn after its backward."""
    def text(x, y, words, size=13, color=INK, weight="normal"):
        style = f'font-size="{size}" font-weight="{weight}" fill="{color}"'
        return f'<text x="{x:g}" y="{y:g}" {style}>{html.escape(words)}</text>'

    def show(array):
        numbers = [f"{number:.4g}" for number in np.ravel(array)]
        return f"[{', '.join(numbers)}]" if np.ndim(array) else numbers[0]

    def forward(op, out):
        op.node, op.data, op.parents = out._node, out.data, [boxes[id(p)] for p in out._node.parents]
        op.column = 1 + max(parent.column for parent in op.parents)
        op.row = sum(parent.row for parent in op.parents) / len(op.parents)
        for parent in op.parents:
            if not parent.parents:
                parent.column = op.column - 1       # a leaf is drawn next to the op that uses it
        boxes[id(out._node)] = op

    def backward(op, dout):
        op.grad = dout
    tensors = {name: Tensor(value, requires_grad=True) for name, value in leaves.items()}
    boxes = {id(t): SimpleNamespace(name=name, data=t.data, parents=(), column=0, row=row)
             for row, (name, t) in enumerate(tensors.items())}
    with hooked(forward, backward):
        eval(expression, {}, tensors).backward()
    for t in tensors.values():
        boxes[id(t)].grad = t.grad

    wide, high, across, down, top = 128, 82, 165, 124, 92
    height, lines = top + down * (len(leaves) - 1) + high + 24, []
    for box in boxes.values():
        x, y, leaf = 16 + across * box.column, top + down * box.row, not box.parents
        name, dashes = (box.name, "5 3") if leaf else ("out", "none")
        lines += [f'<rect x="{x:g}" y="{y:g}" width="{wide}" height="{high}" rx="8" fill="white" stroke="{GREY}" '
                  f'stroke-dasharray="{dashes}"/>',
                  text(x + 10, y + 22, "leaf" if leaf else box.name, 14, GREY if leaf else INK, "bold"),
                  text(x + 10, y + 46, f"{name} = {show(box.data)}", 13, BLUE),
                  text(x + 10, y + 68, f"d{name} = {show(box.grad)}", 13, RED)]
        lines += [text(x + 10, y + high + 18 + 16 * i, rule, 12, GREY)
                  for i, rule in enumerate(RULES.get(box.name, ()))]
        for i, parent in enumerate(box.parents):
            start, end = 16 + across * parent.column + wide + 5, x - 5
            for dy, color, side in ((-5, BLUE, "end"), (5, RED, "start")):
                a = top + down * parent.row + high / 2 + dy
                b = y + high * (i + 1) / (len(box.parents) + 1) + dy
                lines.append(f'<path d="M{start:g} {a:g} C{start + 18:g} {a:g} {end - 18:g} {b:g} {end:g} {b:g}" '
                             f'fill="none" stroke="{color}" stroke-width="1.8" marker-{side}="url(#{side})"/>')
    heads = "".join(f'<marker id="{side}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="5" markerHeight="5" '
                    f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{color}"/></marker>'
                    for side, color in (("end", BLUE), ("start", RED)))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 {height}" font-family="DejaVu Sans, sans-serif">',
        f'<defs>{heads}</defs><rect width="820" height="{height}" fill="{PAPER}"/>',
        text(16, 34, "Values flow forward, gradients flow back", 19, weight="bold"),
        text(16, 62, f"loss = {expression}", 15), text(600, 34, "values →", 15, BLUE),
        text(690, 34, "← gradients", 15, RED), *lines, "</svg>\n"])


def step_size():
    """The error of finite differences for each step size."""
    rng = np.random.default_rng(SEED)       # float32 numbers, so that all types start from the same
    x, w, d = (rng.standard_normal(shape, np.float32) for shape in ((3, 8), 8, (3, 8)))

    def gradient(dtype):
        leaf = Tensor(x.astype(dtype), requires_grad=True)
        rmsnorm(leaf, Tensor(w.astype(dtype))).backward(d.astype(dtype))
        return leaf.grad

    def differences(dtype, h):
        def g(x):
            return float((rmsnorm(Tensor(x.astype(dtype)), Tensor(w.astype(dtype))).data * d.astype(dtype)).sum())
        bumps = np.eye(x.size).reshape(-1, *x.shape) * h
        return np.reshape([(g(x + bump) - g(x - bump)) / (2 * h) for bump in bumps], x.shape)

    def error(found, truth):
        return float(np.sqrt(((found - truth) ** 2).sum() / (truth ** 2).sum()))
    h, exact = np.logspace(-12, 0, 73), gradient(np.longdouble)
    narrow = [error(differences(np.float32, step), exact) for step in h]
    found = [differences(np.float64, step) for step in h]
    wide, wrong = ([error(one, truth) for one in found] for truth in (exact, exact * (1 + 1e-3)))
    at = int(np.abs(np.log10(h) + 5).argmin())
    figure = canvas(f"At h = 10⁻⁵ finite differences agree with backward to {scientific(wide[at])};\n"
                    "a smaller step drowns in rounding, a larger one in the third derivative", 4.7)
    axes = figure.subplots()
    axes.loglog(h, wrong, "--", color=PINK, linewidth=1.4)
    axes.loglog(h, narrow, color=RED)
    axes.loglog(h, wide, color=BLUE)
    axes.plot(h[at], wide[at], "o", color=BLUE)
    for dtype, color in ((np.float64, BLUE), (np.float32, RED)):
        dotted(axes, error(gradient(dtype), exact), f"backward itself, {dtype.__name__}", color, 0.69)
    for right, up, label, color in (
            (1.5e-12, 2, "float32", RED), (1.5e-11, 6e-5, "float64", BLUE), (1.5e-12, 1.8e-3, "wrong by 0.1 %", PINK),
            (h[at] / 8, wide[at] / 60, "gradcheck's h", INK), (4e-9, 6e-7, "~ u / h", GREY),
            (5e-6, 8e-2, "~ u / h", GREY), (1.2e-3, 1e-8, "~ h²", GREY)):
        axes.text(right, up, label, color=color)
    axes.set(xlabel="step h", ylabel="relative error of the gradient", ylim=(1e-17, 30), xlim=(1e-12, 1))
    return figure, (
        "The error of central differences through `rmsnorm` falls with h² until rounding takes over, which grows like "
        f"u/h (u = 1.1·10⁻¹⁶ in float64). The best error is {scientific(min(wide))} in float64 but only "
        f"{scientific(min(narrow))} in float32, so gradients are checked in float64. A backward pass that is wrong by "
        "0.1 % (dashed) cannot hide, because its curve stays at 10⁻³. The rounding of the right backward pass itself "
        "(dotted) is smaller than every difference of its type.")


# ---------------------------------------------------------------- positions and attention

def rope_products(q, k, cos, sin):
    """q_t · k_s, (T, T), for one q (D,) turned to every position t and one k (D,) to every s."""
    q, k = (rope(Tensor(np.tile(x, (len(cos), 1))), cos, sin).data for x in (q, k))
    return q @ k.T


def rotation():
    """Pairs turn like the hands of clocks; the product of two vectors depends only on their distance."""
    from matplotlib.patches import Circle

    model = NanoLLM(Config(8, 64, 1, 2, max_context=64, hidden_dim=8), dtype=np.float64)
    D, T, shown = model.config.head_dim, model.config.max_context, 13
    ones = np.tile(np.repeat([1.0, 0.0], D // 2), (T, 1))                   # each pair is (1, 0), a hand at 3 o'clock
    hands = rope(Tensor(ones), model.cos, model.sin).data
    q = np.random.default_rng(SEED).standard_normal(D)
    products = rope_products(q, q, model.cos, model.sin)
    distance = np.subtract.outer(np.arange(T), np.arange(T))
    spread = max(np.ptp(products[distance == n]) for n in range(1 - T, T))

    figure = canvas("RoPE turns each pair like the hand of a clock, each at its own speed,\n"
                    "so q · k depends on how far apart two tokens are, not on where", 6.3)
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.45])
    dials, (heat, curve) = above.subplots(), below.subplots(1, 2)
    for row, (pair, color) in enumerate(zip((0, 2, 4, 8), (BLUE, RED, GREEN, PINK), strict=True)):
        for t in range(shown):
            right, up = 0.4 * hands[t, [pair, pair + D // 2]]
            dials.add_patch(Circle((t, -row), 0.4, fill=False, edgecolor=PALE))
            dials.plot([t, t + right], [-row, up - row], color=color, linewidth=2.4, solid_capstyle="round")
        turn = 2 * np.pi / np.arctan2(*hands[1, [pair + D // 2, pair]])
        dials.text(-0.7, -row, f"pair {pair}: a turn\nin {turn:,.0f} positions", color=color, fontsize=9.5, ha="right",
                   va="center")
    dials.set(xlim=(-0.6, shown - 0.4), ylim=(-3.6, 0.6), aspect="equal", yticks=[], xticks=range(shown),
              xlabel="position t")
    bare(dials)
    image = heat.imshow(products, cmap=shades())
    bare(heat)
    heat.set(xlabel="key's position s", ylabel="query's position t", title="q · k at (t, s)")
    below.colorbar(image, ax=heat, shrink=0.8).outline.set_visible(False)
    curve.plot(distance.ravel(), products.ravel(), ".", markersize=4, rasterized=True)
    curve.set(xlabel="distance t - s", title=f"the same {T * T:,} products", box_aspect=1)
    return figure, (
        "The upper part shows four pairs of a head's coordinates at successive positions. The first pairs turn fast "
        "and tell neighbours apart; the last ones turn slowly and tell far from near. The lower part takes one vector "
        f"as q at every position t and as k at every s. All {T * T:,} products fall on one curve over t - s (within "
        f"{scientific(spread)}).")


def attention():
    """Where each head looks."""
    model, tokenizer, train_set, _ = trained()
    ids = tokenizer.encode(SENTENCE, add_special_tokens=False).ids[:model.config.max_context]
    maps, labels = attention_maps(model, ids), [word.strip("·") for word in words(tokenizer, ids)]
    real = train_set.windows(np.arange(8))[0]           # a sentence is too short to judge a head
    share = np.mean([attention_maps(model, row) for row in real], 0)
    heads = []
    for back in (0, 1):
        looks = share.diagonal(-back, 2, 3).mean(2)
        block, head = np.unravel_index(looks.argmax(), looks.shape)
        heads += [f"{block}.{head}", looks.max()]
    figure = canvas("Nobody told the heads where to look: over 512 tokens,\n{} reads the token itself ({:.0%}), {} "
                    "the one before it ({:.0%})".format(*heads), 7.7, "compressed")
    axes = figure.subplots(*maps.shape[:2], squeeze=False, sharex=True, sharey=True)
    future = np.triu(np.ones(maps.shape[2:], bool), 1)
    for (block, head), ax in np.ndenumerate(axes):
        image = ax.imshow(np.ma.array(maps[block, head], mask=future), cmap=shades(), vmin=0, vmax=1)
        bare(ax)
        ax.set_title(f"head {block}.{head}", fontsize=10, y=0.86, loc="right")
        ax.set_xticks(range(len(ids)), labels, rotation=90, fontsize=8.5)
        ax.set_yticks(range(len(ids)), labels, fontsize=8.5)
    bar = figure.colorbar(image, ax=axes, location="bottom", pad=0.02, shrink=0.4, aspect=40)
    bar.set_label("share of attention")
    bar.outline.set_visible(False)
    return figure, (
        "There is one map for each head (block.head) of the trained model. Row t shows which tokens token t reads "
        "from: a stronger colour means more, and each row sums to 1. The future (upper right) stays empty. The shares "
        f"in the title are means over {real.size} tokens of the training text.")


# ---------------------------------------------------------------- training

PARTS = {"q, k": ("q", "k"), "v, o": ("v", "o"), "gate, up": ("gate", "up"), "down": ("down",)}


def part_norms(model, arrays):
    """{part: its norm in each block} of {parameter's name: array}."""
    def norm(block, part):
        return math.sqrt(sum(float((arrays[name] ** 2).sum()) for name in arrays if f"layers.{block}." in name
                             and name.split(".")[-2].removesuffix("_proj") in PARTS[part]))
    return {part: [norm(block, part) for block in range(model.config.n_block)] for part in PARTS}


def gradient_flow():
    """The norms of gradients and weights by block and part, before and after training."""
    model, _, train_set, _ = trained()
    found, first, last = {}, NanoLLM(model.config, SEED), NanoLLM(model.config, SEED)
    last.weights.flat[...] = model.weights.flat     # which was opened to be read, without gradients
    for when, one in (("step 0", first), ("trained", last)):
        one.weights.grad[:] = 0
        one.loss(*train_set.batch(0, 32, SEED)).backward()
        found[when] = [part_norms(one, {name: getattr(t, what) for name, t in one.parameters().items()})
                       for what in ("grad", "data")]
    before, after = (np.array(list(gradients.values())) for gradients, _ in found.values())
    gain = after[0].mean() / before[0].mean()
    figure = canvas(f"Attention wakes up late: the gradient of q and k is {gain:.0f} times larger\n"
                    "after training than at step 0", 5.6)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, (when, rows) in enumerate(found.items()):
        for ax, parts in zip(axes[:, column], rows, strict=True):
            for mark, (part, norms) in zip("os^D", parts.items(), strict=True):
                ax.plot(norms, mark + "-", label=part, markersize=6)
            ax.set_xticks(range(model.config.n_block))
        axes[0, column].set(title=when, yscale="log")
        axes[1, column].set_xlabel("block")
    axes[0, 0].set_ylabel("norm of the gradient")
    axes[1, 0].set(ylabel="norm of the weights", ylim=0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure, (
        "These are the norms of one batch's gradient in each block's matrices. At step 0 a token attends almost "
        "equally to all earlier tokens, so q and k hardly matter and receive little gradient. Over the depth each "
        f"part's gradient then differs by at most a factor of {(before.max(1) / before.min(1)).max():.1f}, so no block "
        f"is starved or flooded. After training it differs by up to {(after.max(1) / after.min(1)).max():.0f}, and the "
        "first block learns most.")


def training():
    """Loss, learning rate and gradient norm of the run."""
    model, _, _, rows = trained()

    def points(name):
        return zip(*((int(row["step"]), float(row[name])) for row in rows if row[name]), strict=True)
    last = [row for row in rows if row["val_loss"]][-1]
    start = math.log(model.config.vocab_size)
    figure = canvas(f"The loss falls from ln V = {start:.2f} to {float(last['val_loss']):.2f} on unseen text in "
                    f"{last['step']} steps", 6.2)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    axes[0].plot(*points("train_loss"), label="training")
    axes[0].plot(*points("val_loss"), "o", label="validation (unseen text)")
    axes[0].legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    dotted(axes[0], start, "an even guess, ln V")
    axes[1].plot(*points("learning_rate"), color=GREEN)
    axes[1].ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)
    axes[2].plot(*points("grad_norm"), color=PINK)
    dotted(axes[2], 1, "clipped above")
    for ax, label in zip(axes, ("loss (nats a token)", "learning rate", "gradient norm"), strict=True):
        ax.set_ylabel(label)
    axes[1].set_ylim(0)
    axes[2].set(xlabel="step", ylim=0)
    figure.align_ylabels()
    return figure, (
        "The curves are from the run's metrics.csv. After a warm-up of a few steps the learning rate falls along half "
        "a cosine. The gradient's norm settles below 1, where nothing is clipped. The loss starts at an even guess "
        f"among V tokens and ends at {float(last['train_loss']):.2f} in training and at {float(last['val_loss']):.2f} "
        "on the end of the text, which training never sees.")


# ---------------------------------------------------------------- what a step costs

def memory(size=8):
    """Memory through a training step, with the blocks' activations kept and recomputed."""
    batch = np.random.default_rng(SEED).integers(0, LARGER.vocab_size, (2, size, LARGER.max_context))
    found = []
    for recompute in (False, True):
        tracemalloc.start()
        model = NanoLLM(LARGER, SEED)
        model.recompute = recompute
        optimizer = Adam(model)
        always = tracemalloc.get_traced_memory()[0] / 1e6
        spans = training_step(model, optimizer, lambda: batch)
        tracemalloc.stop()
        found.append((spans, np.array([span.peak for span in spans]) / 1e6))
        del model, optimizer
    kept, again = (peaks.max() for _, peaks in found)
    figure = canvas("Recomputing activations cuts a step's memory from\n"
                    f"{kept:.0f} to {again:.0f} MB, for one more forward pass", 4.2)
    axes = figure.subplots(1, 2, sharey=True, width_ratios=[len(spans) for spans, _ in found])
    for ax, (spans, peaks), title in zip(axes, found, ("activations kept", "model.recompute = True"), strict=True):
        turn, end = next(i for i, span in enumerate(spans) if span.phase == "backward"), len(spans)
        for phase, start, stop, color in (("forward", 0, turn, BLUE), ("backward", turn, end, RED)):
            ax.axvspan(start, stop, color=color, alpha=0.09, linewidth=0)
            ax.text((start + stop) / 2, 0.98, phase, transform=ax.get_xaxis_transform(), color=color, ha="center",
                    va="top")
        ax.fill_between([0, end], always, color="#ced4da", linewidth=0)
        ax.text(end * 0.98, always / 2, "weights, gradients, Adam", ha="right", va="center", fontsize=9.5)
        ax.stairs(peaks, color=INK, linewidth=1.5, baseline=None)
        ax.set(title=title, xlabel="op of the step", xlim=(0, end), ylim=(0, kept * 1.18))
    axes[0].set_ylabel("memory (MB)")
    return figure, (
        f"The curves show the most memory held in each op of a training step ({LARGER.n_block} blocks, {size} windows "
        f"of {LARGER.max_context} tokens). Memory climbs while forward keeps what backward will need, and backward "
        "frees it op by op. With recompute only the blocks' inputs are kept. Each tooth is one block, which is run "
        "again and then freed.")


def shares(steps=6):
    """Where the time of a step goes, by op, on one thread."""
    train_set, model = trained().train_set, NanoLLM(trained().model.config, SEED)
    optimizer = Adam(model)
    with mock.patch.object(device, "threads", 1):
        found = [training_step(model, optimizer, lambda i=i: train_set.batch(i * 32, 32, SEED)) for i in range(steps)]
    fastest = np.min([[span.seconds for span in step] for step in found], 0)     # the machine does other work, too
    total, by = fastest.sum(), Counter()
    for span, seconds in zip(found[0], fastest, strict=True):
        by[span.op, span.phase] += 100 * seconds / total
    share = Counter()
    for (op, _), part in by.items():
        share[op] += part
    ops, left = sorted(share, key=share.get), np.zeros(len(share))
    weights = share["linear"] + share["linear_cross_entropy"]
    figure = canvas(f"The products with the weights take {weights:.0f} % of a training step", 5)
    ax = figure.subplots()
    for phase, color in zip(("forward", "backward", "optimizer", "data"), (BLUE, RED, GREEN, PINK), strict=True):
        width = np.array([by[op, phase] for op in ops])
        ax.barh(ops, width, left=left, color=color, label=phase, height=0.7)
        left += width
    for i, op in enumerate(ops):
        ax.text(share[op], i, f" {share[op]:.1f}", va="center", fontsize=10)
    ax.set(xlabel=f"share of a step's {1000 * total:.0f} ms on one thread (%)", xlim=(0, 1.1 * max(left)))
    bare(ax)
    ax.legend(loc="lower right")
    return figure, (
        f"This is a training step of the run's model and batch, with each op's fastest time of {steps} runs. `linear` "
        "is every product with a block's weights. `linear_cross_entropy` is the output layer and the loss; it computes "
        "its gradients in forward, while it has the logits. Most of the rest is limited by memory bandwidth, so it is "
        "done in blocks that fit into the cache.")


# ---------------------------------------------------------------- sampling

def sampling():
    """The next token's distribution under each setting."""
    model, tokenizer, _, _ = trained()
    with no_grad():
        ids = tokenizer.encode(CONTEXT, add_special_tokens=False).ids
        logits = model(np.array([ids])).data[0, -1:]
    shown = np.argsort(-logits[0])[:12]
    figure = canvas(f"“{CONTEXT} …”: a low temperature sharpens\n"
                    "the whole distribution, top-k and top-p cut off its tail", 4.8)
    axes = figure.subplots(1, 4, sharey=True, sharex=True)
    for ax, color, (name, value) in zip(axes, (BLUE, RED, GREEN, PINK), (
            ("temperature", 1.0), ("temperature", 0.5), ("top_k", 4), ("top_p", 0.8)), strict=True):
        p = probabilities(logits, **{name: value})[0]
        percent = 100 * np.append(p[shown], 1 - p[shown].sum())
        ax.barh(range(len(percent)), percent, color=[color] * len(shown) + [GREY], height=0.75)
        for i, number in enumerate(percent):
            label = "–" if number < 1e-9 else "<1" if number < 0.5 else f"{number:.0f}"
            ax.text(number, i, f" {label}", va="center", fontsize=9.5)
        bare(ax)
        ax.set_title(f"{name} {value}\n{(p > 0).sum():,} tokens", fontsize=10)
        ax.set_xticks([])
        ax.margins(x=0.25)
    axes[0].set_yticks(range(len(shown) + 1), [*words(tokenizer, shown), "all others"])
    axes[0].invert_yaxis()
    figure.supxlabel("probability of the next token (%)", fontsize=11)
    return figure, (
        "The bars are the probabilities of the trained model's next token after these words (· is a space), as "
        "`probabilities` gives them to the sampler. The number below each setting is the number of tokens that can "
        "still come. Top-k keeps a fixed number of tokens; top-p keeps more when the model is less certain.")


# ---------------------------------------------------------------- docs/figures/

FIGURES = {"graph": graph, "step_size": step_size, "rope": rotation, "attention": attention, "training": training,
           "gradient_flow": gradient_flow, "memory": memory, "time": shares, "sampling": sampling}
HEAD = f"""# Figures

`python docs/figures.py` draws all figures, `python docs/figures.py NAME` draws one, and both write this page. The
trained model in `attention`, `training`, `gradient_flow`, `time` and `sampling` comes from

    python train.py {FLAGS}

reference.txt is the language reference that comes with Python, the text of the lessons.
"""


def main(names):
    """Draw these figures, by default all."""
    page, made_of = FOLDER / "README.md", commit()
    FOLDER.mkdir(exist_ok=True)
    old = page.read_text(encoding="utf-8").split("\n## ")[1:] if page.exists() else []
    sections = dict(section.split("\n\n", 1) for section in old)
    for name in names or FIGURES:
        path = FOLDER / f"{name}.svg"
        with drawing.defaults(STYLE):
            figure, caption = FIGURES[name]()
            if isinstance(figure, str):
                path.write_text(figure, encoding="utf-8")
            else:
                figure.savefig(path, dpi=150, metadata={"Date": None})
        sections[name] = (f"![{FIGURES[name].__doc__}]({path.name})\n\n{caption}\n\n`python docs/figures.py {name}` on "
                          f"{device.reason.split(';')[0]}, {cpu()}; seed {SEED}; commit {made_of}\n")
        print(f"{path.name}  {path.stat().st_size / 1000:.0f} KB", flush=True)
    text = HEAD + "".join(f"\n## {name}\n\n{sections[name]}" for name in FIGURES if name in sections)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if wrong := [name for name in sys.argv[1:] if name not in FIGURES]:
        sys.exit(f"figures.py: there is no figure {wrong[0]!r}, only {', '.join(FIGURES)}")
    device.use("cpu")           # time and memory can be measured op by op there
    main(sys.argv[1:])
