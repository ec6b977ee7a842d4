"""Compare nanollm with PyTorch: training step, memory, generation, tokenisation.  python benchmarks/speed.py --help

Both sides start from one checkpoint, see the same new batch at each step, and use the same Adam and clipping. Both have
the same number of cores: PyTorch uses them by threads, a training step of nanollm by processes, as train.py does. They
take turns, A B A B ..., and only one works at a time. A ratio is nanollm's time divided by the other side's time in the
turn that follows; the table shows the median and the range.
Both sides must compute the same loss before the first step and hold the same weights a few steps later. Otherwise the
program says so and exits with 1. --before FOLDER compares with another checkout of nanollm instead of PyTorch;
--processes 2 1 4 compares a step of 2 processes with those of 1 and of 4, too.

A step's FLOPs are counted by console.metrics.flops_per_token. Divided by the time, and by the rate of a large product
of the same type, they give the share of what the machine can do (on a GPU also called MFU).
"""
import argparse
import contextlib
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from safetensors import safe_open
from workers import Gemm, Nanollm, NanollmPictures, PyTorch, PyTorchPictures, Text, Transformers

FIELDS = ("vocab_size", "embedding_dim", "n_block", "n_head", "n_kv_head", "hidden_dim", "max_context",
          "tie_embeddings", "batch_size")
CONFIGS = {     # steps in a turn, then the fields; every window is max_context long
    "base": (2, 30522, 512, 6, 8, 8, 2048, 512, False, 4),
    "small": (5, 4096, 256, 4, 4, 4, 768, 256, False, 16),
    "char": (50, 65, 128, 4, 4, 4, 344, 64, True, 12),
    "qwen": (1, 151669, 512, 6, 8, 8, 2048, 512, False, 4),
    "tiny": (2, 50, 16, 2, 4, 2, 24, 16, False, 2),     # tests this program
}
PICTURES = {"size": 128, "batch_size": 64, "classes": 2}       # as the original's image classifier has them
LOSS_TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1e-2}     # relative
# ‖ours - theirs‖ / ‖theirs - start‖ of the worst tensor: Adam turns the rounding of small gradients into whole steps
WEIGHT_TOLERANCE = {"float32": 3e-3, "tf32": 0.3, "float16": 0.3, "bfloat16": 0.6}


def check(equal, what):
    if not equal:
        sys.exit(f"speed.py: NOT EQUAL: {what}")


# ---------------------------------------------------------------- processes that take turns

def begin(role, options, checkout=None):
    """Make the side of this process: an object of this class, or of the class of that name in another checkout."""
    global side
    if checkout:
        sys.path.insert(0, str(checkout / "benchmarks"))
        del sys.modules["workers"]
        role = getattr(importlib.import_module("workers"), role.__name__)
    side = role(**options)


def call(method, *arguments):
    return getattr(side, method)(*arguments)


@contextlib.contextmanager
def running(**sides):
    """{name: ask} for {name: arguments of begin}: each side has a new process; ask(method, ...) calls it there."""
    with contextlib.ExitStack() as stack:
        def start(*side):
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(1, context, begin, side))
            return lambda method, *arguments: pool.submit(call, method, *arguments).result()
        yield {name: start(*side) for name, side in sides.items()}


def sides_of(args, ours, others):
    """What is compared: nanollm, {name: arguments of begin}, with the other checkout if there is one, or with these."""
    return {"nanollm": ours} | ({"before": (*ours, args.before)} if args.before else others)


def compare(what, unit, ask, rounds, request, shown):
    """(rows of the table, last results): nanollm compared with each other side.

    ask[name](*request(turn)) answers (seconds, result): for turn 0, the warm-up, and then for `rounds` more turns.
    shown(seconds) is the figure in this unit.
    """
    turns, results = {name: [] for name in ask}, {}
    for turn in range(rounds + 1):
        for name in ask:
            seconds, results[name] = ask[name](*request(turn))
            turns[name].append(seconds)
            time.sleep(0.2)                             # let its threads stop spinning
    rows, ours = [], turns.pop("nanollm")[1:]
    for name, (_, *theirs) in turns.items():
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows.append({"what": what, "unit": unit, "nanollm": shown(statistics.median(ours)), "against": name,
                     "other": shown(statistics.median(theirs)), "seconds": [ours, theirs],
                     "ratio": [statistics.median(ratios), min(ratios), max(ratios)]})
    return rows, results


# ---------------------------------------------------------------- what is compared

