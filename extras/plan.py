"""What a training would take, before it begins:  python -m extras.plan --tokenizer FILE [flags of train.py]

Parameters, FLOPs, memory and the largest batch that fits, from the shapes alone: nothing is trained, no text is read.

The memory is found by walking through a step as nanollm.py and autograd.py make it. Forward, every op keeps what its
backward will need (`kept_by_a_block`): in a block 4 C + 2 H D + 2 K D + 3 F elements of --dtype and 2 + H float32 for
each token of the batch. With --recompute a block keeps only its input, C, except while backward works on it. Everything
that is kept is alive when the loss is computed and when backward reaches the last block; from there on it only gets
less. So the peak is at one of a few moments (`moments`), each of which needs some more arrays: gradients on their way,
a product's float32 copies (half precision on a CPU), the logits.

The plan leaves out:
- attention's mask (64 KB, on a GPU 4 T² bytes), Python's own objects and BLAS's buffers;
- gaps between arrays, which an allocator cannot use again: some per cent on a CPU. On a GPU the plan adds GAPS, and is
  within 5 % of what CuPy's pool takes for the default model (`tests/tools/emulated_gpu/count.py`, 4 and 16 windows);
- the encoding of a text that is not in the token cache yet. It happens before training, a million characters at a time,
  and takes 140 MB if every character is a token;
- a GPU's context and libraries, because they are not part of its free memory.
"""
import bisect
import contextlib
import math
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

if not __package__:             # run by its path, as editors do
    sys.path[0] += "/.."

import autograd
from console import cli, metrics, options
from hardware import device
from storage.files import require
from storage.tokens import load_tokenizer

WIDE = 4        # bytes of a float32
GAPS = 0.04     # of a GPU's arrays


# ---------------------------------------------------------------- parameters

def parameters(config):
    """{part of the model: its parameters}, as in Config.shapes; a tied lm_head has none of its own."""
    parts = {"embed_tokens": "embedding", "self_attn": "attention", "mlp": "gated linear unit", "lm_head": "lm_head"}
    count = dict.fromkeys([*parts.values(), "norms"], 0)
    for name, shape in config.shapes().items():
        part = next((part for word, part in parts.items() if f".{word}." in f".{name}"), "norms")
        count[part] += int(np.prod(shape))
    return count


# ---------------------------------------------------------------- what is kept for backward

def kept_by_a_block(config, B, size):
    """[(op, what it keeps for its backward, bytes a token)] of one block, for B windows and `size` bytes an element.

    Other ops keep nothing: rope is undone by the opposite turn, add passes dout on, dropout draws its mask again.
    """
    C, F, H, K = config.embedding_dim, config.hidden_dim, config.n_head, config.n_kv_head
    q, kv = H * config.head_dim, K * config.head_dim
    is_view = B == 1 or K == 1                      # v, reshaped to (B K, T, D), still is a slice of all of q, k, v
    norms = [("rmsnorm of q, k", "its inputs q and k", size * (q + kv)),
             ("rmsnorm of q, k", "sums of squares", WIDE * (H + K))]
    return [("rmsnorm", "its input h", size * C), ("rmsnorm", "sum of squares", WIDE),
            ("linear q, k, v", "its input", size * C),
            *(norms if config.qk_norm else []),
            ("attention", "q", size * q), ("attention", "k", size * kv),
            ("attention", "v", size * (q + 2 * kv if is_view else kv)),
            ("attention", "log-sum-exp", WIDE * H),
            ("linear o", "its input", size * q),
            ("second rmsnorm", "its input h", size * C), ("second rmsnorm", "sum of squares", WIDE),
            ("linear gate, up", "its input", size * C),
            ("glu", "gate, up", size * 2 * F),
            ("linear down", "its input", size * F)]


# ---------------------------------------------------------------- what comes and goes

