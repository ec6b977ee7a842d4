"""A text, a tokenizer and a command line so small that a test trains in a fraction of a second."""
import contextlib
import csv
import functools
import io
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

import train
from autograd import ACTIVATIONS
from console import cli, metrics
from hardware import device, ranks
from hardware.device import to_host
from hardware.local import Local
from nanollm import Config, NanoLLM
from storage.files import InputError, file_hash
from storage.tokenizer_training import byte_bpe
from train import Adam

SENTENCES = ("the cat sat on the mat. ", "a dog ran to the cat! ", "the mat is red, ", "却说孙悟空一个筋斗云。",
             "who ran? \n", "no dog sat 👍 on it. ")
SHAPE = "--embedding-dim 16 --n-block 2 --n-head 2 --n-kv-head 1 --hidden-dim 24 --max-context 8".split()
QUICK = "--batch-size 2 --learning-rate 0.01 --log-every 3 --save-every 5 --sample-every 1000000".split()


def make_text(path, sentences=90, seed=0):
    """A file of about 1,500 tokens in which there is something to learn."""
    path.write_text("".join(random.Random(seed).choices(SENTENCES, k=sentences)), encoding="utf-8")
    return path


@functools.cache
def tokenizer_text(words, special):
    return byte_bpe(SENTENCES, words, special).to_str(pretty=True)


def make_tokenizer(path, words=290, special=()):
    """A byte-level BPE, so that a Chinese character is several tokens."""
    path.write_text(tokenizer_text(words, tuple(special)), encoding="utf-8")
    return path


def make_files(folder):
    """["--text", ..., "--tokenizer", ...]"""
    return ["--text", str(make_text(folder / "text.txt")),
            "--tokenizer", str(make_tokenizer(folder / "tokenizer.json"))]


def make_cheap(monkeypatch):
    """Leave out what is slow and not tested here: waiting for the disk, and drawing."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(metrics, "draw_loss", lambda folder: None)


def command(main, *argv, name="train.py"):
    """(exit code, stdout, stderr) of a command, run in this process."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    before = sys.argv, {number: signal.getsignal(number) for number in cli.SIGNALS}
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
        for number, handler in before[1].items():
            signal.signal(number, handler)


def run(*flags):
    """train.main with the tiny shape; flags given here win."""
    return train.main([*SHAPE, *QUICK, *(str(flag) for flag in flags)])


def rows(folder, without=()):
    """metrics.csv as a list of dicts of strings."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in without} for row in csv.DictReader(file)]


TIMINGS = "tokens_per_second", "images_per_second", "flops_per_second", "seconds"


def snapshot(folder):
    """{path: bytes} of all files below, and {path: None} of all folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def contents(folder):
    """Everything that must be equal in two equal runs: every byte except the timings."""
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


def with_sums(folder):
    """Renew the hashes of a checkpoint, so that only the reader of a file can notice what is wrong in it."""
    (folder / "SHA256SUMS").unlink()
    sums = [f"{file_hash(path)}  {path.name}\n" for path in folder.iterdir()]
    (folder / "SHA256SUMS").write_text("".join(sums))


def edit_trainer(folder, **changes):
    """Change what a checkpoint's trainer.json holds, and its hash."""
    path = folder / "trainer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with_sums(folder)


def set_gradients(model, seed):
    drawn = np.random.default_rng(seed).standard_normal(model.weights.flat.size, np.float32)
    model.weights.grad[...] = device.xp.asarray(drawn)


class Killed(BaseException):
    """Stands for kill -9: no `except Exception` sees it."""


def stop_at(patch, step, number=signal.SIGTERM):
    """Send this process a signal, or let it die of Killed, within that step."""
    before = Adam.step

    def with_signal(self, *args, **named):
        before(self, *args, **named)
        if self.t == step:
            if number is None:
                raise Killed
            os.kill(os.getpid(), number)
    patch.setattr(Adam, "step", with_signal)


GOOD = [*SHAPE, *QUICK, *"--text text.txt --tokenizer tokenizer.json --artifact-dir run".split()]


def check(outcome, *words, name="train.py"):
    code, out, err = outcome
    assert code == 2, err
    assert out == ""
    assert err.startswith(f"{name}: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert re.search(".*".join(words), err), err


def small(**changes):
    return Config(**{"vocab_size": 29, "embedding_dim": 24, "n_block": 2, "n_head": 4, "n_kv_head": 2,
                     "max_context": 16, "hidden_dim": 20, "eps": 1e-5} | changes)


def lively(config=None, seed=0, dtype=np.float32):
    """A model whose weights are large enough that every part of it shows in the logits; no norm weight is 1."""
    model, rng = NanoLLM(config or small(), dtype=dtype), np.random.default_rng(seed)
    weights = rng.standard_normal(model.weights.flat.size) * 0.4
    weights[model.weights.n_matrix:] += 1
    model.weights.flat[...] = device.xp.asarray(weights.astype(dtype))
    return model


def random_ids(config, *shape, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


def logits_of(model, ids):
    return to_host(model(ids).data)


def refused(call, *words):
    """call() raises InputError with one line that has all these words in it."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message and message.isprintable(), f"not one clean line: {message!r}"
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}", message), f"{word!r} is not named in: {message}"


def together(size, work, wrap=lambda team: team, n=0):
    """[work(team) for each rank], in threads of this process; the team is a Local, or `wrap` of one."""
    pipes = {rank: multiprocessing.Pipe() for rank in range(1, size)}
    shared = [bytearray(4 * n) for _ in range(1 + size)]
    teams = [Local(0, {rank: pipe[0] for rank, pipe in pipes.items()}, shared),
             *(Local(rank, {0: pipe[1]}, shared) for rank, pipe in pipes.items())] if pipes else [ranks.ALONE]
    results = [None] * size

    def run(rank):
        try:
            results[rank] = work(wrap(teams[rank]))
        finally:
            for pipe in teams[rank].pipes.values():
                pipe.close()            # after an error nobody waits for this rank
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# every pair of values occurs, though not every combination of three
every_shape = pytest.mark.parametrize("activation, n_kv_head, tied", [
    (activation, n_kv_head, i % 2 != j % 2)
    for i, activation in enumerate(ACTIVATIONS) for j, n_kv_head in enumerate((4, 2, 1))])


# ({field of Config: value}, model_type): every_shape's Llamas, then models of `small`'s size that have something else
LLAMA3 = {"rope_scaling": (8.0, 0.2, 2.0, 32), "rope_theta": 500.0}     # one pair of three stays, one is blended
every_model = pytest.mark.parametrize("fields, kind", [
    *(({"activation": name, "n_kv_head": n, "tie_embeddings": tied}, "llama") for name, n, tied in every_shape.args[1]),
    ({"head_dim": 10}, "llama"), ({"tie_embeddings": True, **LLAMA3}, "llama"),
    ({"n_head": 5, "n_kv_head": 5, "head_dim": 6}, "mistral"),
    ({"qkv_bias": True, "tie_embeddings": True}, "qwen2"), ({"qkv_bias": True, "n_kv_head": 1}, "qwen2"),
    ({"qk_norm": True, "head_dim": 10, "tie_embeddings": True}, "qwen3"), ({"qk_norm": True, **LLAMA3}, "qwen3")])


def edit_config(folder, *without, **values):
    path = folder / "config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in without}
    path.write_text(json.dumps(kept | values))