def weight_difference(start, ours, theirs):
    """The largest |ours - theirs| of two checkpoints, and the worst tensor's ‖ours - theirs‖ / ‖theirs - start‖."""
    largest = share = 0.0
    with contextlib.ExitStack() as stack:
        s, a, b = (stack.enter_context(safe_open(Path(folder, "model.safetensors"), "numpy"))
                   for folder in (start, ours, theirs))
        check(sorted(a.keys()) == sorted(b.keys()), "the names of the tensors")
        for name in sorted(a.keys()):
            x, y, z = (file.get_tensor(name) for file in (a, b, s))
            largest = np.maximum(largest, abs(x - y).max())         # unlike max, keeps a NaN
            share = np.maximum(share, np.linalg.norm(x - y) / np.linalg.norm(y - z))
    return {"largest": float(largest), "share_of_training": float(share)}


def with_processes(args, n):
    return argparse.Namespace(**vars(args) | {"processes": n})


def several(args, counts, ours, common):
    """{"4 processes": arguments of begin}: our side in these numbers of processes."""
    return {f"{n} process{'es' if n > 1 else ''}": (ours, common | {"args": with_processes(args, n)}) for n in counts}


def language_model(name, c, steps, folder, rate, args, counts=()):
    """Compare training steps, from the checkpoint in `folder`, also with those in other numbers of processes."""
    common = {"c": c, "args": args, "folder": folder}
    others = {"PyTorch": (PyTorch, common)}
    if args.compile:
        others["torch.compile"] = PyTorch, common | {"variant": True}
    if args.recompute:
        others["--recompute"] = Nanollm, common | {"variant": True}
    others |= several(args, counts, Nanollm, common)
    return training(name, c, steps, folder, rate, args, sides_of(args, (Nanollm, common), others))


def pictures(folder, rate, args, counts=()):
    """Compare training steps of the image classifier with PyTorch's, in both of its layouts."""
    common = {"c": PICTURES | {"batch_size": args.batch_size or PICTURES["batch_size"]}, "args": args, "folder": folder}
    with running(maker=(NanollmPictures, common | {"folder": None, "args": with_processes(args, 1)})) as ask:
        ask["maker"]("save", folder)
    others = {"PyTorch": (PyTorchPictures, common),
              "PyTorch, channels_last": (PyTorchPictures, common | {"variant": True}),
              **several(args, counts, NanollmPictures, common)}
    return training("images", common["c"], args.steps or 2, folder, rate, args,
                    sides_of(args, (NanollmPictures, common), others))


def training(name, c, steps, folder, rate, args, sides):
    """Compare training steps of these sides, from the checkpoint in `folder`."""
    with running(**sides) as ask:
        loss = {side: ask[side]("first_loss") for side in sides}
        check(np.ptp(list(loss.values())) <= LOSS_TOLERANCE[args.dtype] * loss["nanollm"], f"{name}: first loss {loss}")
        for side in sides:          # the same number of steps in each run, because differences by rounding grow
            ask[side]("steps", 0, 2 * steps)
            os.mkdir(f"{folder}/{side}")
            ask[side]("save", f"{folder}/{side}")
        rows, _ = compare(f"{name}: training step", "ms", ask, args.rounds,
                          lambda turn: ("steps", (turn + 2) * steps, steps), lambda s: 1000 * s / steps)
        flops_per_token = ask["nanollm"]("flops_per_token")
        facts = {side: ask[side]("facts") for side in sides}
        check({threads for threads, _ in facts.values()} == {args.threads}, f"{name}: (threads, peak) {facts}")
    flops = c["batch_size"] * c.get("max_context", 1) * flops_per_token
    for row in rows:
        other = row["against"]
        difference = weight_difference(folder, f"{folder}/nanollm", f"{folder}/{other}")
        row |= {"config": c, "processes": args.processes, "flops": flops, "first_loss": [loss["nanollm"], loss[other]],
                "weight_difference": difference, "peak_bytes": [facts["nanollm"][1], facts[other][1]],
                "share_of_gemm": [flops / (row[key] / 1000) / rate for key in ("nanollm", "other")]}
        equal = difference["share_of_training"] <= WEIGHT_TOLERANCE[args.dtype]
        check(equal, f"{name}: weights after {2 * steps} steps, {other}: {difference}")
    return rows


