"""A text, a tokenizer and a command line so small that a test trains in a fraction of a second."""

import contextlib
import csv
import io
import json
import os
import random
import signal
import sys
import warnings
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import train
from console import cli, metrics

SENTENCES = ("the cat sat on the mat. ", "a dog ran to the cat! ", "the mat is red, ", "却说孙悟空一个筋斗云。",
             "who ran? \n", "no dog sat 👍 on it. ")
SHAPE = "--embedding-dim 16 --n-block 2 --n-head 2 --n-kv-head 1 --hidden-dim 24 --max-context 8".split()
QUICK = "--batch-size 2 --learning-rate 0.01 --log-every 3 --save-every 5 --sample-every 1000000".split()


def make_text(path, sentences=90, seed=0):
    """A file of about 1,500 tokens in which there is something to learn."""
    path.write_text("".join(random.Random(seed).choices(SENTENCES, k=sentences)), encoding="utf-8")
    return path


def make_tokenizer(path, words=290, special=()):
    """A byte-level BPE, so that a Chinese character is several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=words, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(special)))
    bpe.save(str(path))
    return path


def make_files(folder):
    """["--text", ..., "--tokenizer", ...]"""
    return ["--text", str(make_text(folder / "text.txt")),
            "--tokenizer", str(make_tokenizer(folder / "tokenizer.json"))]


def make_cheap(monkeypatch):
    """Leave out what takes long and is none of a test's business: waiting for the disk, and drawing."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(metrics, "draw_loss", lambda folder: None)


def command(main, *argv, name="train.py"):
    """(exit code, stdout, stderr) of a command, run in this process."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    before = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [name]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            warnings.simplefilter("default")
            cli.run(lambda: main([str(word) for word in argv]))
    except SystemExit as end:
        out.flush()
        return end.code, out.buffer.getvalue().decode(), err.getvalue()
    finally:
        sys.argv = before[0]
        signal.signal(signal.SIGTERM, before[1])


def run(*flags):
    """train.main with the tiny shape; flags given here win."""
    return train.main([*SHAPE, *QUICK, *(str(flag) for flag in flags)])


def rows(folder, without=()):
    """metrics.csv as a list of dicts of strings."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in without} for row in csv.DictReader(file)]


TIMINGS = ("tokens_per_second", "flops_per_second", "seconds", "data_share", "forward_share", "backward_share",
           "optimizer_share")


def snapshot(folder):
    """{path: bytes} of all files below, and {path: None} of all folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def contents(folder):
    """All that must be the same of two runs: every byte but the timings."""
    found = snapshot(folder)
    found.pop("loss.png", None)
    found["metrics.csv"] = rows(folder, TIMINGS)
    for path in folder.rglob("trainer.json"):
        name = str(path.relative_to(folder))
        found[name] = json.loads(found[name])
        del found[name]["seconds"]
        del found[str(Path(name).with_name("SHA256SUMS"))]
    return found


def assert_same(a, b):
    a, b = contents(a), contents(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name], name