def product(m, k, n, size, into=None):
    """Bytes that device.matmul of (m, k) by (k, n) takes and gives back, its inputs and its result not counted.

    into: None for a result of `size`, "float32", or "sum" for a float32 array that the product is added to.
    """
    if device.on_gpu:
        return 0
    copies = WIDE * (m * k + k * n + (m * n if into is None else 0)) if size == 2 else 0
    if into == "sum":       # a block of the rows in each thread
        rows = m
        if m >= min(n, 128):
            rows = min(m, device.threads * min(math.ceil(m / device.threads), max(device._TILE // n, 128)))
        copies += WIDE * rows * n
    return copies


def linear_backward(N, C, F, size):
    """Bytes that the backward of linear, (N, C) -> (N, F), takes and gives back: for dx, and then for dw."""
    return max(product(N, F, C, size), product(F, N, C, size, "sum"))


def swept(elements, on_gpu, on_cpu, block=autograd._CACHE):
    """Bytes of an op's float32 temporaries. On a GPU, where a fused formula has none, they are `on_gpu` arrays of all
    `elements`. On a CPU they are `on_cpu` arrays of one block of a sweep, in each thread.
    """
    if elements > block:
        count = math.ceil(elements / block)
        block = elements // (count + count % 2)         # device.sweep's slices
    return WIDE * (on_gpu * elements if device.on_gpu else on_cpu * min(elements, device.threads * block))


def moments(config, B, T, size=WIDE, recompute=False, dropout=0.0):
    """{moment: {what is alive then, weights, their gradients and Adam's moments not counted: bytes}} of a step.

    B windows of T tokens, activations of `size` bytes an element. These are the moments at which a step's memory can be
    at its peak, in their order. Those inside a block are the last block's: its backward comes first, while all other
    blocks still keep their activations. From attention's backward on there is less and less.

    As an example, "backward of glu". Its out went through linear down, whose backward has just ended. Alive are
        activations     what all ops keep, up to linear down's input: what an op keeps outlives its backward by one op
        dh              the gradient of h, which waits for the sum with this branch's
        dropped         dh after the dropout mask, if there is dropout: dout of linear down
        dglu            (N, F), dout of glu: what linear down's backward made
        dgate, dup      (N, 2 F), what glu's backward makes
        temporary       a few blocks of float32 rows, in which the formula is computed
    """
    C, F, V, kv = config.embedding_dim, config.hidden_dim, config.vocab_size, config.n_kv_head * config.head_dim
    N, table, half = B * T, kept_by_a_block(config, B, size), size == 2
    q = N * size * config.n_head * config.head_dim
    h, block = N * size * C, N * sum(width for *_, width in table)
    below = 16 * N + (config.n_block - 1) * (h if recompute else block)         # x and y, and what other blocks keep

    even = math.ceil(N / math.ceil(N * V / autograd._LOGITS))
    rows = min(N, device.rows_at_once(V, even, 64))         # that have their logits at the same time
    rounded = 2 * rows * V if half else 0
    kept = below + (h if recompute else block) + h + WIDE * N                   # the last norm's input and sums
    loss = {"dx": WIDE * N * C, "dw": WIDE * V * C}
    result = {
        "loss": {"activations": kept, "hidden state": h, "logits": WIDE * rows * V, **loss,
                 "temporary": max(
                     product(rows, C, V, size, "float32"),
                     rounded + product(rows, V, C, size, "float32"), rounded + product(V, rows, C, size, "sum"))},
        "its backward": {"activations": kept, **loss, "dx / N": WIDE * N * C + (h if half else 0)}}

    def until(op):
        """The first rows of the table, through those of `op`: backward lets go of the last ones first."""
        last = max(i for i, row in enumerate(table) if row[0] == op)
        return {"activations": below + N * sum(width for *_, width in table[:last + 1]), "dh": h,
                "the block's output": h if recompute else 0}

    # What an op keeps, and its dout, outlive its backward by one: until the next op has made its gradients.
    queries = min(device.rows_at_once(B * config.n_head * T, autograd._QUERIES, autograd._QUERIES), T)
    group = config.n_head // config.n_kv_head * queries * T                     # scores of a key/value head
    summed = size if queries == T else WIDE                                     # dk and dv
    dropped = h if dropout else 0
    if dropout:
        result["backward of dropout"] = until("linear down") | {
            "dropped": h, "temporary": swept(N * C, 2, 12)}             # 64-bit integers
    return result | {
        "backward of glu": until("linear down") | {
            "dropped": dropped, "dglu": N * size * F, "dgate, dup": N * size * 2 * F,
            "temporary": swept(N * F, 0, 5)},
        "backward of linear gate, up": until("linear gate, up") | {
            "dgate, dup": N * size * 2 * F, "dx": h, "temporary": linear_backward(N, C, 2 * F, size)},
        "backward of second rmsnorm": until("linear gate, up") | {
            "dgate, dup": N * size * 2 * F, "dout": h, "dx": h, "temporary": swept(N * C, 1, 4)},
        "backward of attention": until("attention") | {
            "dout, twice": 2 * q, "dq, dk, dv": q + N * summed * 2 * kv,
            "temporary": swept(B * config.n_kv_head * group, 3 if half else 2, 3,
                               max(autograd._SCORES // group, 1) * group)}}


# ---------------------------------------------------------------- the process and the device

def resident():
    """Bytes of memory that this process holds; 0 if the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def fixed_share():
    """Bytes that a training process holds in addition to its arrays: Python and the libraries.

    They are measured in this process, which has imported what train.py does, after drawing a loss.png, because that
    loads Matplotlib. On a GPU the arrays are alone.
    """
    if device.on_gpu:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        metrics.draw_loss(Path(folder))
    return resident()


def available():
    """(bytes that a training could take now, or None, and how that is known). What this process holds counts, because
    it will be given back.
    """
    if device.on_gpu:
        return device.xp.cuda.runtime.memGetInfo()[0], "free on the card (memGetInfo)"
    with contextlib.suppress(OSError):
        if found := re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(found[1]) * 1024 + resident(), "available (/proc/meminfo)"
    with contextlib.suppress(AttributeError, ValueError, OSError):      # Windows has no sysconf
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "installed (sysconf)"
    return None, "This system does not say how much memory it has."


# ---------------------------------------------------------------- the report

def table(*rows):
    """A Markdown table, aligned; the first row is its head, and columns that end with a number are on the right."""
    rows = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    columns = [(max(map(len, column)), column[-1][:1].isdigit()) for column in zip(*rows, strict=True)]
    rule = "|".join("-" * (width + 1) + ("-:"[right]) for width, right in columns)
    lines = [" | ".join(cell.rjust(width) if right else cell.ljust(width)
                        for cell, (width, right) in zip(row, columns, strict=True)) for row in rows]
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:]), ""])


def mb(value):
    return f"{value / 1e6:,.1f}"


def report(config, settings):
    """What `main` prints for a model of this Config and train.py's Settings."""
    B, T, size = settings.batch_size, settings.seq_len, np.dtype(settings.dtype).itemsize
    tokens, per_token = settings.windows_per_step() * T, metrics.flops_per_token(config, T)
    kept = kept_by_a_block(config, B, size)
    count, share, (room, where) = parameters(config), fixed_share(), available()
    n = sum(count.values())
    half = 2 * (n - count["norms"]) if size == 2 else 0
    fixed = {"weights": WIDE * n, "weights, rounded": half, "gradients": WIDE * n, "Adam's moments": 2 * WIDE * n,
             "Python and libraries": share}

    def step(B):
        return moments(config, B, T, size, settings.recompute, settings.dropout)

    def gaps(arrays):
        return GAPS * arrays if device.on_gpu else 0

    def needed(B):
        arrays = sum(fixed.values()) + max(sum(parts.values()) for parts in step(B).values())
        return arrays + gaps(arrays)

    now = step(B)
    peak = max(now, key=lambda name: sum(now[name].values()))
    alive = fixed | now[peak]
    alive["gaps between arrays, about"] = gaps(sum(alive.values()))
    block = "the block at work" if settings.recompute else "each block"
    lines = [
        table(("parameters", "number"), *count.items(), ("total", n)),
        table(("computation", "FLOPs"), ("a token", per_token), (f"a step of {tokens:,} tokens", per_token * tokens)),
        table((f"{block} keeps for backward", "", "bytes a token"), *kept,
              ("total", "", sum(width for *_, width in kept))),
        table((f"alive at the peak ({peak})", "MB"),
              *((name, mb(value)) for name, value in alive.items() if value),
              ("total", mb(needed(B)))),
        table(("moment of a step", "other arrays, MB", "kept activations, MB", "total, MB"), *(
            (name, ", ".join(f"{part} {mb(value)}" for part, value in parts.items() if value and part != "activations"),
             mb(parts["activations"]), mb(sum(fixed.values()) + sum(parts.values()))) for name, parts in now.items()))]
    lines.append(f"--batch-size {B} takes {mb(needed(B))} MB.")
    if not device.on_gpu:           # the activations are divided; the block of logits and dw are not
        more = WIDE * n + share + now["loss"]["logits"] + now["loss"]["dw"]
        lines[-1] += f" That is one process; each further one of --processes adds about {mb(more)} MB."
    if room is None:
        lines.append(where)
    else:
        most = bisect.bisect_right(range(1, 10**9 + 1), room, key=needed)      # train.py takes no more; 0: none fits
        lines.append(f"The largest that fits is {most:,}: it takes {mb(needed(most))} of {mb(room)} MB {where}." if most
                     else f"Not even 1 fits: it takes {mb(needed(1))} MB, and {mb(room)} MB are {where}. Lower "
                     "--seq-len, use --recompute, or make the model smaller.")
    return "\n".join(lines)


def main(argv=None):
    parser = options.command_line()
    parser.usage = "python -m extras.plan --tokenizer FILE|--vocab-size N [options]"
    parser.description = "What training with these flags of train.py would take: parameters, FLOPs, memory."
    request = options.read_flags(argv, parser)
    settings = request.settings
    require(settings.tokenizer or settings.demo or settings.vocab_size,
            "--tokenizer FILE or --vocab-size N is needed because the size of the vocabulary counts (or --demo, which "
            "has its own)")
    tokenizer = load_tokenizer(request.tokenizer) if request.tokenizer else None
    config = options.make_config(request, tokenizer)
    print(f"device  {device.reason}\nmodel   {config}\n\n{report(config, settings)}")
    return 0


if __name__ == "__main__":
    cli.run(main, "python -m extras.plan")