def generation(name, c, folder, args):
    """Compare greedy generation from one prompt, with the cache; both sides must generate the same tokens.

    It is in float32 whatever --dtype says: between nearly equal tokens half precision's rounding would decide.
    """
    args = argparse.Namespace(**vars(args) | {"dtype": "float32"})
    count = min(128, c["max_context"] // 2)
    request = "generate", list(range(count // 4)), count
    sides = sides_of(args, (Nanollm, {"c": c, "args": args, "folder": folder}),
                     {"transformers": (Transformers, {"args": args, "folder": folder})})
    with running(**sides) as ask:
        rows, ids = compare(f"{name}: generation", "tokens/s", ask, args.rounds, lambda _: request, lambda s: count / s)
    ours, theirs = ids.values()
    check(ours == theirs, f"{name}: generated {ids}")
    return rows


def tokenisation(folder, args):
    """Compare a byte-level BPE on a text of random words; the ids must be those of the whole text encoded at once."""
    from storage.tokenizer_training import byte_bpe

    rng = np.random.default_rng(args.seed)
    words = ["".join(rng.choice(list("etaoinshrdlu"), length)) + end
             for length in range(1, 10) for end in ["", "", ",", ".\n"] * 50]
    ranks = (len(words) + 1) ** rng.random(int(args.megabytes * 230_000)) - 1
    text, tokenizer = f"{folder}/text", f"{folder}/tokenizer.json"
    Path(text).write_text(" ".join(words[int(i)] for i in ranks), newline="\n")
    byte_bpe([Path(text).read_text()], 2000).save(tokenizer)
    ours, whole, lines = ((Text, {"way": way, "text": text, "tokenizer": tokenizer})
                          for way in ("nanollm", "whole", "lines"))
    sides = sides_of(args, ours, {"tokenizers": whole, "tokenizers, its lines": lines})
    with running(**sides) as ask:
        rows, ids = compare("tokenisation", "MB/s", ask, args.rounds, lambda turn: ("encode", f"{folder}/cache-{turn}"),
                            lambda s: Path(text).stat().st_size / 1e6 / s)
    ours, theirs, *_ = ids.values()
    check(ours == theirs, "the ids of the text")
    return rows


# ---------------------------------------------------------------- the report

def header(args):
    """What another run must share with this one to be comparable."""
    from results import commit, cpu  # docs/results.py

    packages = ("numpy", "torch", "transformers", "tokenizers")
    return {"date": time.strftime("%Y-%m-%d %H:%M %z"), "command": shlex.join(["python", *sys.argv]), "seed": args.seed,
            "commit": commit(), "cpu": cpu(), "cores": os.cpu_count(), "threads": args.threads, "device": args.device,
            "dtype": args.dtype,
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}}


def main():
    import tables  # docs/tables.py

    from hardware import device  # only here, because each process below imports that of its own checkout

    device.use("cpu")           # this process needs only the number of threads
    parser = argparse.ArgumentParser(description=__doc__.split("  ")[0])
    parser.add_argument("--config", nargs="+", choices=[*CONFIGS, "images"], default=["base", "small", "char"])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side that count (7)")
    parser.add_argument("--steps", type=int, help="training steps in a turn")
    parser.add_argument("--batch-size", type=int, help="windows in a batch")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=LOSS_TOLERANCE, default="float32")
    parser.add_argument("--compile", action="store_true", help="also compare with torch.compile")
    parser.add_argument("--recompute", action="store_true", help="also compare with nanollm's own --recompute")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="compare with the nanollm in this folder instead")
    parser.add_argument("--threads", type=int, default=device.threads)
    parser.add_argument("--processes", type=int, nargs="+", default=[], metavar="N", help="of nanollm, in a training "
                        "step (as many as the command starts); each further number is one more side, to compare with")
    parser.add_argument("--megabytes", type=float, default=4, help="of text to tokenise (4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "NANOLLM_THREADS"):
        os.environ[name] = str(args.threads)            # the processes started from here read them
    os.environ["HF_HUB_OFFLINE"] = "1"
    result = {"header": header(args), "rows": []}
    with running(gemm=(Gemm, {"args": args})) as ask:
        rates = result["header"]["gemm_flops_per_second"] = ask["gemm"]("rates")
    for key, value in result["header"].items():
        print(f"- {key}: {value}")
    print(f"\n{tables.SPEED}")

    def show(rows):
        print(*map(tables.comparison, rows), sep="\n", flush=True)
        result["rows"] += rows
        if args.json:           # now, because the next check may end the program
            args.json.write_text(json.dumps(result, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        alone, (count, *counts) = with_processes(args, 1), args.processes or [None]
        if "images" in args.config:
            args.config.remove("images")
            show(pictures(f"{folder}/images", max(rates.values()), with_processes(args, count or 1), counts))
        for name in args.config:
            steps, *values = CONFIGS[name]
            c = dict(zip(FIELDS, values, strict=True)) | {"eps": 1e-6, "rope_theta": 10000.0}
            c["batch_size"] = args.batch_size or c["batch_size"]
            start = f"{folder}/{name}"
            first = count or (1 if args.device == "gpu" else math.gcd(c["batch_size"], args.threads))
            with running(maker=(Nanollm, {"c": c, "args": alone, "folder": None})) as ask:
                ask["maker"]("save", start)
            show(language_model(name, c, args.steps or steps, start, max(rates.values()), with_processes(args, first),
                                counts))
            show(generation(name, c, start, alone))
        if args.config:
            show(tokenisation(folder, args))


if __name__ == "__main__":
    main()
